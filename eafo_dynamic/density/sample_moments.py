"""Moments of the samples of all sites, and the fraction of units that never fired."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SampleMoments", "dead_fraction", "dead_fractions", "sample_moments"]


class SampleMoments(NamedTuple):
    """Moments of samples, each of shape [sites]; NaN where a site has no finite sample."""

    n: Tensor
    mean: Tensor
    std: Tensor
    skew: Tensor
    kurtosis: Tensor


def sample_moments(samples: Tensor) -> SampleMoments:
    """Number, mean, standard deviation, skewness and excess kurtosis of the finite samples.

    Population formulas (divided by n): std = sqrt(m2), skew = m3 / m2^(3/2), kurtosis = m4 / m2^2 - 3.

    Args:
        samples: shape [sites, n]; non-finite entries count as missing.

    Returns:
        The moments, float64; skew and kurtosis are 0 where the standard deviation is 0.
    """
    if not samples.shape[-1]:
        n = torch.zeros(samples.shape[:-1], dtype=torch.long, device=samples.device)
        nothing = torch.full(n.shape, math.nan, dtype=torch.float64, device=samples.device)
        return SampleMoments(n, nothing, nothing, nothing, nothing)
    low = samples.amin(-1, keepdim=True)
    finite = None
    n = torch.full_like(low[..., 0], samples.shape[-1], dtype=torch.long)
    if not bool((low - samples.amax(-1, keepdim=True)).isfinite().all()):  # only where a sample is missing
        finite = samples.isfinite()
        n = finite.sum(-1)
        low = samples.where(finite, math.inf).amin(-1, keepdim=True)
        low = low.where(low.isfinite(), 0.0)
    low = low.double()
    values = _only(samples.double() - low, finite)
    mean = values.sum(-1) / n
    centred = _only(values.sub_(mean.unsqueeze(-1)), finite)
    square = centred.square()
    m2 = square.sum(-1) / n
    m3 = centred.mul_(square).sum(-1) / n
    m4 = square.square_().sum(-1) / n
    positive = m2 > 0
    safe = m2.where(positive, 1.0)
    nan = torch.full_like(m2, math.nan)
    skew = (m3 / safe.pow(1.5)).where(positive, nan.where(n == 0, 0.0))
    kurtosis = (m4 / safe.square() - 3.0).where(positive, nan.where(n == 0, 0.0))
    return SampleMoments(n, low.squeeze(-1) + mean, m2.sqrt(), skew, kurtosis)


def _only(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values
    return values.where(mask, 0.0)


def dead_fraction(values: Tensor, units: Tensor, per_unit: int = 8) -> float:
    """Fraction of units that never fired: no sampled pre-activation above zero.

    Args:
        values: pre-activations, shape [n]; NaN ones are left out.
        units: unit of each, shape [n].
        per_unit: samples per unit, on average, below which the answer would mean nothing.

    Returns:
        The fraction, in [0, 1]; NaN with fewer than ``per_unit`` samples per unit.
    """
    return float(dead_fractions(values.unsqueeze(0), units.unsqueeze(0), per_unit))


_MOST_CELLS = 1 << 24  # sites times units that are counted in one table


def dead_fractions(values: Tensor, units: Tensor, per_unit: int = 8) -> Tensor:
    """Fraction of units that never fired, of all sites at once; see :func:`dead_fraction`.

    Args:
        values: pre-activations, shape [S, n]; NaN ones are left out.
        units: unit of each, shape [S, n], int64.
        per_unit: samples per unit, on average, below which the answer would mean nothing.

    Returns:
        The fractions, float32, shape [S]; NaN with fewer than ``per_unit`` samples per unit.
    """
    sites, n = values.shape
    if not n:
        return torch.full((sites,), math.nan, dtype=torch.float32, device=values.device)
    width = int(units.max()) + 1
    if sites * width > _MOST_CELLS and sites > 1:
        by_site = zip(values.split(1), units.split(1), strict=True)
        return torch.cat([dead_fractions(own_values, own_units, per_unit) for own_values, own_units in by_site])
    if sites * width > _MOST_CELLS:  # units of a site that are few among many numbers
        present, units = units.unique(return_inverse=True)
        width = len(present)
    known = (~values.isnan()).to(values.dtype)
    # a sum of terms that are not negative is above zero exactly where one of them is, in any order of summation
    positive = values.nan_to_num(0.0).clamp(min=0.0)
    present, fired = ((_sums(part, units, width) > 0).sum(1) for part in (known, positive))
    dead = (present - fired) / present
    return torch.where(known.sum(1) < per_unit * present, math.nan, dead)


def _sums(values: Tensor, units: Tensor, width: int) -> Tensor:
    """Sums of the values of each of ``width`` units, shape [S, width]."""
    return values.new_zeros(len(values), width).scatter_add_(1, units, values)
