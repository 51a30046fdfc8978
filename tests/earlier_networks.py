"""Networks of the files in tests/data/v0.1.0.

The pickles there name this module and its classes, and the checkpoints name modules and lines of their code. So change
nothing here, and put networks for the files of later versions at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

WIDTH = 4


class Tower(nn.Module):
    """Modules only: one called once, one called twice, one with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gelu, self.relu, self.prelu = nn.GELU(), nn.ReLU(), nn.PReLU()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gelu(self.one(x))
        y = self.relu(self.two(x))
        y = self.relu(self.one(y) + x)
        return self.head(self.prelu(self.two(y)))


class Body(nn.Module):
    """Modules, functional calls, a method of a tensor and an activation written out as a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.tower(x))
        x = F.silu(self.mix(x))
        x = self.mix(x).relu()
        x = self.mix(x)
        x = x * torch.sigmoid(1.702 * x)
        return self.mix(x)


class Net(LightningModule):
    """A LightningModule that knows nothing of corrections."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.example_input_array = inputs()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)]


class Classifier(nn.Module):
    """The tower as the Hugging Face Trainer calls a model."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.tower(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Examples(Dataset[dict[str, Tensor]]):
    """The data of ``loader``, as the Hugging Face Trainer takes them."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": inputs(40)[index], "labels": labels(40)[index]}


def inputs(rows: int = 5) -> Tensor:
    """Multiples of 1/16 in [-2, 2), shape [rows, WIDTH]: the same on every machine."""
    numbers = torch.arange(rows * WIDTH) * 37 % 64
    return (numbers.reshape(rows, WIDTH) - 32) / 16


def labels(rows: int = 5) -> Tensor:
    return inputs(rows).argmax(1)


def loader() -> DataLoader[Any]:
    """Five batches of eight."""
    return DataLoader(TensorDataset(inputs(40), labels(40)), batch_size=8)
