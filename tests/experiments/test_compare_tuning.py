"""Learning rates chosen with the same budget for every arm, and the file that carries finished cells."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from eafo_dynamic.cli import main
from eafo_dynamic.errors import ConfigError, LogError
from eafo_dynamic.experiments.compare.cell import finished, restore, result_path
from eafo_dynamic.experiments.compare.evaluation import Evaluation
from eafo_dynamic.experiments.compare.evidence import write_page
from eafo_dynamic.experiments.compare.plan import Plan, read_plan
from eafo_dynamic.experiments.compare.results import read_cell
from eafo_dynamic.experiments.compare.runner import cells, run
from eafo_dynamic.experiments.compare.store import append, read_store
from eafo_dynamic.experiments.compare.tuning import apply_choices, settings_of, tune, untuned

ROOT = Path(__file__).parents[2]
TUNE: dict[str, Any] = {
    "seeds": [900],
    "rates": [0.001, 1.0],
    "own": {"rates": [1.0], "multiples": [0.001, 3.0]},
    "file": "tuned.yaml",
}
SMALL: dict[str, Any] = {
    "task": str(ROOT / "configs" / "wine_mlp.yaml"),
    "seeds": 1,
    "metric": "test_loss",
    "settings": {"trainer.max_epochs": 3},
    "arms": {
        "relu": None,
        "swish beta": {"activation": "swish_beta"},
        "learned": {"eafo": {"policy": "learned", "update_every_n_steps": 2}},
        "observed": {"eafo": {"policy": "frozen", "eps_init": 0.0}},
        "tanh": {"activation": "tanh"},
        "best base": {"activation": "best", "eafo": {"update_every_n_steps": 2}},
    },
    "tune": TUNE,
    "store": "finished.jsonl",
}


def write_plan(folder: Path, **changes: Any) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "directory": str(folder / "out"), **changes}, sort_keys=False))
    return path


def plan_of(folder: Path, **changes: Any) -> Plan:
    return read_plan(write_plan(folder, **changes))


def kept(plan: Plan, arm: str) -> dict[str, Any]:
    return json.loads(result_path(plan, plan.arm(arm), 0).read_text())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = plan_of(tmp_path_factory.mktemp("tuned plan"))
    assert tune(plan, None, jobs=1) == []
    return plan


def test_every_arm_tries_as_many_settings(tuned: Plan) -> None:
    assert tuned.tuning is not None
    tried = {arm.name: [setting.label for setting in settings_of(tuned.tuning, arm)] for arm in tuned.arms}
    assert tried == {
        "relu": ["rate 0.001", "rate 1"],
        "swish beta": ["rate 1 own 0.001", "rate 1 own 3"],
        "learned": ["rate 1 own 0.001", "rate 1 own 3"],
        "observed": ["rate 0.001", "rate 1"],
        "tanh": ["rate 0.001", "rate 1"],
        "best base": ["rate 1 own 0.001", "rate 1 own 3"],
    }


def test_choice_is_the_best_in_validation_and_written_down(tuned: Plan) -> None:
    assert tuned.tuning is not None
    written = yaml.safe_load(tuned.tuning.file.read_text())
    assert written["metric"] == "val_loss" and written["seeds"] == [900]
    assert list(written["arms"]) == [arm.name for arm in tuned.arms]
    relu = written["arms"]["relu"]
    assert relu["rate"] == 1.0, "a thousandth of the rate learns nothing in three epochs"
    assert relu["tried"]["rate 1"] < relu["tried"]["rate 0.001"]
    for choice in written["arms"].values():
        own = "" if choice["multiple"] is None else f" own {choice['multiple']:g}"
        assert choice["tried"][f"rate {choice['rate']:g}{own}"] == min(choice["tried"].values())


def test_tuned_cells_have_the_chosen_rates_and_no_seed_of_the_table(tuned: Plan) -> None:
    found = sorted(tuned.directory.glob("tuning/cells/*/seed-*"))
    assert len(found) == 12 and {path.name for path in found} == {"seed-900"}
    chosen = apply_choices(tuned)
    written = yaml.safe_load(tuned.tuning.file.read_text())["arms"]  # type: ignore[union-attr]
    task = yaml.safe_load((ROOT / "configs" / "wine_mlp.yaml").read_text())
    rate = task["model"]["init_args"]["lr"]
    for arm in chosen.arms:
        assert arm.settings["model.init_args.lr"] == pytest.approx(rate * written[arm.name]["rate"])
    beta = chosen.arm("swish beta").settings["model.init_args.activation_lr_multiple"]
    assert beta == written["swish beta"]["multiple"]
    assert chosen.arm("learned").eafo["lr_multiple"] == written["learned"]["multiple"]  # type: ignore[index]
    assert "lr_multiple" not in chosen.arm("observed").eafo  # type: ignore[operator]


def test_best_base_is_the_plain_activation_that_was_best(tuned: Plan) -> None:
    written = yaml.safe_load(tuned.tuning.file.read_text())["arms"]  # type: ignore[union-attr]
    outcome = {name: min(written[name]["tried"].values()) for name in ("relu", "tanh")}
    best = {"relu": None, "tanh": "tanh"}[min(outcome, key=outcome.__getitem__)]
    assert apply_choices(tuned).arm("best base").activation == best


def test_best_base_waits_for_the_plain_arms(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"best base is not known without"):
        tune(plan_of(tmp_path), ["best base"], jobs=1)


def test_an_arm_with_a_choice_is_not_tried_again(tuned: Plan) -> None:
    assert tuned.tuning is not None
    before = tuned.tuning.file.read_text()
    assert untuned(apply_choices(tuned)) == []
    assert tune(tuned, ["relu"], jobs=1) == []
    assert tuned.tuning.file.read_text() == before


def test_finished_cells_come_back_from_the_store(tuned: Plan) -> None:
    plan = apply_choices(tuned)
    assert run(plan, cells(plan, ["relu", "learned"]), jobs=1) == []
    before = {arm: kept(plan, arm) for arm in ("relu", "learned")}
    assert before["relu"]["curve"]["step"] == [3, 6, 9]
    assert before["relu"]["curve"]["val_loss"][-1] == before["relu"]["metrics"]["val_loss"]
    shutil.rmtree(plan.directory / "cells")
    assert restore(plan) == (2, 0)
    assert restore(plan) == (0, 0)
    assert finished(plan, plan.arm("relu"), 0)
    back = read_cell(result_path(plan, plan.arm("learned"), 0))
    tested = {name: value for name, value in before["learned"]["metrics"].items() if not name.startswith("train_")}
    assert back.metrics == pytest.approx(tested, rel=1e-6)
    assert back.task == plan.title
    assert all(len(line) < 450 for line in plan.store.read_text().splitlines())  # type: ignore[union-attr]
    assert back.weights == before["relu"]["weights"]


def test_a_page_says_how_rates_were_chosen(tuned: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = apply_choices(tuned)
    assert run(plan, cells(plan, ["relu", "learned"]), jobs=1) == []
    page, *_ = write_page([Evaluation(plan)], [], tmp_path / "page.md")
    text = page.read_text()
    assert "chosen by val_loss with as many trainings for every arm, on seeds 900;" in text
    assert "a better rate may lie beyond: relu, swish beta," in text, "each grid has one rate or two"
    assert "| relu (reference) | 1 |" in text
    assert f"| learned | 1 x {plan.chosen['learned'].multiple:g} |" in text
    assert "Not trained yet: swish beta, observed, tanh, best base." in text
    again = dataclasses.replace(plan.arm("relu"), name="again")
    twice = dataclasses.replace(plan, arms=(*plan.arms, again))
    assert run(twice, cells(twice, ["again"]), jobs=1) == []
    page, *_ = write_page([Evaluation(twice)], [], tmp_path / "page.md")
    assert "again is relu here: the same trainings, which are counted twice." in page.read_text()


def test_cells_of_other_settings_stay_in_the_store(tuned: Plan) -> None:
    other = plan_of(tuned.directory.parent, settings={"trainer.max_epochs": 4}, directory="elsewhere")
    assert tuned.store is not None and tuned.store.exists()
    assert restore(other) == (0, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"trainer.max_epochs": 4}},
        {"tune": {**TUNE, "rates": [0.002, 1.0], "own": {"rates": [2.0], "multiples": [0.001, 3.0]}}},
        {"arms": {**SMALL["arms"], "relu": {"activation": "elu"}}},
    ],
    ids=["task", "grid", "arm"],
)
def test_a_choice_made_with_other_settings_is_refused(tuned: Plan, change: dict[str, Any]) -> None:
    other = plan_of(tuned.directory.parent, **change)
    with pytest.raises(ConfigError, match=r"'relu' was tuned with another task, arm or grid .* Delete its entry"):
        apply_choices(other)


@pytest.mark.parametrize("entry", [None, {"rate": 1.0}, "1.0"])
def test_a_choice_that_is_not_whole_is_named(tmp_path: Path, entry: object) -> None:
    plan = plan_of(tmp_path)
    kept = {"metric": "val_loss", "seeds": [900], "arms": {"relu": entry}}
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(kept))
    with pytest.raises(ConfigError, match=r"the entry of 'relu' is not whole. Delete it there"):
        apply_choices(plan)


def test_two_plans_share_the_choices_of_one(tuned: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tuned.directory.parent
    write_plan(folder)
    longer = {**SMALL, "settings": {"trainer.max_epochs": 9}, "tune": {"of": "plan.yaml"}, "directory": "elsewhere"}
    (folder / "longer.yaml").write_text(yaml.safe_dump(longer, sort_keys=False))
    plan = apply_choices(read_plan(folder / "longer.yaml"))
    assert untuned(plan) == []
    short = apply_choices(tuned)
    assert plan.chosen == short.chosen
    assert [arm.settings for arm in plan.arms] == [arm.settings for arm in short.arms]
    assert plan.arm("best base") == short.arm("best base")
    assert main(["compare", "--config", str(folder / "longer.yaml"), "--tune"]) == 2
    assert "another plan chooses its rates. Run --tune with" in capsys.readouterr().err
    (folder / "itself.yaml").write_text(yaml.safe_dump({**longer, "tune": {"of": "itself.yaml"}}, sort_keys=False))
    with pytest.raises(ConfigError, match=r"tune.of='itself.yaml': chooses no rates itself"):
        read_plan(folder / "itself.yaml")
    longer["arms"] = {**SMALL["arms"], "relu": {"activation": "elu"}}
    (folder / "longer.yaml").write_text(yaml.safe_dump(longer, sort_keys=False))
    with pytest.raises(ConfigError, match=r"tune.of=.*has no such arm 'relu'"):
        apply_choices(read_plan(folder / "longer.yaml"))


def test_arms_without_a_choice_are_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--config", str(write_plan(tmp_path)), "--arms", "relu"]) == 2
    message = capsys.readouterr().err
    assert "no learning rate has been chosen" in message and "--tune" in message


def test_a_torn_line_of_a_store_is_named(tmp_path: Path) -> None:
    path = tmp_path / "finished.jsonl"
    append(path, {"arm": "relu", "seed": 0, "fingerprint": "f", "metrics": {"test_loss": 1 / 3}})
    path.write_text(path.read_text() + '{"arm": "re')
    with pytest.raises(LogError, match=r"line 2 is torn"):
        read_store(path)


def test_curves_in_a_store_are_short(tmp_path: Path) -> None:
    path = tmp_path / "finished.jsonl"
    curve = {"step": list(range(1, 101)), "val_loss": [1 / step for step in range(1, 101)]}
    append(path, {"arm": "relu", "seed": 0, "fingerprint": "f", "metrics": {"train_loss": 1.0}, "curve": curve})
    (cell,) = read_store(path)
    assert cell["metrics"] == {}
    assert len(cell["curve"]["step"]) == 8
    assert cell["curve"]["step"][0] == 1 and cell["curve"]["step"][-1] == 100


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tune": {**TUNE, "rates": [1.0]}}, r"tune\.rates=\[1\.0\].*as many settings"),
        ({"tune": {**TUNE, "seeds": [0]}}, r"tune\.seeds=\[0\].*in the table too"),
        ({"tune": {**TUNE, "rates": [0.0, 1.0]}}, r"tune\.rates=0\.0.*no positive number"),
        ({"tune": {**TUNE, "file": None}}, r"tune\.file=None.*must say where"),
        ({"tune": {**TUNE, "trials": 3}}, r"tune='trials'.*unknown key"),
        ({"store": 3}, r"store=3.*is no name of a file"),
    ],
)
def test_mistakes_in_a_plan_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, **changes)


def test_a_plan_without_tune_cannot_be_tuned(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the plan has no tune"):
        tune(plan_of(tmp_path, tune=None), None, jobs=1)
