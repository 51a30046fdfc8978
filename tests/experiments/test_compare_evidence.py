"""Several comparisons on one page: the best of each task, what is within noise of it, and questions across tasks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import yaml
from fabricate_cells import result, write_cell
from figures import assert_inside

from eafo_dynamic.cli import main
from eafo_dynamic.errors import ConfigError, LogError
from eafo_dynamic.experiments.compare import figures
from eafo_dynamic.experiments.compare.early import predictions
from eafo_dynamic.experiments.compare.evaluation import Evaluation
from eafo_dynamic.experiments.compare.evidence import arms_table, write_page
from eafo_dynamic.experiments.compare.plan import read_plan
from eafo_dynamic.experiments.compare.questions import Question, question_pairs, read_questions, sentence
from eafo_dynamic.experiments.compare.ranking import Near, near_best

ROOT = Path(__file__).parents[2]
ARMS: dict[str, Any] = {
    "relu": {},
    "elu": {"activation": "elu"},
    "prelu": {"activation": "prelu"},
    "held": {"eafo": {"policy": "static", "terms": "free"}},
    "default": {"eafo": {}},
}
EFFECTS = {
    "one": {"relu": 0.0, "elu": -0.2, "prelu": -0.1, "held": -0.2, "default": -0.3},
    "two": {"relu": 0.0, "elu": 0.3, "prelu": 0.0, "held": 0.1, "default": 0.1001},
}
TEXTS = matplotlib.text.Text


def write_plan(folder: Path, name: str, arms: dict[str, Any] = ARMS, **changes: Any) -> Path:
    plan = {
        "title": name,
        "task": str(ROOT / "configs" / "wine_mlp.yaml"),
        "seeds": 8,
        "metric": "test_loss",
        "arms": arms,
        "directory": str(folder / "out" / name),
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def write_cells(folder: Path, name: str, effects: dict[str, float], **other: Any) -> None:
    draw = np.random.default_rng(len(name) + len(effects))
    for arm, effect in effects.items():
        for seed in range(8):
            loss = 2.0 + 0.05 * seed + effect + float(draw.normal(0, 0.01))
            losses = [loss + 1.0, loss + 0.3, loss]
            curve = {"step": [10, 20, 30], "seconds": [1.0, 2.0, 3.0 + effect], "val_loss": losses}
            cell = result(arm, seed, {"test_loss": loss, "val_loss": loss}, task=name, curve=curve, **other)
            write_cell(folder / "out" / name, cell)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evidence")
    for name, effects in EFFECTS.items():
        write_plan(path, name)
        write_cells(path, name, effects)
    return path


@pytest.fixture(scope="module")
def evaluations(folder: Path) -> list[Evaluation]:
    return [Evaluation(read_plan(folder / f"{name}.yaml")) for name in EFFECTS]


def test_near_best_by_hand() -> None:
    table = {
        "a": {seed: 1.0 + seed for seed in range(6)},
        "b": {seed: 1.0 + seed + (0.1 if seed % 2 else -0.08) for seed in range(6)},
        "c": {seed: 1.5 + seed + 0.01 * seed for seed in range(6)},
        "diverged": {**dict.fromkeys(range(5), 0.0), 5: math.nan},
    }
    table["of one seed"] = {0: -9.0}
    near = near_best(table, range(6), higher_is_better=False)
    assert near == Near("a", ("b",))
    assert near_best(table, range(6), higher_is_better=True) == Near("c", ())
    assert near_best(table, [0], higher_is_better=False) == Near("of one seed", ()), "no interval from one seed"
    assert near_best({"a": {0: 1.0}, "b": {1: 1.0}}, [0, 1], higher_is_better=False) is None


def test_table_marks_the_best_and_what_is_within_noise(evaluations: list[Evaluation]) -> None:
    table = {row["arm"]: row for row in arms_table(evaluations)}
    assert list(table) == list(ARMS)
    assert table["default"]["one"].startswith("**-")
    assert table["elu"]["one"][0] == "-"
    assert {arm for arm in ARMS if table[arm]["two"].startswith("*")} == {"relu", "prelu"}
    number = float(table["default"]["one"].strip("*"))
    pair = next(pair for pair in evaluations[0].pairs["test_loss"] if pair.arm == "default")
    assert number == pytest.approx(pair.relative, abs=0.05)


def test_an_arm_that_is_not_finished_says_so(tmp_path: Path) -> None:
    write_plan(tmp_path, "one", seeds=9)
    write_cells(tmp_path, "one", EFFECTS["one"])
    for arm in ("relu", "default"):
        write_cell(tmp_path / "out" / "one", result(arm, 8, {"test_loss": 2.0}, task="one"))
    table = {row["arm"]: row["one"] for row in arms_table([Evaluation(read_plan(tmp_path / "one.yaml"))])}
    assert table["default"].startswith("**-") and table["default"].endswith("**")
    assert table["held"].startswith("-") and table["held"].endswith(" (8 of 9 seeds)")


def test_questions_are_answered_task_by_task(evaluations: list[Evaluation]) -> None:
    pairs = question_pairs(Question("?", "default", "held"), evaluations)
    assert {title: pair.verdict for title, pair in pairs.items()} == {"one": "better", "two": "no difference found"}
    apart = sentence(pairs, {"one": "a", "two": "b"})
    assert apart.startswith("Better in 1 of 2, worse in 0; mean gain +") and "over 2 tasks (p " in apart
    together = sentence(pairs, {"one": "a", "two": "a"})
    assert together == apart[: apart.index(" [")] + ".", "one task at two lengths has no interval over tasks"
    plain = question_pairs(Question("?", "default", "best"), evaluations)
    assert {title: pair.reference for title, pair in plain.items()} == {"one": "elu", "two": "relu"}
    assert {title: pair.verdict for title, pair in plain.items()} == {"one": "better", "two": "worse"}
    assert plain["one"].p_corrected >= 2 * plain["one"].p - 1e-12, "corrected for two tasks"
    assert question_pairs(Question("?", "default", "absent"), evaluations) == {}
    reference = question_pairs(Question("?", "default", "reference"), evaluations)
    assert {pair.reference for pair in reference.values()} == {"relu"}


def test_a_question_is_about_the_plans_seeds_and_sees_divergence(tmp_path: Path) -> None:
    write_plan(tmp_path, "one")
    write_cells(tmp_path, "one", EFFECTS["one"])
    for arm in ("relu", "default"):
        write_cell(tmp_path / "out" / "one", result(arm, 99, {"test_loss": 50.0}, task="one"))
    question = Question("?", "default", "relu")
    (pair,) = question_pairs(question, [Evaluation(read_plan(tmp_path / "one.yaml"))]).values()
    assert (len(pair.seeds), pair.verdict) == (8, "better")
    torn = tmp_path / "out" / "one" / "cells" / "default" / "seed-3" / "result.json"
    torn.unlink()
    torn.parent.rmdir()
    write_cell(tmp_path / "out" / "one", result("default", 3, {"test_loss": math.nan}, task="one"))
    (pair,) = question_pairs(question, [Evaluation(read_plan(tmp_path / "one.yaml"))]).values()
    assert (len(pair.seeds), pair.verdict) == (7, "diverged")


def test_a_correction_is_held_against_the_base_it_sits_on(tmp_path: Path) -> None:
    arms = {**ARMS, "best base default": {"activation": "elu", "eafo": {}}}
    write_plan(tmp_path, "one", arms)
    write_cells(tmp_path, "one", {**EFFECTS["one"], "relu": -0.5, "best base default": -0.3})
    one = Evaluation(read_plan(tmp_path / "one.yaml"))
    best = question_pairs(Question("?", "best base default", "best"), [one])["one"]
    assert (best.reference, best.verdict) == ("relu", "worse")
    base = question_pairs(Question("?", "best base default", "base"), [one])["one"]
    assert (base.reference, base.verdict) == ("elu", "better")
    assert question_pairs(Question("?", "default", "base"), [one])["one"].reference == "relu"
    without = {"relu": {}, "prelu default": {"activation": "prelu", "eafo": {}}}
    write_plan(tmp_path, "two", without)
    write_cells(tmp_path, "two", {"relu": 0.0, "prelu default": -0.1})
    two = Evaluation(read_plan(tmp_path / "two.yaml"))
    assert question_pairs(Question("?", "prelu default", "base"), [two]) == {}, "no plain arm has PReLU"


def test_cells_that_do_not_fit_the_plan_are_named(evaluations: list[Evaluation]) -> None:
    assert "default, seed 0, 1, 2, 3, 4, 5, 6, 7: made with other settings" in " ".join(evaluations[0].doubts)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_early_entropies_that_order_as_the_end_does_correlate(tmp_path: Path, sign: float) -> None:
    write_plan(tmp_path, "one")
    write_cells(tmp_path, "one", EFFECTS["one"])
    observed = {
        name: {**ARMS[name], "eafo": {"policy": "frozen", "eps_init": 0.0}} for name in ("relu", "elu", "prelu")
    }
    observed["default"] = {"activation": "gelu", "eafo": {"policy": "frozen", "eps_init": 0.0}}
    write_plan(tmp_path, "one_early", observed)
    for arm, entropy in {"relu": 1.3, "prelu": 1.2, "elu": 1.1, "default": 1.0}.items():
        write_cells(tmp_path, "one_early", {arm: entropy}, entropy_first=0.0, entropy_last=sign * entropy, steps=20)
    early = Evaluation(read_plan(tmp_path / "one_early.yaml"))
    final = [Evaluation(read_plan(tmp_path / "one.yaml"))]
    (found,) = predictions([early], final)
    assert (found.task, found.arms, found.correlation) == ("one", 4, pytest.approx(sign))
    assert found.share == pytest.approx(0.2)
    assert found.without_one == (pytest.approx(sign), pytest.approx(sign))
    assert found.of_metric == pytest.approx(1.0)
    page, *_ = write_page(final, [], tmp_path / "page.md", early=[early])
    assert f"early entropy and final metric {sign:+.2f}, tasks: 1;" in page.read_text(), "one task has no interval"


def test_figure_over_tasks_shows_every_arm_asked_for(evaluations: list[Evaluation]) -> None:
    tasks = {each.plan.title: each.pairs["test_loss"] for each in evaluations}
    figure = figures.over_tasks(tasks, ["default", "held"])
    marks = [found.get_offsets() for found in figure.axes[0].collections]
    assert len(marks) == 4
    pair = next(pair for pair in tasks["one"] if pair.arm == "default")
    assert float(np.asarray(marks[0])[0, 0]) == pytest.approx(pair.relative)
    assert_inside(figure)
    with pytest.raises(LogError, match="no task has a finished cell of absent"):
        figures.over_tasks(tasks, ["absent"])


def test_curves_are_relative_to_the_reference(evaluations: list[Evaluation]) -> None:
    figure = figures.loss_curves(evaluations[0].cells, "relu")
    steps, seconds = figure.axes
    assert "optimiser steps" in steps.get_xlabel() and "seconds" in seconds.get_xlabel()
    lines = {line.get_label(): line for line in steps.get_lines()}
    losses = {
        arm: {cell.seed: cell.curve["val_loss"][-1] for cell in evaluations[0].cells if cell.arm == arm}
        for arm in ("relu", "default")
    }
    expected = np.mean([losses["default"][seed] / losses["relu"][seed] - 1 for seed in range(8)])
    assert lines["default"].get_ydata()[-1] == pytest.approx(100 * expected)
    assert_inside(figure)
    bare = [cell for cell in evaluations[0].cells if cell.arm != "relu"]
    with pytest.raises(LogError, match="no finished cell of relu has a curve"):
        figures.loss_curves(bare, "relu")


def test_page_from_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "evidence.md"
    plans = [str(folder / f"{name}.yaml") for name in EFFECTS]
    questions = str(ROOT / "configs" / "arms" / "questions.yaml")
    more = ["--questions", questions, "--forest", "default", "held", "--curves", "one"]
    assert main(["compare", "--config", *plans, "--show", "--page", str(page), *more]) == 0
    text = page.read_text()
    assert "Does following the data help against held?" in text
    assert "Better in 1 of 2, worse" in text
    assert "against two scalars" not in text, "no task has that arm"
    assert f"eafo-dynamic compare --config {plans[0]} --jobs 2" in text
    for picture in ("evidence_tasks.png", "evidence_one.png"):
        assert f"({picture})" in text
        assert 5_000 < (page.parent / picture).stat().st_size < 100_000
    assert str(page) in capsys.readouterr().out


@pytest.mark.parametrize("text", ["question: what", "- {question: what, arm: relu}", "- relu"])
def test_bad_questions_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "questions.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--questions=.*Write a list of mappings"):
        read_questions(path)


def test_included_questions_name_arms_of_the_evidence() -> None:
    known = {"reference", "best", "base"}
    for path in (ROOT / "configs" / "arms").glob("evidence_*.yaml"):
        known |= set(yaml.safe_load(path.read_text()))
    for path in (ROOT / "configs").glob("evidence_*.yaml"):
        arms = yaml.safe_load(path.read_text())["arms"]
        if isinstance(arms, dict):  # of this plan alone
            known |= set(arms)
    for question in read_questions(ROOT / "configs" / "arms" / "questions.yaml"):
        assert {question.arm, question.against} <= known
