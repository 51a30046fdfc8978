"""Baking: the same functions without the plugin, in place or as a graph, wherever a model is taken."""

from __future__ import annotations

import copy
import importlib
import math
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eafo_dynamic import load_merged, merge, save_merged
from eafo_dynamic.apply.merge import CorrectedCalls, MergedGraph
from eafo_dynamic.apply.standalone import CorrectedActivation
from eafo_dynamic.apply.surgery import hosted_sites, is_wrapped, wrap
from eafo_dynamic.errors import ConfigError, SiteError
from eafo_dynamic.find.sites import Selection, find_sites
from tests.zoo.awkward import MODELS, OneReluForAll, make_awkward

IN_PLACE = ("InPlace", "OneReluForAll", "SeveralOwners", "Gates", "OwnClasses", "TransformerLayers", "Experts")
GRAPHS = ("MixedCalls", "WrittenOut", "Recursive")
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*You are using torch.export", "ignore::torch.jit.TracerWarning"
)


def slow(name: str) -> object:
    """A model whose export takes several seconds."""
    return pytest.param(name, marks=pytest.mark.slow)


def unequal(model: nn.Module) -> None:
    """Gives every site a function of its own."""
    with torch.no_grad():
        for k, (host, site) in enumerate(hosted_sites(model)):
            getattr(host, site.keys[0]).fill_(0.3 - 0.07 * (k % 8))
            getattr(host, site.keys[1]).copy_(torch.tensor([0.1 * (k % 3), 1.0 + 0.05 * k]))


def wrapped_awkward(name: str, train: bool = False) -> tuple[nn.Module, Tensor]:
    model, run = make_awkward(name)
    wrap(model, find_sites(model, run=run))
    unequal(model)
    return model.train(train), torch.randn(getattr(model, "shape", (4, 8)), generator=torch.Generator().manual_seed(2))


def result(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return model(x.clone()).detach()


def assert_no_trace(model: nn.Module) -> None:
    """No generated class, no key, no attribute of the plugin; the amplitudes are not trained."""
    assert not is_wrapped(model)
    for module in model.modules():
        kind = type(module)
        if "<locals>" not in kind.__qualname__ and not kind.__module__.startswith("torch.fx"):
            found: object = importlib.import_module(kind.__module__)
            for part in kind.__qualname__.split("."):
                found = getattr(found, part)
            assert found is kind
        assert not any("eafo" in key for key in vars(module))
    assert not any("eafo" in key for key in model.state_dict())
    assert not any("eps" in name for name, _ in model.named_parameters())


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.relu, self.two = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)
        self.gelu, self.prelu, self.tanh = nn.GELU(), nn.PReLU(6), nn.Tanh()
        self.alias = self.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.tanh(self.prelu(self.two(self.gelu(self.relu(self.one(x))))))


def wrapped_plain(per_channel: bool = False) -> tuple[Plain, Tensor]:
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(5, 6)
    wrap(model, find_sites(model, x), per_channel=per_channel)
    for k, (host, site) in enumerate(hosted_sites(model)):
        nn.init.constant_(getattr(host, site.keys[0]), round(0.3 - 0.1 * k, 1))  # one of them zero
        getattr(host, site.keys[1]).copy_(torch.tensor([0.2 * k, 1.0 + k]))
    return model, x


class TestInPlace:
    @pytest.mark.parametrize("per_channel", [False, True])
    def test_modules_become_plain_modules(self, per_channel: bool) -> None:
        model, x = wrapped_plain(per_channel)
        expected = model(x)
        assert merge(model) is model
        assert torch.equal(model(x), expected)
        assert_no_trace(model)
        assert {type(m).__name__ for m in model.children()} == {"Linear", "CorrectedActivation", "Tanh"}
        assert [type(m) for m in (model.relu.base, model.prelu.base)] == [nn.ReLU, nn.PReLU]
        assert model.alias is model.gelu

    @pytest.mark.filterwarnings("ignore:EAFO. a call of act at awkward:UserWarning")  # without a row in the example
    @pytest.mark.parametrize("train", [False, True])
    @pytest.mark.parametrize("name", IN_PLACE)
    def test_merged_equals_wrapped_bit_for_bit(self, name: str, train: bool) -> None:
        model, x = wrapped_awkward(name, train)
        given = x.clone().requires_grad_()
        torch.manual_seed(3)
        out = model(given.clone())
        (expected_grad,) = torch.autograd.grad(out.square().sum(), given)
        assert merge(model) is model
        assert_no_trace(model)
        torch.manual_seed(3)
        again = model(given.clone())
        assert torch.equal(again, out)
        (grad,) = torch.autograd.grad(again.square().sum(), given)
        torch.testing.assert_close(grad, expected_grad, **ROUNDING)
        model.train(not train)
        model.train(train)
        assert torch.equal(result(model, x), out.detach())

    def test_merging_a_plain_model_does_nothing(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        before = list(model.modules())
        assert merge(model) is model
        assert list(model.modules()) == before

    def test_shared_module_with_one_correction_for_all_calls_is_one_function(self) -> None:
        model, run = make_awkward("OneReluForAll")
        wrap(model, find_sites(model, run=run), 0.2)
        expected = run(model)
        merge(model)
        assert torch.equal(run(model), expected)
        assert isinstance(model.relu, CorrectedActivation)
        assert list(model.state_dict()) == [*make_awkward("OneReluForAll")[0].state_dict(), "relu.eps", "relu.shape"]

    def test_a_call_that_was_left_alone_keeps_the_base(self) -> None:
        model, run = make_awkward("OneReluForAll")
        report = find_sites(model, run=run)
        object.__setattr__(report.sites[1], "wrapped", False)
        wrap(model, report, 0.2)
        expected = run(model)
        merge(model)
        assert isinstance(model.relu, CorrectedCalls)
        assert torch.equal(run(model), expected)

    def test_zero_corrections_leave_nothing_behind(self) -> None:
        model, run = make_awkward("MixedCalls")
        plain, _ = make_awkward("MixedCalls")
        wrap(model, find_sites(model, run=run), 0.0)
        assert merge(model) is model
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert torch.equal(run(model), run(plain))

    def test_hooks_and_other_references_to_an_activation_stay(self) -> None:
        model, x = wrapped_plain()
        seen: list[Tensor] = []
        model.gelu.register_forward_hook(lambda module, args, out: seen.append(out))
        held = model.gelu
        merge(model)
        model(x)
        assert held is model.gelu
        assert len(seen) == 1
        assert type(held.base) is nn.GELU

    def test_a_part_that_was_wrapped_on_its_own(self) -> None:
        part, x = wrapped_awkward("SeveralOwners")
        model = nn.Sequential(nn.Identity(), part)
        expected = result(model, x)
        merge(model)
        assert_no_trace(model)
        assert torch.equal(result(model, x), expected)

    def test_transformer_layers_agree_in_evaluation_and_training(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)  # its activation is F.relu
        x = torch.randn(2, 5, 8)
        wrap(layer, find_sites(layer, x), 0.3)
        layer.eval()
        with torch.no_grad():
            expected = layer(x)
            merge(layer)
            assert_no_trace(layer)
            assert torch.equal(layer(x), expected)  # not the fused kernel, which knows no correction
            torch.testing.assert_close(layer.train()(x), expected)


class TestCalls:
    def test_each_call_has_its_own_function(self) -> None:
        model, x = wrapped_awkward("OneReluForAll")
        merge(model)

        def f(z: Tensor, eps: float, mu: float, sigma: float) -> Tensor:
            u = (z - mu) / sigma
            return torch.clamp(z, min=0) + eps * sigma * u * torch.exp(-u * u / 2)

        h = f(model.one(x), 0.3, 0.0, 1.0)
        h = f(model.two(h), 0.23, 0.1, 1.05)
        torch.testing.assert_close(model(x), f(model.three(h), 0.16, 0.2, 1.1), **ROUNDING)

    def test_counts_survive_errors_and_interrupts(self) -> None:
        model, x = wrapped_awkward("OneReluForAll")
        merge(model)
        expected = result(model, x)
        for kind in (RuntimeError, KeyboardInterrupt):

            def fail(*_: object, kind: type[BaseException] = kind) -> None:
                raise kind

            handle = model.three.register_forward_pre_hook(fail)
            with pytest.raises(kind):
                model(x.clone())
            handle.remove()
            assert torch.equal(result(model, x), expected)

    def test_a_longer_loop_goes_on_with_the_last_function(self) -> None:
        class Loop(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.act, self.turns = nn.GELU(), 2

            def forward(self, x: Tensor) -> Tensor:
                for _ in range(self.turns):
                    x = self.act(x + 1)
                return x

        model, x = Loop(), torch.randn(9)
        wrap(model, find_sites(model, x))
        unequal(model)
        model.turns = 4
        expected = result(model, x)
        merge(model)
        assert torch.equal(result(model, x), expected)

    def test_a_module_that_calls_itself(self) -> None:
        class Tree(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.act = nn.Tanh()

            def forward(self, x: Tensor, depth: int = 2) -> Tensor:
                return self.act(x) if depth == 0 else x + self.act(self(x, depth - 1) + self(-x, depth - 1))

        model, x = Tree(), torch.randn(9)
        wrap(model, find_sites(model, x))
        unequal(model)
        expected = result(model, x)
        merge(model)
        assert isinstance(model.act, CorrectedCalls)
        assert len(model.act.functions) == 7
        assert torch.equal(result(model, x), expected)

    def test_a_copy_inside_the_forward_of_the_original(self) -> None:
        model, x = wrapped_awkward("OneReluForAll")
        merge(model)
        twin, expected = copy.deepcopy(model), result(model, x)
        seen: list[Tensor] = []

        def guide(module: nn.Module, args: tuple[Tensor]) -> None:
            seen.append(twin(x.clone()).detach())

        model.two.register_forward_pre_hook(guide)  # between the first call and the second
        assert torch.equal(result(model, x), expected)
        assert torch.equal(seen[0], expected)

    def test_threads_count_apart(self) -> None:
        model, x = wrapped_awkward("OneReluForAll")
        merge(model)
        expected = result(model, x)
        meet = threading.Barrier(2)

        def wait(module: nn.Module, args: object) -> None:
            meet.wait(20)

        model.two.register_forward_pre_hook(wait)
        outs: list[Tensor] = []
        threads = [threading.Thread(target=lambda: outs.append(model(x.clone()).detach())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outs) == 2
        assert all(torch.equal(out, expected) for out in outs)

    def test_a_call_that_nobody_counts_is_an_error(self) -> None:
        model, x = wrapped_awkward("OneReluForAll")
        merge(model)
        with pytest.raises(SiteError, match=r"relu has a function of its own for each call"):
            model.relu(x)


class TestElsewhere:
    """Copied, saved, traced, compiled and exported."""

    @pytest.mark.parametrize("name", ["OneReluForAll", "SeveralOwners", slow("MixedCalls")])
    def test_copies_and_pickles_compute_the_same(self, name: str) -> None:
        model, x = wrapped_awkward(name)
        merged = merge(model, x)
        expected = result(merged, x)
        for twin in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
            assert torch.equal(result(twin, x), expected)
            with torch.no_grad():
                next(twin.parameters()).mul_(2)
            assert not torch.equal(result(twin, x), expected)
            assert torch.equal(result(merged, x), expected)
            twin.load_state_dict(merged.state_dict())
            assert torch.equal(result(twin, x), expected)

    @pytest.mark.slow
    def test_a_changed_graph_pickles_with_its_changes(self) -> None:
        model, x = wrapped_awkward("MixedCalls")
        merged = merge(model, x).double()
        for buffer in merged.buffers():
            buffer.mul_(0.9)
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                pickle.loads(pickle.dumps(merged)).state_dict().values(), merged.state_dict().values(), strict=True
            )
        )

    @pytest.mark.parametrize("name", ["OneReluForAll", "SeveralOwners", slow("WrittenOut")])
    def test_compiles_as_one_graph_for_every_batch_size(self, name: str) -> None:
        model, x = wrapped_awkward(name)
        merged = merge(model, x)
        compiled = torch.compile(merged, fullgraph=True, backend="eager")
        for batch in (x, torch.cat([x, -x]), x):
            torch.testing.assert_close(result(compiled, batch), result(merged, batch), **ROUNDING)

    @pytest.mark.parametrize("name", ["OneReluForAll", "SeveralOwners", slow("ConvBlocks")])
    def test_torch_jit_traces(self, name: str) -> None:
        model, x = wrapped_awkward(name)
        merged = merge(model, x)
        traced = torch.jit.trace(merged, (x.clone(),))
        torch.testing.assert_close(result(traced, 2 * x), result(merged, 2 * x), **ROUNDING)

    @pytest.mark.parametrize("name", ["OneReluForAll", slow("MixedCalls"), slow("TransformerLayers")])
    def test_onnxruntime_computes_the_same(self, name: str, tmp_path: Path) -> None:
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        model, x = wrapped_awkward(name)
        expected = result(model, x)
        save_merged(merge(model, x), tmp_path / "model.onnx", x)
        session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.slow
    def test_fresh_processes_compute_the_same(self, tmp_path: Path) -> None:
        shared, x = wrapped_awkward("SeveralOwners")
        expected = result(shared, x)
        merge(shared)
        save_merged(shared, tmp_path / "modules.pt")
        save_merged(shared, tmp_path / "program.pt2", x)
        torch.save({"x": x, "expected": expected}, tmp_path / "data")
        shared.cpu()
        torch.save(shared, tmp_path / "whole")
        code = f"""
import sys, torch
data = torch.load({str(tmp_path / "data")!r})
program = torch.export.load({str(tmp_path / "program.pt2")!r}).module()
assert "eafo_dynamic" not in sys.modules
torch.testing.assert_close(program(data["x"]), data["expected"], rtol=1e-5, atol=2e-6)
from eafo_dynamic import load_merged
from tests.zoo.awkward import SeveralOwners
model = load_merged(SeveralOwners().eval(), {str(tmp_path / "modules.pt")!r})
assert torch.equal(model(data["x"]), data["expected"])
whole = torch.load({str(tmp_path / "whole")!r}, weights_only=False)
assert torch.equal(whole(data["x"]), data["expected"])
assert "lightning" not in sys.modules
"""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


class TestGraph:
    @pytest.mark.parametrize("name", ["WrittenOut", slow("MixedCalls"), slow("Recursive")])
    def test_graph_equals_the_wrapped_model(self, name: str) -> None:
        model, x = wrapped_awkward(name)
        merged = merge(model, x.clone())
        assert isinstance(merged, MergedGraph)
        assert_no_trace(merged)
        assert "eafo" not in merged.program.graph_module.code
        for batch in (x, torch.cat([x, -x, x])):
            torch.testing.assert_close(result(merged, batch), result(model, batch), **ROUNDING)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", sorted(set(MODELS) - set(GRAPHS) - set(IN_PLACE)))
    def test_every_other_hand_made_model(self, name: str) -> None:
        model, x = wrapped_awkward(name)
        expected = result(model, x)
        merged = merge(model, x.clone())
        assert_no_trace(merged)
        torch.testing.assert_close(result(merged, x), expected, **ROUNDING)

    def test_training_mode_has_a_graph_of_its_own(self) -> None:
        model, x = wrapped_awkward("ConvBlocks", train=True)
        model.dropout.p = 0.0
        twin = copy.deepcopy(model)
        merged = merge(model, x)
        torch.testing.assert_close(result(merged, x), result(twin, x), **ROUNDING)
        torch.testing.assert_close(merged.state_dict()["bn1.running_mean"], twin.bn1.running_mean)
        assert merged.train() is merged
        with pytest.raises(SiteError, match=r"merged in training mode and has no other. Call model.eval\(\)"):
            merged.eval()

    def test_keyword_arguments_of_the_example(self) -> None:
        class Masked(nn.Module):
            def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
                return F.silu(x) if mask is None else F.silu(x) * mask

        model, x, mask = Masked(), torch.randn(4, 8), torch.rand(4, 8)
        wrap(model, find_sites(model, x, mask=mask), 0.2)
        merged = merge(model, x, mask=mask)
        both = torch.cat([x, x]), torch.cat([mask, mask])
        torch.testing.assert_close(merged(both[0], mask=both[1]), model(both[0], mask=both[1]), **ROUNDING)

    def test_without_an_example_the_model_stays_as_it_is(self) -> None:
        model, x = wrapped_awkward("MixedCalls")
        expected = result(model, x)
        with pytest.raises(SiteError, match=r"^:relu#0, .* and \d+ more|: a function .* merge\(model, x\)"):
            merge(model)
        assert is_wrapped(model)
        assert torch.equal(result(model, x), expected)

    def test_what_torch_cannot_export_is_an_error_in_one_line(self) -> None:
        class Branches(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.relu(x) if x.sum() > 0 else F.relu(-x)

        model, x = Branches(), torch.ones(3)
        wrap(model, find_sites(model, x), 0.2)
        with pytest.raises(
            SiteError, match=r"torch.export cannot follow Branches \(.*self.act = nn.ReLU\(\)"
        ) as caught:
            merge(model, x)
        assert "\n" not in str(caught.value)
        assert is_wrapped(model)


class TestFiles:
    @pytest.mark.parametrize("ending", ["pt", "ckpt", "safetensors"])
    @pytest.mark.parametrize("name", ["OneReluForAll", "TransformerLayers", "OwnClasses"])
    def test_weights_come_back_into_a_plain_model(self, name: str, ending: str, tmp_path: Path) -> None:
        if ending == "safetensors":
            pytest.importorskip("safetensors")
        model, x = wrapped_awkward(name)
        expected = result(model, x)
        file = save_merged(merge(model), tmp_path / f"model.{ending}")
        fresh = type(model)().eval()
        assert load_merged(fresh, file) is fresh
        assert torch.equal(result(fresh, x), expected)
        assert fresh.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(result(load_merged(fresh, file), x), expected), "twice"

    def test_a_file_of_another_model_changes_nothing(self, tmp_path: Path) -> None:
        model, _ = wrapped_awkward("OneReluForAll")
        file = save_merged(merge(model), tmp_path / "model.pt")
        other = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        with pytest.raises(SiteError, match="of another model: this one has no 'relu'"):
            load_merged(other, file)
        bigger = OneReluForAll()
        bigger.four = nn.Linear(8, 8)
        with pytest.raises(SiteError, match=r"names of the weights differ \(four.bias, four.weight\)"):
            load_merged(bigger, file)
        assert type(bigger.relu) is nn.ReLU

    @pytest.mark.parametrize("name", ["absent.pt", "text.pt", "plain.pt", "text.safetensors"])
    def test_what_is_no_merged_model_is_said_in_one_line(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text("no model") if name.startswith("text") else None
        if name == "plain.pt":
            torch.save({"state_dict": {}}, tmp_path / name)
        with pytest.raises(SiteError, match=r"Write one with save_merged") as caught:
            load_merged(OneReluForAll(), tmp_path / name)
        assert "\n" not in str(caught.value)

    def test_formats_that_do_not_fit(self, tmp_path: Path) -> None:
        model, _ = wrapped_awkward("OneReluForAll")
        merge(model)
        with pytest.raises(ConfigError, match=r"End it in .pt, .ckpt, .safetensors, .pt2, .onnx"):
            save_merged(model, tmp_path / "model.h5")
        with pytest.raises(ConfigError, match="needs an example input"):
            save_merged(model, tmp_path / "model.pt2")
        graph = merge(*wrapped_awkward("MixedCalls"))
        with pytest.raises(ConfigError, match=r"end the name in \.pt2 or \.onnx"):
            save_merged(graph, tmp_path / "model.pt")
        assert list(tmp_path.iterdir()) == []


def test_a_selection_that_left_functions_alone_needs_no_example() -> None:
    model, run = make_awkward("ConvBlocks")
    wrap(model, find_sites(model, run=run, selection=Selection(functional="off")))
    unequal(model.eval())
    expected = run(model)
    assert merge(model) is model
    assert torch.equal(run(model), expected)
    assert math.isfinite(float(expected.detach().sum()))


class Written(nn.Module):
    """Calls its activation as a function, behind a layer whose channels lie in another place than its rank suggests."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.conv(x))


class OneForBoth(nn.Module):
    """One activation behind a Conv1d and behind a Linear, where its inputs have the same sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.act = nn.Conv1d(4, 4, 1), nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(self.act(self.conv(x))))


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3)), (2, 3, 9)),
    "conv1d, as long as wide": (lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.GELU()), (2, 3, 4)),
    "linear, channels last": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (2, 5, 6, 3)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(inplace=True)), (2, 3, 4, 4)),
    "one for both": (OneForBoth, (2, 4, 4)),
}


def merged_channels(layout: str, free: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    """A merged model with an amplitude for each channel, an input, and what the wrapped model made of it."""
    torch.manual_seed(0)
    make, shape = LAYOUTS[layout]
    model, x = make(), torch.randn(shape)
    wrap(model, find_sites(model, x), per_channel=True, free=free)
    vary_channels(model)
    expected = result(model, x)
    return merge(model), x, expected


def vary_channels(model: nn.Module) -> None:
    with torch.no_grad():
        for host, site in hosted_sites(model):
            for key in (site.keys[0], site.keys[3]):
                if getattr(host, key) is not None:
                    getattr(host, key).copy_(torch.linspace(-0.5, 0.7, 4))


class TestChannels:
    """One amplitude a channel, wherever the channels lie."""

    @pytest.mark.parametrize("free", [False, True])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_merged_equals_wrapped(self, layout: str, free: bool) -> None:
        model, x, expected = merged_channels(layout, free)
        assert_no_trace(model)
        assert torch.equal(result(model, x), expected)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(result(twin, x), expected)

    @pytest.mark.parametrize("layout", ["conv1d", "linear, channels last"])
    def test_scripts_traces_and_compiles_the_same(self, layout: str) -> None:
        model, x, expected = merged_channels(layout, free=True)
        for made in (
            torch.jit.script(model),
            torch.jit.trace(model, (x,)),
            torch.compile(model, fullgraph=True, backend="eager"),
        ):
            torch.testing.assert_close(result(made, x), expected, **ROUNDING)

    def test_a_graph_keeps_the_channels(self) -> None:
        torch.manual_seed(0)
        model, x = Written(), torch.randn(2, 3, 9)
        wrap(model, find_sites(model, x), per_channel=True)
        vary_channels(model)
        merged = merge(model, x)
        assert isinstance(merged, MergedGraph)
        torch.testing.assert_close(result(merged, x), result(model, x), **ROUNDING)

    def test_the_same_amplitudes_along_other_channels_are_another_function(self) -> None:
        model, _, _ = merged_channels("one for both")
        assert isinstance(model.act, CorrectedCalls)
        assert [each.channel_dim for each in model.act.functions] == [1, -1]

    def test_one_amplitude_for_all_channels_is_one_function(self) -> None:
        model, x = OneForBoth(), torch.randn(2, 4, 4)
        wrap(model, find_sites(model, x), 0.3)
        expected = result(model, x)
        merge(model)
        assert isinstance(model.act, CorrectedActivation)
        assert "channel_dim" not in repr(model)
        assert torch.equal(result(model, x), expected)

    def test_repr_says_where_the_channels_are(self) -> None:
        assert "channel_dim=1" in repr(merged_channels("conv1d")[0])

    @pytest.mark.parametrize("ending", ["pt", "safetensors"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_files_keep_the_channels(self, layout: str, ending: str, tmp_path: Path) -> None:
        if ending == "safetensors":
            pytest.importorskip("safetensors")
        model, x, expected = merged_channels(layout)
        file = save_merged(model, tmp_path / f"model.{ending}")
        fresh = load_merged(LAYOUTS[layout][0](), file)
        assert torch.equal(result(fresh, x), expected)
        for module in fresh.modules():
            if isinstance(module, CorrectedActivation):
                module.channel_dim = None
        assert torch.equal(result(load_merged(fresh, file), x), expected), "into one that is merged already"

    @pytest.mark.parametrize("layout", ["conv1d", "conv2d"])
    def test_a_file_that_does_not_say_loads_with_the_channels_by_the_rank(self, layout: str, tmp_path: Path) -> None:
        model, x, expected = merged_channels(layout)
        saved = torch.load(save_merged(model, tmp_path / "model.pt"), weights_only=True)
        for place in saved["merged"]:
            del place["channel_dims"]
        torch.save(saved, tmp_path / "old.pt")
        old = load_merged(LAYOUTS[layout][0](), tmp_path / "old.pt")
        assert old[1].channel_dim is None
        assert torch.equal(result(old, x), expected) == (layout == "conv2d")
        assert torch.equal(result(load_merged(model, tmp_path / "old.pt"), x), expected), "what a model knows stays"

    def test_a_pickle_that_does_not_say_loads(self) -> None:
        activation, z = CorrectedActivation(nn.ReLU(), 0.2), torch.randn(9)
        del activation.channel_dim
        twin = pickle.loads(pickle.dumps(activation))
        assert twin.channel_dim is None
        torch.testing.assert_close(torch.jit.script(twin)(z), twin(z), **ROUNDING)
