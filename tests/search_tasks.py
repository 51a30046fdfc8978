"""Tasks with a known answer for the search: a teacher network made the targets, its activation is the one to find."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic.experiments import make_activation
from eafo_dynamic.experiments.sampling import EpochSampler

EXAMPLES = 640
FEATURES = 3


class Student(LightningModule):
    """A small network with ReLU, and its mean squared error."""

    def __init__(self, activation: str = "relu", hidden: int = 12, lr: float = 0.02) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, hidden), make_activation(activation), nn.Linear(hidden, 1))
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def make_model() -> Student:
    return Student()


def make_elu_model() -> Student:
    return Student("elu")


def make_small_model() -> Student:
    return Student(hidden=8)


def _loaders(seed: int, x: Tensor, y: Tensor) -> tuple[DataLoader[object], DataLoader[object]]:
    train = TensorDataset(x[EXAMPLES // 4 :], y[EXAMPLES // 4 :])
    val = TensorDataset(x[: EXAMPLES // 4], y[: EXAMPLES // 4])
    order = EpochSampler(len(train), seed)
    return DataLoader(train, batch_size=32, sampler=order), DataLoader(val, batch_size=EXAMPLES)


def _taught_by(activation: str, seed: int) -> tuple[DataLoader[object], DataLoader[object]]:
    draw = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(EXAMPLES, FEATURES, generator=draw)
    directions = torch.randn(FEATURES, 4, generator=draw)
    outputs = make_activation(activation)(x @ directions) @ torch.randn(4, generator=draw)
    y = (outputs - outputs.mean()) / outputs.std()
    return _loaders(seed, x, y.detach())


def taught_by_tanh(seed: int) -> tuple[DataLoader[object], DataLoader[object]]:
    return _taught_by("tanh", seed)


def taught_by_squared_relu(seed: int) -> tuple[DataLoader[object], DataLoader[object]]:
    return _taught_by("squared_relu", seed)


def noise(seed: int) -> tuple[DataLoader[object], DataLoader[object]]:
    """Targets that no input tells anything about: nothing to find."""
    draw = torch.Generator().manual_seed(seed)
    return _loaders(seed, torch.randn(EXAMPLES, FEATURES, generator=draw), torch.randn(EXAMPLES, generator=draw))


def failing_model() -> Student:
    raise RuntimeError("no such network")


CRASHES = Path("crashes")


class Killer(Student):
    """Ends its process without a word while it is trained with SiLU, as the kernel does where memory is short."""

    def on_train_start(self) -> None:
        if any(isinstance(module, nn.SiLU) for module in self.modules()):
            import os

            with CRASHES.open("a") as file:
                file.write("x")
            os._exit(9)


def make_killer() -> Killer:
    return Killer()


class Complaining(Student):
    """Raises while it is trained with SiLU."""

    def on_train_start(self) -> None:
        if any(isinstance(module, nn.SiLU) for module in self.modules()):
            raise RuntimeError("out of patience")


def make_complaining() -> Complaining:
    return Complaining()
