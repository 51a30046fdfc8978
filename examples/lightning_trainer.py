"""A Lightning trainer that exists already: one callback more, and not a line of the model changed.

A small convolutional network learns scikit-learn's handwritten digits. What is EAFO's is the callback in the list and
the log that is read at the end.

Run: python examples/lightning_trainer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import CorrectionLog, EAFOCallback


class DigitsNet(LightningModule):
    """A model as it stood before: it knows nothing of corrections."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(inplace=True),
            nn.Flatten(), nn.Linear(512, 64), nn.GELU(), nn.Linear(64, 10),
        )  # fmt: skip

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    train, held_out = TensorDataset(x[:1400], y[:1400]), TensorDataset(x[1400:], y[1400:])
    return DataLoader(train, 64, shuffle=True), DataLoader(held_out, 512)


def main(folder: str | Path, epochs: int = 12) -> CorrectionLog:
    """Trains, and returns the correction log."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[EAFOCallback(update_every_n_steps=20)],  # this line is all there is to it
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitsNet(), *loaders())
    print(f"accuracy on digits that it has not seen: {float(trainer.callback_metrics['val_accuracy']):.3f}")
    return CorrectionLog.load(folder)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for row in main(folder).last():
            print(f"{row['site']}  eps {row['eps']:+.4f}  entropy {row['entropy']:.4f} nats")
