"""``eafo-dynamic fit|validate|test|predict``: a LightningCLI that takes any LightningModule and any data module."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import eafo_dynamic.experiments  # noqa: F401  (its classes can be named in YAML without a path)

__all__ = ["train"]


class _SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run's folder, ``config.yaml``."""


def train(argv: Sequence[str] | None) -> int:
    """Runs one training command.

    Args:
        argv: arguments with the command first; None: those of the process.

    Returns:
        The exit code.
    """
    try:
        LightningCLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            args=None if argv is None else list(argv),
        )
    except (MisconfigurationException, FileNotFoundError) as error:
        with contextlib.suppress(BrokenPipeError):
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


_ = Any
