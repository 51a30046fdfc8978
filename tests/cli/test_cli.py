"""The command line as a user meets it: training from YAML, reading the log, and every typo answered in one line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_experiments import training_configs

from eafo_dynamic.cli import main
from eafo_dynamic.records import CorrectionLog

ROOT = Path(__file__).parents[2]
CONFIGS = training_configs(files=False)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches", "ignore:Checkpoint directory", "ignore:.*val_dataloader.*bottleneck"
)


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    """Runs the command line in-process, as the installed script does."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["eafo-dynamic", *arguments])
    try:
        return main()
    except SystemExit as stop:
        return int(stop.code or 0)


def quick(config: Path, *more: str) -> list[str]:
    return [
        "fit",
        f"--config={config}",
        "--trainer.max_steps=3",
        "--trainer.max_epochs=1",
        "--trainer.limit_val_batches=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        *more,
    ]


@dataclass
class Trained:
    """A configuration that was trained for three steps, with an update round at each.

    Args:
        folder: the working folder of the command.
        code: its exit code.
        out: what it printed.
    """

    folder: Path
    code: int
    out: str


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param.stem)
    updates = "--trainer.callbacks.init_args.update_every_n_steps=1"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        code = run(monkeypatch, folder, *quick(request.param, updates))
    return Trained(folder, code, printed.getvalue())


def test_every_configuration_trains_and_logs(trained: Trained) -> None:
    assert trained.code == 0
    assert "activation sites wrapped" in trained.out
    log = CorrectionLog.load(trained.folder / "runs")
    assert log.steps == [1, 2, 3]
    assert {row["site"] for row in log.rows} == set(log.sites)
    saved = yaml.safe_load((log.path.parent / "config.yaml").read_text())
    assert saved["data"]["class_path"].endswith(log.manifest["run"]["data"])
    assert saved["trainer"]["max_steps"] == 3, "the resolved configuration, overrides included"
    assert saved["seed_everything"] is not None


def test_every_view_reads_the_log_of_every_configuration(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained.folder
    site = CorrectionLog.load(folder / "runs").sites[0]
    for command in (["summary"], ["layers"], ["show", site], ["events"], ["layers", "--format", "md"]):
        assert run(monkeypatch, folder, "log", command[0], "runs", *command[1:]) == 0
    assert site in capsys.readouterr().out.replace("\n", "")
    for what in ("heatmap", "trajectories", "functions", "densities", "prediction", "ranking"):
        assert run(monkeypatch, folder, "log", "plot", "runs", "--what", what, "--out", f"{what}.png") == 0
        assert (folder / f"{what}.png").stat().st_size > 10_000
    assert run(monkeypatch, folder, "log", "report", "runs", "--out", "report.html") == 0
    page = (folder / "report.html").read_text()
    assert site in page
    assert "http://" not in page.replace("http://www.w3.org", ""), "nothing is fetched from elsewhere"


def test_a_shared_relu_is_one_site_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, tmp_path, *quick(ROOT / "configs/digits_resnet.yaml"))
    sites = CorrectionLog.load(tmp_path / "runs").sites
    firsts = {site.removesuffix("#0") for site in sites if site.endswith("#0")}
    seconds = {site.removesuffix("#1") for site in sites if site.endswith("#1")}
    assert firsts == seconds != set()


def test_equal_seeds_give_equal_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(monkeypatch, tmp_path / name, *quick(ROOT / "configs/digits_vit.yaml"))
        rows.append(CorrectionLog.load(tmp_path / name / "runs").rows)
    assert rows[0] == rows[1]


def test_print_config_shows_every_option_of_the_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fit", f"--config={ROOT / 'configs/digits_vit.yaml'}", "--model.init_args.lr=0.5", "--print_config"]
    assert run(monkeypatch, tmp_path, *arguments) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["init_args"]["lr"] == 0.5
    (callback,) = shown["trainer"]["callbacks"]
    assert {"policy", "density", "eps_init", "max_eps", "samples_per_site"} <= set(callback["init_args"])


def test_log_commands_read_what_fit_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, tmp_path, *quick(ROOT / "configs/wine_mlp.yaml"))
    capsys.readouterr()
    for command in ("summary", "layers"):
        assert run(monkeypatch, tmp_path, "log", command, "runs") == 0
        assert "eps" in capsys.readouterr().out
    assert run(monkeypatch, tmp_path, "log", "layers", "runs", "--format", "json") == 0
    as_json = json.loads(capsys.readouterr().out)
    assert run(monkeypatch, tmp_path, "log", "layers", "runs", "--format", "csv") == 0
    as_csv = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(as_json) == len(as_csv) == len(CorrectionLog.load(tmp_path / "runs").sites)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the test run has a folder of its own
def test_against_plain_prints_the_test_results_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ROOT / "configs/wine_mlp.yaml"
    far = "--trainer.callbacks.init_args.eps_init=0.5"
    both = quick(config, far, "--trainer.logger.init_args.name=both", "--against-plain")
    assert run(monkeypatch, tmp_path, *both) == 0
    out = capsys.readouterr().out
    assert "EAFO: on the test data, with seed 0:" in out
    shown = {words[0]: words[1:] for line in out.splitlines() if len(words := line.split()) == 3}
    assert shown["test_loss"][0] != shown["test_loss"][1]

    # the second column is that of a model that never had corrections
    plain = yaml.safe_load(config.read_text())
    del plain["trainer"]["callbacks"]
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(plain))
    alone = ("--trainer.logger.init_args.name=alone", "--trainer.enable_checkpointing=true")
    assert run(monkeypatch, tmp_path, *quick(tmp_path / "plain.yaml", *alone)) == 0
    (checkpoint,) = (tmp_path / "runs/alone").rglob("*.ckpt")
    tested = ("test", f"--config={tmp_path / 'plain.yaml'}", f"--ckpt_path={checkpoint}", *alone)
    assert run(monkeypatch, tmp_path, *tested) == 0
    (metrics,) = [path for path in (tmp_path / "runs/alone").rglob("metrics.csv") if "test_loss" in path.read_text()]
    lines = metrics.read_text().splitlines()
    (row,) = [row for row in csv.DictReader(lines) if row.get("test_loss")]
    assert float(row["test_loss"]) == pytest.approx(float(shown["test_loss"][1]), rel=1e-3)
    assert len(list((tmp_path / "runs/both").rglob("eafo"))) == 1, "the plain run has no log"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["test"], "is an option of fit"),
        (["fit", "--ckpt_path=last"], "Leave --ckpt_path out"),
        (["fit", "--seed_everything=false"], "Add --seed_everything 0"),
    ],
)
def test_what_cannot_be_compared_with_plain(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    rest = quick(ROOT / "configs/wine_mlp.yaml", "--against-plain")[1:]
    assert run(monkeypatch, tmp_path, arguments[0], *rest, *arguments[1:]) == 2
    assert words in capsys.readouterr().err


def edited(tmp_path: Path, **init_args: Any) -> Path:
    config = yaml.safe_load((ROOT / "configs/wine_mlp.yaml").read_text())
    (callback,) = [c for c in config["trainer"]["callbacks"] if "EAFO" in c["class_path"]]
    callback["init_args"].update(init_args)
    path = tmp_path / "edited.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("policy", "lerned", "policy='lerned': no such policy. Choose one of static, learned"),
        ("density", "gauss", "density='gauss': no such density"),
        ("target_modules", ["Nope"], "target_modules='Nope' matches no activation"),
        ("update_every_n_steps", -3, "update_every_n_steps=-3: must be at least 1"),
        ("eps_init", 1.9, "eps_init=1.9: outside the trust region |eps| <= max_eps=1.0"),
        ("eps_init", "abc", "eps_init"),
        ("eps_inti", 0.1, "unknown option 'eps_inti'. Did you mean 'eps_init'?"),
        ("samples_per_site", 1, "samples_per_site=1: must be at least 16"),
    ],
)
def test_wrong_options_cost_one_line_and_exit_code_2(
    option: str,
    value: object,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, tmp_path, *quick(edited(tmp_path, **{option: value}))) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


def test_policies_by_site_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entropy = {"class_path": "eafo_dynamic.policy.Entropy", "init_args": {"rate": 0.05, "ascent": True}}
    rules = [{"sites": r"model\.2", "policy": "frozen"}, {"sites": r"model\.4", "policy": entropy}]
    config = edited(tmp_path, policy=[*rules, {"sites": ".*", "policy": "learned"}], density="histogram")
    assert run(monkeypatch, tmp_path, *quick(config)) == 0
    log = CorrectionLog.load(tmp_path / "runs")
    assert {row["site"]: row["policy"] for row in log.rows} == {
        "model.2": "frozen",
        "model.4": "entropy",
        "model.6": "learned",
    }


def test_a_policy_object_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid = {"class_path": "eafo_dynamic.policy.Hybrid", "init_args": {"weight": -0.5}}
    assert run(monkeypatch, tmp_path, *quick(edited(tmp_path, policy=hybrid))) == 0
    assert "weight=-0.5" in CorrectionLog.load(tmp_path / "runs").manifest["options"]["policy"]


def test_yaml_numbers_written_as_text_are_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edited(tmp_path)
    text = path.read_text().replace("eps_init: 0.01", "eps_init: 1e-3")
    assert "1e-3" in text
    path.write_text(text)
    assert run(monkeypatch, tmp_path, *quick(path)) == 0
    assert CorrectionLog.load(tmp_path / "runs").manifest["options"]["eps_init"] == 1e-3


WINE = ["fit", f"--config={ROOT / 'configs/wine_mlp.yaml'}"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "--config=nowhere.yaml"], "nowhere.yaml"),
        (["fit", "--config=broken.yaml"], "pars"),
        ([*WINE, "--model.class_path=eafo_dynamic.Nope"], "module 'eafo_dynamic' has no attribute 'Nope'"),
        (["fit"], "no model is given. Name a configuration that has one: --config FILE."),
        ([*WINE, "--model.init_args.lr=abc"], "Classifier: lr='abc': does not fit. It takes float."),
        ([*WINE, "--model.init_args.model.init_args.hidden=abc"], "MLP: hidden='abc': does not fit. It takes "),
        (
            [*WINE, "--model=Nope"],
            "model='Nope': does not fit. It takes LightningModule (package.module.Class) or null.",
        ),
        ([*WINE, "--trainer.max_epochs=three"], "trainer: max_epochs='three': does not fit. It takes int or null."),
        ([*WINE, "--trainer.precision=33"], "trainer: precision='33': does not fit. It takes 64, 32, 16 or "),
        ([*WINE, "--trainer.accelerator=gpux"], "trainer: ValueError: You selected an invalid accelerator name"),
        (["log", "summary", "nowhere"], "nowhere"),
        (["log", "layers", "empty"], "empty"),
        (["sites", "no_such_module:make"], "no_such_module"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_wrong_arguments_cost_one_line_and_exit_code_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.yaml").write_text("trainer: [")
    (tmp_path / "empty").mkdir()
    assert run(monkeypatch, tmp_path, *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


NO_ACTIVATION = """
trainer: {max_epochs: 1, logger: false, callbacks: [{class_path: eafo_dynamic.EAFOCallback}]}
model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}
data: {class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}
"""


def test_a_model_without_activations_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "boring.yaml").write_text(NO_ACTIVATION)
    assert run(monkeypatch, tmp_path, "fit", "--config=boring.yaml") == 2
    assert "error: BoringModel has no activation" in capsys.readouterr().err


def test_yaml_never_runs_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile.yaml").write_text("trainer: !!python/object/apply:os.mkdir ['owned']\n")
    assert run(monkeypatch, tmp_path, "fit", "--config=hostile.yaml") == 2
    assert not (tmp_path / "owned").exists()


def test_sites_lists_what_would_be_wrapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    relu = nn.ReLU()\n"
        "    return nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Sigmoid())\n"
    )
    assert run(monkeypatch, tmp_path, "sites", "my_net:make", "--shape", "2,4", "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["site"], row["status"]) for row in rows] == [("1#0", "wrapped"), ("1#1", "wrapped"), ("4", "skipped")]


@pytest.mark.parametrize("arguments", [["--help"], ["log", "--help"], ["fit", "--help"], ["--version"]], ids=str)
def test_help(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, *arguments) == 0
    assert "eafo-dynamic" in capsys.readouterr().out


def test_module_and_script_are_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eafo_dynamic", "log", "summary", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


class TestConfigurationsOfVersion010:
    """``config.yaml``, as version 0.1.0 saved it in the run's folder, names every option that there was."""

    def configuration(self, folder: Path, compounding: bool) -> Path:
        config = yaml.safe_load((ROOT / "configs/wine_mlp.yaml").read_text())
        callback = next(each for each in config["trainer"]["callbacks"] if each["class_path"].endswith("EAFOCallback"))
        callback.setdefault("init_args", {})["compounding"] = compounding
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def test_what_says_nothing_is_ignored_with_one_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = self.configuration(tmp_path, compounding=False)
        with pytest.warns(UserWarning, match="compounding: false in the configuration is of version 0.1.0") as warned:
            assert run(monkeypatch, tmp_path, *quick(config)) == 0
        assert len([each for each in warned if "compounding" in str(each.message)]) == 1
        saved = next(path for path in tmp_path.rglob("config.yaml") if path != config)
        assert "compounding" not in saved.read_text()

    def test_what_there_is_no_more_is_refused_in_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = self.configuration(tmp_path, compounding=True)
        assert run(monkeypatch, tmp_path, *quick(config)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "compounding" in line and "version 0.1.0" in line
