"""Runs that die by SIGKILL at every place where it could matter, and go on as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from children import KILLED, run, succeed
from crash_points import AHEAD, ENDING, POINTS, RESUMING, Point, kill_later, prepare
from tally import Tally

from eafo_dynamic.records import CorrectionLog

# everything that has a state: a shuffled loader in mid-epoch, accumulation, every estimate that runs along
pytestmark = pytest.mark.slow
OPTIONS: dict[str, Any] = {
    "steps": 12,
    "n": 30,
    "batch": 4,
    "stateful": True,
    "save_every": 2,
    "trainer": {"accumulate_grad_batches": 2},
    "policy": "hybrid",
    "density": "histogram",
    "update_every_n_steps": 3,
    "collect_every_n_steps": 1,
    "rollback_factor": 1.01,
}


# resumed runs save at once, also in mid-accumulation, and Lightning itself keeps no gradients in a checkpoint
BY_STEP: dict[str, Any] = {**OPTIONS, "trainer": {}}


@pytest.fixture(scope="module")
def whole_by_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by step")
    succeed(folder, **BY_STEP)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    succeed(folder, **OPTIONS)
    assert CorrectionLog.load(folder).steps == [1, 2, 3, 6, 9, 12]
    return folder


def assert_equal(one: Any, two: Any, where: str = "") -> None:
    """To the bit, whatever is nested in what."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for number, (first, second) in enumerate(zip(one, two, strict=True)):
            assert_equal(first, second, f"{where}/{number}")
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True, msg=where)
    else:
        assert one == two, where


def last_checkpoint(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of a run's state: all of it but where its log lies."""
    saved = torch.load(folder / "ckpt/last.ckpt", weights_only=True)
    callback = saved["callbacks"]["EAFOCallback"]
    assert callback.pop("log") == str(folder / "eafo")
    for site in saved["eafo"]["sites"]:
        site["places"] = [place for place in site["places"] if not place.startswith("arm.")]  # what is killed there
    return {key: saved[key] for key in ("global_step", "epoch", "state_dict", "optimizer_states", "eafo")} | callback


def assert_equal_runs(one: Path, two: Path) -> None:
    """Weights, optimisers, running statistics, schedule, rows of the log and snapshots of the functions."""
    assert_equal(last_checkpoint(one), last_checkpoint(two))
    assert_equal_results(one, two)


def assert_equal_results(one: Path, two: Path) -> None:
    """Weights, rows of the log and snapshots of the functions."""
    assert_equal(*(torch.load(folder / "final.pt", weights_only=True) for folder in (one, two)))
    assert CorrectionLog.load(one).rows == CorrectionLog.load(two).rows
    assert (one / "eafo/shapes.jsonl").read_bytes() == (two / "eafo/shapes.jsonl").read_bytes()


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_a_run_killed_anywhere_resumes_equal(point: Point, whole: Path, tmp_path: Path, tally: Tally) -> None:
    assert run(tmp_path, prepare=prepare, point=point, **OPTIONS) == [KILLED]
    assert not (tmp_path / "final.pt").exists()
    succeed(tmp_path, resume=True, **OPTIONS)
    assert_equal_runs(whole, tmp_path)
    tally("crash points tried")
    tally("runs resumed equal")


@pytest.fixture(scope="module")
def whole_past_its_last_round(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ending")
    succeed(folder, **{**BY_STEP, "steps": 13})
    assert CorrectionLog.load(folder).steps == [1, 2, 3, 6, 9, 12, 13]
    return folder


@pytest.mark.parametrize("point", ENDING, ids=lambda point: point.name)
def test_a_run_killed_as_its_log_ends_resumes_equal(
    point: Point, whole_past_its_last_round: Path, tmp_path: Path, tally: Tally
) -> None:
    options = {**BY_STEP, "steps": 13}
    assert run(tmp_path, prepare=prepare, point=point, **options) == [KILLED]
    succeed(tmp_path, resume=True, **options)
    assert_equal_results(whole_past_its_last_round, tmp_path)  # a resumed run saves at once, here after step 13
    tally("crash points tried")
    tally("runs resumed equal")


@pytest.mark.parametrize("second", RESUMING, ids=lambda point: point.name)
def test_a_run_killed_while_it_resumes_resumes_equal(
    second: Point, whole_by_step: Path, tmp_path: Path, tally: Tally
) -> None:
    assert run(tmp_path, prepare=prepare, point=AHEAD, **BY_STEP) == [KILLED]
    log = CorrectionLog.load(tmp_path)
    assert log.steps == [1, 2, 3, 6, 9]
    assert {row["step"] for row in log.shapes()} == {1, 2, 6}  # rounds 1, 2 and 4
    assert torch.load(tmp_path / "ckpt/last.ckpt", weights_only=True)["global_step"] == 8
    assert run(tmp_path, resume=True, prepare=prepare, point=second, **BY_STEP) == [KILLED]
    succeed(tmp_path, resume=True, **BY_STEP)
    assert_equal_runs(whole_by_step, tmp_path)
    tally("crash points tried")
    tally("runs resumed equal")


def test_a_run_killed_again_and_again_resumes_equal(whole: Path, tmp_path: Path, tally: Tally) -> None:
    for steps in (7, 3, 3):  # each attempt gets a little further
        point = Point("after some steps", "training_process:Net.training_step", "after", 2 * steps)
        assert run(tmp_path, resume=True, prepare=prepare, point=point, **OPTIONS) == [KILLED]
    succeed(tmp_path, resume=True, **OPTIONS)
    assert_equal_runs(whole, tmp_path)
    tally("runs resumed equal")


KILLS = int(os.environ.get("EAFO_KILLS", "5"))
"""Runs that are killed at a random moment; 100 take a quarter of an hour."""


def test_runs_killed_at_random_moments_resume_equal(
    whole_past_its_last_round: Path, tmp_path: Path, tally: Tally
) -> None:
    """From the first line of the process to its last; a run that is quicker than its kill is compared too."""
    options = {**BY_STEP, "steps": 13}
    began = time.monotonic()
    succeed(tmp_path / "timed", **options)
    duration = time.monotonic() - began
    moments = random.Random(int(os.environ.get("EAFO_KILLS_SEED", "0")))
    killed = 0
    while killed < KILLS:
        folder, delay = tmp_path / f"{killed}", moments.uniform(0.0, duration)
        (code,) = run(folder, prepare=kill_later, delay=delay, **options)
        assert code in (0, KILLED)
        if code == KILLED:
            killed += 1
            succeed(folder, resume=True, **options)
        assert_equal_results(whole_past_its_last_round, folder)
        shutil.rmtree(folder)
    tally("crash points tried", killed)
    tally("runs resumed equal", killed)


def test_what_a_kill_leaves_behind_is_whole(tmp_path: Path) -> None:
    """Half a row is in the file, and a reader beside the dead run sees whole updates only."""
    point = next(point for point in POINTS if point.name == "in the middle of a row")
    assert run(tmp_path, prepare=prepare, point=point, **OPTIONS) == [KILLED]
    assert not (tmp_path / "eafo/corrections.jsonl").read_bytes().endswith(b"\n")
    log = CorrectionLog.load(tmp_path)
    rows = [(row["step"], row["site"]) for row in log.rows]
    assert rows[:6] == [(step, site) for step in (1, 2) for site in log.sites]
    assert all(step == 3 for step, _ in rows[6:])
