"""The configuration of one cell: the task's, with the changes of its arm and its seed, and nothing else."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.compare.plan import SEED_KEYS, Arm, Plan, read_yaml

__all__ = [
    "ACTIVATION",
    "WEIGHTS",
    "cell_config",
    "compose",
    "compose_pretraining",
    "differences",
    "fingerprint",
    "flat",
    "put",
]

Config = dict[str, Any]

ACTIVATION = "model.init_args.model.init_args.activation"
WEIGHTS = "model.init_args.weights"

_CALLBACK = "eafo_dynamic.EAFOCallback"
_HIDDEN = ("verbose", "dirpath")  # options of it that are no difference between arms
_LEFT_OUT = ("EAFOCallback", "ModelCheckpoint")  # the arm says which corrections; cells keep no checkpoints
_QUIET = {  # none of it changes what is trained
    "trainer.logger": False,
    "trainer.enable_checkpointing": False,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
}


def compose(plan: Plan, arm: Arm, seed: int, folder: Path, weights: Path | None = None) -> Config:
    """The configuration of one cell.

    Args:
        plan: the plan.
        arm: one of its arms.
        seed: the cell's seed.
        folder: the cell's folder, where its correction log goes.
        weights: checkpoint to start from, where the plan pretrains.

    Returns:
        A configuration for LightningCLI, in plain values.

    Raises:
        ConfigError: if the arm names an activation but the task's network takes none.
    """
    config = _task_config(plan.task, {**plan.settings, **arm.settings}, seed, plan.seed_keys)
    put(config, "trainer.default_root_dir", str(folder))
    if weights is not None:
        put(config, WEIGHTS, str(weights))
    if arm.activation is not None:
        if _get(config, ACTIVATION) is None:
            mend = f"Say it with set: and the key of your network, or give the task the key {ACTIVATION}."
            raise ConfigError(f"arms.{arm.name}.activation", arm.activation, "the task's network names none", mend)
        put(config, ACTIVATION, arm.activation)
    if arm.eafo is not None:
        options = {"verbose": False, "dirpath": str(folder / "eafo"), **arm.eafo}
        config["trainer"]["callbacks"].insert(0, {"class_path": _CALLBACK, "init_args": options})
    return config


def compose_pretraining(plan: Plan, seed: int, folder: Path) -> Config:
    """The configuration of the training that the arms of a seed start from; it has no corrections.

    Args:
        plan: a plan with `pretrain`.
        seed: the seed.
        folder: for whatever the run writes.

    Returns:
        A configuration for LightningCLI, in plain values.
    """
    assert plan.pretrain is not None
    config = _task_config(plan.pretrain, plan.pretrain_settings, seed, plan.seed_keys)
    put(config, "trainer.default_root_dir", str(folder))
    return config


def _task_config(task: Path, settings: Mapping[str, Any], seed: int, seed_keys: tuple[str, ...]) -> Config:
    config = copy.deepcopy(read_yaml(task, "task"))
    if not isinstance(config, dict) or not {"model", "data"} <= set(config):
        raise ConfigError("task", str(task), "has no model or no data", "Name a configuration of eafo-dynamic fit.")
    trainer = config.setdefault("trainer", {})
    callbacks = trainer.get("callbacks") or []
    if not isinstance(callbacks, list):
        callbacks = [callbacks]
    trainer["callbacks"] = [each for each in callbacks if _class_name(each) not in _LEFT_OUT]
    for key, value in {**_QUIET, **settings}.items():
        put(config, key, copy.deepcopy(value))
    for key in seed_keys:
        if key == "seed_everything" or _get(config, key) is not None:
            put(config, key, seed)
    return config


def cell_config(task: Path, settings: Mapping[str, Any], seed: int) -> Config:
    """A task's configuration without corrections, checkpoints and loggers, with every seed set.

    Args:
        task: a configuration of ``eafo-dynamic fit``.
        settings: configuration keys with dots and their values.
        seed: the seed.

    Returns:
        A configuration for LightningCLI, in plain values.
    """
    return _task_config(task, settings, seed, SEED_KEYS)


def _class_name(callback: Mapping[str, Any]) -> str:
    return callback.get("class_path", "").rpartition(".")[2]


def put(config: Config, key: str, value: Any) -> None:
    """Sets one value of a nested configuration.

    Args:
        config: changed in place.
        key: path with dots; mappings that are missing are made.
        value: the value.

    Raises:
        ConfigError: if a part of the path is no mapping.
    """
    *path, last = key.split(".")
    for part in path:
        config = config.setdefault(part, {})
        if not isinstance(config, dict):
            raise ConfigError(key, value, f"{part!r} is no mapping", "Check the key against the task's file.")
    config[last] = value


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(config, dict):
            return None
        config = config.get(part)
    return config


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as keys with dots.

    Args:
        config: mappings and lists of plain values.
        prefix: what every key begins with.

    Returns:
        One entry per leaf; an empty mapping or list is a leaf.
    """
    if isinstance(config, Mapping):
        children = dict(config)
    elif isinstance(config, list):
        children = dict(enumerate(config))
    else:
        children = {}
    if not children:
        return {prefix: config}
    leaves: dict[str, Any] = {}
    for name, value in children.items():
        leaves |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return leaves


def differences(plan: Plan, arm: Arm) -> list[str]:
    """The differences between an arm and the reference, for people to read.

    Args:
        plan: the plan.
        arm: one of its arms.

    Returns:
        ``key: the arm's value (the reference's value)``, sorted; the callback's options as ``eafo.<option>``.
    """
    folder = Path("cell")
    ours = _leaves(compose(plan, arm, plan.seeds[0], folder))
    theirs = _leaves(compose(plan, plan.arm(plan.reference), plan.seeds[0], folder))
    return [
        f"{key}: {ours.get(key, 'absent')} ({theirs.get(key, 'absent')})"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def _leaves(config: Config) -> dict[str, Any]:
    """Return keys and values, the options of the EAFOCallback under ``eafo`` wherever it stands in the list."""
    callbacks = config["trainer"]["callbacks"]
    config["trainer"]["callbacks"] = [each for each in callbacks if each["class_path"] != _CALLBACK]
    leaves = flat(config)
    for callback in callbacks:
        if callback["class_path"] == _CALLBACK:
            options = {key: value for key, value in callback["init_args"].items() if key not in _HIDDEN}
            for name, value in options.items():
                leaves |= flat(value, f"eafo.{name}")
    return leaves


def fingerprint(config: Config, folder: Path, manner: tuple[Any, ...], pretrained: str = "") -> str:
    """A hash that is equal for two cells that would train the same, wherever their folders are.

    Args:
        config: the cell's configuration.
        folder: the cell's folder; paths in it do not count.
        manner: what else decides the result: threads of torch (the order of sums), the epoch that is tested.
        pretrained: fingerprint of the pretraining, which counts in place of the path of its weights.

    Returns:
        Sixteen hexadecimal digits.
    """
    place = str(folder)
    leaves = {key: value for key, value in flat(config).items() if not str(value).startswith(place)}
    if pretrained:
        leaves[WEIGHTS] = pretrained
    text = json.dumps([leaves, manner], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
