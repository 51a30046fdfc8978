"""Every precision that Lightning has: activations keep their dtype, amplitudes theirs, and training its course."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tally import Tally
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import EAFOCallback, wrap
from eafo_dynamic.records import CorrectionLog

pytestmark = pytest.mark.filterwarnings(
    "ignore:You passed .Trainer.accelerator='cpu', precision='16-mixed'",  # Lightning: it runs bf16-mixed instead
    "ignore:The dirpath has changed",
    "ignore:Checkpoint directory",
    "ignore:bf16 is supported for historical reasons",
    "ignore:.*lr_scheduler.step.*:UserWarning",
)
PRECISIONS = ["32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true"]
BASES = [partial(nn.ReLU, inplace=True), nn.GELU, nn.SiLU, partial(nn.LeakyReLU, 0.1), nn.Tanh, nn.ELU]


class Net(LightningModule):
    """One activation of each family, a functional one and a convolution; writes down what dtypes come out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 4, 3, padding=1)
        self.body = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), base()) for base in BASES)
        self.head = nn.Linear(32, 3)
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.stem(x.unsqueeze(1)))
        outputs = [hidden]
        for block in self.body:
            outputs.append(block(outputs[-1]))
        if self._trainer is not None and self.trainer.training:
            self.dtypes += [output.dtype for output in outputs]
        return self.head(outputs[-1].flatten(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)  # Adam's 1e-8 is 0 in fp16


def loader(dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x.to(dtype), x[:, :3].argmax(1)), 16)


def fit(folder: Path, net: LightningModule, *callbacks: Any, ckpt: str | None = None, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    trainer = Trainer(
        default_root_dir=str(folder),
        callbacks=list(callbacks),
        enable_checkpointing=checkpoints,
        accelerator="cpu",
        **{"max_epochs": 3, **quiet, **options},
    )
    trainer.fit(net, loader(), ckpt_path=ckpt)
    return trainer


def made() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_activation_changes_its_dtype_and_all_numbers_are_finite(
    tmp_path: Path, precision: str, tally: Tally
) -> None:
    plain, wrapped = made(), made()
    fit(tmp_path, plain, precision=precision)
    callback = EAFOCallback(dirpath=tmp_path, update_every_n_steps=3, eps_init=0.1, verbose=False)
    fit(tmp_path, wrapped, callback, precision=precision)
    assert wrapped.dtypes == plain.dtypes
    assert callback.controller is not None
    wide = torch.float64 if precision == "64-true" else torch.float32
    for eps in callback.controller.bank.eps:
        assert eps.dtype == wide
        assert eps.dim() == 0
        assert eps.item() != pytest.approx(0.1, abs=1e-7)
    log = CorrectionLog.load(tmp_path)
    assert len(log.sites) == 1 + len(BASES)
    assert log.steps == [1, 2, 3, 6, 9, 12]
    for row in log.rows:
        for column in ("eps", "entropy", "entropy_after", "d_entropy_d_eps", "mean", "std", "mu", "sigma"):
            assert math.isfinite(row[column]), (row["site"], column)
    tally("trainer features tried")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_eps_zero_trains_as_without_to_the_bit(tmp_path: Path, precision: str) -> None:
    plain, wrapped = made(), made()
    fit(tmp_path, plain, precision=precision)
    fit(tmp_path, wrapped, EAFOCallback(policy="frozen", eps_init=0.0, save_log=False), precision=precision)
    after = wrapped.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
@pytest.mark.parametrize("options", [{"per_channel": True}, {"density": "histogram"}], ids=str)
def test_other_forms_keep_the_dtype_too(tmp_path: Path, precision: str, options: dict[str, Any]) -> None:
    plain, wrapped = made(), made()
    fit(tmp_path, plain, precision=precision)
    fit(tmp_path, wrapped, EAFOCallback(save_log=False, update_every_n_steps=3, **options), precision=precision)
    assert wrapped.dtypes == plain.dtypes
    for key, value in wrapped.state_dict().items():
        if "eafo_" in key:
            assert value.dtype == torch.float32, key


def test_half_precision_swallows_no_step_of_an_amplitude(tmp_path: Path) -> None:
    """From 0.25 on, bfloat16 knows no number nearer than 0.001: steps of 1e-4 would go nowhere."""
    net = made()
    callback = EAFOCallback(eps_init=0.25, lr=1e-4, save_log=False, update_every_n_steps=100)
    net.configure_optimizers = lambda: torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-4)  # pyright: ignore
    fit(tmp_path, net, callback, precision="bf16-true", max_epochs=2)
    assert callback.controller is not None
    moved = [abs(eps.item() - 0.25) for eps in callback.controller.bank.eps]
    assert all(0 < way < 1.1e-4 * 8 for way in moved)
    assert max(moved) > 1e-4


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])  # 64-true: Lightning restores through float32
def test_resumed_equals_whole(tmp_path: Path, precision: str, tally: Tally) -> None:
    def run(part: str, epochs: int, ckpt: str | None) -> dict[str, Tensor]:
        net, keep = made(), ModelCheckpoint(tmp_path / part, filename="{step}", save_top_k=-1)
        callback = EAFOCallback(dirpath=tmp_path / part / "eafo", update_every_n_steps=3, verbose=False)
        fit(tmp_path, net, callback, keep, ckpt=ckpt, max_epochs=epochs, precision=precision)
        return net.state_dict()

    whole = run("whole", 4, None)
    run("parts", 2, None)
    resumed = run("parts", 4, str(tmp_path / "parts/step=8.ckpt"))
    for key, value in whole.items():
        assert value.dtype == resumed[key].dtype
        assert torch.equal(value, resumed[key]), key
    assert CorrectionLog.load(tmp_path / "whole").rows == CorrectionLog.load(tmp_path / "parts").rows
    tally("runs resumed equal")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_wrapped_model_by_hand(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    wrap(model, eps_init=0.123456)
    model(torch.randn(3, 4)).sum().backward()
    own = {key: value.clone() for key, value in model.state_dict().items() if "eafo_" in key}
    gradient = model[1].eafo_0_eps.grad.clone()
    model.to(dtype)
    for key, value in own.items():
        assert torch.equal(model.state_dict()[key], value), "no bit is lost"
    assert torch.equal(model[1].eafo_0_eps.grad, gradient.to(dtype).float())
    assert model(torch.randn(3, 4, dtype=dtype)).dtype == dtype
    model.double()
    assert model[1].eafo_0_eps.dtype == torch.float64
    model.to(dtype)
    assert model[1].eafo_0_eps.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 with a gradient scaler needs a GPU")
def test_fp16_with_a_gradient_scaler(tmp_path: Path) -> None:
    net = made()
    callback = EAFOCallback(dirpath=tmp_path, update_every_n_steps=3, verbose=False)
    Trainer(accelerator="gpu", devices=1, precision="16-mixed", max_epochs=3, callbacks=[callback], logger=False).fit(
        net, loader()
    )
    updates = [row for row in CorrectionLog.load(tmp_path).rows if row.get("fit_end") is None]
    assert updates
    assert all(math.isfinite(row["entropy"]) for row in updates)
