"""Finished cells and paired statistics: against scipy, closed forms, and numbers worked out by hand."""

from __future__ import annotations

import csv
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricate_cells import result, write_cell, write_comparison
from scipy import stats

from eafo_dynamic.errors import ConfigError, EAFOError, LogError
from eafo_dynamic.experiments.compare.across import summarise
from eafo_dynamic.experiments.compare.paired import (
    compare,
    holm,
    interval,
    is_higher_better,
    labelled,
    main_reference,
    seeds_needed,
    sign_flip,
)
from eafo_dynamic.experiments.compare.results import (
    read_cell,
    read_cells,
    step_times,
    tidy,
    unpaired,
    values,
    write_csv,
)


def by_seed(*numbers: float) -> dict[int, float]:
    return dict(enumerate(numbers))


@pytest.mark.parametrize("count", [2, 5, 10, 16])
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_sign_flips_are_scipys_exact_test(count: int, shift: float) -> None:
    data = np.random.default_rng(count).normal(shift, 1, count)
    p, name = sign_flip(data)
    exact = stats.permutation_test((data,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert p == pytest.approx(exact.pvalue, rel=1e-12)
    assert name == "exact sign flips"


def test_sign_flips_by_hand() -> None:
    # The sums of +-1 +-2 +-4 are +-7, +-5, +-3, +-1.
    assert sign_flip([1, 2, 4])[0] == 2 / 8
    assert sign_flip([-1, 2, 4])[0] == 4 / 8
    assert sign_flip([-1, -2, 4])[0] == 1.0
    assert sign_flip([0, 0, 0])[0] == 1.0
    # Equal but for rounding: 0.3 - 0.1 is not 0.2.
    assert sign_flip([0.3 - 0.1, 0.2, 0.1 + 0.1])[0] == 2 / 8
    assert math.isnan(sign_flip([1.0])[0])


def test_drawn_sign_flips_agree_with_the_normal_limit_and_repeat() -> None:
    data = np.random.default_rng(1).normal(0.25, 1, 60)
    p, name = sign_flip(data)
    z = abs(data.sum()) / math.sqrt((data**2).sum())
    assert p == pytest.approx(2 * stats.norm.sf(z), abs=0.01)
    assert sign_flip(data)[0] == p
    assert name == "sign flips, 100000 drawn"
    assert sign_flip([1.0] * 40)[0] == 1 / 100_001


def test_holm_by_hand() -> None:
    corrected = holm([0.01, 0.04, 0.03, math.nan, 0.005])
    assert corrected[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert math.isnan(corrected[3])
    assert corrected[4] == pytest.approx(0.02)
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    """p_i corrected = the largest Bonferroni p over all sets of hypotheses that hold i."""
    p = [0.001, 0.2, 0.03, 0.012, 0.5]
    for place in range(len(p)):
        groups = (group for size in range(1, 6) for group in itertools.combinations(range(5), size) if place in group)
        closed = max(min(1.0, len(group) * min(p[each] for each in group)) for group in groups)
        assert holm(p)[place] == pytest.approx(closed)


def test_interval_is_the_expanded_percentile_of_all_resamples() -> None:
    """With n = 5 all 3125 resamples can be listed."""
    data = np.array([0.3, -0.1, 0.8, 0.45, 0.2])
    means = np.array(list(itertools.product(data, repeat=5))).mean(1)
    tail = stats.norm.cdf(math.sqrt(5 / 4) * stats.t.ppf(0.025, 4))
    assert tail == pytest.approx(0.00095, abs=2e-5)
    assert interval(data) == pytest.approx(np.quantile(means, [tail, 1 - tail]), abs=0.02)


def test_interval_tends_to_the_normal_one() -> None:
    data = np.random.default_rng(0).normal(3, 2, 400)
    half = stats.norm.ppf(0.975) * data.std(ddof=1) / 20
    assert interval(data) == pytest.approx((data.mean() - half, data.mean() + half), abs=0.03)
    assert interval(data) == interval(data)


def test_interval_of_few_or_equal_differences() -> None:
    assert all(math.isnan(end) for end in interval([1.0]))
    assert interval([0.0] * 5) == (0.0, 0.0)
    assert interval([-0.25] * 5) == (-0.25, -0.25)
    for few in ([1.0, 2.0], [0.3, -0.2, 0.9, 0.4]):
        low, high = stats.ttest_1samp(few, 0).confidence_interval()
        assert interval(few) == pytest.approx((low, high))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "least"), [(5, 0.89), (10, 0.925), (20, 0.925)])
def test_interval_covers(count: int, least: float) -> None:
    draws = np.random.default_rng(2).normal(size=(600, count))
    ends = np.array([interval(row) for row in draws])
    covered = ((ends[:, 0] <= 0) & (ends[:, 1] >= 0)).mean()
    assert least <= covered <= 0.985


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("test_loss", False),
        ("val/loss", False),
        ("bits_per_byte", False),
        ("test_rmse", False),
        ("perplexity", False),
        ("test_accuracy", True),
        ("val-acc", True),
        ("r2", True),
        ("Test_R2", True),
    ],
)
def test_direction_is_known_from_the_name(metric: str, higher: bool) -> None:
    assert is_higher_better(metric) is higher


def test_unknown_direction_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"metric='test_zap'.*Write higher_is_better"):
        compare({"a": by_seed(1, 2), "b": by_seed(1, 2)}, "a", "test_zap")
    (pair,) = compare({"a": by_seed(1, 2), "b": by_seed(1, 2)}, "a", "test_zap", higher_is_better=True)
    assert pair.higher_is_better


def test_comparison_by_hand() -> None:
    base = by_seed(2.0, 2.5, 1.5, 2.0, 2.0)
    arm = by_seed(1.8, 2.4, 1.5, 2.1, 1.7)
    times = {"base": by_seed(*[2.0] * 5), "arm": by_seed(2.0, 2.1, 2.2, 2.3, 2.4)}
    (pair,) = compare({"base": base, "arm": arm}, "base", "test_loss", step_ms=times)
    differences = [-0.2, -0.1, 0.0, 0.1, -0.3]
    assert pair.differences == pytest.approx(differences)
    assert pair.difference == pytest.approx(-0.1)
    assert (pair.mean, pair.reference_mean) == pytest.approx((1.9, 2.0))
    assert (pair.wins, pair.ties, pair.losses) == (3, 1, 1)
    assert pair.d_z == pytest.approx(-0.1 / math.sqrt(0.025))
    assert pair.relative == pytest.approx(-5.0)
    assert pair.relative_interval == pytest.approx((50 * pair.low, 50 * pair.high))
    assert pair.time_ratio == pytest.approx(1.1)
    assert pair.gain_per_time == pytest.approx(5.0 / 10.0)
    assert pair.p == stats.permutation_test((differences,), np.sum, permutation_type="samples").pvalue
    assert pair.verdict == "no difference found"


def test_an_arm_may_have_a_reference_of_its_own() -> None:
    table = {"a": by_seed(1, 2, 3), "b": by_seed(2, 3, 5), "c": by_seed(2, 2, 2)}
    first, second = compare(
        table, "a", "loss", against={"c": "b"}, step_ms={"b": by_seed(2, 2, 2), "c": by_seed(3, 3, 3)}
    )
    assert (first.reference, first.differences) == ("a", (1, 1, 2))
    assert (second.reference, second.differences, second.reference_mean) == ("b", (0, -1, -3), pytest.approx(10 / 3))
    assert second.time_ratio == 1.5 and second.relative == pytest.approx(-40)
    assert main_reference([second, first]) == "a"
    assert [labelled(pair, "a") for pair in (first, second)] == ["b", "c (against b)"]
    with pytest.raises(ConfigError, match="reference='d': has no finished cell"):
        compare(table, "a", "loss", against={"c": "d"})


def test_effect_size_is_that_of_the_paired_t_test() -> None:
    draw = np.random.default_rng(4)
    base, arm = draw.normal(2, 0.1, 12), draw.normal(1.9, 0.1, 12)
    (pair,) = compare({"base": by_seed(*base), "arm": by_seed(*arm)}, "base", "loss")
    assert pair.d_z is not None
    assert pair.d_z * math.sqrt(12) == pytest.approx(stats.ttest_rel(arm, base).statistic)


def test_verdicts_follow_the_direction_and_the_correction() -> None:
    draw = np.random.default_rng(0)
    base = draw.normal(2.0, 0.3, 10)
    effects = {"better": -0.1, "worse": 0.1, "same": 0.0}
    table = {"base": by_seed(*base)} | {
        name: by_seed(*(base + effect + draw.normal(0, 0.03, 10))) for name, effect in effects.items()
    }
    down = compare(table, "base", "test_loss")
    assert [pair.verdict for pair in down] == ["better", "worse", "no difference found"]
    assert [pair.verdict for pair in compare(table, "base", "test_accuracy")][:2] == ["worse", "better"]
    assert [pair.p_corrected for pair in down] == pytest.approx(holm([pair.p for pair in down]))
    # Five seeds cannot say anything, however clear it looks.
    few = {name: {seed: found[seed] for seed in range(5)} for name, found in table.items()}
    assert {pair.verdict for pair in compare(few, "base", "test_loss")} == {"no difference found"}


@pytest.mark.parametrize("arms", [1, 3, 10])
def test_seeds_needed_is_where_the_smallest_p_passes(arms: int) -> None:
    count = seeds_needed(arms)
    for seeds, passes in ((count, True), (count - 1, False)):
        table = {f"arm {number}": by_seed(*[1.0] * seeds) for number in range(arms)}
        # Only one arm differs: the others have p = 1.
        table = {"base": by_seed(*[1.0] * seeds), **table, "arm 0": by_seed(*np.linspace(0.5, 0.6, seeds))}
        assert (compare(table, "base", "loss")[0].verdict == "better") is passes


def test_equal_arms_are_no_difference() -> None:
    same = by_seed(*[0.5] * 8)
    (pair,) = compare({"base": same, "arm": dict(same)}, "base", "loss")
    assert (pair.low, pair.high, pair.p, pair.ties, pair.d_z) == (0.0, 0.0, 1.0, 8, None)
    assert pair.verdict == "no difference found"
    shifted = {seed: 0.1 * seed + 0.1 for seed in range(8)}
    (pair,) = compare({"base": {seed: 0.1 * seed for seed in range(8)}, "arm": shifted}, "base", "loss")
    assert pair.d_z is None  # the spread is rounding
    assert pair.verdict == "worse"


def test_missing_seeds_are_named_and_not_paired() -> None:
    table = {"base": by_seed(1, 2, 3, 4), "arm": {1: 2.5, 3: 4.5, 5: 0.0}, "none": {9: 1.0}}
    arm, none = compare(table, "base", "loss", seeds=range(6))
    assert arm.seeds == (1, 3)
    assert arm.missing == (0, 2, 4, 5)
    assert (arm.mean, arm.reference_mean, arm.difference) == (3.5, 3.0, 0.5)
    assert none.seeds == ()
    assert none.verdict == "too few seeds"
    assert math.isnan(none.difference)
    assert compare(table, "base", "loss")[0].missing == (0, 2, 5, 9)
    with pytest.raises(ConfigError, match="reference='other'"):
        compare(table, "other", "loss")


def test_a_diverged_arm_is_never_better() -> None:
    base = by_seed(*np.linspace(2, 3, 12))
    arm = {seed: value - 0.5 for seed, value in base.items()} | {3: math.nan, 5: math.inf}
    (pair,) = compare({"base": base, "arm": arm}, "base", "loss")
    assert pair.p_corrected < 0.05
    assert pair.diverged == (3, 5)
    assert pair.missing == ()
    assert pair.verdict == "diverged"
    (back,) = compare({"base": base, "arm": arm}, "arm", "loss")
    assert back.reference_diverged == (3, 5)
    assert back.verdict == "worse"


def test_gain_per_time_needs_time() -> None:
    table = {"base": by_seed(2, 2, 2), "arm": by_seed(1, 1, 1)}
    times = {"base": by_seed(1, 1, 1), "arm": by_seed(1.0, 1.005, 1.2)}
    (pair,) = compare(table, "base", "loss", step_ms=times)
    assert pair.extra_time == pytest.approx(0.5)
    assert pair.gain_per_time is None
    assert compare(table, "base", "loss")[0].time_ratio is None


def test_tasks_together() -> None:
    draw = np.random.default_rng(0)

    def task(metric: str, scale: float, effect: float) -> Any:
        base = draw.normal(scale, scale / 10, 10)
        arm = base * (1 + effect) + scale * draw.normal(0, 0.001, 10)
        return compare({"base": by_seed(*base), "arm": by_seed(*arm)}, "base", metric)

    tasks = {"a": task("loss", 1, -0.02), "b": task("accuracy", 100, 0.04), "c": task("loss", 5, 0.0), "d": []}
    (summary,) = summarise(tasks)
    assert summary.better == ("a", "b")
    assert summary.no_difference == ("c",)
    assert summary.worse == ()
    assert summary.absent == ("d",)
    assert summary.gain == pytest.approx(2.0, abs=0.1)
    assert summary.gains["b"] == pytest.approx(4.0, abs=0.1)
    assert (summary.low, summary.high) == interval(list(summary.gains.values()))
    sizes = [tasks["a"][0].d_z * -1, tasks["b"][0].d_z, tasks["c"][0].d_z * -1]
    assert summary.standardised == pytest.approx(np.mean(sizes))


def test_cells_are_read_back(tmp_path: Path) -> None:
    write_comparison(tmp_path, {"plain": 0.0, "learned eps": -0.1}, seeds=3)
    cells = read_cells(tmp_path, ["plain", "learned eps"])
    assert [(cell.arm, cell.seed) for cell in cells] == [(a, s) for a in ("plain", "learned eps") for s in range(3)]
    assert [cell.arm for cell in read_cells(tmp_path, ["learned eps"])] == ["learned eps"] * 3
    raw = json.loads(cells[4].path.read_text())
    assert vars(cells[4]) == {**vars(cells[4]), **{key: raw[key] for key in raw if key in vars(cells[4])}}
    assert values(cells, "test_loss")["plain"][2] == cells[2].metrics["test_loss"]
    assert step_times(cells)["learned eps"][0] == cells[3].step_ms
    out = write_csv(cells, tmp_path / "results.csv")
    with out.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == ["task", "arm", "seed", "metric", "value", "seconds", "step_ms"]
    assert len(read) == len(tidy(cells)) == 12
    assert float(read[0]["value"]) == cells[0].metrics["test_loss"]
    with pytest.raises(ConfigError, match="cannot be written"):
        write_csv(cells, tmp_path / "no" / "results.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "task": "a', "is torn or no JSON"),
        ("", "is torn or no JSON"),
        ("[1, 2]", "is not the result of a cell"),
        ('{"name": "package.json"}', "is not the result of a cell"),
        (json.dumps(result("a", 0, {}, schema=2)), "has schema 2, this version reads 1"),
        (json.dumps(result("a", 0, {}, seed="0")), "seed='0' is no int"),
        (json.dumps(result("a", 0, {}, step_ms=True)), "step_ms=True is no float"),
        (json.dumps(result("a", 0, {}, metrics=[1])), "metrics=[1] is no mapping"),
        (json.dumps(result("a", 0, {}, metrics={"loss": "low"})), "loss='low' is no float"),
        (json.dumps(result("a", 0, {}, entropy_steps=[1])), "differ in length"),
        (json.dumps(result("a", 0, {}, entropy_mean=None)), "entropy_mean=None is no list"),
        (json.dumps({k: v for k, v in result("a", 0, {}).items() if k != "weights"}), "weights=None is no str"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(LogError) as caught:
        read_cell(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_make_no_sense_are_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="has no finished cell"):
        read_cells(tmp_path)
    with pytest.raises(LogError, match="cannot be read"):
        read_cell(tmp_path / "result.json")
    write_cell(tmp_path, result("A", 0, {"loss": 1.0}))
    twice = write_cell(tmp_path, result("B", 0, {"loss": 1.0}))
    twice.write_text(json.dumps(result("A", 0, {"loss": 1.0})))
    with pytest.raises(LogError, match="'A', seed 0, and so is"):
        read_cells(tmp_path)
    twice.write_text(json.dumps(result("B", 0, {"acc": 1.0}, task="another")))
    with pytest.raises(LogError, match="is of task 'another'"):
        read_cells(tmp_path)
    twice.write_text(json.dumps(result("B", 0, {"acc": 1.0})))
    with pytest.raises(LogError, match=r"b/seed-0/result.json: has no metric 'loss'"):
        values(read_cells(tmp_path), "loss")
    with pytest.raises(ConfigError, match="Metrics: loss, acc"):
        values(read_cells(tmp_path), "los")


def test_null_and_nan_are_divergence(tmp_path: Path) -> None:
    for seed, value in enumerate([None, math.nan]):
        cell = read_cell(write_cell(tmp_path, result("A", seed, {"loss": value})))
        assert math.isnan(cell.metrics["loss"])


def test_other_starts_are_named(tmp_path: Path) -> None:
    write_comparison(tmp_path, {"plain": 0.0, "arm": 0.0}, seeds=2)
    assert unpaired(read_cells(tmp_path), "plain") == []
    path = tmp_path / "cells" / "arm" / "seed-1" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "x", "batches": "y"}))
    assert unpaired(read_cells(tmp_path), "plain") == [
        "arm, seed 1: other initial weights and order of batches than plain"
    ]


def test_without_scipy_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(EAFOError, match=r"pip install 'eafo-dynamic\[examples\]'"):
        interval([1.0, 2.0])


def test_statistics_load_nothing_heavy() -> None:
    compare = "eafo_dynamic.experiments.compare"
    code = f"import sys, {compare}.paired, {compare}.results, {compare}.across;"
    code += "print([m for m in ('scipy', 'matplotlib', 'pandas', 'lightning', 'torch', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
