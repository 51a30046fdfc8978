"""The line that names a mistake in a configuration: an unknown option, a value of the wrong type, a class not found."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_experiments import CONFIGS
from torch import nn

from eafo_dynamic.experiments import Classifier, TabularData
from eafo_dynamic.experiments.mistakes import find_mistake

WINE = CONFIGS / "wine_mlp.yaml"


def changed(path: str, value: Any) -> dict[str, Any]:
    """The wine configuration with one value set; the path has a name or the number of an element between slashes."""
    config = yaml.safe_load(WINE.read_text())
    node: Any = config
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        node = node[part]
    node[last] = value
    return config


CALLBACK = "trainer/callbacks/0"
ENTROPY = "eafo_dynamic.policy.Entropy"


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("trainer/max_epoch", 3, "trainer: unknown option 'max_epoch'. Did you mean 'max_epochs'?"),
        ("trainer/max_epochs", "three", "trainer: max_epochs='three': does not fit. It takes int or null."),
        ("model/init_args/lr", "abc", "eafo_dynamic.experiments.Classifier: lr='abc': does not fit. It takes float."),
        (
            "model/init_args/model/init_args/hidden",
            [1, "a"],
            "eafo_dynamic.experiments.MLP: hidden=[1, 'a']: does not fit. It takes list of int.",
        ),
        (
            "model/init_args/model/init_args/normalisation",
            "group",
            "eafo_dynamic.experiments.MLP: normalisation='group': does not fit. It takes 'none', 'batch', 'layer'.",
        ),
        (
            "model/init_args",
            {"lr": 1},
            "eafo_dynamic.experiments.Classifier: the following arguments are required: model, num_classes",
        ),
        (
            "model/init_argss",
            {},
            "eafo_dynamic.experiments.Classifier: unknown key 'init_argss' beside class_path. "
            "Did you mean 'init_args'?",
        ),
        ("model/init_args", 3, "eafo_dynamic.experiments.Classifier: init_args=3: does not fit. It takes mapping."),
        ("model", None, "no model is given. Name a configuration that has one: --config FILE."),
        ("model", "torch.nn.ReLU", "model='torch.nn.ReLU': does not fit. It takes LightningModule"),
        (
            "model/class_path",
            "eafo_dynamic.experiments.Classifer",
            "module 'eafo_dynamic.experiments' has no attribute 'Classifer'. Did you mean 'Classifier'?",
        ),
        (
            "model/class_path",
            "eafo_dynamic.experimants.Classifier",
            "eafo_dynamic.experimants.Classifier: No module named 'eafo_dynamic.experimants'",
        ),
        ("model/init_args/model/class_path", "eafo_dynamic.experiments.DigitsData", "does not fit. It takes Module"),
        ("model", {"class_path": Classifier.__name__, "init_args": {"lrr": 1}}, "Classifier: unknown option 'lrr'."),
        ("data", {"class_path": TabularData.__name__, "init_args": {"name": "iris"}}, "name='iris': does not fit."),
        ("seed_everything", "x", "seed_everything='x': does not fit. It takes bool or int."),
        ("ckpt_path", 3, "ckpt_path=3: does not fit. It takes str or null."),
        (f"{CALLBACK}", {"class_path": "torch.nn.ReLU"}, "does not fit. It takes list of Callback"),
        (f"{CALLBACK}/init_args/policy", 3.5, "policy=3.5: does not fit. It takes str or Policy"),
        (f"{CALLBACK}/init_args/filter_fn", "no.such", "It takes function (package.module.function) or null."),
        (
            f"{CALLBACK}/init_args/policy",
            {"class_path": ENTROPY, "init_args": {"rat": 0.1}},
            f"{ENTROPY}: unknown option 'rat'. Did you mean 'rate'?",
        ),
        (
            f"{CALLBACK}/init_args/policy",
            [{"sites": ".*", "polcy": "learned"}],
            "Rule: unknown option 'polcy'. Did you mean 'policy'?",
        ),
        ("optimizer", {"class_path": "torch.optim.SGD", "init_args": {"lr": "abc"}}, "SGD: lr='abc': does not fit."),
        (
            "lr_scheduler",
            {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step": 1}},
            "StepLR: unknown option 'step'. Did you mean 'step_size'?",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_named(path: str, value: Any, line: str) -> None:
    config = changed(path, value)
    before = copy.deepcopy(config)
    found = find_mistake(config)
    assert found is not None
    assert line in found
    assert "\n" not in found
    assert config == before


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_*.yaml")), ids=lambda path: path.stem)
def test_no_mistake_is_named_where_there_is_none(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    if "trainer" in config:
        assert find_mistake(config) is None


def test_an_optimizer_without_its_parameters_is_no_mistake() -> None:
    config = changed("optimizer", {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}})
    assert find_mistake(config) is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model.lr=abc"], "eafo_dynamic.experiments.Classifier: lr='abc'"),
        (["--model.init_args.model.init_args.hiden", "3"], "MLP: unknown option 'hiden'. Did you mean 'hidden'?"),
        (["--trainer.callbacks.init_args.eps_init=abc"], "EAFOCallback: eps_init='abc'"),
        (["--trainer.callbacks+=no.such.Callback"], "no.such.Callback: No module named 'no'"),
        (["--model=eafo_dynamic.experiments.Regressor", "--model.lr=abc"], "Regressor: lr='abc'"),
        (["--config=nowhere.yaml"], "config='nowhere.yaml': no such file."),
        (["--data.init_args={name: wine, batch_size: x}"], "TabularData: batch_size='x'"),
        (["--data.init_args={name: wine}", "--model.init_args.model.init_args.hidden=[1, 2]"], None),
        (["--model.help", "--foo", "--trainer.max_epochs=-1"], None),
    ],
    ids=str,
)
def test_values_of_the_command_line_replace_those_of_the_file(words: list[str], line: str | None) -> None:
    found = find_mistake(["fit", f"--config={WINE}", *words])
    if line is None:
        assert found is None
    else:
        assert found is not None
        assert line in found


def test_a_part_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("{class_path: eafo_dynamic.experiments.TabularData, init_args: {name: wine}}")
    assert find_mistake(changed("data", str(path))) is None
    path.write_text("{class_path: eafo_dynamic.experiments.TabularData, init_args: {nam: wine}}")
    assert "TabularData: unknown option 'nam'. Did you mean 'name'?" in str(find_mistake(changed("data", str(path))))
    path.write_text("{class_path: ")
    assert "cannot be parsed" in str(find_mistake(changed("data", str(path))))


class Made:
    @staticmethod
    def task(lr: float) -> Classifier:
        return Classifier(nn.Linear(13, 3), 3, lr)


def test_a_method_may_stand_in_the_place_of_a_class() -> None:
    path = f"{__name__}.Made.task"
    assert find_mistake(changed("model", {"class_path": path, "init_args": {"lr": 0.1}})) is None
    found = find_mistake(changed("model", {"class_path": path, "init_args": {"lr": "abc"}}))
    assert found == f"{path}: lr='abc': does not fit. It takes float."
