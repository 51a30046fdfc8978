"""What a log says in a few rows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from fabricate import fabricate_run
from small_logs import oracle_rows, row, write_run

from eafo_dynamic.records import CorrectionLog, LogWriter
from eafo_dynamic.records.summary import (
    compare_runs,
    compare_sites,
    drift_changes,
    entropy_changes,
    layer_rows,
    run_labels,
    summarise,
)


@pytest.fixture(scope="module")
def fabricated(tmp_path_factory: pytest.TempPathFactory) -> CorrectionLog:
    return CorrectionLog.load(fabricate_run(tmp_path_factory.mktemp("runs") / "run"))


def test_summary_against_plain_arithmetic(fabricated: CorrectionLog) -> None:
    rows = oracle_rows(fabricated.path.parent)
    last = [entry for entry in rows if entry["step"] == 600]
    first = [entry for entry in rows if entry["step"] == 50]
    facts = summarise(fabricated)
    assert facts["steps"] == [50, 600]
    assert facts["updates"] == 12
    assert facts["policies"] == {"entropy": 5}
    assert facts["mean_eps"] == pytest.approx(sum(entry["eps"] for entry in last) / 5)
    assert facts["entropy_first"] == pytest.approx(sum(entry["entropy"] for entry in first) / 5)
    largest = max(last, key=lambda entry: abs(entry["eps"]))
    assert facts["largest_eps"][0] == {"site": largest["site"], "value": largest["eps"]}
    lowest = min(last, key=lambda entry: entry["entropy"])
    assert facts["lowest_entropy"][0]["site"] == lowest["site"]
    extremes = [entry["site"] for name in ("lowest_entropy", "highest_entropy") for entry in facts[name]]
    assert len(set(extremes)) == len(extremes) == 5
    assert facts["events"] == 2
    assert facts["event_kinds"] == {"eps held at max_eps": 1, "3 samples not finite": 1}


def test_layer_row_has_first_last_and_trend(fabricated: CorrectionLog) -> None:
    rows = {entry["site"]: entry for entry in layer_rows(fabricated)}
    history = [entry for entry in fabricated.rows if entry["site"] == "blocks.2.mlp.act"]
    found = rows["blocks.2.mlp.act"]
    assert found["entropy_trend"] == [entry["entropy"] for entry in history]
    assert found["entropy_change"] == pytest.approx(history[-1]["entropy"] - history[0]["entropy"])
    assert (found["event"], found["event_step"]) == ("eps held at max_eps", 200)
    assert (found["base"], found["updates"], found["eps"]) == ("gelu", 12, history[-1]["eps"])
    assert rows["blocks.0.mlp.act"]["event"] is None


def test_layer_row_without_any_entropy(tmp_path: Path) -> None:
    write_run(tmp_path, entropy=math.nan)
    for found in layer_rows(CorrectionLog.load(tmp_path)):
        assert found["entropy_first"] is found["entropy"] is found["entropy_change"] is None
    assert summarise(CorrectionLog.load(tmp_path))["entropy_last"] is None


@pytest.mark.parametrize("policy", ["entropy", "learned"])
def test_prediction_uses_eps_as_it_was_when_measured(tmp_path: Path, policy: str) -> None:
    writer = LogWriter(tmp_path / "eafo", {})
    measured_at = [0.0, 0.1, 0.3]
    moves = [0.1, 0.2, 0.05]
    for step, (at, move) in enumerate(zip(measured_at, moves, strict=True)):
        eps, delta = (at + move, move) if policy == "entropy" else (at, 0.9)
        entry = row(step, "s", eps=eps, delta_eps=delta, d_entropy_d_eps=2.0, entropy=1 + 2 * at, policy=policy)
        writer.write([entry])
    pairs = drift_changes(CorrectionLog.load(tmp_path), "s")
    assert pairs == [pytest.approx((0.2, 0.2)), pytest.approx((0.4, 0.4))]


def test_changes_at_an_update_are_of_the_same_samples(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "eafo", {})
    for step, (before, predicted, after) in enumerate([(1.0, 0.75, 0.875), (1.0, 1.0, 1.0), (1.0, None, 2.0)]):
        writer.write([row(step, "s", entropy=before, entropy_predicted=predicted, entropy_after=after)])
    which, changes = entropy_changes(CorrectionLog.load(tmp_path))
    assert "same samples" in which
    assert changes == {"s": [(-0.25, -0.125)]}


def test_changes_between_updates_where_updates_change_nothing(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "eafo", {})
    for step, eps in enumerate([0.0, 0.5]):
        same = dict.fromkeys(["entropy", "entropy_predicted", "entropy_after"], 1.0 - eps)
        writer.write([row(step, "s", eps=eps, delta_eps=0.5, d_entropy_d_eps=-2.0, policy="learned", **same)])
    which, changes = entropy_changes(CorrectionLog.load(tmp_path))
    assert "between updates" in which
    assert changes == {"s": [(-1.0, -0.5)]}


def test_name_of_a_numbered_version_has_its_folder(tmp_path: Path) -> None:
    write_run(tmp_path / "digits" / "version_0")
    assert CorrectionLog.load(tmp_path).name == "digits/version_0"


def test_runs_are_told_apart_by_the_ends_of_their_paths(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a/version_0", "b/version_0", "b/version_1")]
    for number, run in enumerate(runs):
        write_run(run, entropy=float(number))
    logs = [CorrectionLog.load(run) for run in runs]
    assert run_labels(logs) == ["a/version_0", "b/version_0", "b/version_1"]
    assert run_labels(logs[1:]) == ["version_0", "version_1"]
    assert [entry["entropy_last"] for entry in compare_runs(logs)] == [0.0, 1.0, 2.0]
    by_site = compare_sites(logs[1:], "entropy")
    assert by_site[0] == {"site": "b.1.act", "version_0": 1.0, "version_1": 2.0, "spread": 1.0}
