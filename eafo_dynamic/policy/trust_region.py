"""The trust region: how large an amplitude may be, and how far a function may move in one round (Theory, section 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eafo_dynamic.apply.bank import moved_channels
from eafo_dynamic.correction.stacked import AmplitudeValues, Functions
from eafo_dynamic.correction.table import HALF_WIDTH, KNOTS

__all__ = ["TrustRegion", "bounded_move"]

_FRACTIONS = (1.0, 0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class TrustRegion:
    """Bounds that keep a correction harmless (Theory, section 5).

    Args:
        max_eps: kappa, bound of |eps| and |lift|; the slope of f stays within kappa of the base's, since |ghat'| <= 1,
            with free terms within 1.16 kappa: max over u of (|1 - u^2| + |u|) exp(-u^2 / 2) = 1.157.
        max_delta: bound of max over z of |c_new(z) - c_old(z)| / sigma at one update round.
    """

    max_eps: float
    max_delta: float

    def clamp(self, eps: Tensor) -> Tensor:
        """Eps brought back into the trust region.

        Args:
            eps: amplitudes, any shape.

        Returns:
            The amplitudes, none larger than max_eps in absolute value.
        """
        return eps.clamp(-self.max_eps, self.max_eps)

    def admissible(self, jumps: Tensor, fractions: Tensor) -> Tensor:
        """The largest tried fraction of a move whose jump is within bounds.

        Args:
            jumps: max |c_new - c_old| / sigma of each tried fraction, shape [fractions, sites].
            fractions: the fractions tried, shape [fractions], from large to small.

        Returns:
            The fraction to take, shape [sites]; 0 where even the smallest jumps too far or is not finite.
        """
        allowed = jumps <= self.max_delta  # false for NaN too
        first = allowed.to(torch.int8).argmax(0)
        return torch.where(allowed.any(0), fractions[first], 0.0)


def bounded_move(
    old: Functions, new: Functions, region: TrustRegion, channels: AmplitudeValues | None = None
) -> tuple[Functions, Tensor]:
    """The largest tried part of a move that keeps max over z of |c_taken(z) - c_old(z)| / sigma within max_delta.

    sigma is the larger one of the functions taken and the old ones; z runs over the range of both tables, knot by
    knot. Where channels have amplitudes of their own, the bound holds for the function of every channel. A function
    that is not finite or has no scale is never taken.

    Args:
        old: the functions now.
        new: the functions wanted.
        region: the bounds.
        channels: amplitudes of all channels now, from ``Bank.channels``; None where every site has one.

    Returns:
        The functions to take and the part of the way, shape [S]; 0 where nothing was admissible.
    """
    jumps = [_jump(old, new, region, channels)]
    if bool((jumps[0] <= region.max_delta).all()):  # as nearly always: then the smaller parts need no look
        return new, torch.ones_like(old.eps)
    fractions = torch.tensor(_FRACTIONS, device=old.eps.device, dtype=old.eps.dtype)
    for part in fractions[1:]:
        between = old.towards(new, part.expand_as(old.eps))
        jumps.append(_jump(old, between, region, channels))
    fraction = region.admissible(torch.stack(jumps), fractions)
    return old.towards(new, fraction), fraction


def _jump(old: Functions, new: Functions, region: TrustRegion, channels: AmplitudeValues | None) -> Tensor:
    """Max |c_new - c_old| / sigma, shape [S]; NaN where the new function cannot be used."""
    # every second point is a knot of the tables, the others lie between
    grid = torch.linspace(-HALF_WIDTH, HALF_WIDTH, 2 * KNOTS - 1, device=old.eps.device, dtype=old.eps.dtype)
    z = torch.cat([side.shape[:, :1] + side.sigma * grid for side in (old, new)], dim=-1)
    if channels is None:
        change = (new.correction(z) - old.correction(z)).abs().amax(-1)
    else:
        change = _largest_change_of_a_channel(z, old, new, region, channels)
    jump = change / torch.maximum(old.sigma, new.sigma)[:, 0]
    finite = new.eps.isfinite()
    if new.lift is not None:
        finite &= new.lift.isfinite()
    sound = finite & new.shape.isfinite().all(-1) & (new.shape[:, 1] > 0)
    return torch.where(sound, jump, math.nan)


def _largest_change_of_a_channel(
    z: Tensor, old: Functions, new: Functions, region: TrustRegion, channels: AmplitudeValues
) -> Tensor:
    """Max over channels and z of |c_new - c_old|, shape [S]."""
    amplitudes_before, amplitudes_after = [], []
    for of_channels, mean_before, mean_after in zip(channels, old.amplitudes, new.amplitudes, strict=True):
        if of_channels is not None and mean_before is not None and mean_after is not None:
            amplitudes_before.append(moved_channels(of_channels, mean_before, mean_before, math.inf))
            amplitudes_after.append(moved_channels(of_channels, mean_before, mean_after, region.max_eps))
    before, after = torch.stack(amplitudes_before, -1), torch.stack(amplitudes_after, -1)  # [S, C, terms]
    directions_before, directions_after = torch.stack(old.directions(z), 1), torch.stack(new.directions(z), 1)
    # site by site: all together would take S times C times 2052 numbers
    largest = [
        (after[site] @ directions_after[site] - before[site] @ directions_before[site]).abs().max()
        for site in range(len(z))
    ]
    return torch.stack(largest)
