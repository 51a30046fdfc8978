"""What a search tries: bases times corrections times learning rates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

from torch import nn

from eafo_dynamic.correction.bases import activation_types
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.activations import ACTIVATIONS, make_activation

__all__ = ["OWN", "Candidate", "Space", "make_base", "read_space"]

OWN = "own"
"""As a base: the activations that the model has."""
_PLAIN = "plain"
_BASES = (OWN, "relu", "gelu", "silu", "mish", "elu", "squared_relu", "xielu", "prelu", "swish_beta")
_TERMS = ("full", "tails", "tied")  # "learned" has the local ones
_HELD = {"policy": "static", "terms": "free", "lr_multiple": 3.0}
_DECAYED = {"weight_decay": 1.0}  # draws the amplitudes back to zero


@dataclass(frozen=True)
class Candidate:
    """One answer that a search may give.

    Attributes:
        name: as tables show it.
        base: name of an activation; None: the model keeps its own.
        eafo: options of the EAFOCallback; None: no correction.
        rate: learning rate, in units of the task's.
    """

    name: str
    base: str | None = None
    eafo: Mapping[str, Any] | None = None
    rate: float = 1.0

    @property
    def is_reference(self) -> bool:
        """Whether it is the model as it comes."""
        return self.base is None and self.eafo is None and self.rate == 1.0


def _default_corrections() -> dict[str, dict[str, Any] | None]:
    corrections: dict[str, dict[str, Any] | None] = {
        _PLAIN: None,
        "held": dict(_HELD),
        "held decayed": {**_HELD, **_DECAYED},
        "learned": {},
        "learned decayed": dict(_DECAYED),
    }
    for terms in _TERMS:
        corrections[f"learned {terms}"] = {"terms": terms}
    return corrections


@dataclass(frozen=True)
class Space:
    """Candidates: every base with every correction at every rate, and those of `extra`.

    Args:
        bases: names of activations, and "own" for those that the model has.
        corrections: options of the EAFOCallback by name; None stands for no correction.
        rates: learning rates in units of the task's.
        extra: further candidates by name, with the keys base, eafo and rate.

    Raises:
        ConfigError: for a base, an option or a rate that cannot work.
    """

    bases: Sequence[str] = _BASES
    corrections: Mapping[str, Mapping[str, Any] | None] = field(default_factory=_default_corrections)
    rates: Sequence[float] = (1.0,)
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])

    def __post_init__(self) -> None:
        for base in self.bases:
            _check_base("bases", base)
        for name, options in self.corrections.items():
            _check_options(f"corrections.{name}", options)
        for rate in self.rates:
            _check_rate("rates", rate)
        for name, given in self.extra.items():
            unknown = sorted(given.keys() - {"base", "eafo", "rate"})
            if unknown:
                raise ConfigError(f"extra.{name}", unknown[0], "unknown key", "There are: base, eafo, rate.")
            _check_base(f"extra.{name}.base", given.get("base", OWN))
            _check_options(f"extra.{name}.eafo", given.get("eafo"))
            _check_rate(f"extra.{name}.rate", given.get("rate", 1.0))

    def candidates(self) -> list[Candidate]:
        """All candidates, each once, without the model as it comes.

        Returns:
            At least one.

        Raises:
            ConfigError: if there is none, or two have one name.
        """
        found: list[Candidate] = []
        for base in self.bases:
            for correction, options in self.corrections.items():
                for rate in self.rates:
                    found.append(_candidate(base, correction, options, rate))
        for name, given in self.extra.items():
            base = given.get("base", OWN)
            if base == OWN:
                base = None
            found.append(Candidate(name, base, given.get("eafo"), given.get("rate", 1.0)))
        kept: dict[str, Candidate] = {}
        for candidate in found:
            if candidate.is_reference:
                continue
            if candidate.name in kept:
                raise ConfigError("extra", candidate.name, "is the name of two candidates", "Give each its own.")
            kept[candidate.name] = candidate
        if not kept:
            raise ConfigError("bases", list(self.bases), "leave no candidate", "Add a base, a correction or a rate.")
        return list(kept.values())


def _candidate(base: str, correction: str, options: Mapping[str, Any] | None, rate: float) -> Candidate:
    parts = [base]
    if options is not None:
        parts.append(correction)
    if rate != 1.0:
        parts.append(f"x{rate:g}")
    return Candidate(" ".join(parts), None if base == OWN else base, options, float(rate))


def read_space(given: object) -> Space:
    """A space from the contents of a YAML file; keys that are left out have their defaults.

    Args:
        given: plain values.

    Returns:
        The space.

    Raises:
        ConfigError: for an unknown key, or a value that cannot work.
    """
    if given is None:
        return Space()
    if not isinstance(given, Mapping):
        raise ConfigError("--space", given, "is no mapping", "Write bases:, corrections:, rates: or extra:.")
    options = cast("Mapping[str, Any]", given)
    known = [each.name for each in fields(Space)]
    for key in options:
        if key not in known:
            raise ConfigError("--space", key, "unknown key", f"There are: {', '.join(known)}.")
    kinds = {"bases": list, "rates": list, "corrections": Mapping, "extra": Mapping}
    for key, value in options.items():
        if not isinstance(value, kinds[key]):
            wanted = "list" if kinds[key] is list else "mapping"
            raise ConfigError(key, value, f"is no {wanted}", f"Write a {wanted}, or leave it out.")
    return Space(**options)


def make_base(name: str) -> nn.Module:
    """A new module of a base: of `make_activation`, or of a class that the package's registry has.

    Args:
        name: its name.

    Returns:
        The module.

    Raises:
        ConfigError: for an unknown name.
    """
    for cls in activation_types():
        if name not in ACTIVATIONS and _canonical(cls.__name__) == _canonical(name):
            return cls()
    return make_activation(name)


def _canonical(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _check_base(where: str, base: Any) -> None:
    if base == OWN:
        return
    try:
        make_base(base)
    except (ConfigError, AttributeError, TypeError):
        known = ", ".join([OWN, *sorted(ACTIVATIONS)])
        raise ConfigError(where, base, "no such activation", f"Use one of {known}.") from None


def _check_options(where: str, options: Any) -> None:
    if options is None:
        return
    if not isinstance(options, Mapping):
        mend = "Write options of EAFOCallback, {} for its defaults, or null for no correction."
        raise ConfigError(where, options, "is no mapping", mend)
    from eafo_dynamic.trainers.lightning.callback import EAFOCallback

    given = cast("Mapping[str, Any]", options)
    try:
        EAFOCallback(**given)
    except TypeError as error:
        problem = str(error).partition(") ")[2] or str(error)
        raise ConfigError(where, dict(given), problem, "See the options of EAFOCallback.") from None
    except ConfigError as error:
        raise ConfigError(where, dict(given), str(error), "Correct this option.") from None


def _check_rate(where: str, rate: Any) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate <= 0:
        raise ConfigError(where, rate, "is no positive number", "Write for example 1.0.")
