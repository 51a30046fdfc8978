"""A small training run as a process of its own, for tests that need real ranks or a real kill.

Run: python training_process.py FOLDER RANKS STEPS OPTIONS_AS_JSON
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import EAFOCallback


class Net(LightningModule):
    """One shared in-place ReLU and a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.relu, self.gelu = nn.ReLU(inplace=True), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.gelu(self.relu(self.two(self.relu(self.one(x))))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Skipping(Net):
    """Skips an activation in some steps, on some ranks or on all: no parameter of the plain model goes unused."""

    def __init__(self, skips: str) -> None:
        super().__init__()
        self.skips, self.extra = skips, nn.Tanh()

    def skipping(self) -> bool:
        step = self.trainer.global_step
        return {
            "on one rank": self.global_rank == 0 and step > 0,
            "on every rank": step in (1, 2),
            "in turn": step % self.trainer.world_size == self.global_rank and step > 0,
        }[self.skips]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.two(self.relu(self.one(x))))
        if self._trainer is None or not self.skipping():
            hidden = self.extra(hidden)
        return self.three(self.gelu(hidden))


class Watch(Callback):
    """Writes a digest of every correction after each step, and can slow a run down so that a kill hits it."""

    def __init__(self, folder: Path, pause: float) -> None:
        self.folder, self.pause = folder, pause

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        state = {key: value for key, value in pl_module.state_dict().items() if "eafo_" in key}
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()
        with (self.folder / f"rank{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{trainer.global_step} {digest}\n")
        time.sleep(self.pause)


class Stateful:
    """A loader that says where it is, so that a run can go on in the middle of an epoch; shuffles, each epoch anew.

    Args:
        dataset: what to read.
        batch: items a batch; the last one is shorter where they do not fit.
        rank: ranks read in orders of their own.
    """

    def __init__(self, dataset: TensorDataset, batch: int, rank: int = 0) -> None:
        self.dataset, self.batch, self.rank = dataset, batch, rank
        self.epoch = self.place = 0

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self.place == len(self):  # nobody asks for more after the last batch
            self.epoch, self.place = self.epoch + 1, 0
        generator = torch.Generator().manual_seed(self.epoch + 1000 * self.rank)
        order = torch.randperm(len(self.dataset), generator=generator)
        while self.place < len(self):
            self.place += 1
            yield self.dataset[order[(self.place - 1) * self.batch : self.place * self.batch]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]


def data(n: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=generator) * 2 + 0.5
    return TensorDataset(x, x[:, :3].argmax(1))


def main(folder: Path, ranks: int, steps: int, options: dict[str, Any]) -> None:
    """Trains; options that are not named here go to EAFOCallback."""
    pause, save, resume = options.pop("pause", 0.0), options.pop("save_every", None), options.pop("resume", False)
    n, batch = options.pop("n", 256), options.pop("batch", 32)
    plain, skips, stateful = options.pop("plain", False), options.pop("skips", None), options.pop("stateful", False)
    strategy, extra = options.pop("strategy", {}), options.pop("trainer", {})
    shares: list[int] | None = options.pop("shares", None)  # items of each rank, one batch of them a step
    callbacks: list[Callback] = options.pop("callbacks", [])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if not plain:
        callbacks = [EAFOCallback(dirpath=folder / "eafo", verbose=False, **options), *callbacks]
    if save:
        callbacks.append(ModelCheckpoint(folder / "ckpt", every_n_train_steps=save, save_top_k=-1, save_last=True))
    callbacks.append(Watch(folder, pause))
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(**strategy) if ranks > 1 else "auto",
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=save is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        use_distributed_sampler=shares is None,
        **extra,
    )
    last = folder / "ckpt" / "last.ckpt"
    net = Net() if skips is None else Skipping(skips)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    loader: Any = Stateful(data(n), batch, rank) if stateful else DataLoader(data(n), batch)
    if shares is not None:
        first = sum(shares[:rank])
        loader = DataLoader(TensorDataset(*data(sum(shares))[first : first + shares[rank]]), shares[rank])
    trainer.fit(net, loader, ckpt_path=str(last) if resume and last.exists() else None)
    if trainer.is_global_zero:
        torch.save(net.state_dict(), folder / "final.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
