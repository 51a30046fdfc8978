"""Wrapping: bit-identity at eps = 0, corrections that act where they should, and an undo without a trace."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eafo_dynamic.apply.manifest import manifest, wrap_from_manifest
from eafo_dynamic.apply.site import Site
from eafo_dynamic.apply.surgery import disabled, hosted_sites, is_wrapped, unwrap, wrap
from eafo_dynamic.correction.kernels import correction, resolve_backend
from eafo_dynamic.density.collector import Collector
from eafo_dynamic.density.sample_moments import dead_fraction
from eafo_dynamic.errors import SiteError
from eafo_dynamic.find.sites import Selection, find_sites
from tests.zoo import awkward
from tests.zoo.awkward import MODELS, Layers, make_awkward
from tests.zoo.score import bit_differences

pytestmark = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad",  # reentrant checkpointing without gradient
    "ignore:While compiling, we found certain side effects",  # frames that were opened and closed
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # torch.compile, after a graph break
)


def wrapped_awkward(name: str, eps: float = 0.0) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    model, run = make_awkward(name)
    wrap(model, find_sites(model, run=run), eps)
    return model, run


def amplitudes(model: nn.Module) -> dict[str, nn.Parameter]:
    return {site.name: getattr(host, site.keys[0]) for host, site in hosted_sites(model)}


def set_amplitudes(model: nn.Module, start: float = 0.1, step: float = 0.05) -> None:
    for k, eps in enumerate(amplitudes(model).values()):
        nn.init.constant_(eps, start + step * k)


def gradients(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(2)
    model.zero_grad()
    out = run(model)
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(one: Any, two: Any, exact: bool = True) -> None:
    assert one[1].keys() == two[1].keys()
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {}
    torch.testing.assert_close(one[0], two[0], **tolerance)
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, two[1][name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_eps_zero_is_the_base_bit_for_bit_and_undo_leaves_no_trace(name: str, train: bool) -> None:
    model, run = make_awkward(name)
    assert bit_differences(model, run, train) == []


@pytest.mark.parametrize("name", MODELS)
def test_every_site_acts_and_disabled_switches_all_off(name: str) -> None:
    model, run = wrapped_awkward(name)
    model.train(name not in ("TransformerLayers", "ConvBlocks"))
    reference = run(model).detach()
    for site, eps in amplitudes(model).items():
        nn.init.constant_(eps, 0.4)
        assert not torch.equal(run(model), reference), f"{site} changes nothing"
        with disabled(model):
            assert torch.equal(run(model), reference)
        nn.init.zeros_(eps)
    assert torch.equal(run(model), reference)


def test_a_part_can_be_disabled_alone() -> None:
    model, x = nn.Sequential(make_awkward("OneReluForAll")[0], make_awkward("HelperFunctions")[0]), torch.randn(4, 8)
    wrap(model, find_sites(model, x), 0.3)
    expected, half = model(x), copy.deepcopy(model)
    unwrap(half[0])
    with disabled(model[0]), disabled(model[0]):
        torch.testing.assert_close(model(x), half(x), rtol=0.0, atol=0.0)
        with disabled(model):
            unwrap(half)
            torch.testing.assert_close(model(x), half(x), rtol=0.0, atol=0.0)
    assert torch.equal(model(x), expected)


def test_correction_acts_on_each_call_by_its_own_amplitude() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x) + 10 * self.act(x - 1) + 100 * F.relu(x + 1) + 1000 * x.mul(0.5).relu()

    model, x = Twice(), torch.randn(64)
    wrap(model, find_sites(model, x))
    set_amplitudes(model)
    assert list(amplitudes(model)) == ["act#0", "act#1", ":relu#0", ":relu#1"]
    expected = torch.zeros_like(x)
    for scale, z, eps in zip((1, 10, 100, 1000), (x, x - 1, x + 1, x * 0.5), (0.1, 0.15, 0.2, 0.25), strict=True):
        expected = expected + scale * (z.relu() + eps * z * torch.exp(-z * z / 2))
    torch.testing.assert_close(model(x), expected)


class TestIdentity:
    def test_objects_classes_names_and_keys_survive(self) -> None:
        model, run = make_awkward("MixedCalls")
        before = dict(model.named_modules())
        text, keys = repr(model), list(model.state_dict())
        wrap(model, find_sites(model, run=run))
        assert dict(model.named_modules()) == before
        assert isinstance(model, MODELS["MixedCalls"])
        assert isinstance(before["act"], nn.ReLU)
        assert type(before["act"]).__name__ == "ReLU"
        assert [key for key in model.state_dict() if "eafo_" not in key] == keys
        unwrap(model)
        assert repr(model) == text
        assert list(model.state_dict()) == keys
        assert all(type(module).__module__ != "abc" and "eafo" not in str(vars(module)) for module in model.modules())
        assert not is_wrapped(model)

    def test_wrapping_again_changes_nothing(self) -> None:
        model, run = make_awkward("MixedCalls")
        report = find_sites(model, run=run)
        first = wrap(model, report)
        set_amplitudes(model)
        values = {name: eps.item() for name, eps in amplitudes(model).items()}
        assert wrap(model, report) == first
        assert wrap(model, find_sites(model, run=run)) == hosted_sites(model)
        assert {name: eps.item() for name, eps in amplitudes(model).items()} == values

    def test_a_model_of_which_a_part_is_wrapped_gets_the_rest(self) -> None:
        model, run = make_awkward("MixedCalls")
        inner = model.get_submodule("inner")
        wrap(inner, find_sites(inner, torch.randn(4, 8)), 0.3)
        part = set(hosted_sites(inner))
        wrap(model, find_sites(model, run=run), 0.1)
        assert part < set(hosted_sites(model))
        assert sorted(round(eps.item(), 1) for eps in amplitudes(model).values()) == [0.1] * 6 + [0.3] * 3
        unwrap(model)
        plain, _ = make_awkward("MixedCalls")
        assert torch.equal(run(model), run(plain))

    def test_undo_restores_training_flags_and_the_fast_path(self) -> None:
        model, run = make_awkward("TransformerLayers")
        layer = model.get_submodule("by_name")
        before = vars(layer)["activation_relu_or_gelu"]
        wrap(model, find_sites(model, run=run), 0.2)
        assert layer.activation_relu_or_gelu == 0
        unwrap(model)
        assert vars(layer)["activation_relu_or_gelu"] == before == layer.activation_relu_or_gelu
        assert model.training

    def test_fast_path_of_eval_agrees_with_training(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        x = torch.randn(2, 5, 8)
        wrap(layer, find_sites(layer, x), 0.4)
        trained = layer(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), trained)
            with disabled(layer):
                assert not torch.allclose(layer(x), trained, atol=1e-3)


class TestCopies:
    def test_deepcopy_is_independent(self) -> None:
        model, run = wrapped_awkward("MixedCalls", 0.2)
        twin = copy.deepcopy(model)
        assert torch.equal(run(twin), run(model))
        set_amplitudes(twin, -0.4, 0.0)
        assert not torch.equal(run(twin), run(model))
        with disabled(twin):
            assert torch.equal(run(model), run(copy.deepcopy(model)))
        unwrap(twin)
        assert len(hosted_sites(model)) == 9

    @pytest.mark.parametrize("name", ["OneReluForAll", "InPlace", "TransformerLayers", "WrittenOut", "TiedBlocks"])
    def test_pickle(self, name: str) -> None:
        model, run = wrapped_awkward(name, 0.2)
        model.eval()
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(run(twin), run(model))
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        assert torch.equal(run(torch.load(stream, weights_only=False)), run(model))
        unwrap(twin)
        assert not is_wrapped(twin)

    def test_plain_checkpoints_load_strictly_and_back(self) -> None:
        model, run = wrapped_awkward("MixedCalls", 0.2)
        plain, _ = make_awkward("MixedCalls")
        for parameter in plain.parameters():
            nn.init.normal_(parameter)
        model.load_state_dict(plain.state_dict(), strict=True)
        assert all(eps.item() == pytest.approx(0.2) for eps in amplitudes(model).values())
        with disabled(model):
            assert torch.equal(run(model), run(plain))
        state = model.state_dict()
        unwrap(model)
        problem = plain.load_state_dict(state, strict=False)
        assert problem.missing_keys == []
        assert all("eafo_" in key for key in problem.unexpected_keys)
        model.load_state_dict(plain.state_dict(), strict=True)

    def test_half_a_set_of_corrections_is_an_error(self) -> None:
        model, _ = wrapped_awkward("OneReluForAll", 0.2)
        state = model.state_dict()
        del state["eafo_1_eps"]
        with pytest.raises(RuntimeError, match="eafo_1_eps"):
            model.load_state_dict(state)

    def test_safetensors(self, tmp_path: Any) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        model, run = wrapped_awkward("MixedCalls", 0.2)
        safetensors.save_model(model, str(tmp_path / "model.safetensors"))
        twin, _ = wrapped_awkward("MixedCalls")
        safetensors.load_model(twin, str(tmp_path / "model.safetensors"))
        assert torch.equal(run(twin), run(model))

    @pytest.mark.parametrize("name", ["MixedCalls", "WrittenOut", "TiedBlocks", "Checkpointed", "EveryFunction"])
    def test_manifest_wraps_the_same_sites_again(self, name: str) -> None:
        model, run = make_awkward(name)
        report = find_sites(model, run=run)
        wrap(model, report)
        set_amplitudes(model)
        stream = io.BytesIO()
        torch.save(manifest(report), stream)
        stream.seek(0)
        twin, _ = make_awkward(name)
        wrap_from_manifest(twin, torch.load(stream, weights_only=True))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(run(twin), run(model))
        assert list(amplitudes(twin)) == list(amplitudes(model))


class TestOtherNumbersOfCalls:
    def test_more_calls_than_discovered_use_the_last_site(self) -> None:
        model, run = wrapped_awkward("TiedBlocks", 0.0)
        nn.init.constant_(amplitudes(model)["block.act#5"], 0.3)
        plain, _ = make_awkward("TiedBlocks")
        model.depth = plain.depth = 2  # type: ignore[assignment]
        assert torch.equal(run(model), run(plain))
        model.depth = plain.depth = 4  # type: ignore[assignment]
        out = run(model)
        act = plain.get_submodule("block.act")
        calls = []

        def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            calls.append(1)
            (z,) = args
            c = correction(z, torch.tensor([0.3]), torch.tensor([0.0, 1.0]), site_table(model), 8.0)
            return output + c if len(calls) in (6, 8) else output  # the second call of the block, in its last turns

        act.register_forward_hook(replace)
        torch.testing.assert_close(out, run(plain))
        assert len(calls) == 8

    def test_skipped_blocks_do_not_shift_sites(self) -> None:
        class Droppable(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList([awkward.OneReluForAll() for _ in range(3)])
                self.skip: set[int] = set()

            def forward(self, x: Tensor) -> Tensor:
                for k, block in enumerate(self.blocks):
                    x = x if k in self.skip else block(x)
                return x

        model, x = Droppable(), torch.randn(4, 8)
        wrap(model, find_sites(model, x), 0.0)
        nn.init.constant_(amplitudes(model)["blocks.2.relu#1"], 0.3)
        block = copy.deepcopy(model.blocks[2])
        model.skip = {0, 1}
        assert torch.equal(model(x.clone()), block(x.clone()))
        model.skip = {2}
        with disabled(model):
            expected = model(x.clone())
        assert torch.equal(model(x.clone()), expected)


def site_table(model: nn.Module) -> Tensor | None:
    host, site = next((host, site) for host, site in hosted_sites(model) if site.name == "block.act#5")
    return getattr(host, site.keys[2])


class TestCheckpointing:
    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
    @pytest.mark.parametrize(
        "name", ["OneReluForAll", "TiedBlocks", "MixedCalls", "Recursive", "WrittenOut", "InPlace"]
    )
    def test_whole_forward(self, name: str, reentrant: bool) -> None:
        model, run = wrapped_awkward(name)
        set_amplitudes(model)
        assert_same_gradients(
            gradients(model, run),
            gradients(model, lambda m: run(lambda x: recomputed(m, x, reentrant))),  # type: ignore[arg-type, return-value]
        )

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
    def test_a_part_of_the_owners_forward(self, reentrant: bool) -> None:
        class Parted(Layers):
            def __init__(self) -> None:
                super().__init__()
                self.act, self.tied, self.recompute = nn.SiLU(), awkward.TiedFunctionalBlocks(), True

            def part(self, x: Tensor) -> Tensor:
                x = self.act(self.one(x)) * F.gelu(x)
                x = x * torch.sigmoid(1.702 * x)
                return F.gelu(self.tied(x))

            def forward(self, x: Tensor) -> Tensor:
                x = self.act(F.gelu(self.two(x)))
                for _ in range(2):
                    x = recomputed(self.part, x, reentrant) if self.recompute else self.part(x)
                return self.act(F.gelu(x)) + x

        torch.manual_seed(0)
        model, x = Parted(), torch.randn(4, 8)
        wrap(model, find_sites(model, x))
        set_amplitudes(model)
        with_recomputation = gradients(model, lambda m: m(x))
        model.recompute = False
        assert_same_gradients(gradients(model, lambda m: m(x)), with_recomputation, exact=False)

    def test_foreign_recomputation_of_a_shared_activation_is_an_error_and_never_silent(self) -> None:
        class Parted(Layers):
            def __init__(self) -> None:
                super().__init__()
                self.act = nn.ReLU()

            def forward(self, x: Tensor) -> Tensor:
                return self.act(Foreign.apply(lambda t: self.act(self.two(t)), self.act(self.one(x))))

        model, x = Parted(), torch.randn(4, 8)
        wrap(model, find_sites(model, x), 0.2)
        with pytest.raises(SiteError, match="Use torch"):
            model(x)

    def test_functions_inside_a_foreign_recomputation_are_left_alone_in_both_passes(self) -> None:
        class Parted(Layers):
            def forward(self, x: Tensor) -> Tensor:
                x = checkpoint(lambda t: F.relu(self.three(t)), x, use_reentrant=False)
                return F.relu(Foreign.apply(lambda t: F.relu(self.two(t)), F.relu(self.one(x))))

        model, x = Parted(), torch.randn(4, 8)
        report = find_sites(model, x)
        assert [(site.name, site.wrapped) for site in report.sites] == [(f":relu#{k}", k != 2) for k in range(4)]
        assert report.sites[2].reason == "inside Foreign, whose backward would not know of a correction"
        wrap(model, report, 0.2)

        def corrected(z: Tensor) -> Tensor:
            return z.relu() + 0.2 * z * torch.exp(-z * z / 2)

        def by_hand(model: nn.Module) -> Tensor:
            return corrected(model.two(corrected(model.one(corrected(model.three(x))))).relu())  # type: ignore[operator]

        with disabled(model):
            plain = model(x)
        found = gradients(model, lambda m: m(x))
        expected = gradients(model, by_hand)
        assert not torch.equal(found[0], plain)
        torch.testing.assert_close(found[0], expected[0])
        for name in ("one.weight", "three.weight"):
            torch.testing.assert_close(found[1][name], expected[1][name])
        assert {name for name in found[1] if "eafo" in name} == {f"eafo_{k}_eps" for k in range(3)}

    def test_samples_are_taken_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, run = wrapped_awkward("Checkpointed", 0.1)
        taken: list[Collector] = []
        monkeypatch.setattr(Collector, "observe", lambda self, z: taken.append(self))
        sites = [site for _, site in hosted_sites(model)]
        sites[0].switch.collecting = True
        run(model).sum().backward()
        assert len(taken) == len(sites) == len(set(map(id, taken)))


class Foreign(torch.autograd.Function):
    """Another library's way to recompute a part of a forward."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            out = ctx.function(x)
        return None, torch.autograd.grad(out, x, grads[0])[0]


def recomputed(function: Callable[..., Tensor], x: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(function, x.requires_grad_() if x.is_leaf else x, use_reentrant=reentrant)  # type: ignore[return-value]


class TestThreads:
    def test_threads_do_not_share_counts(self) -> None:
        model, _ = wrapped_awkward("MixedCalls")
        set_amplitudes(model)
        inputs = [torch.randn(4, 8) for _ in range(32)]
        expected = [model(x).detach() for x in inputs]
        barrier = threading.Barrier(4)

        def work(x: Tensor) -> Tensor:
            barrier.wait(10)
            return model(x).detach()

        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(a, b) for a, b in zip(pool.map(work, inputs), expected, strict=True))

    def test_two_models_in_threads_do_not_take_each_others_sites(self) -> None:
        names = ("MixedCalls", "TiedBlocks")
        pairs = []
        for k, name in enumerate(names):
            model, run = wrapped_awkward(name)
            set_amplitudes(model, 0.1 + 0.2 * k)
            pairs.append((model, run, gradients(model, run)))
        barrier = threading.Barrier(2)

        def work(k: int) -> None:
            model, run, expected = pairs[k]
            for _ in range(50):
                barrier.wait(10)
                model.zero_grad()
                out = run(model)
                out.square().sum().backward()
                found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
                assert_same_gradients((out.detach(), found), expected)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, (0, 1)))

    def test_replicas_of_data_parallel(self) -> None:
        model, run = wrapped_awkward("MixedCalls")
        set_amplitudes(model)
        # what torch.nn.parallel.replicate does on one device
        replicas = {id(m): m._replicate_for_data_parallel() for m in model.modules()}
        for module in model.modules():
            replica = replicas[id(module)]
            for name, child in module._modules.items():
                replica._modules[name] = replicas[id(child)]
            for name, parameter in module._parameters.items():
                setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
        assert torch.equal(run(replicas[id(model)]), run(model))

    def test_models_interleaved_and_inside_each_other(self) -> None:
        class Outer(Layers):
            def __init__(self, guest: nn.Module) -> None:
                super().__init__()
                self.act, self.guest = nn.ReLU(), [guest]

            def forward(self, x: Tensor) -> Tensor:
                h = self.act(F.relu(self.one(x)))
                h = h + self.guest[0](h)
                return self.act(F.relu(self.two(h)))

        guest, _ = wrapped_awkward("MixedCalls", 0.3)
        torch.manual_seed(0)
        model, x = Outer(nn.Identity()), torch.randn(4, 8)
        model.guest[0] = nn.Flatten()
        wrap(model, find_sites(model, x), 0.0)
        set_amplitudes(model)
        plain_guest = copy.deepcopy(guest)
        model.guest[0] = guest
        h = F.relu(model.one(x))
        full = model(x)
        assert torch.equal(guest(x), plain_guest(x))
        assert full.shape == h.shape
        assert all(len(known.all_sites()) == 2 for known in model.eafo_routes.values())  # type: ignore[operator, union-attr]


class TestTransforms:
    @pytest.mark.parametrize("name", ["MixedCalls", "TiedBlocks", "WrittenOut", "OwnClasses"])
    def test_functional_call_vmap_and_grad(self, name: str) -> None:
        model, _ = wrapped_awkward(name)
        set_amplitudes(model)
        parameters = {key: p.detach() for key, p in model.named_parameters()}
        x = torch.randn(5, 4, 8)

        def loss(values: dict[str, Tensor], batch: Tensor) -> Tensor:
            return torch.func.functional_call(model, values, (batch,)).square().sum()

        each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        for k in range(5):
            model.zero_grad()
            model(x[k]).square().sum().backward()
            for key, p in model.named_parameters():
                torch.testing.assert_close(each[key][k], p.grad if p.grad is not None else torch.zeros_like(p))

    @pytest.mark.parametrize("name", ["MixedCalls", "InPlace", "TransformerLayers"])
    def test_autocast_at_eps_zero_is_the_base(self, name: str) -> None:
        plain, run = make_awkward(name)
        model, _ = wrapped_awkward(name)
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(0)
            expected = run(plain)
            torch.manual_seed(0)
            found = run(model)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("name", ["MixedCalls", "OneReluForAll", "WrittenOut"])
    @pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
    def test_export(self, name: str, strict: bool) -> None:
        model, _ = wrapped_awkward(name, 0.2)
        x = torch.randn(4, 8)
        program = torch.export.export(model.eval(), (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), model(x))

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # of the exporter
    def test_onnx(self, tmp_path: Any) -> None:
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        model, _ = wrapped_awkward("MixedCalls", 0.2)
        x = torch.randn(4, 8)
        torch.onnx.export(model.eval(), (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        session = runtime.InferenceSession(tmp_path / "model.onnx")
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), model(x).detach(), rtol=1e-4, atol=1e-5)


def compiled_counts(model: nn.Module, run: Callable[[nn.Module], Any], fullgraph: bool) -> tuple[int, int, Tensor]:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    for _ in range(3):
        torch.manual_seed(0)
        out = run(compiled)
    return int(counters["stats"]["unique_graphs"]), sum(counters["graph_break"].values()), out


class TestCompile:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name", ["InPlace", "OneReluForAll", "MixedCalls", "WrittenOut", "Recursive", "TransformerLayers"]
    )
    def test_fullgraph_without_more_graphs_breaks_or_recompilations(self, name: str) -> None:
        plain, run = make_awkward(name)
        graphs, breaks, _ = compiled_counts(plain, run, fullgraph=True)
        model, _ = wrapped_awkward(name, 0.2)
        assert compiled_counts(model, run, fullgraph=True)[:2] == (graphs, breaks) == (1, 0)

    def test_compiled_model_computes_the_same(self) -> None:
        model, run = wrapped_awkward("MixedCalls")
        set_amplitudes(model)
        graphs, breaks, out = compiled_counts(model, run, fullgraph=True)
        torch.testing.assert_close(out, run(model))
        assert (graphs, breaks) == (1, 0)

    @pytest.mark.parametrize("shared", [False, True], ids=["own", "one for all"])
    def test_blocks_that_are_compiled_one_by_one_share_a_graph(self, shared: bool) -> None:
        class Block(Layers):
            def __init__(self, act: nn.Module) -> None:
                super().__init__()
                self.act = act

            def forward(self, x: Tensor) -> Tensor:
                return x + torch.tanh(self.two(F.relu(self.act(self.one(x)))))

        counts = []
        for wrapped in (False, True):
            torch.manual_seed(0)
            act, x = nn.GELU(), torch.randn(4, 8)
            model = nn.Sequential(*[Block(act if shared else nn.GELU()) for _ in range(12)])
            if wrapped:
                wrap(model, find_sites(model, x), 0.2)
                set_amplitudes(model, 0.1, 0.01)
            expected = model(x)
            torch._dynamo.reset()
            counters.clear()
            for block in model:
                block.compile(backend="eager", fullgraph=True)
            for _ in range(2):
                torch.testing.assert_close(model(x), expected)
            counts.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
        assert counts == [(2, 0), (2, 0)], "one for the input, which needs no gradient, and one for what blocks make"

    def test_graph_break_inside_an_owners_forward(self) -> None:
        class Broken(Layers):
            def forward(self, x: Tensor) -> Tensor:
                x = F.relu(self.one(x))
                torch._dynamo.graph_break()
                return F.relu(self.two(x)).tanh()

        model, x = Broken(), torch.randn(4, 8)
        wrap(model, find_sites(model, x), 0.3)
        _, _, out = compiled_counts(model, lambda m: m(x), fullgraph=False)
        torch.testing.assert_close(out, model(x))

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_graphs_that_run_under_the_owners_mode_are_corrected_once(self, backend: str) -> None:
        def squared(x: Tensor) -> Tensor:
            return F.relu(x).square() * torch.sigmoid(x)

        class Parts(Layers):
            def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
                super().__init__()
                self.part = part

            def forward(self, x: Tensor) -> Tensor:
                x = F.relu(self.one(x))
                torch._dynamo.graph_break()
                x = self.two(x)
                return torch.tanh(self.part(x * torch.sigmoid(1.702 * x)))

        torch._dynamo.reset()
        outs: list[Tensor] = []
        for part in (squared, torch.compile(squared, backend=backend, fullgraph=True)):
            torch.manual_seed(0)
            model, x = Parts(part), torch.randn(4, 8)
            wrap(model, find_sites(model, x), 0.3)
            outs.append(model(x))
        outs.append(torch.compile(model, backend=backend)(x))
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0])

    @pytest.mark.parametrize("spelling", ["F.relu_", "F.leaky_relu_", "torch.tanh_", "F.tanh", "F.hardswish"])
    def test_functions_hidden_from_the_compiler_are_corrected_and_said(self, spelling: str) -> None:
        home, name = spelling.split(".")
        function = getattr({"F": F, "torch": torch}[home], name)

        class InPlaceByName(Layers):
            def forward(self, x: Tensor) -> Tensor:
                return self.two(function(self.one(x)))

        class Whole(nn.Sequential):
            pass

        torch.manual_seed(0)
        model, x = Whole(nn.Linear(8, 8), nn.GELU(), InPlaceByName()), torch.randn(4, 8)
        wrap(model, find_sites(model, x), 0.3)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        expected = gradients(model, lambda m: m(x))
        with pytest.warns(UserWarning, match=f"2 is not compiled: torch.compile hides its {name.rstrip('_')} from"):
            found = gradients(model, lambda m: compiled(x))
        assert_same_gradients(found, expected, exact=False)

    @pytest.mark.parametrize(("inside_graph", "counts"), [(True, (1, 0)), (False, (2, 3))], ids=["flag", "no flag"])
    def test_checkpointing_in_a_compiled_region(self, inside_graph: bool, counts: tuple[int, int]) -> None:
        """Torch breaks at a side effect in a checkpointed part, as frames are, unless a flag of its own is set."""

        class Parted(Layers):
            def part(self, x: Tensor) -> Tensor:
                return F.gelu(self.one(x))

            def forward(self, x: Tensor) -> Tensor:
                return F.relu(self.two(x)) + checkpoint(self.part, x, use_reentrant=False)  # type: ignore[operator]

        torch.manual_seed(0)
        model, x = Parted(), torch.randn(4, 8)
        with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=inside_graph):
            assert compiled_counts(model, lambda m: m(x), fullgraph=True)[:2] == (1, 0)
            wrap(model, find_sites(model, x), 0.3)
            expected = gradients(model, lambda m: m(x))
            found = compiled_counts(model, lambda m: m(x), fullgraph=inside_graph)
            assert found[:2] == counts
            compiled = torch.compile(model, backend="aot_eager")
            assert_same_gradients(gradients(model, lambda m: compiled(x)), expected, exact=False)

    def test_reentrant_checkpointing_of_a_part_is_refused_where_it_would_be_wrong(self) -> None:
        class Parted(Layers):
            def part(self, x: Tensor) -> Tensor:
                return F.gelu(self.one(x))

            def forward(self, x: Tensor) -> Tensor:
                return F.relu(x) + checkpoint(self.part, x, use_reentrant=True)  # type: ignore[operator]

        model, x = Parted(), torch.randn(4, 8, requires_grad=True)
        wrap(model, find_sites(model, x), 0.3)
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"SiteError: the model: torch.compile cannot follow.*use_reentrant=False"):
            torch.compile(model, backend="aot_eager")(x)


class ChannelsInBothPlaces(nn.Module):
    """A block as in ConvNeXt: channels behind the batch, then last, then behind the batch again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.wide, self.narrow, self.line = nn.Linear(6, 12), nn.Linear(12, 6), nn.Conv1d(6, 5, 1)
        self.last = nn.Conv1d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        x = self.narrow(F.gelu(self.wide(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.last(torch.tanh(self.line(x.flatten(2))))


class TestChannels:
    def test_places_are_known_by_the_layer_before(self) -> None:
        model, x = ChannelsInBothPlaces(), torch.randn(2, 3, 8, 8)
        report = find_sites(model, x)
        assert {site.base: site.channel_dim for site in report.wrapped} == {"relu": 1, "gelu": -1, "tanh": 1}
        wrap(model, report, per_channel=True)
        assert {name: eps.numel() for name, eps in amplitudes(model).items()} == {"act": 6, ":gelu": 12, ":tanh": 5}

    def test_one_amplitude_acts_on_one_channel(self) -> None:
        model, x = ChannelsInBothPlaces(), torch.randn(2, 3, 8, 8)
        wrap(model, find_sites(model, x), 0.0, per_channel=True)
        eps = amplitudes(model)[":gelu"]
        seen: list[Tensor] = []
        model.narrow.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        model(x)
        with torch.no_grad():
            eps[7] = 0.4
        model(x)
        changed = (seen[0] != seen[1]).any(0).any(0).any(0)
        assert changed.nonzero().flatten().tolist() == [7]

    def test_dead_units_are_channels(self) -> None:
        model, x = ChannelsInBothPlaces(), torch.randn(8, 3, 8, 8)
        nn.init.constant_(model.wide.bias[:9], -100.0)
        hosted = wrap(model, find_sites(model, x), 0.0)
        hosted[0][1].switch.collecting = True
        model(x)
        gelu = next(site for _, site in hosted if site.name == ":gelu")
        dead = {site.name: dead_fraction(*site.collector.drain()) for _, site in hosted}
        assert dead[":gelu"] == pytest.approx(9 / 12)
        assert copy.deepcopy(gelu).collector.channel_dim == -1


class Placed(nn.Module):
    """An activation behind a batch norm, whose sums show in the last bit how its gradient lies in memory."""

    def __init__(self, act: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.before, self.after = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            act,
            before,
            after,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.act(self.before(self.norm(self.conv(x)))))


DENSE = {
    "expanded": lambda t: t.mean((2, 3)),
    "permuted": lambda t: t.permute(0, 2, 3, 1) @ torch.ones(8, 4, dtype=t.dtype),
    "sliced": lambda t: t[:, :, ::2],
    "used twice": lambda t: torch.cat([t, t * t.mean((2, 3), keepdim=True)], 1),
}
GAPS = {"slice": lambda t: t[:, :, ::2], "transposed": lambda t: t.mT}
OUT_OF_PLACE = (
    *(nn.ReLU(), nn.SiLU(), nn.ELU(), nn.ReLU6(), nn.LeakyReLU(0.1), nn.Hardswish(), nn.Mish(), nn.SELU(), nn.GELU()),
    *(nn.Tanh(), nn.PReLU(8), nn.Softsign(), nn.Hardshrink(), nn.GELU("tanh"), nn.Softplus(), nn.LogSigmoid()),
)
IN_PLACE = (
    nn.ReLU(True),
    nn.SiLU(True),
    nn.ELU(1.0, True),
    nn.ReLU6(True),
    nn.LeakyReLU(0.1, True),
    nn.CELU(1.0, True),
)


class TestPlacesInMemory:
    """At eps = 0 gradients come in torch's own order of memory: what sums them next depends on it."""

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
    @pytest.mark.parametrize("act", [*OUT_OF_PLACE, *IN_PLACE], ids=str)
    def test_of_gradients(self, act: nn.Module, layout: torch.memory_format) -> None:
        torch.manual_seed(0)
        x = torch.randn(3, 3, 9, 9).to(memory_format=layout)
        for name, after in DENSE.items():
            model = Placed(copy.deepcopy(act), lambda t: t, after).to(memory_format=layout)  # type: ignore[call-overload]
            assert bit_differences(model, lambda m: m(x.clone()), True) == [], name

    @pytest.mark.parametrize("act", OUT_OF_PLACE, ids=str)
    def test_of_what_is_activated(self, act: nn.Module) -> None:
        torch.manual_seed(0)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = torch.randn(3, 3, 9, 9, dtype=dtype)
            for (gap, before), (name, after) in itertools.product(GAPS.items(), DENSE.items()):
                model = Placed(copy.deepcopy(act), before, after).to(dtype)
                assert bit_differences(model, lambda m, x=x: m(x.clone()), True) == [], (dtype, gap, name)


class TestFunctionMode:
    def test_is_off_inside_children_and_when_nothing_is_to_be_done(self) -> None:
        seen: list[int] = []

        class Child(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                seen.append(torch._C._len_torch_function_stack())
                return x

        class Parent(Layers):
            def __init__(self) -> None:
                super().__init__()
                self.child = Child()

            def forward(self, x: Tensor) -> Tensor:
                seen.append(torch._C._len_torch_function_stack())
                return self.child(F.relu(self.one(x)))

        model, x = Parent(), torch.randn(4, 8)
        wrap(model, find_sites(model, x), 0.1)
        seen.clear()
        model(x)
        assert seen == [1, 0]
        for eps in amplitudes(model).values():
            nn.init.zeros_(eps).requires_grad_(False)
        seen.clear()
        model(x)
        assert seen == [0, 0]

    def test_other_modes_and_exceptions_are_left_in_order(self) -> None:
        class Failing(Layers):
            def forward(self, x: Tensor) -> Tensor:
                x = F.relu(self.one(x))
                if x.shape[0] == 3:
                    raise KeyError("no")
                return x

        model = Failing()
        wrap(model, find_sites(model, torch.randn(4, 8)), 0.1)
        with torch.device("cpu"):
            depth = torch._C._len_torch_function_stack()
            with pytest.raises(KeyError):
                model(torch.randn(3, 8))
            assert torch._C._len_torch_function_stack() == depth
        reference = model(torch.ones(4, 8))
        assert torch.equal(model(torch.ones(4, 8)), reference)


def test_gates_are_wrapped_when_asked_for() -> None:
    model, run = make_awkward("Gates")
    report = find_sites(model, run=run, selection=Selection(target_modules=["sigmoid", "Hardsigmoid"]))
    assert {site.base for site in report.wrapped} == {"sigmoid", "hardsigmoid"}
    wrap(model, report, 0.0)
    reference = run(model).detach()
    for eps in amplitudes(model).values():
        nn.init.constant_(eps, 0.3)
        assert not torch.equal(run(model), reference)
        nn.init.zeros_(eps)


def test_device_of_a_site_is_that_of_its_surroundings() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).to("meta")
    wrap(model)
    assert all(eps.is_meta for eps in amplitudes(model).values())


def test_repr_shows_live_state() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    wrap(model, eps_init=0.25)
    assert (
        repr(model[1]) == f"ReLU(inplace=True, eps=+0.2500, mu=+0.000, sigma=1.000, backend={resolve_backend('auto')})"
    )


def test_site_is_idle_only_where_it_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    ((host, site),) = wrap(model, eps_init=0.0)
    assert isinstance(site, Site)
    assert not site.idle(host)  # eps needs its gradient
    with torch.no_grad():
        assert site.idle(host)
        host.get_parameter(site.keys[0]).fill_(0.1)
        assert not site.idle(host)
    site.enabled = False
    assert site.idle(host)
    site.switch.collecting = True
    assert not site.idle(host)
