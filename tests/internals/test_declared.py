"""An option is defined once: what is added to a definition is in signatures, help, docstrings, checks and the guide."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from eafo_dynamic import EAFOCallback, EAFOController
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.internals.checks import not_negative
from eafo_dynamic.internals.declared import Described, named, option, options_class, takes
from eafo_dynamic.policy.options import Options
from eafo_dynamic.trainers.options import CallbackOptions, GroupOptions, TrainerCallbackOptions

ROOT = Path(__file__).parents[2]
CLASSES = [Options, GroupOptions, CallbackOptions, TrainerCallbackOptions]


@options_class
class WarmOptions(CallbackOptions):
    """The callback's options and one more, as somebody would add it."""

    warmth: float = option(
        default=0.25,
        part="When",
        text="how warm |a site| starts",
        check=not_negative,
        unit="kelvin",
        when="in winter",
    )


class WarmCallback(EAFOCallback):
    @takes(WarmOptions)
    def __init__(self, options: WarmOptions) -> None:
        super().__init__(eps_init=options.eps_init)
        self.warm = options


# ------------------------------------------------------------------ one more option


def test_a_new_option_is_in_signature_annotations_and_docstring() -> None:
    parameters = inspect.signature(WarmCallback).parameters
    assert list(parameters) == [*inspect.signature(EAFOCallback).parameters, "warmth"]
    assert (parameters["warmth"].default, parameters["warmth"].annotation) == (0.25, float)
    assert WarmCallback.__init__.__annotations__["warmth"] is float
    assert "    warmth: how warm |a site| starts. Unit: kelvin." in (WarmCallback.__init__.__doc__ or "").splitlines()
    assert "self" in inspect.signature(WarmCallback.__init__).parameters


def test_a_new_option_is_checked() -> None:
    assert WarmCallback(warmth=3, eps_init=0.5).warm == WarmOptions(warmth=3.0, eps_init=0.5)
    with pytest.raises(ConfigError, match=r"^warmth=-1: must be a finite number"):
        WarmCallback(warmth=-1)


def test_a_new_option_is_in_the_guide() -> None:
    filled = runpy.run_path(str(ROOT / ".ci/options_page.py"))["filled"]
    page = (ROOT / "examples/guide/options.md").read_text(encoding="utf-8")
    before, after = page.splitlines(), filled(page, [WarmOptions, TrainerCallbackOptions]).splitlines()
    (row,) = [line for line in after if line not in before]
    assert row == "| `warmth` | `0.25` | kelvin | how warm \\|a site\\| starts | in winter |"
    assert before.index("## When") < after.index(row) < after.index("## How it is computed")
    assert [line for line in after if line != row] == before


def test_an_option_without_its_heading_is_refused() -> None:
    filled = runpy.run_path(str(ROOT / ".ci/options_page.py"))["filled"]
    with pytest.raises(SystemExit, match=r"no heading '## Which sites'"):
        filled("# Options\n")


def parser() -> Any:
    jsonargparse = pytest.importorskip("jsonargparse")
    made = jsonargparse.ArgumentParser(exit_on_error=False)
    made.add_class_arguments(Trainer, "trainer", skip={"strategy", "plugins"})
    return made


def test_a_new_option_is_in_the_help_and_in_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    path = f"{__name__}.WarmCallback"
    with pytest.raises(SystemExit):
        parser().parse_args(["--trainer.callbacks.help", path])
    said = " ".join(capsys.readouterr().out.split())
    assert "how warm |a site| starts. Unit: kelvin. (type: float, default: 0.25)" in said
    assert "starting amplitude of every correction. No unit. (type: float, default: 0.01)" in said
    yaml = f"trainer: {{callbacks: [{{class_path: {path}, init_args: {{warmth: 2}}}}], logger: false}}"
    parsed = parser().parse_string(yaml)
    assert parsed.trainer.callbacks[0].init_args.warmth == 2.0
    assert parsed.trainer.callbacks[0].init_args.max_delta == 0.5, "defaults are written out, as --print_config does"
    with pytest.raises(Exception, match="warmed"):
        parser().parse_string(yaml.replace("warmth", "warmed"))


def test_the_help_of_fit_has_every_option(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eafo_dynamic", "fit", "--trainer.callbacks.help=eafo_dynamic.EAFOCallback"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    said = " ".join(done.stdout.split())
    for name, described in Described.of(CallbackOptions).items():
        assert f"--trainer.callbacks.{name} " in said or f"--trainer.callbacks.init_args.{name} " in said, name
        assert " ".join(described.text.split()) in said, name


# ------------------------------------------------------------------ all that there are


@pytest.mark.parametrize("options", CLASSES, ids=lambda kind: kind.__name__)
def test_every_field_is_described(options: type) -> None:
    described = Described.of(options)
    assert list(described) == list(inspect.signature(options).parameters)
    for name, each in described.items():
        assert each.text and each.part, name
        assert not each.text.endswith("."), name
        assert each.default is None or each.check(name, each.default) == each.default, f"{name}: a default is fine"


def test_callbacks_have_the_options_of_the_corrections_and_the_controller_too() -> None:
    huggingface = pytest.importorskip("eafo_dynamic.trainers.huggingface")
    expected = inspect.signature(Options).parameters
    for function in (EAFOCallback, huggingface.EAFOTrainerCallback, EAFOController.attach):
        parameters = inspect.signature(function).parameters
        assert {name: each.default for name, each in parameters.items() if name in expected} == {
            name: each.default for name, each in expected.items()
        }
        assert not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


def test_types_in_signatures_are_types() -> None:
    for function in (EAFOCallback, EAFOController.attach):
        parameters = inspect.signature(function).parameters
        assert parameters["freeze_at_step"].annotation == int | None


def test_named_keeps_what_stands_before() -> None:
    @named(GroupOptions)
    def train(model: object, *examples: object, **options: Any) -> GroupOptions:
        return GroupOptions(**options)

    assert list(inspect.signature(train).parameters) == ["model", "examples", "lr", "lr_multiple", "weight_decay"]
    assert train(None, lr=0.5).lr == 0.5


def test_options_are_given_by_name() -> None:
    words = r"EAFOCallback takes its options by name\. Write EAFOCallback\(target_modules=\.\.\.\)"
    with pytest.raises(TypeError, match=words):
        EAFOCallback("ReLU")  # type: ignore[call-arg, misc]
    with pytest.raises(TypeError, match="max_epz"):
        EAFOCallback(max_epz=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="max_epz"):
        EAFOController.attach(None, max_epz=1.0)  # type: ignore[arg-type]


def test_all_options_that_cannot_work_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        CallbackOptions(max_eps=-1.0, samples_per_site=2, verbose="no", lr=-0.5)  # type: ignore[arg-type]
    assert str(error.value) == (
        "max_eps=-1.0: a bound must be positive. Leave it out for the default. "
        "Also: samples_per_site=2: must be at least 16. Give a whole number of 16 or more. "
        "Also: lr=-0.5: must be a finite number and cannot be negative. Give 0 or more, or leave it out. "
        "Also: verbose='no': neither True nor False. Give one of the two."
    )
    assert error.value.option == "max_eps"
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.option) == (str(error.value), "max_eps")


def test_all_conflicts_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        CallbackOptions(
            eps_init=2.0, collect_every_n_steps=99, lr=1.0, lr_multiple=2.0, log_figures=True, save_log=False
        )
    said = str(error.value).split(" Also: ")
    assert [each.partition("=")[0] for each in said] == [
        "eps_init",
        "collect_every_n_steps",
        "lr_multiple",
        "log_figures",
    ]


def test_copies_of_a_callback_have_its_options() -> None:
    callback = EAFOCallback(max_eps=0.3, target_modules=["ReLU"], dirpath="runs")
    for twin in (copy.copy(callback), copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin.options == callback.options
        assert twin != callback
    assert callback.options.dirpath == Path("runs")


def test_epochs_leave_room_for_the_samples() -> None:
    schedule = CallbackOptions(update_every_n_epochs=2, collect_every_n_steps=80).schedule
    assert (schedule.update_every_n_steps, schedule.collect_every_n_steps) == (80, 80)
    assert CallbackOptions(update_every_n_epochs=2).schedule == Options().schedule


USE = """
from eafo_dynamic import EAFOCallback
from eafo_dynamic.policy import Rule

EAFOCallback(max_eps=0.5, target_modules=["ReLU"], policy=[Rule("a", "static")], lr=None, backend="eager")
EAFOCallback(max_epz=0.5)
EAFOCallback(max_eps="large")
EAFOCallback("ReLU")
"""


@pytest.mark.slow
def test_type_checkers_know_names_and_types_of_options(tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    (tmp_path / "use.py").write_text(USE)
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "strict"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "use.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = {(each["range"]["start"]["line"], each["rule"]) for each in json.loads(done.stdout)["generalDiagnostics"]}
    assert found == {(5, "reportCallIssue"), (6, "reportArgumentType"), (7, "reportCallIssue")}
