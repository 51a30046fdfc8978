"""Other bases in place of a model's own activations: which sites get which, and what refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from eafo_dynamic.correction.bases import Base, as_base
from eafo_dynamic.correction.kernels import Known, known_base
from eafo_dynamic.errors import ConfigError, PatternError
from eafo_dynamic.find.sites import FoundSite, SiteReport, matches

__all__ = ["Swap", "check_base", "check_swap", "check_swaps", "made_swap", "swap_of"]

BaseOption = str | Mapping[str, str] | None


class Swap(NamedTuple):
    """A function that is computed in place of an activation's own.

    Args:
        base: what it is.
        function: computes it, out of place.
        known: the same, with its gradient.
    """

    base: Base
    function: Callable[[Tensor], Tensor]
    known: Known


def made_swap(name: str) -> Swap:
    """The function of a name.

    Args:
        name: as ``as_base`` takes it.

    Returns:
        The function.
    """
    base = as_base(name)
    return Swap(base, base.fn, known_base(base.fn))


def check_base(base: Any) -> BaseOption:
    """Checks a value of the option ``base``.

    Args:
        base: name of an activation, a mapping from patterns of sites to names, or None.

    Returns:
        The same.

    Raises:
        ConfigError: if it is neither, or a name is unknown.
    """
    if base is None:
        return None
    names = list(base.values()) if isinstance(base, Mapping) else [base]
    for name in names:
        if not isinstance(name, str):
            problem = "neither the name of an activation nor a mapping from patterns to names"
            raise ConfigError("base", name, problem, "Give for example 'relu', or {'mlp.act': 'relu'}.")
        try:
            as_base(name)
        except ConfigError as error:
            raise ConfigError("base", name, error.problem, error.mend) from None
    if not names:
        raise ConfigError("base", base, "an empty mapping", "Name a pattern and a base, or leave it out.")
    return base


def swap_of(found: FoundSite, base: BaseOption) -> str | None:
    """The base that a site gets.

    Args:
        found: the site.
        base: a value of the option ``base``; of a mapping the first pattern that matches decides.

    Returns:
        Its name; None for the site's own.
    """
    if base is None or isinstance(base, str):
        return base
    return next((name for pattern, name in base.items() if matches(pattern, found)), None)


def check_swaps(report: SiteReport, base: BaseOption) -> None:
    """Checks that every pattern names a site.

    Args:
        report: the sites.
        base: a value of the option ``base``.

    Raises:
        PatternError: for a pattern that names none that is wrapped.
    """
    if isinstance(base, Mapping):
        for pattern in base:
            if not any(matches(pattern, site) for site in report.wrapped):
                raise PatternError("base", pattern, [site.module for site in report.wrapped])


def check_swap(name: str, own: Base, site: str) -> None:
    """Refuses another base for a gate: what the model multiplies by must stay between 0 and 1.

    Args:
        name: the base that a site would get.
        own: what the site computes itself.
        site: its name.

    Raises:
        ConfigError: if the site's own function is a gate.
    """
    if own.traits.gate:
        problem = f"{site} is a gate ({own}), which no other base can replace"
        raise ConfigError("base", name, problem, "Leave the site out of target_modules, or of the mapping.")
