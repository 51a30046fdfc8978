"""``eafo-dynamic fit|validate|test|predict``: a LightningCLI that takes any LightningModule and any data module."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eafo_dynamic.errors import LogError, interruptible, printable
from eafo_dynamic.experiments.against_plain import check_comparable, seed_of_both, side_by_side, test_results
from eafo_dynamic.experiments.configured import AGAINST_PLAIN, configured, quieten
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
    arguments = None if argv is None else list(argv)
    given = sys.argv[1:] if arguments is None else arguments
    against_plain = AGAINST_PLAIN in given
    if against_plain:
        arguments = [each for each in given if each != AGAINST_PLAIN]
        check_comparable(arguments)
    cli = _run(arguments)
    if cli.trainer.is_global_zero:
        _tell(cli.trainer)
    if against_plain:
        _compare_with_plain(cli, arguments)
    return 0


def _run(arguments: list[str] | None, corrected: bool = True) -> Any:
    with interruptible():
        cli = configured(arguments, run=True, corrected=corrected, save_config_kwargs={"overwrite": True})
    if cli.trainer.interrupted:  # Lightning has caught the exception
        raise KeyboardInterrupt
    return cli


def _compare_with_plain(cli: Any, arguments: list[str] | None) -> None:
    """Trains the same model without corrections, from the same seed, and says how both do on the test data."""
    seed = seed_of_both()
    corrected = test_results(cli)
    if cli.trainer.is_global_zero:
        print("EAFO: now the same training without corrections.", flush=True)
    plain = test_results(_run(arguments, corrected=False))
    if cli.trainer.is_global_zero:
        print("\n".join(printable(line) for line in side_by_side(corrected, plain, seed)))


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
