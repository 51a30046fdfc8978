"""Real processes: two and four ranks that must agree, and runs killed in the middle that must go on as if not."""

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

SCRIPT = Path(__file__).with_name("training_process.py")
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
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("policy", ["learned", "entropy"])
def test_ranks_hold_identical_corrections_after_every_step(tmp_path: Path, ranks: int, policy: str) -> None:
    finish(start(tmp_path, ranks, steps=9, policy=policy, update_every_n_steps=3, density="histogram", batch=8))
    reference = digests(tmp_path, 0)
    assert len(reference) == 9
    assert len({line.split()[1] for line in reference}) > 3, "corrections move"
    for rank in range(1, ranks):
        assert digests(tmp_path, rank) == reference
    log = CorrectionLog.load(tmp_path)
    assert [(row["step"], row["site"]) for row in log.rows] == [
        (step, site) for step in (1, 3, 6, 9) for site in log.sites
    ], "one log, written by one rank"
    assert set(log.sites) == SITES


@pytest.mark.slow
def test_statistics_of_two_ranks_are_those_of_one_process_that_saw_all_data(tmp_path: Path) -> None:
    common = {
        "n": 64,
        "update_every_n_steps": 1,
        "samples_per_site": 8192,
        "policy": "frozen",
        "collect_every_n_steps": 1,
    }
    finish(start(tmp_path / "one", 1, steps=1, batch=64, **common))
    finish(start(tmp_path / "two", 2, steps=1, batch=32, **common))
    one, two = (CorrectionLog.load(tmp_path / name).rows for name in ("one", "two"))
    for alone, shared in zip(one, two, strict=True):
        assert shared["n"] == alone["n"]
        for column in ("mean", "std", "skew", "kurtosis", "entropy", "d_entropy_d_eps", "negentropy"):
            assert shared[column] == pytest.approx(alone[column], rel=1e-4, abs=1e-5), column


@pytest.mark.slow
@pytest.mark.parametrize("after", [2, 5, 8], ids=lambda n: f"killed after {n} steps")
def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path: Path, after: int) -> None:
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
