"""Several processes: the same callback, ``strategy="ddp"``, and every rank ends with the same corrections.

Statistics of all ranks are pooled in one collective an update; none runs in between. Rank 0 writes the log. Under DDP
the sites must be known before the model is wrapped for it: set ``example_input_array``, as here.

Run: python examples/ddp_launch.py           (two processes on a CPU; Lightning starts the second one itself)
Or:  torchrun --nproc-per-node 2 examples/ddp_launch.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import CorrectionLog, EAFOCallback


class Net(LightningModule):
    """A classifier of points on a plane."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        self.example_input_array = torch.zeros(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def rings() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 2, generator=generator)
    return DataLoader(TensorDataset(x, (x.norm(dim=1) > 1.2).long()), 64, shuffle=True)


def main(folder: str | Path, devices: int = 2, epochs: int = 6) -> None:
    """Trains on all ranks; each says what it ends with."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp",
        max_epochs=epochs,
        callbacks=[EAFOCallback(update_every_n_steps=10)],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Net()
    trainer.fit(model, rings())
    eps = {name: value.item() for name, value in model.named_parameters() if "eps" in name}
    print(f"rank {trainer.global_rank} of {trainer.world_size}: {eps}", flush=True)
    if trainer.is_global_zero:
        log = CorrectionLog.load(folder)
        print(f"log of rank 0: {len(log)} rows, up to step {log.steps[-1]}, {log.last()[-1]['n']} samples per site")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/ddp")
