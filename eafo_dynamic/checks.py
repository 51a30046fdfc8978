"""Checks of options that several modules share."""

from __future__ import annotations

import numbers

from eafo_dynamic.errors import ConfigError

__all__ = ["at_least", "number"]


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
