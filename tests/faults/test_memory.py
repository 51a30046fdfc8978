"""Memory stays flat, however long a run is: Python's own, and what the process has of the machine."""

from __future__ import annotations

import gc
import os
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import EAFOCallback
from eafo_dynamic.density.collector import Collector
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.records import CorrectionLog, LogWriter

Tally = Callable[..., None]
MB = 2**20


def resident() -> int:
    """Bytes of the machine's memory that the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


class Watch:
    """Python's memory and the process's at some moments of a run; a first part of it fills caches."""

    def __init__(self) -> None:
        self.python: list[int] = []
        self.process: list[int] = []

    def look(self) -> None:
        gc.collect()
        self.python.append(tracemalloc.get_traced_memory()[0])
        self.process.append(resident())

    def assert_flat(self, python: float, process: float) -> None:
        """Growth from the second look to the last, in bytes."""
        assert len(self.python) >= 4
        assert self.python[-1] - self.python[1] < python, self.python
        assert self.process[-1] - self.process[1] < process, self.process


@pytest.fixture
def watch() -> Any:
    tracemalloc.start()
    yield Watch()
    tracemalloc.stop()


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 1))


@needs_proc
@pytest.mark.slow
def test_twenty_thousand_steps_and_their_updates(watch: Watch, tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deque of the newest rows is bounded; nothing else grows with steps, samples or updates."""
    monkeypatch.setattr(EAFOController, "KEPT_RECORDS", 200)
    model, x = nn.Sequential(nn.Linear(2, 4), nn.ReLU()), torch.randn(16, 2)
    controller = EAFOController.attach(
        model,
        policy="hybrid",
        update_every_n_steps=20,
        collect_every_n_steps=2,
        samples_per_site=512,
        rollback_factor=2.0,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(1, 20_001):
        optimizer.zero_grad(set_to_none=True)
        loss = model(x).square().mean()
        loss.backward()
        controller.observe_loss(loss)
        controller.before_optimizer_step(step - 1)
        optimizer.step()
        controller.step(step)
        if step % 4000 == 0:
            watch.look()
    assert controller.rounds > 1000
    assert len(controller.records) == 200
    watch.assert_flat(python=64 * 1024, process=8 * MB)
    tally("steps watched for memory", 20_000)


@needs_proc
@pytest.mark.slow
def test_an_update_keeps_nothing_of_the_last(watch: Watch, monkeypatch: pytest.MonkeyPatch, tally: Tally) -> None:
    """An update after every step, with tables and batches of changing size."""
    monkeypatch.setattr(EAFOController, "KEPT_RECORDS", 50)
    model = tiny()
    controller = EAFOController.attach(
        model, policy="entropy", density="histogram", update_every_n_steps=1, samples_per_site=64
    )
    for step in range(1, 401):
        model(torch.randn(4 + step % 7, 2))
        controller.step(step)
        if step % 80 == 0:
            watch.look()
    watch.assert_flat(python=256 * 1024, process=16 * MB)
    tally("steps watched for memory", 400)


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = tiny()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.body(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Look(Callback):
    def __init__(self, watch: Watch, every: int) -> None:
        self.watch, self.every = watch, every

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.watch.look()


@needs_proc
@pytest.mark.slow
def test_a_trainer_with_log_and_loggers(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """The callback, its log and its reports add nothing to what a plain run of the same length keeps."""
    monkeypatch.setattr(EAFOController, "KEPT_RECORDS", 100)
    growth = []
    for callbacks in (
        [],
        [
            EAFOCallback(
                update_every_n_steps=10, samples_per_site=64, log_sites=["eps"], dirpath=tmp_path, verbose=False
            )
        ],
    ):
        seen = Watch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(
                max_steps=1200,
                max_epochs=-1,
                callbacks=[*callbacks, Look(seen, 240)],
                logger=CSVLogger(str(tmp_path / str(len(callbacks))), flush_logs_every_n_steps=50),
                log_every_n_steps=50,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                accelerator="cpu",
            ).fit(Net(), DataLoader(TensorDataset(torch.randn(400, 2)), 2))
        growth.append(seen.python[-1] - seen.python[1])
    assert len(CorrectionLog.load(tmp_path / "corrections.jsonl").steps) == 124  # 1, 2, 4, 8 and every tenth
    assert growth[1] - growth[0] < 128 * 1024, growth
    tally("steps watched for memory", 2400)


def test_the_writer_keeps_nothing_of_what_it_has_written(tmp_path: Path, watch: Watch) -> None:
    writer = LogWriter(tmp_path / "eafo", {"sites": []})
    for step in range(1, 2001):
        writer.write([{"step": step, "site": f"s{k}", "eps": 0.1 * step, "event": "x" * 50} for k in range(4)])
        if step % 400 == 0:
            watch.look()
    watch.assert_flat(python=32 * 1024, process=64 * MB)


def test_samples_live_until_they_are_drained(watch: Watch) -> None:
    collector = Collector(quota=1024)
    for _ in range(5):
        for _ in range(40):
            collector.observe(torch.randn(64, 64))
        values, _ = collector.drain()
        assert values.numel() == 40 * 1024
        del values
        watch.look()
    watch.assert_flat(python=16 * 1024, process=32 * MB)
