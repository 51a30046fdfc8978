"""Activations that are a part of the loss are no hidden activations; those that a layer follows are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import EAFOCallback


class Hinge(nn.Module):
    """A loss as a module, with an activation module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, margin: Tensor) -> Tensor:
        return self.relu(1 - margin).mean()


class Margin(LightningModule):
    """A network written out in the step, with one of several losses."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two, self.three = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.act = nn.ReLU()
        self.hinge = Hinge() if kind == "module" else None

    def outputs(self, x: Tensor) -> Tensor:
        hidden = self.act(self.two(F.relu(self.one(x))))
        self.penalty = 1e-3 * hidden.abs().mean()
        return self.three(hidden)

    def loss(self, batch: list[Tensor]) -> Tensor:
        margin = batch[1] * self.outputs(batch[0])
        self.margins = [margin.detach()] if batch[2][0] == 0 else [*self.margins, margin.detach()]
        kinds = {
            "function": lambda: F.relu(1 - margin).mean() + self.penalty,
            "module": lambda: self.hinge(margin),
            "logsigmoid": lambda: {"loss": -F.logsigmoid(margin).sum(1).mean()}["loss"],
            "in place": lambda: F.relu_(1 - margin).square().sum() / len(margin),
        }
        return kinds[self.kind]()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def fit(model: Margin, callback: EAFOCallback, data: DataLoader[Any], folder: Path) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, callbacks=[callback], default_root_dir=folder, enable_model_summary=False, **quiet)
    trainer.fit(model, data, data)
    return trainer


@pytest.mark.parametrize("kind", ["function", "module", "logsigmoid", "in place"])
def test_the_loss_is_left_alone_and_logged_as_it_is(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    data = DataLoader(TensorDataset(x, x[:, :1].sign(), torch.arange(64)), 16)
    callback = EAFOCallback(verbose=False, save_log=False, eps_init=0.3)
    model = Margin(kind)
    trainer = fit(model, callback, data, tmp_path)
    assert callback.controller is not None
    wrapped = {site.name for site in callback.controller.report.wrapped}
    assert wrapped == {"act", ":relu#0" if kind in ("function", "in place") else ":relu"}
    losses = [site for site in callback.controller.report.sites if site.role == "loss"]
    assert len(losses) == 1 and "no layer comes after it" in losses[0].reason
    margin = torch.cat(model.margins)  # of the last validation
    by_hand = {"logsigmoid": -F.logsigmoid(margin), "in place": (1 - margin).clamp(min=0).square()}
    expected = by_hand.get(kind, (1 - margin).clamp(min=0)).mean() + (model.penalty if kind == "function" else 0)
    tolerance = 2e-3 if kind == "function" else 1e-5  # the penalty is a mean over the last batch
    assert trainer.callback_metrics["val"].item() == pytest.approx(expected.item(), abs=tolerance)


def test_a_loss_can_still_be_asked_for(tmp_path: Path) -> None:
    callback = EAFOCallback(target_modules=["hinge.relu", "act"], verbose=False, save_log=False)
    x = torch.randn(16, 4)
    fit(Margin("module"), callback, DataLoader(TensorDataset(x, x[:, :1], torch.arange(16)), 8), tmp_path)
    assert callback.controller is not None
    assert {site.name for site in callback.controller.report.wrapped} == {"act", "hinge.relu"}
