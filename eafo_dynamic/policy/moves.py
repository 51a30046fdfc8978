"""The arithmetic of one update round: where all sites' functions go, and how far of it they may."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from eafo_dynamic.correction.bases import Base
from eafo_dynamic.correction.kernels import ghat_table
from eafo_dynamic.correction.shape import (
    HALF_WIDTH,
    KNOTS,
    correction_shape,
    faded_table,
    steepest_slope,
    tabulate,
)
from eafo_dynamic.correction.stacked import Functions
from eafo_dynamic.density.estimators import Density
from eafo_dynamic.policy.schedule import TrustRegion

__all__ = ["bounded_move", "compounded", "mended", "refreshed", "reverted"]

_FRACTIONS = (1.0, 0.5, 0.25, 0.125, 0.0625)
_LEAST_SIGMA = 1e-6  # z / sigma must not become 0 / 0 in float16


def refreshed(old: Functions, density: Density, usable: Tensor, resolution: float) -> Functions:
    """The functions with shapes that fit a new density; eps as before.

    Args:
        old: the functions now.
        density: of all sites.
        usable: sites to refresh, shape [S], bool; the others stay as they are.
        resolution: r of the score route.

    Returns:
        The refreshed functions.
    """
    shape = torch.where(usable.unsqueeze(-1), _fitted(density, old.shape), old.shape)
    if not old.tabulated.numel():
        return replace(old, shape=shape)
    tables = old.tables.clone()
    place = {row: k for k, row in enumerate(old.tabulated.tolist())}
    good = usable.tolist()
    for base, rows in old.groups().items():
        wanted = [row for row in rows if row in place and good[row]]
        if wanted:
            shapes = correction_shape(base, density.select(wanted), resolution=resolution, kernel=old.kernel)
            fresh = tabulate(shapes)
            tables[[place[row] for row in wanted]] = fresh.to(tables.dtype)
    return replace(old, shape=shape, tables=tables)


def mended(functions: Functions, eps: Tensor, lift: Tensor | None) -> tuple[Functions, Tensor]:
    """The functions with amplitudes as they were where a gradient that was not finite has broken them.

    Args:
        functions: the functions now.
        eps: amplitudes after the last round, shape [S].
        lift: likewise; None unless terms are free.

    Returns:
        The functions, and which were broken, shape [S], bool; the optimiser itself cannot mend them.
    """
    broken = ~functions.eps.isfinite()
    if functions.lift is None or lift is None:
        return replace(functions, eps=torch.where(broken, eps, functions.eps)), broken
    broken |= ~functions.lift.isfinite()
    lift = torch.where(broken, lift, functions.lift)
    return replace(functions, eps=torch.where(broken, eps, functions.eps), lift=lift), broken


def reverted(old: Functions, before: Functions, trained: Tensor) -> Functions:
    """The functions before the last round; amplitudes that the optimiser moves stay where they are now.

    Args:
        old: the functions now.
        before: the functions before the last round.
        trained: sites whose amplitudes the optimiser moves, shape [S], bool.

    Returns:
        The functions to go back to.
    """
    trained = trained.to(old.eps.device)
    eps = torch.where(trained, old.eps, before.eps)
    back = replace(before, bases=old.bases, kernel=old.kernel, eps=eps)  # a checkpoint has neither of the two
    if old.lift is None or before.lift is None:
        return back
    return replace(back, lift=torch.where(trained, old.lift, before.lift))


def _fitted(density: Density, like: Tensor) -> Tensor:
    """Mu and sigma of a density, shape [S, 2]; sigma is kept where half precision still has it.

    Returns:
        The two, dtype of ``like``.
    """
    return torch.stack([density.mean, density.std.clamp(min=_LEAST_SIGMA)], dim=-1).to(like)


def compounded(old: Functions, density: Density, usable: Tensor, resolution: float, max_slope: float) -> Functions:
    """Settles the correction so far, and shapes the next one for the function that has been corrected.

    The offset becomes all of c(z), read again in the coordinates of the new density and held to ``max_slope``; eps
    starts again from 0; the new shape is the score route's for base + c, which need not be monotone any more.

    Args:
        old: the functions now, all tabulated, with offsets.
        density: of all sites.
        usable: sites to change, shape [S], bool; the others stay as they are.
        resolution: r of the score route.
        max_slope: bound of the slope of the offset.

    Returns:
        The new functions.
    """
    shape = torch.where(usable.unsqueeze(-1), _fitted(density, old.shape), old.shape)
    settled = _settled(old, shape, max_slope)
    offsets = settled if old.offsets is None else torch.where(usable.view(-1, 1, 1), settled, old.offsets)
    new = replace(old, shape=shape, offsets=offsets, eps=torch.where(usable, 0.0, old.eps), tables=old.tables.clone())
    for row in usable.nonzero().flatten().tolist():
        base = Base("corrected", _one_function(new, row), key=row)
        fresh = correction_shape(base, density.select([row]), "score", resolution, kernel=old.kernel)
        new.tables[row] = tabulate(fresh)[0].to(new.tables.dtype)
    return new


def _settled(old: Functions, shape: Tensor, max_slope: float) -> Tensor:
    """Tables of c(z) / sigma in the coordinates of a new shape, faded out at their ends, no steeper than max_slope.

    Returns:
        Coefficients, shape [S, 4, intervals].
    """
    intervals = old.tables.shape[-1]
    step = 2 * HALF_WIDTH / intervals
    u = torch.linspace(-HALF_WIDTH, HALF_WIDTH, intervals + 1, device=shape.device, dtype=torch.float64)
    with torch.enable_grad():
        z = (shape[:, :1] + shape[:, 1:] * u).requires_grad_()
        c = old.correction(z)
        (slope,) = torch.autograd.grad(c.sum(), z)
    # where sigma has shrunk, c may be large still at the ends of the new table
    table = faded_table(c.detach() / shape[:, 1:], slope)
    steepest = steepest_slope(table)[:, None, None] / step
    return torch.where(steepest > max_slope, table * (max_slope / steepest), table).to(old.tables.dtype)


def _one_function(functions: Functions, row: int) -> Callable[[Tensor], Tensor]:
    """F of one site without its eps term, for points of any shape."""
    mu, sigma = functions.shape[row]
    assert functions.offsets is not None
    offset = functions.offsets[row]

    def function(z: Tensor) -> Tensor:
        value, _ = ghat_table((z - mu) / sigma, offset.to(z.dtype), HALF_WIDTH)
        return functions.bases[row].fn(z) + sigma * value

    return function


def bounded_move(old: Functions, new: Functions, region: TrustRegion) -> tuple[Functions, Tensor]:
    """The largest tried part of a move that keeps max over z of |c_taken(z) - c_old(z)| / sigma within max_delta.

    sigma is the larger one of the functions taken and the old ones; z runs over the tables' range of both, knot by
    knot. A function that is not finite or has no scale is never taken.

    Args:
        old: the functions now.
        new: the functions wanted.
        region: the bounds.

    Returns:
        The functions to take and the part of the way, shape [S]; 0 where nothing was admissible.
    """
    jumps = [_jump(old, new)]
    if bool((jumps[0] <= region.max_delta).all()):  # as nearly always: then the smaller parts need no look
        return new, torch.ones_like(old.eps)
    fractions = torch.tensor(_FRACTIONS, device=old.eps.device, dtype=old.eps.dtype)
    jumps += [_jump(old, old.towards(new, part.expand_as(old.eps))) for part in fractions[1:]]
    fraction = region.admissible(torch.stack(jumps), fractions)
    return old.towards(new, fraction), fraction


def _jump(old: Functions, new: Functions) -> Tensor:
    """Max |c_new - c_old| / sigma, shape [S]; NaN where the new function cannot be used."""
    # every second point is a knot of the tables, the others lie between
    grid = torch.linspace(-HALF_WIDTH, HALF_WIDTH, 2 * KNOTS - 1, device=old.eps.device, dtype=old.eps.dtype)
    z = torch.cat([side.shape[:, :1] + side.sigma * grid for side in (old, new)], dim=-1)
    jump = (new.correction(z) - old.correction(z)).abs().amax(-1) / torch.maximum(old.sigma, new.sigma)[:, 0]
    finite = new.eps.isfinite() if new.lift is None else (new.eps + new.lift).isfinite()
    sound = finite & new.shape.isfinite().all(-1) & (new.shape[:, 1] > 0)
    return torch.where(sound, jump, math.nan)
