"""``eafo-dynamic fit|validate|test|predict``: a LightningCLI that takes any LightningModule and any data module."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eafo_dynamic.errors import LogError, interruptible, printable
from eafo_dynamic.experiments.configured import configured, quieten
from eafo_dynamic.internals.files import see_working_directory
from eafo_dynamic.records import CorrectionLog
from eafo_dynamic.records.summary import summarise

__all__ = ["train"]


def train(argv: Sequence[str] | None) -> int:
    """Runs one training command; the resolved configuration is saved as ``config.yaml`` in the run's folder.

    Args:
        argv: arguments with the command first; None: those of this process.

    Returns:
        The exit code.

    Raises:
        KeyboardInterrupt: if training was interrupted.
    """
    quieten()
    see_working_directory()
    with interruptible():
        cli = configured(None if argv is None else list(argv), run=True, save_config_kwargs={"overwrite": True})
    if cli.trainer.interrupted:  # Lightning has caught the exception
        raise KeyboardInterrupt
    if cli.trainer.is_global_zero:
        _tell(cli.trainer)
    return 0


def _tell(trainer: Any) -> None:
    """Says at the end of a fit what was learned, and where to look."""
    from eafo_dynamic.trainers.lightning.callback import EAFOCallback

    for callback in trainer.callbacks:
        if isinstance(callback, EAFOCallback) and callback.options.verbose and callback.log_path is not None:
            print("\n".join(printable(line) for line in _of_log(callback.log_path)))


def _of_log(path: Path) -> list[str]:
    try:
        log = CorrectionLog.load(path)
    except LogError as error:  # the disk is full, or the like: the fit itself has come to its end
        return [f"EAFO: {error}"]
    return _learned(log) if len(log) else []


def _learned(log: CorrectionLog) -> list[str]:
    facts = summarise(log, top=1)
    entropies = [f"{facts[name]:.4g}" for name in ("entropy_first", "entropy_last") if facts[name] is not None]
    words = f"{facts['sites']} sites, {facts['updates']} updates; mean entropy {' -> '.join(entropies)} nats"
    if set(facts["policies"]) == {"observe"}:
        words += f"; {facts['events']} rows with something out of the ordinary"
        facts["largest_eps"] = []
    for entry in facts["largest_eps"]:
        words += f"; largest eps {entry['value']:+.3g} at {entry['site']}"
    run = shlex.quote(os.path.relpath(log.path.parent))
    more = [f"  eafo-dynamic log layers {run}", f"  eafo-dynamic log report {run} --out report.html"]
    return [f"EAFO: {words}. To see more:", *more]
