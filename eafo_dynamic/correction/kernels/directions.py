"""The terms of a correction: the directions in which an activation moves away from its base, each with an amplitude.

    f(z) = (1 + gain) base(z) + slope z + sigma (eps u + lift) exp(-u^2 / 2),   u = (z - mu) / sigma

``eps`` and ``lift`` bend the function where the data lie, ``gain`` and ``slope`` move its two tails. With all
amplitudes 0 the function is the base bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "BASE_TERM",
    "EPS",
    "GAIN",
    "LIFT",
    "MAX_U",
    "SLOPE",
    "TERMS",
    "Term",
    "bell",
    "code_of_terms",
    "finite",
    "ghat_closed_form",
    "in_order",
    "with_number",
]

MAX_U = 13.0
"""Standardised pre-activations are clamped to [-MAX_U, MAX_U]. exp(-MAX_U^2 / 2) = 2e-37 is still a float32, MAX_U^2 is
still a float16, and an infinite z gives a finite correction."""


def _clamped(u: Tensor) -> Tensor:
    # MAX_U as a literal: torch.jit.script cannot read a global number, and torch.compile with dynamic=True makes one an
    # input of the graph, which fails at the second site
    return u.clamp(-13.0, 13.0)


def with_number(u: Tensor, number: float) -> Tensor:
    """Standardised pre-activations with a number in place of NaN, before they are clamped.

    Args:
        u: any shape, no unit.
        number: finite.

    Returns:
        The same shape; in place of an infinity there may be the largest number.
    """
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        return u.nan_to_num(nan=number)
    # what the compiler makes of nan_to_num for a CPU looks at one number after the other
    return torch.where(u == u, u, number)


def _with_number_again(u: Tensor, number: float) -> Tensor:
    """``with_number`` in a backward."""
    if not torch.compiler.is_compiling():
        return u.nan_to_num(nan=number)
    # not u == u: the compiler would know it from the forward, and keep that outcome in memory until the backward
    return torch.where(u <= math.inf, u, number)


def ghat_closed_form(u: Tensor) -> tuple[Tensor, Tensor]:
    """Shape of the correction for a piecewise linear base and a Gaussian density, and its slope.

        ghat(u) = u exp(-u^2/2),   ghat'(u) = (1 - u^2) exp(-u^2/2)

    Args:
        u: standardised pre-activations, any shape, no unit.

    Returns:
        ghat and ghat', both of the shape of u.
    """
    u = _clamped(u)
    square = u * u
    peak = torch.exp(-0.5 * square)
    return u * peak, (1.0 - square) * peak


def bell(u: Tensor) -> tuple[Tensor, Tensor]:
    """Shape of the lift, and its slope.

        bell(u) = exp(-u^2/2),   bell'(u) = -u exp(-u^2/2)

    Args:
        u: standardised pre-activations, any shape, no unit; a NaN counts as infinitely far away.

    Returns:
        The bell and its slope, both of the shape of u.
    """
    return _bell(with_number(u, 13.0))


def _bell(u: Tensor) -> tuple[Tensor, Tensor]:
    u = _clamped(u)
    value = torch.exp(-0.5 * u * u)
    return value, -u * value


def finite(values: Tensor) -> Tensor:
    """The values, 0 where they are infinite or NaN: there a tail adds nothing, and f is the base.

    Args:
        values: pre-activations or outputs of the base, any shape.

    Returns:
        The same shape.
    """
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class Term:
    """One direction g of f = base + sum over the terms of amplitude * g.

        g(z) = scale * value(u, z, base(z)),   scale = sigma for a local term, else 1

    Args:
        name: of its amplitude: in options, in checkpoints and in the log.
        local: whether g vanishes away from the data, and grows with sigma.
        value: g / scale, from u, z and base(z); the outcome has the shape of z.
        derivative: dg/dz with base(z) held, from u and z.
        by_base: dg / d base(z).
        code: its bit in the compiled kernels.
        text: what it does, in a few words.
    """

    name: str
    local: bool
    value: Callable[[Tensor, Tensor, Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]
    by_base: float
    code: int
    text: str

    def scale(self, sigma: Tensor) -> Tensor | float:
        """What ``value`` is multiplied by.

        Args:
            sigma: standard deviation of the pre-activations.

        Returns:
            Sigma for a local term, 1 for a tail.
        """
        return sigma if self.local else 1.0


EPS = Term(
    "eps",
    local=True,
    value=lambda u, z, base: ghat_closed_form(_with_number_again(u, 0.0))[0],
    derivative=lambda u, z: ghat_closed_form(_with_number_again(u, 0.0))[1],
    by_base=0.0,
    code=1,
    text="sigma u exp(-u^2 / 2), or sigma times the shape of base and density: tilts f where the data lie",
)
LIFT = Term(
    "lift",
    local=True,
    value=lambda u, z, base: _bell(_with_number_again(u, 13.0))[0],
    derivative=lambda u, z: _bell(_with_number_again(u, 13.0))[1],
    by_base=0.0,
    code=2,
    text="sigma exp(-u^2 / 2): raises f where the data lie",
)
GAIN = Term(
    "gain",
    local=False,
    value=lambda u, z, base: finite(base),
    derivative=lambda u, z: torch.zeros_like(z),
    by_base=1.0,
    code=4,
    text="base(z): stretches the base",
)
SLOPE = Term(
    "slope",
    local=False,
    value=lambda u, z, base: finite(z),
    derivative=lambda u, z: z.isfinite().to(z.dtype),
    by_base=0.0,
    code=8,
    text="z: adds a straight line",
)

TERMS: dict[str, Term] = {term.name: term for term in (EPS, LIFT, GAIN, SLOPE)}
"""The terms by name, in the order in which amplitudes are stacked."""
BASE_TERM = GAIN.name
"""The one term whose direction is the base itself."""


def in_order(names: Sequence[str]) -> tuple[str, ...]:
    """Names of terms in the order in which their amplitudes are stacked.

    Args:
        names: of known terms.

    Returns:
        Each once.
    """
    return tuple(name for name in TERMS if name in names)


@functools.cache
def code_of_terms(names: tuple[str, ...]) -> int:
    """The terms as the compiled kernels know them.

    Args:
        names: of known terms, in order.

    Returns:
        The sum of their codes.
    """
    return sum(TERMS[name].code for name in names)
