"""Which terms a correction has: the values of the option ``terms``, and the names that they come to.

The paper's one amplitude for both local terms, in the proportion that base and density give, is the term "tied". It has
the name and the place of eps, and its direction is a shape of its own; see ``shape``.
"""

from __future__ import annotations

from collections.abc import Sequence

from eafo_dynamic.correction.kernels import EPS, LIFT, TERMS
from eafo_dynamic.errors import ConfigError

__all__ = ["LOCAL", "PRESETS", "TIED", "TIED_TERM", "amplitude_names", "local_terms", "resolve_terms"]

TIED_TERM = "tied"
TIED = (TIED_TERM,)
LOCAL = tuple(term.name for term in TERMS.values() if term.local)
_TAILS = tuple(term.name for term in TERMS.values() if not term.local)

PRESETS: dict[str, tuple[str, ...]] = {
    "full": tuple(TERMS),
    "local": LOCAL,
    "tails": _TAILS,
    "tied": TIED,
    "free": LOCAL,  # as versions before this one called it
}
"""Sets of terms by name."""


def resolve_terms(terms: str | Sequence[str]) -> tuple[str, ...]:
    """The terms that a value of the option ``terms`` stands for.

    Args:
        terms: "full", "local", "tails", "tied", or a list of "tied" or names of terms.

    Returns:
        Names in the order of the stacked amplitudes; "tied" in the place of eps.

    Raises:
        ConfigError: if a name is unknown or given twice, there is none, or "tied" stands beside what it ties.

    Example:
        >>> resolve_terms("local"), resolve_terms(["slope", "tied"])
        (('eps', 'lift'), ('tied', 'slope'))
    """
    if isinstance(terms, str):
        if terms not in PRESETS:
            raise ConfigError(
                "terms", terms, "unknown", f"Choose one of auto, {', '.join(PRESETS)}, or a list of terms."
            )
        return PRESETS[terms]
    known = (TIED_TERM, *TERMS)
    mend = f"Give a list of {', '.join(known)}."
    if not isinstance(terms, Sequence) or not terms:
        raise ConfigError("terms", terms, "neither a name nor a list of terms", mend)
    for name in terms:
        if name not in known:
            raise ConfigError("terms", name, "unknown", mend)
    if len(set(terms)) < len(terms):
        raise ConfigError("terms", list(terms), "a term stands there twice", mend)
    if TIED_TERM in terms and set(LOCAL) & set(terms):
        problem = "tied is one amplitude for eps and lift together"
        raise ConfigError("terms", list(terms), problem, "Give tied, or eps and lift, not both.")
    return tuple(name for name in known if name in terms)


def amplitude_names(terms: Sequence[str]) -> tuple[str, ...]:
    """The names of the amplitudes of terms.

    Args:
        terms: from ``resolve_terms``.

    Returns:
        The names of the terms, with "eps" for "tied".

    Example:
        >>> amplitude_names(("tied", "slope"))
        ('eps', 'slope')
    """
    return tuple(EPS.name if name == TIED_TERM else name for name in terms)


def local_terms(terms: Sequence[str]) -> list[str]:
    """The terms that need the closed form of a Gaussian density.

    Args:
        terms: from ``resolve_terms``.

    Returns:
        Names; empty where any density will do.
    """
    return [name for name in terms if name in (EPS.name, LIFT.name)]
