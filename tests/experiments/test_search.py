"""The search: a planted best candidate is found, nothing where there is nothing, and what fails leaves the rest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import search_tasks
import torch
import yaml
from lightning.pytorch import LightningModule
from torch import nn

import eafo_dynamic
from eafo_dynamic.cli import main
from eafo_dynamic.errors import ConfigError, EAFOError, SiteError
from eafo_dynamic.experiments.compare.plan import read_yaml
from eafo_dynamic.experiments.search import Answer, Candidate, Space, search
from eafo_dynamic.experiments.search.candidates import read_space
from eafo_dynamic.experiments.search.swap import swap_activations
from eafo_dynamic.experiments.search.trainings import ConfiguredTask

ROOT = Path(__file__).parents[2]
PLAIN: dict[str, Any] = {"corrections": {"plain": None}}
FIVE = {**PLAIN, "bases": ["own", "tanh", "gelu", "squared_relu", "silu"]}

# Lightning 2.6 with torch 2.13.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]


def find(out: Path, make_data: Any, **options: Any) -> Answer:
    make_model = options.pop("make_model", search_tasks.make_model)
    trainer = {"max_epochs": 6, "accelerator": "cpu", **options.pop("trainer", {})}
    defaults: dict[str, Any] = {"space": FIVE, "seeds": 2, "finalists": 1, "verbose": False}
    return search(make_model, make_data, trainer=trainer, out=out, **{**defaults, **options})


def finished_trainings(out: Path) -> dict[str, int]:
    """Number of trials by study that were trained, whatever their state."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(out / "journal.log")))
    names = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
    studies = {name: optuna.load_study(study_name=name, storage=storage) for name in names}
    return {name: sum("duplicate" not in trial.user_attrs for trial in study.trials) for name, study in studies.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, Path]:
    out = tmp_path_factory.mktemp("search") / "out"
    return find(out, search_tasks.taught_by_tanh), out


def test_a_planted_activation_is_found(found: tuple[Answer, Path]) -> None:
    answer, out = found
    assert answer.best == Candidate("tanh", "tanh")
    assert answer.sentence.startswith("take 'tanh': val_loss")
    assert answer.ranking[0].candidate == "tanh" and answer.ranking[0].outcome == "finalist"
    (pair,) = answer.pairs
    assert pair.verdict == "better" and pair.seeds == tuple(range(2, 10)), "fresh seeds"
    assert answer.snippet.endswith("\ntrainer = Trainer(callbacks=[SwapActivations('tanh')])\n")
    names: dict[str, Any] = {}
    exec(answer.snippet, names)
    assert names["trainer"].callbacks
    assert "take 'tanh'" in (out / "answer.md").read_text()
    assert (out / "answer.png").stat().st_size > 10_000


def test_another_planted_activation_is_found(tmp_path: Path) -> None:
    answer = find(tmp_path, search_tasks.taught_by_squared_relu, pruner="hyperband")
    assert answer.best == Candidate("squared_relu", "squared_relu")


def test_bad_candidates_stop_early_and_good_ones_get_all_seeds(found: tuple[Answer, Path]) -> None:
    answer, _ = found
    rows = {row.candidate: row for row in answer.ranking}
    assert rows["tanh"].seeds == 2
    stopped = [row for row in answer.ranking if row.outcome.startswith("stopped after")]
    assert stopped, [row.outcome for row in answer.ranking]
    assert all(row.relative != row.relative or row.relative < rows["tanh"].relative for row in stopped)


def test_nothing_is_found_where_all_are_equal(tmp_path: Path) -> None:
    equal = {
        "bases": ["own", "celu"],  # elu by another name
        "corrections": {"plain": None, "observed": {"policy": "frozen", "eps_init": 0.0}},
    }
    answer = find(
        tmp_path, search_tasks.taught_by_tanh, make_model=search_tasks.make_elu_model, space=equal, finalists=3
    )
    assert answer.best is None and answer.snippet == ""
    assert answer.sentence.startswith("nothing beats what you have")
    assert {pair.verdict for pair in answer.pairs} == {"no difference found"}
    assert all(pair.difference == 0 for pair in answer.pairs)


def test_nothing_is_found_in_noise(tmp_path: Path) -> None:
    answer = find(tmp_path, search_tasks.noise, make_model=search_tasks.make_small_model, finalists=2)
    assert answer.best is None


def test_a_finished_search_trains_nothing_again(found: tuple[Answer, Path]) -> None:
    answer, out = found
    before = finished_trainings(out)
    assert before == {"reference": 2, "candidates": 4, "confirm": 16}
    again = find(out, search_tasks.taught_by_tanh)
    assert again.sentence == answer.sentence and again.ranking == answer.ranking
    assert finished_trainings(out) == before


def test_another_search_in_the_same_folder_is_refused(found: tuple[Answer, Path]) -> None:
    with pytest.raises(ConfigError, match=r"out=.*holds a search with other settings"):
        find(found[1], search_tasks.taught_by_tanh, trainer={"max_epochs": 7})


def test_an_interrupted_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eafo_dynamic.experiments.search.trainings import MadeTask

    whole = find(tmp_path / "whole", search_tasks.taught_by_tanh)
    real = MadeTask.train
    left = 5

    def train(self: MadeTask, *args: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(MadeTask, "train", train)
    out = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        find(out, search_tasks.taught_by_tanh)
    resumed = find(out, search_tasks.taught_by_tanh)
    assert resumed.best == whole.best
    assert [pair.differences for pair in resumed.pairs] == [pair.differences for pair in whole.pairs]


def test_a_candidate_that_fails_leaves_the_others(tmp_path: Path) -> None:
    space = {**PLAIN, "bases": ["silu", "tanh"]}
    answer = find(tmp_path, search_tasks.taught_by_tanh, make_model=search_tasks.make_complaining, space=space)
    assert answer.best == Candidate("tanh", "tanh")
    rows = {row.candidate: row.outcome for row in answer.ranking}
    assert rows["silu"] == "failed: RuntimeError: out of patience"


@pytest.mark.slow
def test_a_candidate_that_kills_its_process_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = {**PLAIN, "bases": ["silu", "tanh"]}
    options = {"make_model": search_tasks.make_killer, "space": space, "confirm": 6, "jobs": 2}
    answer = find(tmp_path / "out", search_tasks.taught_by_tanh, **options)
    assert answer.best == Candidate("tanh", "tanh")
    rows = {row.candidate: row.outcome for row in answer.ranking}
    assert rows["silu"] == "failed: its process was killed"
    assert search_tasks.CRASHES.read_text() == "xx", "it was tried again, once"


def test_a_model_that_cannot_be_trained_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EAFOError, match="the model as it is cannot be trained: RuntimeError: no such network"):
        find(tmp_path, search_tasks.taught_by_tanh, make_model=search_tasks.failing_model)


def test_a_metric_that_is_not_logged_is_named(tmp_path: Path) -> None:
    with pytest.raises(EAFOError, match=r"metric='val_error': is not logged in validation\. There are: val_loss"):
        find(tmp_path, search_tasks.taught_by_tanh, metric="val_error")


def test_functions_that_cannot_be_sent_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"jobs=2: the task cannot be sent to other processes"):
        find(tmp_path, lambda seed: search_tasks.taught_by_tanh(seed), jobs=2)


@pytest.mark.parametrize(
    "space, message",
    [
        ({"bases": ["rleu"]}, r"bases='rleu': no such activation.*own"),
        ({"corrections": {"wild": {"max_eps": -1}}}, r"corrections\.wild=.*max_eps"),
        ({"corrections": {"wild": {"polciy": "static"}}}, r"corrections\.wild=.*polciy"),
        ({"corrections": {"wild": 3}}, r"corrections\.wild=3: is no mapping"),
        ({"rates": [0]}, r"rates=0: is no positive number"),
        ({"extra": {"mine": {"activation": "elu"}}}, r"extra\.mine='activation': unknown key"),
        ({"extra": {"tanh": {"base": "elu"}}, "bases": ["tanh"], **PLAIN}, r"extra='tanh': is the name of two"),
        ({"base": ["relu"]}, r"--space='base': unknown key"),
        ({"bases": "relu"}, r"bases='relu': is no list"),
        ({"bases": ["own"], **PLAIN}, r"bases=\['own'\]: leave no candidate"),
        ([], r"--space=\[\]: is no mapping"),
    ],
)
def test_mistakes_in_a_space_are_named(space: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_space(space).candidates()


def test_space_is_bases_times_corrections_times_rates() -> None:
    space = Space(
        bases=["own", "elu"],
        corrections={"plain": None, "held": {"policy": "static"}},
        rates=[1.0, 2.0],
        extra={"mine": {"eafo": {"max_eps": 0.5}}},
    )
    assert [each.name for each in space.candidates()] == [
        "own x2",
        "own held",
        "own held x2",
        "elu",
        "elu x2",
        "elu held",
        "elu held x2",
        "mine",
    ]


def test_default_space_can_be_made() -> None:
    names = {each.name for each in Space().candidates()}
    assert {"own held", "own learned", "elu", "elu learned", "squared_relu"} <= names


def test_registered_activations_can_be_bases() -> None:
    @eafo_dynamic.register_activation
    class Kinked(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return torch.where(z > 0, z, 0.3 * z)

    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    assert swap_activations(net, "kinked") == ["1"]
    assert type(net[1]) is Kinked


def test_swap_keeps_shared_modules_shared_and_leaves_outputs_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 3)
            self.act = nn.ReLU()
            self.body = nn.Sequential(nn.Linear(3, 3), self.act)
            self.out = nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.body(self.act(self.first(x))))

    net = Net().eval()
    assert sorted(swap_activations(net, "elu")) == ["act", "body.1"]
    assert isinstance(net.act, nn.ELU) and net.act is net.body[1] and not net.act.training
    assert isinstance(net.out[1], nn.Sigmoid)


def test_swap_refuses_functions() -> None:
    class Functional(LightningModule):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.relu(x)

    with pytest.raises(SiteError, match=r"base='elu': the model has no activation module"):
        swap_activations(Functional(), "elu")


def test_a_configuration_gets_its_snippet(tmp_path: Path) -> None:
    task = ConfiguredTask(ROOT / "configs" / "wine_mlp.yaml", "val_loss")
    candidate = Candidate("elu held x2", "elu", {"policy": "static"}, 2.0)
    snippet = yaml.safe_load(task.snippet(candidate))
    rate = read_yaml(task.path, "task")["model"]["init_args"]["lr"]
    assert snippet == {
        "trainer": {"callbacks": [{"class_path": "eafo_dynamic.EAFOCallback", "init_args": {"policy": "static"}}]},
        "model": {"init_args": {"model": {"init_args": {"activation": "elu"}}, "lr": 2 * rate}},
    }


def test_command_line_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "wine_mlp.yaml")
    space = tmp_path / "space.yaml"
    space.write_text("bases: [own, elu]\ncorrections: {plain: null, default: {}}\n")
    options = [
        "--space",
        str(space),
        "--set",
        "trainer.max_epochs=2",
        "--seeds",
        "1",
        "--confirm",
        "6",
        "--finalists",
        "1",
    ]
    where = ["search", "--config", config, "--out", str(tmp_path / "out"), *options]
    assert main([*where, "--list", "--format", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["candidate"] for row in listed] == ["own default", "elu", "elu default"]
    assert not (tmp_path / "out").exists()
    assert main(where) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^(nothing beats what you have|take '(own|elu))", printed, re.MULTILINE)
    assert "elu default" in printed and "answer.md" in printed


def test_command_line_names_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "wine_mlp.yaml")
    for words, message in {
        ("--bases", "rleu"): "bases='rleu'",
        ("--set", "trainer.max_epochs"): "--set='trainer.max_epochs': is no KEY=VALUE",
        ("--seeds", "0"): "seeds=0",
        ("--confirm", "6"): "confirm=6: with 3 finalists the test cannot find anything below 7 seeds",
        ("--metric", "val_thing"): "metric='val_thing': does not tell by its name",
    }.items():
        assert main(["search", "--config", config, "--out", str(tmp_path / "out"), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


def test_importing_the_package_does_not_import_optuna() -> None:
    code = "import sys, eafo_dynamic; eafo_dynamic.search; print('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_network_that_names_no_activation_gets_another_one(tmp_path: Path) -> None:
    config = read_yaml(ROOT / "configs" / "wine_mlp.yaml", "task")
    network = {
        "class_path": "torch.nn.Sequential",
        "init_args": {"args": []},
    }
    config["model"]["init_args"]["model"] = network
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(config))
    task = ConfiguredTask(path, "val_loss")
    composed = task.composed(Candidate("elu default", "elu", {}), 1, tmp_path)
    kinds = [callback["class_path"] for callback in composed["trainer"]["callbacks"]]
    assert kinds == ["eafo_dynamic.experiments.SwapActivations", "eafo_dynamic.EAFOCallback"]
    assert yaml.safe_load(task.snippet(Candidate("elu", "elu")))["trainer"]["callbacks"] == [
        {"class_path": "eafo_dynamic.experiments.SwapActivations", "init_args": {"base": "elu"}}
    ]


def test_the_best_activation_without_a_correction_is_a_finalist_and_taken_where_it_is_as_good(tmp_path: Path) -> None:
    observed = {"policy": "frozen", "eps_init": 0.0}  # tanh by other names: as good, and not as simple
    space = {
        **PLAIN,
        "bases": ["tanh"],
        "extra": {name: {"base": "tanh", "eafo": observed} for name in ("first", "second")},
    }
    answer = find(tmp_path, search_tasks.taught_by_tanh, space=space, finalists=2, confirm=7)
    assert "tanh" in {pair.arm for pair in answer.pairs} and len(answer.pairs) == 2
    assert answer.best == Candidate("tanh", "tanh")


@pytest.mark.slow
def test_two_searches_share_one_folder(tmp_path: Path) -> None:
    words = ["search", "--config", str(ROOT / "configs" / "wine_mlp.yaml"), "--bases", "elu", "tanh"]
    words += ["--set", "trainer.max_epochs=2", "--seeds", "1", "--confirm", "6", "--finalists", "1"]
    command = [sys.executable, "-m", "eafo_dynamic", *words, "--out", str(tmp_path), "--format", "json"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=250) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    counts = finished_trainings(tmp_path)
    assert counts["reference"] == 1 and counts["confirm"] == 12, "nothing was trained twice"
