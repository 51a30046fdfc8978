"""Plans, cells and the runner: what is compared is comparable, kept, and resumed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eafo_dynamic.apply.surgery import wrap
from eafo_dynamic.cli import main
from eafo_dynamic.errors import ConfigError, EAFOError
from eafo_dynamic.experiments import Classifier
from eafo_dynamic.experiments.compare.cell import finished, result_path, run_cell
from eafo_dynamic.experiments.compare.compose import compose, differences, flat
from eafo_dynamic.experiments.compare.plan import Plan, read_plan
from eafo_dynamic.experiments.compare.runner import Failure, cells, run
from eafo_dynamic.experiments.compare.witness import weights_hash

ROOT = Path(__file__).parents[2]
PLANS = sorted(
    path
    for kind in ("compare", "study", "evidence")
    for path in (ROOT / "configs").glob(f"{kind}_*.yaml")
    if "evidence_fashion" not in path.name  # test_experiments_published.py writes the files that these need
)

SMALL = {
    "task": str(ROOT / "configs" / "wine_mlp.yaml"),
    "seeds": 2,
    "metric": "test_loss",
    "settings": {"trainer.max_epochs": 3},
    "arms": {
        "relu": None,
        "observed": {"eafo": {"policy": "frozen", "eps_init": 0.0, "update_every_n_steps": 2}},
        "learned": {"eafo": {"policy": "learned", "update_every_n_steps": 2}},
        "gelu": {"activation": "gelu"},
    },
}


def plan_of(folder: Path, **changes: Any) -> Plan:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return read_plan(path, folder / "out")


def kept(plan: Plan, arm: str, seed: int) -> dict[str, Any]:
    return json.loads(result_path(plan, plan.arm(arm), seed).read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = plan_of(tmp_path_factory.mktemp("small plan"))
    assert run(plan, cells(plan), jobs=1) == []
    return plan


def test_arms_of_a_seed_start_from_the_same_weights_and_see_the_same_batches(small: Plan) -> None:
    for seed in small.seeds:
        results = [kept(small, arm.name, seed) for arm in small.arms]
        assert len({result["weights"] for result in results}) == 1
        assert len({result["batches"] for result in results}) == 1
    first, second = (kept(small, "relu", seed) for seed in small.seeds)
    assert first["weights"] != second["weights"]
    assert first["batches"] != second["batches"]


def test_observing_changes_nothing_and_correcting_does(small: Plan) -> None:
    for seed in small.seeds:
        plain, observed, learned = (kept(small, arm, seed)["metrics"] for arm in ("relu", "observed", "learned"))
        assert observed == plain, "eps = 0 is the base bit for bit, through a whole training"
        assert learned["test_loss"] != plain["test_loss"]


def test_result_holds_what_the_log_says(small: Plan) -> None:
    result = kept(small, "learned", 1)
    assert set(result["eps_last"]) == {"model.2", "model.4", "model.6"}
    assert result["entropy_mean"][0] == result["entropy_first"]
    assert result["entropy_steps"] == sorted(result["entropy_steps"])
    assert result["steps"] == 9 and result["step_ms"] > 0
    assert kept(small, "gelu", 1)["entropy_last"] is None


def test_cell_alone_equals_the_cell_among_others(small: Plan, tmp_path: Path) -> None:
    alone = plan_of(tmp_path)
    run_cell(alone, alone.arm("learned"), 1)
    assert kept(alone, "learned", 1)["metrics"] == kept(small, "learned", 1)["metrics"]


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[Failure]]:
    """Two cells that can be trained, and two that cannot, in two processes; to start them takes long."""
    bad = {"eafo": {"target_modules": ["nope"]}}
    clip = {"set": {"trainer.gradient_clip_algorithm": "nonsense"}}
    arms = {"relu": None, "bad": bad, "clip": clip, "learned": SMALL["arms"]["learned"]}
    plan = plan_of(tmp_path_factory.mktemp("parallel plan"), arms=arms, seeds=[1])
    return plan, run(plan, cells(plan), jobs=2)


def test_parallel_processes_give_the_same_results(small: Plan, parallel: tuple[Plan, list[Failure]]) -> None:
    plan, _ = parallel
    for arm in ("relu", "learned"):
        assert kept(plan, arm, 1)["metrics"] == kept(small, arm, 1)["metrics"]


def test_a_bad_cell_leaves_the_others_and_says_the_same_in_any_process(parallel: tuple[Plan, list[Failure]]) -> None:
    plan, failures = parallel
    assert [finished(plan, arm, 1) for arm in plan.arms] == [True, False, False, True]
    assert sorted(failures) == sorted(run(plan, cells(plan), jobs=1))
    assert {failure.what for failure in failures} == {"bad, seed 1", "clip, seed 1"}
    assert any("target_modules='nope' matches no activation" in failure.why for failure in failures)


def test_finished_cells_are_kept_and_changed_plans_refused(small: Plan, tmp_path: Path) -> None:
    before = result_path(small, small.arm("relu"), 0).stat().st_mtime_ns
    assert run(small, cells(small), jobs=1) == []
    assert result_path(small, small.arm("relu"), 0).stat().st_mtime_ns == before
    other = plan_of(tmp_path, settings={"trainer.max_epochs": 4})
    other = Plan(**{**vars(other), "directory": small.directory})
    with pytest.raises(ConfigError, match="other settings of arm 'relu'"):
        finished(other, other.arm("relu"), 0)


def test_damaged_result_is_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    path = result_path(plan, plan.arm("relu"), 0)
    path.parent.mkdir(parents=True)
    path.write_text('{"finger')
    with pytest.raises(ConfigError, match=r"is damaged\. Delete the file"):
        finished(plan, plan.arm("relu"), 0)


@pytest.mark.slow
def test_killed_run_goes_on(small: Plan, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, settings={"trainer.max_epochs": 3})
    command = [sys.executable, "-m", "eafo_dynamic", "compare", "--config", str(tmp_path / "plan.yaml")]
    command += ["--out", str(plan.directory), "--no-tables"]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(plan.directory.rglob("result.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = {path: path.stat().st_mtime_ns for path in plan.directory.rglob("result.json")}
    assert 0 < len(done) < len(cells(plan)), "killed too late to show anything"
    assert main(command[3:]) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    for arm, seed in cells(plan):
        assert kept(plan, arm.name, seed)["metrics"] == kept(small, arm.name, seed)["metrics"]


def test_failing_cells_do_not_stop_the_others(tmp_path: Path) -> None:
    arms = {"relu": None, "broken": {"set": {"trainer.max_epochs": 1, "trainer.gradient_clip_algorithm": "nonsense"}}}
    plan = plan_of(tmp_path, arms=arms, seeds=[3])
    failures = run(plan, cells(plan), jobs=1)
    assert [failure.what for failure in failures] == ["broken, seed 3"]
    assert "\n" not in failures[0].why and "nonsense" in failures[0].why
    assert finished(plan, plan.arm("relu"), 3)


def test_weights_hash_does_not_see_corrections() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    before = weights_hash(model)
    wrap(model)
    assert any("eafo_" in key for key in model.state_dict())
    assert weights_hash(model) == before
    with torch.no_grad():
        model[0].bias[0] += 1e-7
    assert weights_hash(model) != before


def test_an_arm_differs_in_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, arms={**SMALL["arms"], "slow": {"set": {"model.init_args.lr": 1e-4}}})
    said = {arm.name: differences(plan, arm) for arm in plan.arms}
    assert said["relu"] == []
    assert said["gelu"] == ["model.init_args.model.init_args.activation: gelu (relu)"]
    assert said["slow"] == ["model.init_args.lr: 0.0001 (0.001)"]
    assert [each.partition(":")[0] for each in said["learned"]] == ["eafo.policy", "eafo.update_every_n_steps"]


def test_every_seed_key_is_set(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    leaves = flat(compose(plan, plan.arms[0], 7, tmp_path))
    assert [leaves[key] for key in plan.seed_keys] == [7, 7, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {}}, "plan='arm': unknown key. Did you mean 'arms'"),
        ({"task": "missing.yaml"}, "task='missing.yaml': there is no file"),
        ({"task": None}, "task=None: the plan must name it"),
        ({"metric": 3}, "metric=3: the plan must name it"),
        ({"reference": "rleu"}, "arm='rleu': the plan has no such arm. Did you mean 'relu'"),
        ({"arms": {"a": {}}}, "needs two arms"),
        ({"arms": {"a": {}, "b": {}}}, "arms='b': is the same as 'a'"),
        ({"arms": {"a b": {}, "A  b": {"activation": "gelu"}}}, "has the name of 'a b'"),
        ({"arms": {"a": {}, "b": {"activation": "gelu", "against": "c"}}}, "arm='c': the plan has no such arm"),
        ({"arms": {"a": {"against": "b"}, "b": {"activation": "gelu"}}}, "arms.a.against='b': the reference is"),
        ({"arms": {"a": {}, "b": {"activation": "gelu", "against": "b"}}}, "arms.b.against='b': is itself compared"),
        ({"arms": {"a": {}, "../b": {"activation": "gelu"}}}, "is no name for an arm"),
        ({"arms": {"a": {}, "b": {"policy": "learned"}}}, "arms.b='policy': unknown key"),
        ({"arms": {"a": {}, "b": {"eafo": "learned"}}}, "arms.b.eafo='learned': is no mapping"),
        ({"arms": {"a": {}, "b": {"eafo": {"policy": "lerned"}}}}, "arm 'b': policy='lerned': no such policy"),
        ({"arms": {"a": {}, "b": {"eafo": {"eps": 0.1}}}}, "arm 'b': .*unknown option 'eps'"),
        ({"arms": {"a": {}, "b": {"activation": "swish"}}}, "arm 'b': activation='swish': no such activation"),
        ({"arms": {"a": {}, "b": {"set": {"seed_everything.x": 1}}}}, "'seed_everything' is no mapping"),
        ({"seeds": 0}, "seeds=0: is neither"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"seeds": "ten"}, "seeds='ten': is neither"),
        ({"threads": 0}, "threads=0: must be at least 1"),
        ({"higher_is_better": "false"}, "higher_is_better='false': is neither true nor false. Write true or false"),
        ({"higher_is_better": 0}, "higher_is_better=0: is neither true nor false"),
        ({"select": "nope"}, "select='nope': does not tell by its name whether higher is better. Name a metric"),
        ({"select": ["val_loss"]}, r"select=\['val_loss'\]: is no name of a metric"),
        ({"settings": {"data.init_args.name": "vine"}}, "arm 'relu': .*vine"),
    ],
)
def test_mistakes_cost_one_line_before_anything_runs(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    assert main(["compare", "--config", str(path), "--out", str(tmp_path / "out"), "--no-tables"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    import re

    assert re.search(message, error), error
    assert not list(tmp_path.rglob("result.json"))


def test_yaml_that_would_build_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("task: !!python/object/apply:os.system ['touch made']\n")
    with pytest.raises(ConfigError, match="is not plain YAML"):
        read_plan(path)
    path.write_text("{task: a.yaml, lr: 1e-3}")
    with pytest.raises(ConfigError, match="unknown key"):
        read_plan(path)


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    (tmp_path / "t.yaml").write_text("{model: {}, data: {}}")
    path.write_text(
        "{task: t.yaml, metric: test_loss, arms: {plain: {}},"
        " sweep: {option: eafo.lr, values: [1e-3, 2E-2, null], arm: {}}}"
    )
    plan = read_plan(path)
    assert [arm.swept for arm in plan.arms] == [None, 1e-3, 2e-2, None]
    assert [arm.name for arm in plan.arms] == ["plain", "lr=0.001", "lr=0.02", "lr=None"]
    assert plan.arms[1].eafo == {"lr": 1e-3}


def test_each_value_of_a_sweep_may_have_its_own_reference(tmp_path: Path) -> None:
    names = ["relu", "gelu"]
    sweep = {"option": "activation", "values": names, "arm": {"eafo": {}, "against": "{}"}}
    plan = plan_of(tmp_path, arms={name: {"activation": name} for name in names}, sweep=sweep)
    assert [arm.against for arm in plan.arms] == [None, None, "relu", "gelu"]


def test_listed_commands_are_the_open_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path, seeds=[0])
    run_cell(plan, plan.arm("relu"), 0)
    arguments = ["compare", "--config", str(tmp_path / "plan.yaml"), "--out", str(plan.directory)]
    assert main([*arguments, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    words = shlex.split(lines[0])
    assert words[0] == "eafo-dynamic"
    assert main(words[1:]) == 0
    assert finished(plan, plan.arm("observed"), 0)
    capsys.readouterr()
    assert main([*arguments, "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_seeds_that_are_not_in_the_plan_are_run_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(
        tmp_path, seeds=[0], settings={"trainer.max_epochs": 1}, arms={"relu": None, "gelu": SMALL["arms"]["gelu"]}
    )
    arguments = ["compare", "--config", str(tmp_path / "plan.yaml"), "--out", str(plan.directory)]
    assert main([*arguments, "--seeds", "40", "7", "40"]) == 0
    assert [finished(plan, plan.arm("relu"), seed) for seed in (0, 7, 40)] == [False, True, True]
    out = capsys.readouterr().out
    assert "has not finished seed 0." in out and "not in the plan" not in out
    run_cell(plan, plan.arm("relu"), 0)
    run_cell(plan, plan.arm("gelu"), 0)
    assert main([*arguments, "--show", "--seeds", "7", "40", "--format", "json"]) == 0
    assert [row["n"] for row in json.loads(capsys.readouterr().out)] == ["3", "3"]
    assert main([*arguments, "--show"]) == 0
    assert "Finished, but not in the plan: seed 7, 40. --seeds adds them." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_lightning_would_change_are_refused(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_of(tmp_path)
    assert main(["compare", "--config", str(tmp_path / "plan.yaml"), "--check", "--seeds", str(seed)]) == 2
    assert f"--seeds={seed}: is no seed. Write a number from 0" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"seeds={seed}: is no seed"):
        plan_of(tmp_path, seeds=[seed])


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"metric": "test_los"}, "metric='test_los'"),
        ({"also": ["test_loss", "val_acuracy"]}, "also='val_acuracy'"),
        ({"select": "vall_loss"}, "select='vall_loss'"),
    ],
)
def test_check_refuses_a_metric_that_no_arm_logs(
    changes: dict[str, Any], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {"relu": None, "learned": SMALL["arms"]["learned"]}
    plan = plan_of(tmp_path, higher_is_better=False, arms=arms, **changes)
    arguments = ["compare", "--config", str(tmp_path / "plan.yaml"), "--out", str(plan.directory), "--check"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{option}: no arm logs such a metric. There are: train_loss, val_loss" in error
    assert error.count("\n") == 1 and "eafo/" not in error
    assert not list(plan.directory.rglob("*")), "nothing of what was tried is kept"


def test_check_takes_a_metric_that_only_one_arm_logs(tmp_path: Path) -> None:
    own = {"set": {"model.class_path": f"{__name__}.Verbose"}}
    plan = plan_of(tmp_path, metric="own_loss", arms={"relu": None, "own": own})
    assert main(["compare", "--config", str(tmp_path / "plan.yaml"), "--out", str(plan.directory), "--check"]) == 0


def test_check_names_the_arm_whose_first_step_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path, settings={"trainer.gradient_clip_val": 1.0, "trainer.gradient_clip_algorithm": "nonsense"})
    assert main(["compare", "--config", str(tmp_path / "plan.yaml"), "--out", str(plan.directory), "--check"]) == 2
    assert "error: arm 'relu': " in capsys.readouterr().err


class Verbose(Classifier):
    """Logs one metric more, while it trains."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("own_loss", loss)
        return loss


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_included_can_be_built(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--config", str(path), "--out", str(tmp_path), "--check"]) == 0
    assert "the reference" in capsys.readouterr().out


def test_an_error_in_one_arm_names_the_arm(tmp_path: Path) -> None:
    from eafo_dynamic.experiments.compare.cell import check

    plan = plan_of(tmp_path, arms={"relu": None, "wild": {"eafo": {"max_eps": -1}}})
    with pytest.raises(EAFOError, match="arm 'wild': max_eps"):
        check(plan)
