"""One cell: one arm trained and tested with one seed, kept in one file that is there whole or not at all."""

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
from typing import Any

import yaml

from eafo_dynamic.errors import ConfigError, EAFOError, interruptible
from eafo_dynamic.experiments.compare.compose import compose, compose_pretraining, fingerprint
from eafo_dynamic.experiments.compare.plan import Arm, Plan
from eafo_dynamic.internals.version import package_versions

__all__ = ["SCHEMA", "check", "finished", "pretrain", "result_path", "run_cell"]

SCHEMA = 1
_TALKATIVE = (
    *("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"),
    *("lightning.fabric", "lightning.fabric.utilities.seed"),
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


def _prints(plan: Plan, arm: Arm, seed: int) -> tuple[dict[str, Any], str]:
    folder = result_path(plan, arm, seed).parent.absolute()
    manner = (plan.threads, plan.select, {} if arm.eafo is None else _defaults())
    if plan.pretrain is None:
        config = compose(plan, arm, seed, folder)
        return config, fingerprint(config, folder, manner)
    weights = _weights_path(plan, seed).absolute()
    config = compose(plan, arm, seed, folder, weights)
    before = fingerprint(compose_pretraining(plan, seed, weights.parent), weights.parent, (plan.threads,))
    return config, fingerprint(config, folder, manner, before)


@functools.cache
def _defaults() -> dict[str, Any]:
    """Defaults of the callback's options: a result made with others is none of this version's."""
    from eafo_dynamic.trainers.lightning.callback import EAFOCallback

    return {name: each.default for name, each in inspect.signature(EAFOCallback).parameters.items()}


def finished(plan: Plan, arm: Arm, seed: int) -> bool:
    """Whether a cell has its result.

    Args:
        plan: the plan.
        arm: one of its arms.
        seed: one of its seeds.

    Returns:
        True where the result is there.

    Raises:
        ConfigError: if it is the result of other settings than the plan now has.
    """
    path = result_path(plan, arm, seed)
    if not path.exists():
        return False
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError("--config", str(path), "is damaged", "Delete the file; its cell is then run again.") from None
    if kept != _prints(plan, arm, seed)[1]:
        raise ConfigError(
            "--config",
            plan.name,
            f"{path} was made with other settings of arm {arm.name!r}",
            "Give --out another folder, or delete this one.",
        )
    return True


@interruptible()
def run_cell(plan: Plan, arm: Arm, seed: int) -> Path:
    """Trains and tests one cell, unless its result is there.

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
    config, print_ = _prints(plan, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with _quiet(plan.threads):
        result = _train(config, plan.select)
    about = {"schema": SCHEMA, "task": plan.title, "arm": arm.name, "seed": seed, "fingerprint": print_}
    swept = {} if plan.sweep is None else {"option": plan.sweep, "value": arm.swept}
    stamp = {"versions": package_versions(), "finished": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    result = {**about, **swept, **result, **_entropies(path.parent / "eafo"), **stamp}
    _write(path, json.dumps(result, indent=1) + "\n")
    return path


@interruptible()
def pretrain(plan: Plan, seed: int) -> Path:
    """Trains what the arms of a seed start from, unless it is there.

    Args:
        plan: with `pretrain`.
        seed: one of its seeds.

    Returns:
        A plain checkpoint: {"state_dict": ...}, for torch.load(weights_only=True).

    Raises:
        KeyboardInterrupt: if training was interrupted; nothing is kept then.
    """
    path = _weights_path(plan, seed)
    config = compose_pretraining(plan, seed, path.parent)
    print_ = fingerprint(config, path.parent, (plan.threads,))
    note = path.with_suffix(".json")
    if path.exists() and note.exists() and json.loads(note.read_text())["fingerprint"] == print_:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _quiet(plan.threads):
        cli = _built(config)
        _fit(cli)
    _write(path, _packed(cli.model))
    _write(note, json.dumps({"fingerprint": print_}))
    return path


def check(plan: Plan) -> None:
    """Builds every arm once, and the data: what cannot work is said before anything runs.

    Args:
        plan: the plan.

    Raises:
        EAFOError: one line on what is wrong, and in which arm.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet(plan.threads):
        weights = Path(folder) / "weights.pt"
        if plan.pretrain is not None:  # what the arms start from, as it is before it is trained
            weights.write_bytes(_packed(_built(compose_pretraining(plan, plan.seeds[0], weights.parent)).model))
        for arm in plan.arms:
            finished(plan, arm, plan.seeds[0])
            config = _prints(plan, arm, plan.seeds[0])[0]
            if plan.pretrain is not None:
                config["model"]["init_args"]["weights"] = str(weights)
            try:
                cli = _built(config)
                if arm.name == plan.reference:
                    cli.datamodule.prepare_data()
                    cli.datamodule.setup("fit")
            except EAFOError as error:
                raise EAFOError(f"arm {arm.name!r}: {error}") from None


def _built(config: dict[str, Any], *callbacks: Any) -> Any:
    from eafo_dynamic.experiments.configured import configured

    defaults = {"callbacks": list(callbacks)} if callbacks else {}
    return configured(config, run=False, save_config_callback=None, trainer_defaults=defaults)


def _fit(cli: Any) -> None:
    cli.trainer.fit(cli.model, cli.datamodule)
    if cli.trainer.interrupted:  # where Lightning keeps it to itself
        raise KeyboardInterrupt


def _train(config: dict[str, Any], select: str | None) -> dict[str, Any]:
    from eafo_dynamic.experiments.compare.paired import is_higher_better
    from eafo_dynamic.experiments.compare.witness import BestEpoch, Witness

    witness = Witness()
    best = None if select is None else BestEpoch(select, is_higher_better(select))
    cli = _built(config, witness, *([] if best is None else [best]))
    start = time.perf_counter()
    _fit(cli)
    seconds = time.perf_counter() - start
    metrics = dict(cli.trainer.callback_metrics)
    if best is not None:
        best.restore(cli.model)
    metrics.update(cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0])
    return {
        "metrics": {name: float(value) for name, value in metrics.items() if not name.startswith("eafo/")},
        "best_epoch": None if best is None else best.epoch,
        "seconds": seconds,
        "step_ms": 1000 * witness.step_seconds / max(1, witness.steps),
        "steps": witness.steps,
        "parameters": witness.parameters,
        "weights": witness.weights,
        "batches": witness.batches,
    }


def _entropies(folder: Path) -> dict[str, Any]:
    """What the correction log of a cell says, in a few numbers; of an arm without corrections, nothing."""
    from eafo_dynamic.records import CorrectionLog

    nothing = {"entropy_first": None, "entropy_last": None, "eps_last": None, "entropy_steps": [], "entropy_mean": []}
    if not (folder / "corrections.jsonl").exists():
        return nothing
    by_step: dict[int, list[float]] = {}
    last: dict[str, float] = {}
    for row in CorrectionLog.load(folder).rows:
        if row["entropy"] is not None:
            by_step.setdefault(row["step"], []).append(row["entropy"])
        last[row["site"]] = row["eps"]
    if not by_step:
        return nothing
    means = [sum(values) / len(values) for values in by_step.values()]
    trajectory = {"entropy_steps": list(by_step), "entropy_mean": means}
    return {"entropy_first": means[0], "entropy_last": means[-1], "eps_last": last, **trajectory}


def _packed(model: Any) -> bytes:
    import torch

    weights = io.BytesIO()
    torch.save({"state_dict": model.state_dict()}, weights)
    return weights.getvalue()


def _write(path: Path, contents: str | bytes) -> None:
    target = path.with_name(f".{path.name}.{os.getpid()}")
    target.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    os.replace(target, path)


@contextlib.contextmanager
def _quiet(count: int) -> Generator[None]:
    """Torch with so many threads, and Lightning without its talk."""
    import torch

    before = torch.get_num_threads()
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    torch.set_num_threads(count)
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
