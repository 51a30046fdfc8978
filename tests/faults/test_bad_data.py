"""Whatever a batch holds: a run that succeeds without the plugin succeeds with it, and no correction is poisoned."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from eafo_dynamic import CorrectedActivation, EAFOCallback
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.records import CorrectionLog
from tests.faults.bad_inputs import (
    FLOATS,
    INPUTS,
    MODELS,
    SIZES,
    Called,
    assert_same,
    assert_same_kind,
    attempt,
    normal,
    parts,
    some,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of",
    "ignore:Sparse",
    "ignore:.*quantize_per_tensor",
    "ignore:.*quantization",
    "ignore:.*sparse",
    "ignore:EAFO corrects .*, since target_modules names it",
)


def assert_sound(model: nn.Module) -> None:
    for key, value in model.state_dict().items():
        if "eafo_" in key:
            assert value.isfinite().all(), key


@pytest.mark.parametrize("name", INPUTS)
def test_a_call_comes_to_what_it_comes_to_without_the_plugin(name: str, tally: Callable[..., None]) -> None:
    """Same numbers at eps = 0, same kind of result at any eps, same exception where the plain activation raises."""
    make, tried = INPUTS[name], 0
    z = make()
    differentiable = isinstance(z, Tensor) and (z.is_floating_point() or z.is_complex())
    for label, build in MODELS.items():
        for eps, grad, train in [(0.0, False, True), (0.0, True, True), (0.1, False, False), (0.1, True, True)]:
            if grad and not differentiable:
                continue
            torch.manual_seed(0)
            plain, model = build(), build()
            controller = EAFOController.attach(
                model, normal(4, 4), policy="entropy", eps_init=eps, update_every_n_steps=1, target_modules=[".*"]
            )
            expected, found = attempt(plain, make, grad), attempt(model.train(train), make, grad)
            where = f"{label}, eps={eps}, grad={grad}: {expected!r} became {found!r}"
            if isinstance(expected, Exception) or isinstance(found, Exception):
                assert type(found) is type(expected), where
            else:
                same = assert_same if eps == 0.0 else assert_same_kind
                same(found[0], expected[0])
                for one, two in zip(found[1], expected[1], strict=True):
                    same(one, two)
            controller.step(1)
            assert_sound(model)
            controller.collecting = False
            assert model(normal(64)).isfinite().all()
            tried += 1
    tally("bad inputs tried")
    tally("calls with them", tried)


SITUATIONS = {
    "policy": [("static", {}), ("learned", {}), ("hybrid", {}), ("frozen", {})],
    "density": [("learned", {"density": "histogram"}), ("entropy", {"density": "histogram"})],
    "backend": [("learned", {"backend": "eager"}), ("entropy", {"backend": "eager"})],
    "rollback": [("learned", {"rollback_factor": 1.5})],
}


@pytest.mark.parametrize(
    ("policy", "options"), [case for cases in SITUATIONS.values() for case in cases], ids=lambda v: str(v) or "default"
)
def test_no_policy_density_or_back_end_lets_poison_through(policy: str, options: dict[str, Any]) -> None:
    """Good and bad batches by turns, an update after each; the optimiser steps where the loss is finite."""
    torch.manual_seed(0)
    model = Called(nn.GELU())
    controller = EAFOController.attach(model, policy=policy, update_every_n_steps=1, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    step = 0
    for make in [*FLOATS.values(), *SIZES.values(), INPUTS["float64 beyond float32"], INPUTS["float16 NaN"]]:
        for batch in (make(), normal(64)):
            optimizer.zero_grad()
            out = model(batch)
            if out.requires_grad and out.numel() and out.isfinite().all():
                out.square().mean().clamp(max=10.0).backward()
            controller.observe_loss(out.sum())
            controller.before_optimizer_step(step)
            optimizer.step()
            step += 1
            (row,) = controller.step(step)
            assert_sound(model)
            assert all(math.isfinite(row[column]) for column in ("eps", "mu", "sigma")), row
    assert step == 2 * (len(FLOATS) + len(SIZES) + 2)


EVENTS = {
    "some NaN": "non-finite samples left out",
    "all NaN": "non-finite samples left out; no samples",
    "some inf": "non-finite samples left out",
    "all -inf": "non-finite samples left out; no samples",
    "one finite among NaN": "non-finite samples left out; no spread",
    "nested, NaN": "non-finite samples left out",
    "zeros": "no spread",
    "constant": "no spread",
    "one element": "no spread",
    "0-dim": "no spread",
    "empty batch": "no samples",
    "no features": "no samples",
    "nested without parts": "no samples",
    "meta": "no samples",
    "int64": "left alone: int64 tensor; no samples",
    "complex64": "left alone: complex64 tensor; no samples",
    "float8": "left alone: float8_e4m3fn tensor; no samples",
    "sparse COO": "left alone: sparse_coo tensor; no samples",
    "sparse CSR": "left alone: sparse_csr tensor; no samples",
    "mkldnn": "left alone: mkldnn tensor; no samples",
    "masked": "left alone: MaskedTensor; no samples",
    "wrapper subclass": "left alone: TwoTensor; no samples",
    "list": "left alone: list; no samples",
    "normal": None,
    "nested": None,
    "jagged": None,
    "float64": None,
    "bfloat16": None,
    "float64 beyond float32": "no spread",
}


@pytest.mark.parametrize("name", EVENTS)
def test_the_log_says_what_happened(name: str) -> None:
    controller = EAFOController.attach(Called(nn.ReLU()), update_every_n_steps=1)
    attempt(controller.model, INPUTS[name], False)
    (row,) = controller.step(1)
    assert row["event"] == EVENTS[name]
    controller.model(normal(512))
    (row,) = controller.step(2)
    assert row["event"] in (None, "bounded"), "and it says it once"
    assert row["n"] == 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("density", ["gaussian", "histogram"])
def test_nan_that_the_loss_masks_out_stay_where_they_are(dtype: torch.dtype, backend: str, density: str) -> None:
    """Gradients of eps and of everything else see the finite pre-activations alone."""
    model = Called(nn.ReLU())
    controller = EAFOController.attach(model, eps_init=0.2, density=density, backend=backend)
    controller.collecting = False
    amplitudes = list(controller.amplitudes.values())
    grads = []
    for z in (some(math.nan), some(math.nan)[some(math.nan).isfinite()]):
        for amplitude in amplitudes:
            amplitude.grad = None
        scale = torch.ones((), dtype=dtype, requires_grad=True)
        out = model(z.to(dtype) if grads else z.to(dtype).requires_grad_())
        known = out.isfinite()
        torch.where(known, out * scale, torch.zeros((), dtype=dtype)).sum().backward(inputs=amplitudes)
        grads.append([torch.zeros(()) if each.grad is None else each.grad.clone() for each in amplitudes])
    assert all(grad.item() != 0.0 for grad in grads[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_overwritten_input_is_noticed_as_torch_notices_it(eps: float, backend: str, dtype: torch.dtype) -> None:
    model = Called(nn.ReLU(inplace=True))
    EAFOController.attach(model, eps_init=eps, backend=backend)
    z = torch.ones(4, dtype=dtype, requires_grad=True) * 2.0
    kept = z * z
    with torch.no_grad():
        model(z)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


class TestRagged:
    """Nested tensors, which nn.TransformerEncoder makes of padded batches in eval by itself."""

    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    def test_padded_batches_are_evaluated_with_the_corrections_they_were_trained_with(self, activation: str) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True, dropout=0.0)
        encoder, x = nn.TransformerEncoder(layer, 2), torch.randn(3, 5, 16)
        plain = copy.deepcopy(encoder).eval()
        padding = torch.arange(5) >= torch.tensor([[5], [3], [1]])
        controller = EAFOController.attach(encoder, x, eps_init=0.3)
        controller.collecting = False
        trained = encoder(x, src_key_padding_mask=padding).detach()
        with torch.no_grad():
            evaluated = encoder.eval()(x, src_key_padding_mask=padding)
            without = plain(x, src_key_padding_mask=padding)
        torch.testing.assert_close(evaluated[~padding], trained[~padding], rtol=0, atol=1e-5)
        assert (evaluated - without)[~padding].abs().max() > 0.01

    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
    @pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
    @pytest.mark.parametrize("density", ["gaussian", "histogram"])
    def test_each_part_gets_what_it_would_get_alone(self, layout: torch.layout, inplace: bool, density: str) -> None:
        model = Called(nn.ReLU(inplace=inplace))
        EAFOController.attach(model, eps_init=0.3, density=density).collecting = False
        leaves = [part.requires_grad_() for part in parts()]
        nested = model(torch.nested.as_nested_tensor(leaves, layout=layout) * 1.0)
        torch.cat([part.flatten() for part in nested.unbind()]).square().sum().backward()
        for leaf, part in zip(leaves, nested.unbind(), strict=True):
            alone = leaf.detach().clone().requires_grad_()
            out = model(alone * 1.0)
            out.square().sum().backward()
            torch.testing.assert_close(part.detach(), out.detach())
            torch.testing.assert_close(leaf.grad, alone.grad)

    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
    def test_all_values_are_sampled_by_channel(self, layout: torch.layout) -> None:
        controller = EAFOController.attach(Called(nn.ReLU()), update_every_n_steps=1, eps_init=0.0)
        batch = [torch.randn(9, 4) * 0.1 + torch.tensor([1.0, -1.0, 1.0, -1.0]) for _ in range(3)]
        controller.model(torch.nested.as_nested_tensor(batch, layout=layout))
        (row,) = controller.step(1)
        assert row["n"] == 3 * 9 * 4
        assert row["dead_fraction"] == 0.5
        assert row["mean"] == pytest.approx(torch.cat(batch).mean().item(), abs=1e-6)

    def test_amplitudes_a_channel(self) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        controller = EAFOController.attach(model, torch.randn(2, 3), per_channel=True)
        controller.collecting = False
        for amplitude in controller.amplitudes.values():
            nn.init.uniform_(amplitude, -0.3, 0.3)
        batch = [torch.randn(2, 3), torch.randn(5, 3)]
        for part, alone in zip(model(torch.nested.nested_tensor(batch)).unbind(), map(model, batch), strict=True):
            torch.testing.assert_close(part, alone)


def test_amplitudes_a_channel_meet_another_number_of_channels() -> None:
    """A plain ReLU takes any; the corrected one takes the mean amplitude then."""
    model = Called(nn.ReLU())
    controller = EAFOController.attach(model, torch.randn(2, 4), per_channel=True)
    controller.collecting = False
    with torch.no_grad():
        for amplitude, values in zip(
            controller.amplitudes.values(), ([0.1, 0.2, 0.3, 0.4], [0.0, 0.1, 0.1, 0.2]), strict=True
        ):
            amplitude.copy_(torch.tensor(values))
    for z in (normal(5, 3), normal(7), torch.tensor(0.4), normal(2, 3, 5, 5), torch.empty(0, 6)):
        torch.testing.assert_close(model(z), F.relu(z) + (0.25 * z + 0.1) * torch.exp(-z * z / 2))


def test_the_example_of_the_dry_run_may_be_what_cannot_be_corrected() -> None:
    class TwoActs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counter, self.act, self.layer = nn.ReLU(), nn.ReLU(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            counts = self.counter(x.long())
            return self.act(self.layer(x)) + counts

    model = TwoActs()
    controller = EAFOController.attach(model, normal(2, 4), update_every_n_steps=1)
    (odd,) = [site for site in controller.report.sites if site.module == "counter"]
    assert odd.reason == "the example calls it with what cannot be corrected: int64 tensor"
    model(normal(64, 4))
    rows = {row["site"]: row["event"] for row in controller.step(1)}
    assert rows == {"act": None, "counter": "left alone: int64 tensor; no samples"}


def test_a_shared_activation_counts_the_calls_that_can_be_corrected() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.layer = nn.ReLU(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            counts = self.act(x.long())
            return self.act(self.layer(self.act(x))) + counts

    model = Shared()
    controller = EAFOController.attach(model, normal(2, 4), update_every_n_steps=1, eps_init=0.0)
    assert [site.name for site in controller.sites] == ["act#0", "act#1"]
    x = normal(64, 4) + 3.0
    model(x)
    means = {row["site"]: row["mean"] for row in controller.step(1)}
    assert means["act#0"] == pytest.approx(x.mean().item(), abs=1e-5)
    assert means["act#1"] == pytest.approx(model.layer(x.relu()).mean().item(), abs=1e-5)


def test_a_corrected_activation_alone_takes_what_its_base_takes() -> None:
    for name in ("int64", "sparse COO", "mkldnn", "empty batch", "0-dim", "jagged", "nested", "masked", "list"):
        for base in (nn.ReLU(), nn.Tanh()):
            expected = attempt(base, INPUTS[name], False)
            found = attempt(CorrectedActivation(base, eps=0.0), INPUTS[name], False)
            if isinstance(expected, Exception):
                assert type(found) is type(expected)
            else:
                assert not isinstance(found, Exception), f"{name}: {found!r}"
                assert_same(found[0].detach(), expected[0])


class Net(LightningModule):
    """Sums over whatever rows a batch has, and leaves out what is not finite, as careful users do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = self.body(batch.float()).square().sum()
        return loss if batch.numel() and loss.isfinite() else None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


BATCHES = {
    "good": normal(16, 4),
    "NaN": torch.full((16, 4), math.nan),
    "inf": torch.full((16, 4), math.inf),
    "a NaN": torch.cat([normal(15, 4), torch.full((1, 4), math.nan)]),
    "empty": torch.empty(0, 4),
    "constant": torch.ones(16, 4),
    "integer": torch.arange(64).view(16, 4),
    "one row": normal(1, 4),
    "huge": normal(16, 4) * 1e30,
    "half": normal(16, 4).half(),
}


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`", "ignore:Trying to infer the `batch_size`")
@pytest.mark.parametrize("first", BATCHES)
def test_a_trainer_goes_through_bad_batches_as_it_does_without(
    first: str, tmp_path: Path, tally: Callable[..., None]
) -> None:
    """Same weights to the bit as the plain run at eps = 0; finite ones with corrections that learn."""
    order = [BATCHES[first], *BATCHES.values(), *BATCHES.values()]
    results = []
    for callbacks in (
        [],
        [EAFOCallback(policy="frozen", eps_init=0.0, update_every_n_steps=1, verbose=False, dirpath=tmp_path / "zero")],
        [EAFOCallback(policy="hybrid", update_every_n_steps=1, verbose=False, dirpath=tmp_path / "log")],
    ):
        torch.manual_seed(0)
        net = Net()
        Trainer(
            max_epochs=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        ).fit(net, DataLoader(order, batch_size=None))  # pyright: ignore[reportArgumentType]
        results.append({key: value for key, value in net.state_dict().items() if "eafo_" not in key})
        assert_sound(net)
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key
        assert results[2][key].isfinite().all()
    events = " ".join(str(row["event"]) for row in CorrectionLog.load(tmp_path / "log").rows)
    assert "non-finite samples left out" in events
    tally("bad batches trained on", 3 * len(order))
