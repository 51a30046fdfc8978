"""Checks that several modules share: of options, and of what a checkpoint holds."""

from __future__ import annotations

import math
import numbers
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from eafo_dynamic.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["at_least", "fitting", "flag", "folder", "not_negative", "number", "pattern"]


def flag(option: str, value: object) -> bool:
    """Checks that an option is True or False.

    Args:
        option: its name.
        value: what was given, also one of numpy's.

    Returns:
        The value, as one of Python's.

    Raises:
        ConfigError: if it is neither.

    Example:
        >>> flag("per_channel", "yes")
        Traceback (most recent call last):
        eafo_dynamic.errors.ConfigError: per_channel='yes': neither True nor False. Give one of the two.
    """
    numpy = sys.modules.get("numpy")  # not needed, but where it is used its comparisons give a kind of its own
    if not isinstance(value, bool if numpy is None else (bool, numpy.bool_)):
        raise ConfigError(option, value, "neither True nor False", "Give one of the two.")
    return bool(value)


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
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ConfigError(option, value, "not a number", "Give a number.")
    return float(value)


def pattern(option: str, value: object) -> str:
    """Checks that an option is a pattern of sites.

    Args:
        option: its name.
        value: what was given.

    Returns:
        The pattern.

    Raises:
        ConfigError: if it is no text, or no valid regular expression.

    Example:
        >>> pattern("sites", 3)
        Traceback (most recent call last):
        eafo_dynamic.errors.ConfigError: sites=3: not a pattern. Give text, such as 'ReLU'.
    """
    if not isinstance(value, str):
        raise ConfigError(option, value, "not a pattern", "Give text, such as 'ReLU'.")
    try:
        re.compile(value)
    except re.error as error:
        mend = "Escape special characters, or use a class name or the end of a module's name."
        raise ConfigError(option, value, f"not a valid regular expression ({error})", mend) from None
    return value


def not_negative(option: str, value: object, mend: str = "Give 0 or more.") -> float:
    """Checks that an option is a number, finite and not below 0.

    Args:
        option: its name.
        value: what was given.
        mend: what to write instead.

    Returns:
        The number.

    Raises:
        ConfigError: if it is not.

    Example:
        >>> not_negative("lr_multiple", -1.0)
        Traceback (most recent call last):
        eafo_dynamic.errors.ConfigError: lr_multiple=-1.0: must be a finite number and cannot be negative...
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ConfigError(option, value, "not a number", mend)
    if not 0.0 <= float(value) < math.inf:
        raise ConfigError(option, value, "must be a finite number and cannot be negative", mend)
    return float(value)


def folder(option: str, value: object) -> Path | None:
    """Checks that an option is a path, or None.

    Args:
        option: its name.
        value: what was given.

    Returns:
        The path.

    Raises:
        ConfigError: if it is neither.

    Example:
        >>> folder("dirpath", 3)
        Traceback (most recent call last):
        eafo_dynamic.errors.ConfigError: dirpath=3: not a path. Give the path of a folder, or None.
    """
    if value is not None and not isinstance(value, (str, Path)):
        raise ConfigError(option, value, "not a path", "Give the path of a folder, or None.")
    return None if value is None else Path(value)


def at_least(option: str, value: object, least: int) -> int:
    """Checks that an option is a whole number and large enough.

    Args:
        option: its name.
        value: what was given.
        least: smallest value allowed.

    Returns:
        The value.

    Raises:
        ConfigError: if it is not.

    Example:
        >>> at_least("samples_per_site", 4, 16)
        Traceback (most recent call last):
        eafo_dynamic.errors.ConfigError: samples_per_site=4: must be at least 16...
    """
    mend = f"Give a whole number of {least} or more."
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ConfigError(option, value, "not a whole number", mend)
    if value < least:
        raise ConfigError(option, value, f"must be at least {least}", mend)
    return int(value)


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
