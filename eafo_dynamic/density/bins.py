"""A small histogram of every site's samples, for the log."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eafo_dynamic.density.sample_moments import sample_moments

__all__ = ["BINS", "BinCounts", "bin_counts"]

BINS = 32
_REACH = 4.0  # standard deviations on each side of the mean


class BinCounts(NamedTuple):
    """Counts of the samples of all sites in bins of equal width.

    Args:
        edges: of the bins, increasing, float64, shape [S, bins + 1]; all equal where a site has no spread.
        counts: samples in each bin, int64, shape [S, bins].
    """

    edges: Tensor
    counts: Tensor


def bin_counts(samples: Tensor) -> BinCounts:
    """Counts every site's finite samples in 32 bins of equal width.

    The bins reach from the smallest to the largest sample, but at most 4 standard deviations from the mean; the
    outermost ones also count what lies farther out.

    Args:
        samples: shape [S, n]; non-finite entries count as missing.

    Returns:
        The counts; they are 0 where a site has no sample.
    """
    if not samples.shape[-1]:
        samples = samples.new_full((len(samples), 1), torch.nan)
    moments = sample_moments(samples)
    values = samples.double()
    finite = values.isfinite()
    reach = _REACH * moments.std
    low = values.where(finite, torch.inf).amin(-1).maximum(moments.mean - reach)
    high = values.where(finite, -torch.inf).amax(-1).minimum(moments.mean + reach)
    share = torch.linspace(0.0, 1.0, BINS + 1, dtype=values.dtype, device=values.device)
    edges = torch.lerp(low.unsqueeze(-1), high.unsqueeze(-1), share).nan_to_num()

    ordered = values.where(finite, torch.inf).sort(-1).values
    inner = torch.searchsorted(ordered, edges[:, 1:-1].contiguous())
    n = moments.n.unsqueeze(-1)
    below = torch.cat([torch.zeros_like(n), inner.minimum(n), n], dim=-1)
    return BinCounts(edges, below.diff())
