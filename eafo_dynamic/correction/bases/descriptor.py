"""What a base activation is, its derivatives, and its traits, found by how it behaves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Base", "Derivatives", "LogSlope", "Pointwise", "Traits", "derivatives", "probe_points", "traits"]

Pointwise = Callable[[Tensor], Tensor]


class Derivatives(NamedTuple):
    """f, f' and f'' at the same points; shape and dtype of the points."""

    value: Tensor
    first: Tensor
    second: Tensor


class LogSlope(NamedTuple):
    """d/dz log f' = f''/f' in closed form, for where f saturates and f' is 0 in floating point.

    Args:
        below: for z < 0, and continued to 0.
        above: for z > 0, and continued to 0; the same function where f''/f' has no jump at 0.
        integral: I(z, b), an antiderivative in z of (f''/f') / (1 + b (f''/f')^2), b >= 0; None where it is not needed.
            Its differences are means over cells, which hold where f turns within less than a cell.
    """

    below: Pointwise
    above: Pointwise
    integral: Callable[[Tensor, Tensor], Tensor] | None = None


class Traits(NamedTuple):
    """Properties of a base that decide how it is handled.

    Args:
        affine: f'' = 0 and one slope everywhere: a linear layer in disguise, no place for a correction.
        monotone: f never falls (f' >= 0, jumps only upwards): the analytic route applies.
        piecewise_linear: f is continuous and f'' = 0 almost everywhere: the raw correction is p'.
        gate: f rises from 0 to 1 and never leaves [0, 1]: more often a gate than an activation.
        flat: f is constant on an interval, so that the output has atoms.
    """

    affine: bool
    monotone: bool
    piecewise_linear: bool
    gate: bool
    flat: bool


@dataclass(frozen=True)
class Base:
    """A pointwise function f: out of place, differentiable, deterministic.

    Two bases are equal, and hash alike, when they are the same kind of function with the same
    hyper-parameters, so that sites group: ``as_base(nn.LeakyReLU(0.01)) == as_base("leaky_relu")``.

    Args:
        name: short name, as the registry and the command line use it.
        fn: the function itself, on any device, in float32 or float64.
        params: hyper-parameters, part of the identity, as sorted (name, value) pairs.
        key: tells unregistered functions apart (the callable, or the module's type and state).
        label: name with the hyper-parameters that differ from the default; what ``str`` shows.
        log_slope: f''/f' in closed form; None where it is not known, or needs none.
    """

    name: str
    fn: Pointwise = field(compare=False, repr=False)
    params: tuple[tuple[str, object], ...] = ()
    key: object = field(default=None, repr=False)
    label: str = field(default="", compare=False, repr=False)
    log_slope: LogSlope | None = field(default=None, compare=False, repr=False)

    def __call__(self, z: Tensor) -> Tensor:
        """f(z).

        Args:
            z: pre-activations, any shape.

        Returns:
            Activations, same shape.
        """
        return self.fn(z)

    def __str__(self) -> str:
        return self.label or self.name

    @property
    def traits(self) -> Traits:
        """What kind of function this is, found by its behaviour; see :func:`traits`."""
        return traits(self)


def derivatives(base: Base, z: Tensor, order: int = 2) -> Derivatives:
    """f, f' and f'' by automatic differentiation.

    At a kink the value is torch's one-sided convention (relu'(0) = 0); the delta function that f''
    has there is not represented, as section 4 of the theory asks for piecewise linear functions.

    Args:
        base: the function.
        z: points, any shape, float32 or float64 (float64 is advised: f'' cancels).
        order: 1 leaves f'' out, which then is 0.

    Returns:
        Value, first and second derivative at z, without graph.
    """
    with torch.inference_mode(False), torch.enable_grad():
        points = z.detach().clone().requires_grad_()
        value = base(points).to(z.dtype)
        first = _slope(value, points, graph=order > 1)
        try:
            second = _slope(first, points, graph=False)  # 0 without a graph
        except RuntimeError:  # F.hardsigmoid and some custom functions have no second backward pass
            second = _difference(base, z.detach())
    return Derivatives(value.detach(), first.detach(), second.detach())


def _difference(base: Base, z: Tensor) -> Tensor:
    step = torch.finfo(z.dtype).eps ** (1 / 3)
    sides = torch.stack([z - step, z + step]).requires_grad_()
    below, above = _slope(base(sides).to(z.dtype), sides, graph=False)
    return (above - below) / (2 * step)


def _slope(value: Tensor, points: Tensor, *, graph: bool) -> Tensor:
    if not value.requires_grad:  # constant, or linear one derivative earlier
        return torch.zeros_like(points)
    (slope,) = torch.autograd.grad(value.sum(), points, create_graph=graph, allow_unused=True, materialize_grads=True)
    return slope


def probe_points(count: int, reach: float) -> Tensor:
    """Return points from -reach to reach, denser at 0, none where a function of interest has a kink."""
    # On the CPU whatever the default device is: a model may be built on "meta".
    t = torch.linspace(-1, 1, count, dtype=torch.float64, device="cpu")
    return torch.sinh(6 * t) * (reach / math.sinh(6)) + 1.2345e-3


@functools.lru_cache(maxsize=1024)
def traits(base: Base) -> Traits:
    """Traits of a base, from its values and derivatives on 8193 float64 points of [-100, 100].

    Args:
        base: the function.

    Returns:
        What the function does; properties beyond that range are not seen.
    """
    z = probe_points(8193, 100.0)
    value, first, second = (torch.nan_to_num(t) for t in derivatives(base, z))
    rise = value.diff()
    run = z.diff()
    steepest = torch.maximum(first[1:].abs(), first[:-1].abs())
    jumps = bool((rise.abs() > 4 * run * steepest + 0.05).any())
    piecewise = not jumps and bool((second.abs() <= 1e-9).all())
    tolerance = 1e-9 * (1 + value[1:].abs())
    return Traits(
        affine=piecewise and bool((first - first[0]).abs().max() <= 1e-9),
        monotone=bool((first >= -1e-9).all()) and bool((rise >= -tolerance).all()),
        piecewise_linear=piecewise,
        gate=bool((rise >= -tolerance).all())
        and abs(float(value[0])) < 1e-2
        and abs(float(value[-1]) - 1) < 1e-2
        and bool((value >= -1e-9).all() and (value <= 1 + 1e-9).all()),
        flat=_has_flat_part(z, first),
    )


def _has_flat_part(z: Tensor, first: Tensor) -> bool:
    """Return whether f' is exactly 0 on an interval that f' enters other than by fading away.

    A saturating function such as tanh also reaches f' = 0 in floating point, but only where f' is
    already negligible; a flat part begins at a corner or within a few units of 0.
    """
    still = first == 0
    inner = still[:-2] & still[1:-1] & still[2:]
    corner = (still[1:] != still[:-1]) & (torch.maximum(first[1:].abs(), first[:-1].abs()) > 1e-6)
    return bool((inner & (z[1:-1].abs() < 4)).any()) or bool(corner.any() and inner.any())
