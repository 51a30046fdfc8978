"""Processes that a shell starts and another process kills; tests/faults does the same to many more, by forks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from eafo_dynamic.records import CorrectionLog

SCRIPT = Path(__file__).parents[1] / "training_process.py"
SITES = {"relu#0", "relu#1", "gelu"}


def start(folder: Path, ranks: int = 1, steps: int = 12, **options: Any) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), str(ranks), str(steps), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> None:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-3000:]


def digests(folder: Path, rank: int) -> list[str]:
    return (folder / f"rank{rank}.txt").read_text().splitlines()


@pytest.mark.slow
def test_ranks_that_lightning_starts_hold_identical_corrections(tmp_path: Path) -> None:
    finish(start(tmp_path, 2, steps=9, policy="entropy", update_every_n_steps=3, density="histogram", batch=8))
    assert len(digests(tmp_path, 0)) == 9
    assert len({line.split()[1] for line in digests(tmp_path, 0)}) > 3, "corrections move"
    assert digests(tmp_path, 1) == digests(tmp_path, 0)
    log = CorrectionLog.load(tmp_path)
    assert log.steps == [1, 2, 3, 6, 9]
    assert len(log.rows) == 5 * len(SITES), "one log, written by one rank"
    assert set(log.sites) == SITES


@pytest.mark.slow
def test_a_run_killed_from_outside_resumes_as_if_nothing_had_happened(tmp_path: Path) -> None:
    after = 5
    # one batch an epoch: Lightning itself starts a plain DataLoader's epoch again when it resumes inside one
    options: dict[str, Any] = {"n": 32, "update_every_n_steps": 4, "collect_every_n_steps": 1, "policy": "hybrid"}
    options["save_every"] = 1
    finish(start(tmp_path / "whole", steps=12, **options))
    folder = tmp_path / "killed"
    victim = start(folder, steps=12, pause=0.15, **options)
    deadline = time.monotonic() + 120
    while not (folder / "rank0.txt").exists() or len(digests(folder, 0)) < after:
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert not (folder / "final.pt").exists()
    finish(start(folder, steps=12, resume=True, **options))
    whole, resumed = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key
    assert CorrectionLog.load(tmp_path / "whole").rows == CorrectionLog.load(folder).rows
