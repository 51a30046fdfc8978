"""``eafo-dynamic fit|validate|test|predict``: a LightningCLI that takes any LightningModule and any data module."""

from __future__ import annotations

from collections.abc import Sequence

from eafo_dynamic.errors import interruptible
from eafo_dynamic.experiments.configured import configured, quieten
from eafo_dynamic.internals.files import see_working_directory

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
    return 0
