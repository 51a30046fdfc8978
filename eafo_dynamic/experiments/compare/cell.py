"""A cell: one arm trained and tested with one seed. Its result is one file, which is written whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Generator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from eafo_dynamic.errors import ConfigError, EAFOError, interruptible, one_line
from eafo_dynamic.experiments.compare.compose import compose, compose_pretraining, fingerprint
from eafo_dynamic.experiments.compare.plan import Arm, Plan, validation_twin
from eafo_dynamic.experiments.compare.store import append, read_store
from eafo_dynamic.internals.version import package_versions

__all__ = [
    "SCHEMA",
    "Restored",
    "check",
    "check_metrics",
    "expected_fingerprint",
    "finished",
    "pretrain",
    "quiet",
    "restore",
    "result_path",
    "run_cell",
]

SCHEMA = 1
_TALKATIVE = (
    "lightning.pytorch",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric",
    "lightning.fabric.utilities.seed",
)


def result_path(plan: Plan, arm: Arm, seed: int) -> Path:
    """Where the result of a cell is kept.

    Args:
        plan: the plan.
        arm: one of its arms.
        seed: one of its seeds.

    Returns:
        ``<directory>/cells/<arm>/seed-<n>/result.json``.
    """
    return plan.directory / "cells" / arm.slug / f"seed-{seed}" / "result.json"


def _weights_path(plan: Plan, seed: int) -> Path:
    return plan.directory / "pretrained" / f"seed-{seed}" / "weights.pt"


def _config_and_fingerprint(plan: Plan, arm: Arm, seed: int) -> tuple[dict[str, Any], str]:
    folder = result_path(plan, arm, seed).parent.absolute()
    defaults: dict[str, Any] = {}
    if arm.eafo is not None:
        defaults = _callback_defaults()
    manner = (plan.threads, plan.select, defaults)
    if plan.pretrain is None:
        config = compose(plan, arm, seed, folder)
        return config, fingerprint(config, folder, manner)
    weights = _weights_path(plan, seed).absolute()
    pretraining = compose_pretraining(plan, seed, weights.parent)
    pretrained = fingerprint(pretraining, weights.parent, (plan.threads,))
    config = compose(plan, arm, seed, folder, weights)
    return config, fingerprint(config, folder, manner, pretrained)


@functools.cache
def _callback_defaults() -> dict[str, Any]:
    """The defaults of the callback's options: a version with other defaults would give another result."""
    from eafo_dynamic.trainers.lightning.callback import EAFOCallback

    return {name: each.default for name, each in inspect.signature(EAFOCallback).parameters.items()}


def expected_fingerprint(plan: Plan, arm: Arm, seed: int) -> str:
    """What the fingerprint of a cell is if it is trained now.

    Args:
        plan: the plan.
        arm: one of its arms.
        seed: one of its seeds.

    Returns:
        See `compose.fingerprint`.
    """
    return _config_and_fingerprint(plan, arm, seed)[1]


def finished(plan: Plan, arm: Arm, seed: int) -> bool:
    """Whether a cell has its result.

    Args:
        plan: the plan.
        arm: one of its arms.
        seed: one of its seeds.

    Returns:
        True if it has.

    Raises:
        ConfigError: if the result was made with other settings than the plan now has, or is damaged.
    """
    path = result_path(plan, arm, seed)
    if not path.exists():
        return False
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError("--config", str(path), "is damaged", "Delete the file; its cell is then run again.") from None
    if kept != expected_fingerprint(plan, arm, seed):
        raise ConfigError(
            "--config",
            plan.name,
            f"{path} was made with other settings of arm {arm.name!r}",
            "Give --out another folder, or delete this one.",
        )
    return True


@interruptible()
def run_cell(plan: Plan, arm: Arm, seed: int) -> Path:
    """Trains and tests one cell, unless it has its result.

    Args:
        plan: the plan.
        arm: one of its arms.
        seed: one of its seeds.

    Returns:
        The file with the result.

    Raises:
        KeyboardInterrupt: if training was interrupted; nothing is kept then.
    """
    path = result_path(plan, arm, seed)
    if finished(plan, arm, seed):
        return path
    if plan.pretrain is not None:
        pretrain(plan, seed)
    config, expected = _config_and_fingerprint(plan, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with quiet(plan.threads):
        result = _train(config, plan.select, validation_twin(plan.metric))
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "task": plan.title,
        "arm": arm.name,
        "seed": seed,
        "fingerprint": expected,
    }
    if plan.sweep is not None:
        about["option"] = plan.sweep
        about["value"] = arm.swept
    entropies = _entropies(path.parent / "eafo")
    stamp = {"versions": package_versions(), "finished": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    whole = {**about, **result, **entropies, **stamp}
    _write(path, json.dumps(whole, indent=1) + "\n")
    if plan.store is not None:
        append(plan.store, whole)
    return path


class Restored(NamedTuple):
    """What a store had.

    Attributes:
        cells: cells that were brought back.
        refused: cells that have lines there, none of which was made with the plan's settings.
    """

    cells: int
    refused: int


def restore(plan: Plan) -> Restored:
    """Brings finished cells back from the plan's store, where they were made with the plan's settings.

    Args:
        plan: the plan.

    Returns:
        How many, of the cells that had no result in the plan's folder.
    """
    if plan.store is None:
        return Restored(0, 0)
    restored = 0
    refused: set[Path] = set()
    arms = {arm.name: arm for arm in plan.arms}
    for result in read_store(plan.store):
        arm = arms.get(result["arm"])
        if arm is None:
            continue
        path = result_path(plan, arm, result["seed"])
        if path.exists():
            continue
        if result["fingerprint"] != expected_fingerprint(plan, arm, result["seed"]):
            refused.add(path)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"schema": SCHEMA, "task": plan.title, **result}
        _write(path, json.dumps(whole, indent=1) + "\n")
        restored += 1
    return Restored(restored, sum(not path.exists() for path in refused))


@interruptible()
def pretrain(plan: Plan, seed: int) -> Path:
    """Trains the weights that the arms of a seed start from, unless they are there.

    Args:
        plan: a plan with `pretrain`.
        seed: one of its seeds.

    Returns:
        A plain checkpoint: {"state_dict": ...}, for torch.load(weights_only=True).

    Raises:
        KeyboardInterrupt: if training was interrupted; nothing is kept then.
    """
    path = _weights_path(plan, seed)
    config = compose_pretraining(plan, seed, path.parent)
    expected = fingerprint(config, path.parent, (plan.threads,))
    note = path.with_suffix(".json")
    if path.exists() and note.exists() and json.loads(note.read_text())["fingerprint"] == expected:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet(plan.threads):
        cli = _built(config)
        _fit(cli)
    _write(path, _packed(cli.model))
    _write(note, json.dumps({"fingerprint": expected}))
    return path


def check(plan: Plan) -> None:
    """Builds every arm once, and the data, so that what cannot work is said before anything runs.

    Args:
        plan: the plan.

    Raises:
        EAFOError: one line on what is wrong, and in which arm.
    """
    seed = plan.seeds[0]
    with tempfile.TemporaryDirectory() as folder, quiet(plan.threads):
        weights = _untrained_weights(plan, Path(folder))
        for arm in plan.arms:
            finished(plan, arm, seed)
            with _naming(arm):
                cli = _built(compose(plan, arm, seed, Path(folder), weights))
                if arm.name == plan.reference:
                    cli.datamodule.prepare_data()
                    cli.datamodule.setup("fit")


def check_metrics(plan: Plan) -> None:
    """Checks that some arm logs each metric that the plan names: one step, one batch of validation and of the test.

    What is trained here is thrown away. The reference is tried first, the other arms only if it lacks a metric.

    Args:
        plan: a plan that `check` has passed.

    Raises:
        ConfigError: for a metric that no arm logs.
        EAFOError: if an arm cannot be trained.
    """
    wanted = {"metric": [plan.metric], "also": list(plan.also), "select": []}
    if plan.select is not None:
        wanted["select"] = [plan.select]
    names = {name for metrics in wanted.values() for name in metrics}
    logged: dict[str, None] = {}
    reference = plan.arm(plan.reference)
    others = [arm for arm in plan.arms if arm.name != plan.reference]
    with tempfile.TemporaryDirectory() as folder, quiet(plan.threads):
        weights = _untrained_weights(plan, Path(folder))
        for arm in (reference, *others):
            with _naming(arm):
                config = compose(plan, arm, plan.seeds[0], Path(folder) / arm.slug, weights)
                logged.update(dict.fromkeys(_logged_in_one_step(config)))
            if names <= logged.keys():
                return
    for option, metrics in wanted.items():
        for metric in metrics:
            if metric not in logged:
                raise ConfigError(option, metric, "no arm logs such a metric", f"There are: {', '.join(logged)}.")


def _logged_in_one_step(config: dict[str, Any]) -> list[str]:
    config["trainer"]["fast_dev_run"] = True
    cli = _built(config)
    try:
        _fit(cli)
        logged = [*cli.trainer.callback_metrics]
        cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    except EAFOError:
        raise
    except Exception as error:
        raise EAFOError(f"one training step fails: {one_line(error)}") from error
    logged += cli.trainer.callback_metrics
    return [name for name in logged if not name.startswith("eafo/")]


def _untrained_weights(plan: Plan, folder: Path) -> Path | None:
    """A file of the weights that the arms start from, as they are before they are trained."""
    if plan.pretrain is None:
        return None
    cli = _built(compose_pretraining(plan, plan.seeds[0], folder))
    path = folder / "weights.pt"
    path.write_bytes(_packed(cli.model))
    return path


@contextlib.contextmanager
def _naming(arm: Arm) -> Generator[None]:
    """Errors say in which arm they are."""
    try:
        yield
    except EAFOError as error:
        raise EAFOError(f"arm {arm.name!r}: {error}") from None


def _built(config: dict[str, Any], *callbacks: Any) -> Any:
    from eafo_dynamic.experiments.configured import configured

    defaults: dict[str, Any] = {}
    if callbacks:
        defaults["callbacks"] = list(callbacks)
    return configured(config, run=False, save_config_callback=None, trainer_defaults=defaults)


def _fit(cli: Any) -> None:
    cli.trainer.fit(cli.model, cli.datamodule)
    if cli.trainer.interrupted:  # Lightning has caught the exception
        raise KeyboardInterrupt


def _train(config: dict[str, Any], select: str | None, followed: str) -> dict[str, Any]:
    from eafo_dynamic.experiments.compare.paired import is_higher_better
    from eafo_dynamic.experiments.compare.witness import BestEpoch, Witness

    witness = Witness(followed)
    best = None
    callbacks: list[Any] = [witness]
    if select is not None:
        best = BestEpoch(select, is_higher_better(select))
        callbacks.append(best)
    cli = _built(config, *callbacks)
    start = time.perf_counter()
    _fit(cli)
    seconds = time.perf_counter() - start
    metrics = dict(cli.trainer.callback_metrics)
    best_epoch = None
    if best is not None:
        best.restore(cli.model)
        best_epoch = best.epoch
    metrics.update(cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0])
    return {
        "metrics": {name: float(value) for name, value in metrics.items() if not name.startswith("eafo/")},
        "best_epoch": best_epoch,
        "seconds": seconds,
        "step_ms": 1000 * witness.step_seconds / max(1, witness.steps),
        "steps": witness.steps,
        "parameters": witness.parameters,
        "weights": witness.weights,
        "batches": witness.batches,
        "curve": witness.curve,
    }


def _entropies(folder: Path) -> dict[str, Any]:
    """A summary of the correction log of a cell; of an arm without corrections, None and empty lists."""
    from eafo_dynamic.records import CorrectionLog

    summary: dict[str, Any] = {
        "entropy_first": None,
        "entropy_last": None,
        "eps_last": None,
        "entropy_steps": [],
        "entropy_mean": [],
    }
    if not (folder / "corrections.jsonl").exists():
        return summary
    by_step: dict[int, list[float]] = {}
    eps_last: dict[str, float] = {}
    for row in CorrectionLog.load(folder).rows:
        if row["entropy"] is not None:
            by_step.setdefault(row["step"], []).append(row["entropy"])
        if row.get("eps") is not None:  # corrections with tails alone have none
            eps_last[row["site"]] = row["eps"]
    if not by_step:
        return summary
    means = [sum(entropies) / len(entropies) for entropies in by_step.values()]
    return {
        "entropy_first": means[0],
        "entropy_last": means[-1],
        "eps_last": eps_last,
        "entropy_steps": list(by_step),
        "entropy_mean": means,
    }


def _packed(model: Any) -> bytes:
    import torch

    weights = io.BytesIO()
    torch.save({"state_dict": model.state_dict()}, weights)
    return weights.getvalue()


def _write(path: Path, contents: str | bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    if isinstance(contents, str):
        contents = contents.encode()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(contents)
    os.replace(unfinished, path)


@contextlib.contextmanager
def quiet(threads: int) -> Generator[None]:
    """Gives torch this number of threads, and silences Lightning's messages.

    Args:
        threads: number of threads.

    Yields:
        Nothing; both are put back afterwards.
    """
    import torch

    before = torch.get_num_threads()
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    torch.set_num_threads(threads)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
            yield
    finally:
        torch.set_num_threads(before)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
