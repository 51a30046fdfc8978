"""Checks that several modules share: of options, and of what a checkpoint holds."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING

from eafo_dynamic.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["at_least", "fitting", "number"]


def number(option: str, value: object) -> float:
    """Checks that an option is a number.

    Args:
        option: its name.
        value: what was given.

    Returns:
        The number; it may be infinite or NaN.

    Raises:
        ConfigError: if it is none.
    """
    if not isinstance(value, numbers.Real):
        raise ConfigError(option, value, "not a number", "Give a number.")
    return float(value)


def at_least(option: str, value: int, least: int) -> None:
    """Checks that an option is a whole number and large enough.

    Args:
        option: its name.
        value: what was given.
        least: smallest value allowed.

    Raises:
        ConfigError: if it is not.

    Example:
        >>> at_least("samples_per_site", 4, 16)
        Traceback (most recent call last):
        eafo_dynamic.errors.ConfigError: samples_per_site=4: must be at least 16...
    """
    if not isinstance(value, numbers.Integral) or value < least:
        raise ConfigError(option, value, f"must be at least {least}", f"Give a whole number of {least} or more.")


def fitting(saved: Tensor, like: Tensor) -> Tensor:
    """Checks that a tensor of a checkpoint can stand where another stands.

    Args:
        saved: from the checkpoint.
        like: the other.

    Returns:
        The tensor, on the device of the other.

    Raises:
        ValueError: if shapes or dtypes differ.
    """
    if saved.shape != like.shape or saved.dtype != like.dtype:
        raise ValueError(f"{saved.dtype} {list(saved.shape)} in place of {like.dtype} {list(like.shape)}")
    return saved.to(like.device)
