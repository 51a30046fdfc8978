"""The trust region: how large an amplitude may be, and how far a function may move in one round (Theory, section 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eafo_dynamic.apply.bank import moved_channels
from eafo_dynamic.correction.kernels import BASE_TERM, EPS, LIFT, SLOPE, TERMS
from eafo_dynamic.correction.stacked import Functions
from eafo_dynamic.correction.table import HALF_WIDTH, KNOTS

__all__ = ["TrustRegion", "bounded_move", "range_of"]

_FRACTIONS = (1.0, 0.5, 0.25, 0.125, 0.0625)
_STEEPEST = {EPS.name: 1.0, LIFT.name: math.exp(-0.5)}  # max over u of |ghat'| and of |u| exp(-u^2 / 2)
_STEEPEST_OF_BOTH = 1.157  # max over u of (|1 - u^2| + |u|) exp(-u^2 / 2)
_DATA = 4.0  # standard deviations around mu that stand for the range of the data where no sample says it


@dataclass(frozen=True)
class TrustRegion:
    """Bounds that keep a correction harmless (Theory, section 5).

    Args:
        max_eps: kappa, bound of every |amplitude|. The slope of f stays within kappa of the base's with tied terms,
            since |ghat'| <= 1; within 1.16 kappa with both local ones, max over u of (|1 - u^2| + |u|) exp(-u^2 / 2) =
            1.157; the two tails add kappa (|base'| + 1). See ``slope_bound``.
        max_delta: bound of max over z of |f_new(z) - f_old(z)| / sigma at one update round; z runs over all that a
            local term can reach, or, where there are tails, over the range of the data.
    """

    max_eps: float
    max_delta: float

    def clamp(self, amplitudes: Tensor) -> Tensor:
        """Amplitudes brought back into the trust region.

        Args:
            amplitudes: any shape.

        Returns:
            The amplitudes, none larger than max_eps in absolute value.
        """
        return amplitudes.clamp(-self.max_eps, self.max_eps)

    def slope_bound(self, names: Sequence[str], steepest: float) -> float:
        """How far the slope of f can be from that of its base.

            |f' - base'| <= max_eps * (steepest of the local terms + |base'| with a gain + 1 with a slope)

        Args:
            names: of the terms.
            steepest: largest |base'|.

        Returns:
            The bound, units of output per unit of pre-activation.

        Example:
            >>> round(TrustRegion(max_eps=0.5, max_delta=0.5).slope_bound(["eps", "lift", "gain", "slope"], 1.0), 4)
            1.5785
        """
        local = [name for name in names if TERMS[name].local]
        bound = _STEEPEST_OF_BOTH if len(local) > 1 else _STEEPEST.get("".join(local), 0.0)
        if BASE_TERM in names:
            bound += steepest
        if SLOPE.name in names:
            bound += 1.0
        return self.max_eps * bound

    def admissible(self, jumps: Tensor, fractions: Tensor) -> Tensor:
        """The largest tried fraction of a move whose jump is within bounds.

        Args:
            jumps: max |f_new - f_old| / sigma of each tried fraction, shape [fractions, sites].
            fractions: the fractions tried, shape [fractions], from large to small.

        Returns:
            The fraction to take, shape [sites]; 0 where even the smallest jumps too far or is not finite.
        """
        allowed = jumps <= self.max_delta  # false for NaN too
        first = allowed.to(torch.int8).argmax(0)
        return torch.where(allowed.any(0), fractions[first], 0.0)


def range_of(samples: Tensor, functions: Functions) -> tuple[Tensor, Tensor]:
    """The range of the data, over which functions with tails are compared.

    Args:
        samples: pre-activations, shape [S, n]; those that are not finite are missing.
        functions: of the sites; mu -+ 4 sigma stands for the range of a site without samples.

    Returns:
        Smallest and largest pre-activation of every site, each of shape [S, 1].
    """
    samples = torch.nn.functional.pad(samples, (0, 1), value=math.nan)  # a minimum of nothing is an error
    known = samples.isfinite()
    missing = ~known.any(1, keepdim=True)
    low = samples.where(known, math.inf).amin(1, keepdim=True)
    high = samples.where(known, -math.inf).amax(1, keepdim=True)
    mu = functions.shape[:, :1]
    reach = _DATA * functions.sigma
    smallest = torch.where(missing, mu - reach, low.to(mu.dtype))
    largest = torch.where(missing, mu + reach, high.to(mu.dtype))
    return smallest, largest


def bounded_move(
    old: Functions,
    new: Functions,
    region: TrustRegion,
    channels: Tensor | None = None,
    span: tuple[Tensor, Tensor] | None = None,
) -> tuple[Functions, Tensor]:
    """The largest tried part of a move that keeps max over z of |f_taken(z) - f_old(z)| / sigma within max_delta.

    sigma is the larger one of the functions taken and the old ones; z runs over the range of both tables, knot by
    knot, as far as it lies in the span. Where channels have amplitudes of their own, the bound holds for the function
    of every channel. A function that is not finite or has no scale is never taken.

    Args:
        old: the functions now.
        new: the functions wanted.
        region: the bounds.
        channels: amplitudes of all channels now, from ``Bank.channels``; None where every site has one.
        span: from ``range_of``, where functions have tails, which grow without end; None for no limit.

    Returns:
        The functions to take and the part of the way, shape [S]; 0 where nothing was admissible.
    """
    jumps = [_jump(old, new, region, channels, span)]
    if bool((jumps[0] <= region.max_delta).all()):  # as nearly always: then the smaller parts need no look
        return new, torch.ones_like(jumps[0])
    fractions = torch.tensor(_FRACTIONS, device=old.shape.device, dtype=old.shape.dtype)
    for part in fractions[1:]:
        between = old.towards(new, part.expand_as(jumps[0]))
        jumps.append(_jump(old, between, region, channels, span))
    fraction = region.admissible(torch.stack(jumps), fractions)
    return old.towards(new, fraction), fraction


def _jump(
    old: Functions,
    new: Functions,
    region: TrustRegion,
    channels: Tensor | None,
    span: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Max |f_new - f_old| / sigma, shape [S]; NaN where the new function cannot be used."""
    # every second point is a knot of the tables, the others lie between
    grid = torch.linspace(-HALF_WIDTH, HALF_WIDTH, 2 * KNOTS - 1, device=old.shape.device, dtype=old.shape.dtype)
    z = torch.cat([side.shape[:, :1] + side.sigma * grid for side in (old, new)], dim=-1)
    if span is not None:
        z = z.clamp(*span)
    if channels is None:
        change = (new.correction(z) - old.correction(z)).abs().amax(-1)
    else:
        change = _largest_change_of_a_channel(z, old, new, region, channels)
    jump = change / torch.maximum(old.sigma, new.sigma)[:, 0]
    sound = new.amplitudes.isfinite().all(0) & new.shape.isfinite().all(-1) & (new.shape[:, 1] > 0)
    return torch.where(sound, jump, math.nan)


def _largest_change_of_a_channel(
    z: Tensor, old: Functions, new: Functions, region: TrustRegion, channels: Tensor
) -> Tensor:
    """Max over channels and z of |c_new - c_old|, shape [S]."""
    before = moved_channels(channels, old.amplitudes, old.amplitudes, math.inf).movedim(0, -1)  # [S, C, T]
    after = moved_channels(channels, old.amplitudes, new.amplitudes, region.max_eps).movedim(0, -1)
    directions_before = torch.stack(old.directions(z), 1)
    directions_after = torch.stack(new.directions(z), 1)
    # site by site: all together would take S times C times 2052 numbers
    largest: list[Tensor] = []
    for site in range(len(z)):
        change = after[site] @ directions_after[site] - before[site] @ directions_before[site]
        largest.append(change.abs().max())
    return torch.stack(largest)
