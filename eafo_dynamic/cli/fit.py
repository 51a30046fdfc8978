"""``eafo-dynamic fit|validate|test|predict``: a LightningCLI that takes any LightningModule and any data module."""

from __future__ import annotations

from collections.abc import Sequence

from eafo_dynamic.configured import configured, quieten

__all__ = ["train"]


def train(argv: Sequence[str] | None) -> int:
    """Runs one training command; the resolved configuration is saved as ``config.yaml`` in the run's folder.

    Args:
        argv: arguments with the command first; None: those of the process.

    Returns:
        The exit code.
    """
    quieten()
    configured(None if argv is None else list(argv), run=True, save_config_kwargs={"overwrite": True})
    return 0
