"""Activations that are a part of the loss are no hidden activations; those that a layer follows are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
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


class Written(LightningModule):
    """A step that is given; its layers have a weight of several numbers, or a buffer."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.kernel, self.scale = nn.Parameter(torch.randn(8, 3, 2, 2)), nn.Parameter(torch.ones(()))
        self.prototypes: Tensor
        self.register_buffer("prototypes", torch.randn(3, 8))
        self.up = spectral_norm(nn.ConvTranspose1d(8, 1, 4, bias=False))
        self.net, self.tempered = Encoder(), Tempered()
        self.step = step

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(self.one(x))

    def margin(self, x: Tensor) -> Tensor:
        return 1 - self.out(F.silu(self.one(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        result: Tensor = self.step(self, batch[0])
        return result

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Encoder(nn.Module):
    """Has its activations in a method that is not its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 8)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.two(F.relu(self.one(x))))


class Tempered(nn.Module):
    """A loss with a learnable temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, margin: Tensor) -> Tensor:
        return F.relu(margin * self.temperature).mean()


def logged(module: Written, x: Tensor) -> Tensor:
    hidden = module.hidden(x)
    module.log("mean", hidden.mean())
    return torch.func.vmap(module.out)(hidden).square().mean()


def scattered(module: Written, x: Tensor) -> Tensor:
    hidden = module.hidden(x)
    buffer = x.new_zeros(len(x), 8)
    buffer[torch.arange(len(x))] = hidden
    return module.out(buffer).square().mean() + 1e-3 * hidden.abs().mean()


def written_out(z: Tensor) -> Tensor:
    return (z * torch.sigmoid(z)).mean()


HIDDEN: dict[str, Any] = {
    "a transposed convolution of a computed weight": lambda m, x: m.up(m.hidden(x)[:, :, None]).square().mean(),
    "a flipped kernel": lambda m, x: F.conv_transpose2d(m.hidden(x)[..., None, None], m.kernel.flip(2)).square().mean(),
    "tensordot": lambda m, x: torch.tensordot(m.hidden(x), m.two.weight * 1.0, ([1], [1])).square().mean(),
    "mv": lambda m, x: m.hidden(x).mv(m.out.weight[0]).square().mean(),
    "a product by hand": lambda m, x: (m.hidden(x) * m.out.weight[0]).sum(1).square().mean(),
    "one row": lambda m, x: F.linear(m.hidden(x[:1]), m.out.weight).square().mean(),
    "distances from prototypes": lambda m, x: torch.cdist(m.hidden(x), m.prototypes).mean(),
    "a layer that no function shows": logged,
    "items that are set": scattered,
    "a method of another module": lambda m, x: F.triplet_margin_loss(*map(m.net.encode, (x, x + 0.1, x.flip(0)))),
}
LOSSES: dict[str, Any] = {
    "weighted by uncertainty": lambda m, x: torch.exp(-m.scale) * F.relu(m.margin(x)).mean() + m.scale,
    "times a parameter": lambda m, x: (F.relu(m.margin(x)) * m.scale).mean(),
    "weighted by a product": lambda m, x: x.new_full((len(x),), 0.1) @ F.relu(m.margin(x)).squeeze(1),
    "of one dimension": lambda m, x: F.relu(m.margin(x)).mean(0),
    "written out": lambda m, x: written_out(m.margin(x)),
    "a module with a temperature": lambda m, x: m.tempered(m.margin(x)),
}


def roles(step: Any, folder: Path) -> list[str]:
    callback = EAFOCallback(verbose=False, save_log=False)
    data = DataLoader(TensorDataset(torch.randn(16, 4)), 8)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, callbacks=[callback], default_root_dir=folder, enable_model_summary=False, **quiet)
    trainer.fit(Written(step), data)
    assert callback.controller is not None
    return [site.role for site in callback.controller.report.sites if site.role != "part"]


@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_layer_follows_is_hidden(name: str, tmp_path: Path) -> None:
    found = roles(HIDDEN[name], tmp_path)
    assert found and set(found) == {"hidden"}


@pytest.mark.parametrize("name", LOSSES)
def test_one_number_makes_no_layer(name: str, tmp_path: Path) -> None:
    assert roles(LOSSES[name], tmp_path) == ["hidden", "loss"]
