"""Models that do what one should not, or may do and rarely does: found, corrected and undone all the same."""

from __future__ import annotations

import abc
import copy
import pickle
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from eafo_dynamic.apply.merge import merge
from eafo_dynamic.apply.surgery import disabled, hosted_sites, is_wrapped, unwrap, wrap
from eafo_dynamic.errors import SiteError
from eafo_dynamic.find.sites import SiteReport, find_sites
from tests.zoo.awkward import Layers
from tests.zoo.score import bit_differences, score_coverage
from tests.zoo.truth import witness

Run = Callable[[nn.Module], Any]


def example() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def forward(model: nn.Module) -> Any:
    return model(example().to(next(model.parameters()).dtype))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_every_call_has_a_site_that_acts_and_learns(model: nn.Module, run: Run = forward) -> list[str]:
    """The witness sees a site at every kernel; each site changes the output, and its gradient is the difference's."""
    score = score_coverage("", model, run)
    assert (score.missed, score.false_positives, score.problems) == ([], [], [])
    assert score.own == score.hidden
    for train in (False, True):
        assert bit_differences(model, run, train) == []
    hosted = wrap(model, find_sites(model, run=run), 0.0)
    amplitudes = {site.name: getattr(host, site.keys[0]) for host, site in hosted}
    reference = run(model).detach()
    for name, eps in amplitudes.items():
        nn.init.constant_(eps, 0.4)
        assert not torch.equal(run(model), reference), name
        nn.init.constant_(eps, 0.1)
    model.double()
    run(model).sum().backward()
    for name, eps in amplitudes.items():
        around = []
        for value in (0.1001, 0.0999):
            nn.init.constant_(eps, value)
            around.append(run(model).sum().item())
        nn.init.constant_(eps, 0.1)
        assert eps.grad is not None, name
        assert eps.grad.item() == pytest.approx((around[0] - around[1]) / 2e-4, rel=1e-3, abs=1e-5), name
    with torch.no_grad():
        torch.testing.assert_close(run(model), run(copy.deepcopy(model).eval()))
    unwrap(model)
    return list(amplitudes)


def reasons(report: SiteReport) -> dict[str, str]:
    return {site.name: site.reason for site in report.sites if site.reason}


class Relu(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.one(x))


class TestHowAForwardIsReached:
    def test_by_a_direct_call(self) -> None:
        class Direct(Layers):
            def __init__(self) -> None:
                super().__init__()
                self.act, self.block, self.child = nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), Relu()

            def forward(self, x: Tensor) -> Tensor:
                h = self.act.forward(self.one(x)) + self.block.forward(x)
                return F.relu(self.child.forward(F.relu(h)))

        names = assert_every_call_has_a_site_that_acts_and_learns(Direct())
        assert names == ["act", "block.1", ":relu#0", "child:relu", ":relu#1"]

    def test_by_a_static_method_or_a_built_in_function(self) -> None:
        class Swish(nn.Module):
            @staticmethod
            def forward(x: Tensor) -> Tensor:
                return x * torch.sigmoid(x)

        class Tanh(nn.Module):
            forward = torch.tanh  # type: ignore[assignment]

        class Halves(nn.Module):
            @staticmethod
            def forward(x: Tensor) -> Tensor:
                return torch.cat([F.relu(x[:, :4]), F.gelu(x[:, 4:])], -1)

        layers = [nn.Linear(8, 8) for _ in range(4)]
        model = nn.Sequential(layers[0], Swish(), layers[1], Halves(), layers[2], Tanh(), layers[3])
        assert assert_every_call_has_a_site_that_acts_and_learns(model) == ["1", "3:relu", "3:gelu", "5"]

    def test_with_more_than_the_pre_activation(self) -> None:
        class Scaled(nn.Module):
            def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
                return F.relu(x) * scale

        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.act, self.other = nn.GELU(), nn.SiLU()

            def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
                return self.act(x) if gate is None else self.other(x) * gate

        class Model(Layers):
            def __init__(self) -> None:
                super().__init__()
                self.scaled, self.gated, self.plain = Scaled(), Gated(), Scaled()

            def forward(self, x: Tensor) -> Tensor:
                h = self.scaled(self.scaled(self.one(x)), scale=0.5)
                return self.gated(self.two(h)) + self.gated(self.plain(h), gate=self.three(x))

        names = assert_every_call_has_a_site_that_acts_and_learns(Model())
        assert names == ["scaled:relu#0", "scaled:relu#1", "gated.act", "plain", "gated.other"]

    def test_hooks_that_call_activations_belong_to_the_caller(self) -> None:
        class Hooked(Layers):
            def forward(self, x: Tensor) -> Tensor:
                return self.two(torch.tanh(self.one(x)))

        model = Hooked()
        model.one.register_forward_hook(lambda module, args, out: F.relu(out))
        model.two.register_forward_pre_hook(lambda module, args: (F.silu(args[0]),))
        assert assert_every_call_has_a_site_that_acts_and_learns(model) == [":relu", ":tanh", ":silu"]

    def test_in_threads_of_its_own(self) -> None:
        class Threads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.parts = nn.ModuleList(Relu() for _ in range(4))

            def forward(self, x: Tensor) -> Tensor:
                with ThreadPoolExecutor(4) as pool:
                    return F.relu(sum(pool.map(lambda part: part(x), self.parts)))  # type: ignore[arg-type]

        model = Threads()
        report = find_sites(model, example())
        assert sorted(site.name for site in report.wrapped) == [":relu", *(f"parts.{k}:relu" for k in range(4))]
        hosted = wrap(model, report, 0.3)
        forward(model).sum().backward()
        assert all(getattr(host, site.keys[0]).grad is not None for host, site in hosted)

    def test_by_vmap_inside(self) -> None:
        class Mapped(Layers):
            def forward(self, x: Tensor) -> Tensor:
                return torch.vmap(lambda row: F.relu(self.two(torch.tanh(self.one(row)))))(x)

        assert assert_every_call_has_a_site_that_acts_and_learns(Mapped()) == [":tanh", ":relu"]

    def test_by_a_copy_that_the_forward_makes(self) -> None:
        class Copies(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.part = Relu()

            def forward(self, x: Tensor) -> Tensor:
                return copy.deepcopy(self.part)(x) + self.part(2 * x)

        assert assert_every_call_has_a_site_that_acts_and_learns(Copies()) == ["part:relu#0", "part:relu#1"]

    def test_by_a_compiled_part_that_the_dry_run_does_not_compile(self) -> None:
        class Compiled(Layers):
            def __init__(self) -> None:
                super().__init__()
                self.part = torch.compile(Relu(), backend=self.never)

            def never(self, graph: Any, inputs: Any) -> Any:
                raise AssertionError("compiled")

            def forward(self, x: Tensor) -> Tensor:
                return self.part(x)

        assert [site.name for site in find_sites(Compiled(), example()).wrapped] == ["part._orig_mod:relu"]

    def test_outside_any_forward(self) -> None:
        class Halves(Layers):
            def __init__(self) -> None:
                super().__init__()
                self.act = nn.GELU()

            def encode(self, x: Tensor) -> Tensor:
                return self.act(F.relu(self.act(self.one(x))))

        model = Halves()
        report = find_sites(model, run=lambda m: m.encode(example()))  # type: ignore[operator]
        assert [site.name for site in report.wrapped] == ["act"], "one site for all its calls"
        assert "outside any forward" in reasons(report)[":relu"]
        wrap(model, report, 0.3)
        with disabled(model):
            plain = model.encode(example())
        assert not torch.equal(model.encode(example()), plain)

    def test_that_differentiates(self) -> None:
        class Force(Layers):
            def __init__(self) -> None:
                super().__init__()
                self.act = nn.SiLU()

            def forward(self, x: Tensor) -> Tensor:
                energy = torch.tanh(self.act(self.one(x.requires_grad_()))).sum()
                return torch.autograd.grad(energy, x, create_graph=True)[0]

        model = Force()
        report = find_sites(model, example())
        assert [site.name for site in report.wrapped] == ["act", ":tanh"]
        assert all(p.grad is None for p in model.parameters())
        hosted = wrap(model, report, 0.2)
        forward(model).square().sum().backward()
        assert all(getattr(host, site.keys[0]).grad != 0 for host, site in hosted)


class TestWhatTheExampleDoesNotReach:
    def test_experts_without_a_token_get_the_sites_of_their_like(self) -> None:
        class Expert(Layers):
            def forward(self, x: Tensor) -> Tensor:
                return self.two(F.silu(self.one(x)))

        class Experts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.experts, self.chosen = nn.ModuleList(Expert() for _ in range(4)), [0, 1]

            def forward(self, x: Tensor) -> Tensor:
                x = F.silu(x)
                for k in self.chosen:
                    x = self.experts[k](x)
                return x

        model = Experts()
        report = find_sites(model, example())
        assert reasons(report) == {
            f"experts.{k}:silu": "not reached by the example input; as in experts.0" for k in (2, 3)
        }
        wrap(model, report, 0.3)
        model.chosen = [3, 2]
        with torch.no_grad():
            events = [(each.module, each.sites) for each in witness(model, forward) if each.hidden]
        assert events == [("", [":silu"]), ("experts.3", ["experts.3:silu"]), ("experts.2", ["experts.2:silu"])]

    def test_dropped_layers_count_their_repeated_calls(self) -> None:
        class Block(Layers):
            def __init__(self, act: nn.Module) -> None:
                super().__init__()
                self.act = act

            def forward(self, x: Tensor) -> Tensor:
                return self.act(self.two(self.act(self.one(x))))

        class Dropped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                act = nn.GELU()
                self.tied = nn.ModuleList(Block(act) for _ in range(3))
                self.own, self.depth = nn.ModuleList(Block(nn.SiLU()) for _ in range(3)), 2

            def forward(self, x: Tensor) -> Tensor:
                for block in (*self.tied[: self.depth], *self.own[: self.depth]):
                    x = block(x)
                return x

        model = Dropped()
        wrap(model, find_sites(model, example()), 0.3)
        model.depth = 3
        with torch.no_grad():
            sites = [each.sites for each in witness(model, forward)]
        assert sites == [[f"{kind}.{k}.act#{call}"] for kind in ("tied", "own") for k in range(3) for call in (0, 1)]

    def test_an_unreached_child_keeps_its_functions_to_itself(self) -> None:
        class Exit(Layers):
            def __init__(self) -> None:
                super().__init__()
                self.late, self.early = nn.ModuleDict({"part": Relu()}), True

            def forward(self, x: Tensor) -> Tensor:
                x = F.relu(self.two(x))
                return x if self.early else self.late["part"](x)

        model = Exit()
        hosted = wrap(model, find_sites(model, example()), 1e-30)
        model.early = False
        assert [site.name for _, site in hosted] == [":relu"]
        with torch.no_grad():
            assert [each.sites for each in witness(model, forward)] == [[":relu"], []]


class TestWhatCannotBeCorrected:
    def test_parts_of_an_autograd_function(self) -> None:
        class Swish(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, z: Tensor) -> Tensor:
                ctx.save_for_backward(z)
                return z * torch.sigmoid(z)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                s = ctx.saved_tensors[0].sigmoid()
                return grads[0] * s * (1 + ctx.saved_tensors[0] * (1 - s))

        class Uses(Layers):
            def forward(self, x: Tensor) -> Tensor:
                x = self.two(x * torch.sigmoid(x))
                return F.relu(Swish.apply(self.one(x)))  # type: ignore[arg-type]

        model = Uses()
        report = find_sites(model, example())
        assert [(site.base, site.wrapped) for site in report.sites if site.kind == "written"] == [
            ("silu", True),
            ("silu", False),
        ]
        hosted = wrap(model, report, 0.2)
        forward(model).sum().backward()
        assert all(getattr(host, site.keys[0]).grad is not None for host, site in hosted)
        assert bit_differences(Uses(), forward, True) == []

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    def test_scripted_functions_operators_and_branches_are_listed(self) -> None:
        @torch.jit.script
        def scripted(x: Tensor) -> Tensor:
            return torch.relu(x)

        class Opaque(Layers):
            def forward(self, x: Tensor) -> Tensor:
                x = scripted(self.one(x)) + torch.ops.aten.silu(self.two(x))
                return torch.cond(x.sum() > 0, F.relu, torch.tanh, (x,))

        report = find_sites(Opaque(), example())
        found = {site.name: (site.kind, site.wrapped) for site in report.sites}
        assert found == dict.fromkeys((":relu", ":silu", ":cond"), ("opaque", False))
        assert "scripted or C++ code" in reasons(report)[":relu"]
        assert "branch in Python" in reasons(report)[":cond"]
        with pytest.raises(SiteError, match="scripted or C"):
            wrap(Opaque(), report)

    def test_quantisers_are_no_activations(self) -> None:
        class Round(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return (4 * x).round() / 4

        class Sign(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.sign()

        model = nn.Sequential(nn.Linear(8, 8), Round(), nn.Linear(8, 8), Sign(), nn.ReLU())
        assert [site.name for site in find_sites(model, example()).sites] == ["4"]

    def test_a_trace_by_fx_is_refused_and_not_made_without_corrections(self) -> None:
        model = Relu()
        wrap(model, find_sites(model, example()), 0.3)
        with pytest.raises(SiteError, match=r"the model: torch\.fx.*merge\(model, example_input\)"):
            torch.fx.symbolic_trace(model)
        unwrap(model)
        assert torch.equal(torch.fx.symbolic_trace(model)(example()), forward(model))

    @pytest.mark.filterwarnings("ignore:EAFO. .*act is called outside the forward:UserWarning")  # by torch.fx itself
    @pytest.mark.parametrize("inside", [False, True])
    def test_nor_is_one_of_calls_that_an_owner_counts(self, inside: bool) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.act = nn.Linear(8, 8), nn.GELU()

            def forward(self, x: Tensor) -> Tensor:
                return self.act(self.one(self.act(self.one(x))))

        model = nn.Sequential(Twice(), nn.SiLU()) if inside else Twice()
        wrap(model, find_sites(model, example()), 0.3)
        with pytest.raises(SiteError, match=r"torch\.fx traces the plain activations only"):
            torch.fx.symbolic_trace(model)
        for host, site in hosted_sites(model):
            nn.init.zeros_(getattr(host, site.keys[0])).requires_grad_(False)
        assert torch.equal(torch.fx.symbolic_trace(model)(example()), forward(model))

    def test_modules_that_are_called_once_keep_their_corrections_in_a_trace(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        wrap(model, find_sites(model, example()), 0.3)
        assert torch.equal(torch.fx.symbolic_trace(model)(example()), forward(model))


class Registered(nn.Module):
    """Keeps a register of its subclasses, and wants an argument of each."""

    register: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, tag: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        Registered.register[tag] = cls


class Meta(abc.ABCMeta):
    """Counts the classes that are made by it."""

    made = 0

    def __init__(cls, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        Meta.made += 1


class TestClasses:
    def test_registers_of_subclasses_do_not_see_the_generated_ones(self) -> None:
        class Swish(Registered, tag="swish"):
            def forward(self, x: Tensor) -> Tensor:
                return x * torch.sigmoid(x)

        class Net(Registered, tag="net"):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.act = nn.Linear(8, 8), Swish()

            def forward(self, x: Tensor) -> Tensor:
                return self.act(F.relu(self.layer(x)))

        assert assert_every_call_has_a_site_that_acts_and_learns(Net()) == [":relu", "act"]
        assert Registered.register == {"swish": Swish, "net": Net}

    def test_metaclasses_do_not_see_the_generated_ones(self) -> None:
        class Net(Relu, metaclass=Meta):
            pass

        made = Meta.made
        assert assert_every_call_has_a_site_that_acts_and_learns(Net()) == [":relu"]
        assert Meta.made == made

    def test_lazy_modules_are_searched_before_they_know_their_sizes(self) -> None:
        model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3), nn.Tanh())
        report = find_sites(model, example())
        assert all(nn.parameter.is_lazy(p) for p in model.parameters())
        hosted = wrap(model, report, 0.2)
        forward(model).sum().backward()
        assert [type(model[0]), type(model[2])] == [nn.Linear, nn.Linear]
        assert all(getattr(host, site.keys[0]).grad is not None for host, site in hosted)

    def test_parametrizations_can_be_removed_while_wrapped(self) -> None:
        """As vocoders do with weight norm before they are used."""

        class Vocoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = weight_norm(nn.Conv1d(8, 8, 1)), Own()
                parametrize.register_parametrization(self.two, "weight", Symmetric())

            def forward(self, x: Tensor) -> Tensor:
                return self.two(F.leaky_relu(self.one(x.unsqueeze(-1)).squeeze(-1), 0.1))

        model = Vocoder()
        kinds = [type(each) for each in model.modules()]
        wrap(model, find_sites(model, example()), 0.2)
        found = forward(model)
        unwrap(model)
        assert [type(each) for each in model.modules()] == kinds
        wrap(model, find_sites(model, example()), 0.2)
        parametrize.remove_parametrizations(model.one, "weight")
        parametrize.remove_parametrizations(model.two, "weight")
        torch.testing.assert_close(forward(model), found)
        unwrap(model)
        assert [type(model.one), type(model.two)] == [nn.Conv1d, Own]
        assert forward(model).shape == (4, 8)

    def test_parametrizations_that_come_while_wrapped_stay(self) -> None:
        model = Own()
        wrap(model, find_sites(model, example()), 0.2)
        parametrize.register_parametrization(model, "weight", Symmetric())
        with disabled(model):
            plain = forward(model)
        unwrap(model)
        assert not is_wrapped(model)
        assert torch.equal(forward(model), plain)
        parametrize.remove_parametrizations(model, "weight")
        assert type(model) is Own

    def test_the_search_leaves_the_example_as_it_is(self) -> None:
        x = example()
        find_sites(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)), x)
        assert torch.equal(x, example())


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.weight)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def test_recursion_reaches_as_deep_as_two_thirds_of_the_plain_model() -> None:
    class Recursive(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.depth = nn.Tanh(), 3

        def forward(self, x: Tensor, depth: int = 0) -> Tensor:
            x = F.relu(self.act(self.one(x)))
            return x if depth >= self.depth else self(x, depth + 1)

    def deepest(model: Recursive) -> int:
        for depth in range(10, 1000, 10):
            model.depth = depth
            try:
                forward(model)
            except RecursionError:
                break
        return depth

    model = Recursive()
    plain = deepest(model)
    model.depth = 3
    wrap(model, find_sites(model, example()), 0.1)
    assert deepest(model) >= 2 * plain / 3
    assert len(hosted_sites(model)) == 8


def test_the_end_of_the_stack_is_a_recursion_error_wherever_it_is_met() -> None:
    model = nn.Sequential(nn.ReLU())
    wrap(model, find_sites(model, example()), 0.1)

    def deeper(model: nn.Module, left: int) -> object:
        return forward(model) if left == 0 else deeper(model, left - 1)

    met = 0
    for depth in range(sys.getrecursionlimit() - 300, sys.getrecursionlimit()):
        try:
            deeper(model, depth)
        except RecursionError:
            met += 1
    assert met > 20


class TestGraphsOfFx:
    """A GraphModule has a class of its own, into which it writes its code."""

    def graph(self) -> tuple[Any, Tensor]:
        class Net(Layers):
            def __init__(self) -> None:
                super().__init__()
                self.act = nn.ReLU()

            def forward(self, x):  # torch cannot pickle a graph with annotations that are strings
                return self.two(F.gelu(self.act(self.one(x)))) + torch.relu(x)

        graph = torch.fx.symbolic_trace(Net())
        report = find_sites(graph, example())
        assert [site.name for site in report.wrapped] == ["act", ":gelu", ":relu"]
        for k, (host, site) in enumerate(wrap(graph, report)):
            nn.init.constant_(getattr(host, site.keys[0]), 0.1 * (k + 1))
        return graph, forward(graph)

    @pytest.mark.parametrize("how", ["copy", "pickle", "recompile", "new graph", "save"])
    def test_it_stays_wrapped(self, how: str, tmp_path: Path) -> None:
        graph, expected = self.graph()
        other = graph
        if how == "copy":
            other = copy.deepcopy(graph)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(graph))
        elif how == "recompile":
            graph.recompile()
        elif how == "new graph":
            graph.graph = copy.deepcopy(graph.graph)
        else:
            torch.save(graph, tmp_path / "graph.pt")
            other = torch.load(tmp_path / "graph.pt", weights_only=False)
        assert torch.equal(forward(other), expected)
        assert [site.name for _, site in hosted_sites(other)] == [":gelu", ":relu", "act"]
        assert list(other.state_dict()) == list(graph.state_dict())
        if other is not graph:
            nn.init.constant_(getattr(*[(host, site.keys[0]) for host, site in hosted_sites(other)][1]), 0.0)
            assert not torch.equal(forward(other), expected)
        unwrap(other)
        assert not is_wrapped(other)
        other.recompile()
        forward(other)

    def test_code_that_changes_is_corrected_as_it_then_is(self) -> None:
        graph, expected = self.graph()
        output = next(node for node in graph.graph.nodes if node.op == "output")
        with graph.graph.inserting_before(output):
            output.args = (graph.graph.call_function(torch.neg, output.args),)
        graph.recompile()
        assert torch.equal(forward(graph), -expected)


class TestAForwardThatSomebodyReplaced:
    """As accelerate does for mixed precision: the bound method of the wrapped class stays on the instance."""

    class Net(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.gelu(self.act(self.one(x))))

    def wrapped(self) -> tuple[nn.Module, Tensor, Tensor]:
        model = self.Net()
        plain = forward(model)
        wrap(model, find_sites(model, example()), 0.3)
        for module in (model, model.act):
            own: Any = module.forward
            vars(module)["forward"] = types.MethodType(lambda *args, own=own.__func__: own(*args), module)
        return model, plain, forward(model)

    def test_unwrap(self) -> None:
        model, plain, corrected = self.wrapped()
        assert not torch.equal(plain, corrected)
        unwrap(model)
        assert torch.equal(forward(model), plain)

    def test_merge(self) -> None:
        model, _, corrected = self.wrapped()
        merged = merge(model, example())
        torch.testing.assert_close(forward(merged), corrected)
        unwrap(model)
        forward(model)

    def test_merge_in_place(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        wrap(model, find_sites(model, example()), 0.3)
        for module in (model, model[1]):
            own: Any = module.forward
            vars(module)["forward"] = types.MethodType(lambda *args, own=own.__func__: own(*args), module)
        corrected = forward(model)
        assert torch.equal(forward(merge(model)), corrected)


class TestLazyModules:
    def test_a_lazy_model_is_searched_and_wrapped_before_its_first_forward(self) -> None:
        class Lazy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.norm, self.act, self.two = (
                    nn.LazyLinear(8),
                    nn.LazyBatchNorm1d(),
                    nn.ReLU(),
                    Layers().two,
                )

            def forward(self, x: Tensor) -> Tensor:
                return self.two(F.gelu(self.norm(self.act(self.one(x)))))

        model = Lazy()
        hosted = wrap(model, find_sites(model, example()), 0.3)
        assert model.one.has_uninitialized_params(), "the search has a copy"
        forward(model).sum().backward()
        assert type(model.one) is nn.Linear
        assert [(site.name, getattr(host, site.keys[0]).grad is not None) for host, site in hosted] == [
            ("act", True),
            (":gelu", True),
        ]

    def test_one_that_changes_its_class_is_refused_until_it_is_initialised(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.empty(0))

            def forward(self, x: Tensor) -> Tensor:
                return F.relu(x @ self.weight)

        class LazyBlock(nn.modules.lazy.LazyModuleMixin, Block):
            cls_to_become = Block  # type: ignore[assignment]

            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.UninitializedParameter()

            def initialize_parameters(self, x: Tensor) -> None:
                if self.has_uninitialized_params():
                    self.weight.materialize((x.shape[-1], 4))
                    nn.init.ones_(self.weight)

        model = nn.Sequential(LazyBlock(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
        report = find_sites(model, example())
        with pytest.raises(SiteError, match=r"^0 is a lazy module .* Run the model once, model\(x\)"):
            wrap(model, report)
        assert not is_wrapped(model)
        forward(model)
        assert [site.name for _, site in wrap(model, report)] == ["0:relu", "2"]
