"""The configuration of one cell: the task's, with what its arm and its seed change, and nothing else."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.compare.plan import Arm, Plan, read_yaml

__all__ = ["ACTIVATION", "WEIGHTS", "compose", "compose_pretraining", "differences", "fingerprint", "flat"]

Config = dict[str, Any]

ACTIVATION = "model.init_args.model.init_args.activation"
WEIGHTS = "model.init_args.weights"

_CALLBACK = "eafo_dynamic.EAFOCallback"
_LEFT_OUT = ("EAFOCallback", "ModelCheckpoint")  # the arm says which corrections; weights are kept by the cells
_QUIET = {  # nothing of it changes what is trained
    "trainer.logger": False,
    "trainer.enable_checkpointing": False,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
}


def compose(plan: Plan, arm: Arm, seed: int, folder: Path, weights: Path | None = None) -> Config:
    """The configuration of one cell.

    Args:
        plan: arms, seeds and task.
        arm: one of the plan's.
        seed: one of the plan's.
        folder: of the cell; its correction log goes there.
        weights: checkpoint to start from, where the plan pretrains.

    Returns:
        What LightningCLI takes, as plain values.

    Raises:
        ConfigError: if the arm names an activation and the task's network takes none.
    """
    config = _of_task(plan.task, {**plan.settings, **arm.settings}, seed, plan.seed_keys)
    _put(config, "trainer.default_root_dir", str(folder))
    if weights is not None:
        _put(config, WEIGHTS, str(weights))
    if arm.activation is not None:
        if _get(config, ACTIVATION) is None:
            mend = f"Say it with set: and the key of your network, or give the task the key {ACTIVATION}."
            raise ConfigError(f"arms.{arm.name}.activation", arm.activation, "the task's network names none", mend)
        _put(config, ACTIVATION, arm.activation)
    if arm.eafo is not None:
        options = {"verbose": False, "dirpath": str(folder / "eafo"), **arm.eafo}
        config["trainer"]["callbacks"].insert(0, {"class_path": _CALLBACK, "init_args": options})
    return config


def compose_pretraining(plan: Plan, seed: int, folder: Path) -> Config:
    """The configuration that trains what the arms of a seed start from; no corrections in it.

    Args:
        plan: with `pretrain`.
        seed: one of the plan's.
        folder: for whatever the run writes.

    Returns:
        What LightningCLI takes, as plain values.
    """
    assert plan.pretrain is not None
    config = _of_task(plan.pretrain, plan.pretrain_settings, seed, plan.seed_keys)
    _put(config, "trainer.default_root_dir", str(folder))
    return config


def _of_task(task: Path, settings: Mapping[str, Any], seed: int, seed_keys: tuple[str, ...]) -> Config:
    config = copy.deepcopy(read_yaml(task, "task"))
    if not isinstance(config, dict) or not {"model", "data"} <= set(config):
        raise ConfigError("task", str(task), "has no model or no data", "Name a configuration of eafo-dynamic fit.")
    trainer = config.setdefault("trainer", {})
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    trainer["callbacks"] = [
        each for each in callbacks if each.get("class_path", "").rpartition(".")[2] not in _LEFT_OUT
    ]
    for key, value in {**_QUIET, **settings}.items():
        _put(config, key, copy.deepcopy(value))
    for key in seed_keys:
        if key == "seed_everything" or _get(config, key) is not None:
            _put(config, key, seed)
    return config


def _put(config: Config, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        config = config.setdefault(part, {})
        if not isinstance(config, dict):
            raise ConfigError(key, value, f"{part!r} is no mapping", "Check the key against the task's file.")
    config[last] = value


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as keys with dots.

    Args:
        config: mappings and lists of plain values.
        prefix: of every key.

    Returns:
        One entry a leaf.
    """
    items = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else None
    if items is None or not config:
        return {prefix: config}
    return {
        key: leaf
        for name, value in items
        for key, leaf in flat(value, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def differences(plan: Plan, arm: Arm) -> list[str]:
    """What an arm differs in from the reference, as people read it.

    Args:
        plan: the plan.
        arm: one of its arms.

    Returns:
        ``key: value here (value there)``, sorted; the correction's options as ``eafo.<option>``.
    """
    folder = Path("cell")
    here, there = (_leaves(compose(plan, each, plan.seeds[0], folder)) for each in (arm, plan.arm(plan.reference)))
    return [
        f"{key}: {here.get(key, 'absent')} ({there.get(key, 'absent')})"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]


def _leaves(config: Config) -> dict[str, Any]:
    callbacks = config["trainer"]["callbacks"]
    ours = [each for each in callbacks if each["class_path"] == _CALLBACK]
    config["trainer"]["callbacks"] = [each for each in callbacks if each not in ours]
    eafo = flat(ours[0]["init_args"], "eafo") if ours else {}
    hidden = ("eafo.verbose", "eafo.dirpath")
    return {**flat(config), **{key: value for key, value in eafo.items() if key not in hidden}}


def fingerprint(config: Config, folder: Path, manner: tuple[Any, ...], pretrained: str = "") -> str:
    """Says whether two cells would train the same, wherever their folders lie.

    Args:
        config: of the cell.
        folder: the cell's; what lies in it does not count.
        manner: what else decides the result: threads of torch (the order of sums), the epoch that is tested.
        pretrained: fingerprint of what the cell starts from, in place of the path of its weights.

    Returns:
        Sixteen hexadecimal digits.
    """
    place = str(folder)
    leaves = {key: value for key, value in flat(config).items() if not str(value).startswith(place)}
    if pretrained:
        leaves[WEIGHTS] = pretrained
    text = json.dumps([leaves, manner], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
