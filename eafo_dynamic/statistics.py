"""What one site remembers of its batches between two update rounds, and how that merges over steps and ranks.

A site keeps a sample of its pre-activations, never a running sum: entropy, density and correction then all come from
the same numbers, and merging over steps, chunks or ranks is concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Collector", "Moments", "dead_fraction", "gather_ranks", "moments", "stack_samples"]


class _Plan(NamedTuple):
    """How to take a sample of a tensor: every ``stride``-th element of its memory."""

    count: int
    stride: int
    dense: bool


@lru_cache(maxsize=4096)
def _plan(shape: tuple[int, ...], strides: tuple[int, ...], quota: int) -> _Plan:
    """A stride coprime with the number of elements, so that the sample runs through all channels and places.

    Returns:
        The plan; ``dense`` says whether the elements lie in memory without gaps or overlaps, in whatever order.
    """
    numel = math.prod(shape)
    expected = 1
    dense = True
    for stride, size in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n > 1):
        dense = dense and stride == expected
        expected *= size
    if numel <= quota:
        return _Plan(numel, 1, dense)
    stride = math.ceil(numel / quota)
    while math.gcd(stride, numel) != 1:
        stride += 1
    return _Plan(math.ceil(numel / stride), stride, dense)


def _unravel(flat: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.unravel_index(flat, tuple(shape))


def _take(z: Tensor, plan: _Plan) -> Tensor:
    """A copy of the sample: a strided view of the memory where that is dense, a gather of as many elements elsewhere.

    Returns:
        Shape [plan.count].
    """
    if plan.dense:
        return z.as_strided((plan.count,), (plan.stride,), z.storage_offset()).clone()
    flat = torch.arange(0, z.numel(), plan.stride, device=z.device)
    return z[_unravel(flat, z.shape)]


class _Chunk(NamedTuple):
    values: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    plan: _Plan


@dataclass(eq=False)
class Collector:
    """The sample of pre-activations of one site since its last update round.

    Costs the same for any tensor size, draws no random number and copies nothing to the host.

    Args:
        quota: number of elements taken from one tensor, at most.
        chunks: what has been taken, one entry a forward.
    """

    quota: int = 1024
    chunks: list[_Chunk] = field(default_factory=list)

    def observe(self, z: Tensor) -> None:
        """Takes a sample of one batch of pre-activations.

        Args:
            z: pre-activations, any shape and layout, floating point.
        """
        z = z.detach()
        shape, strides = tuple(z.shape), tuple(z.stride())
        plan = _plan(shape, strides, self.quota)
        if plan.count:
            self.chunks.append(_Chunk(_take(z, plan), shape, strides, plan))

    def drain(self) -> tuple[Tensor, Tensor]:
        """Hands out the sample and forgets it.

        Returns:
            The pre-activations, shape [n], float32 or wider, and the unit (channel) of each, shape [n], int64.
        """
        if not self.chunks:
            return torch.empty(0), torch.empty(0, dtype=torch.long)
        values = torch.cat([chunk.values for chunk in self.chunks])
        units = torch.cat([_units(chunk) for chunk in self.chunks])
        self.chunks.clear()
        return values.to(torch.promote_types(values.dtype, torch.float32)), units

    def __getstate__(self) -> dict[str, object]:
        # a copied or pickled model starts without its twin's sample
        return {"quota": self.quota, "chunks": []}


def _units(chunk: _Chunk) -> Tensor:
    """Unit of each sampled element: dimension 1 of images [N, C, H, W, ...], the last dimension of anything else."""
    dim = 1 if len(chunk.shape) >= 4 else len(chunk.shape) - 1
    flat = torch.arange(chunk.values.numel(), device=chunk.values.device) * chunk.plan.stride
    if dim < 0:
        return flat
    if chunk.plan.dense:
        return (flat // max(chunk.strides[dim], 1)) % chunk.shape[dim]
    return _unravel(flat, chunk.shape)[dim]


def dead_fraction(values: Tensor, units: Tensor, per_unit: int = 8) -> float:
    """Fraction of units that never fired: no sampled pre-activation above zero.

    Args:
        values: pre-activations, shape [n].
        units: unit of each, shape [n].
        per_unit: samples a unit needs on average for the answer to mean something.

    Returns:
        The fraction, in [0, 1]; NaN with fewer than ``per_unit`` samples a unit.
    """
    if not values.numel():
        return math.nan
    present, index = units.unique(return_inverse=True)
    if values.numel() < per_unit * present.numel():
        return math.nan
    largest = torch.full((present.numel(),), -math.inf, dtype=values.dtype, device=values.device)
    largest.scatter_reduce_(0, index, values, reduce="amax")
    return float((largest <= 0).to(torch.float32).mean())


def stack_samples(samples: Sequence[Tensor], limit: int) -> Tensor:
    """Stacks samples of unequal length, the shorter ones filled with NaN.

    Args:
        samples: one tensor [n_s] a site.
        limit: number of samples kept of each, at most; a longer one is thinned evenly.

    Returns:
        Shape [sites, n].
    """
    thinned = [_thin(values, limit) for values in samples]
    width = max((values.numel() for values in thinned), default=0)
    dtype = max((values.dtype for values in thinned), key=lambda d: torch.finfo(d).bits)
    stacked = torch.full((len(thinned), width), math.nan, dtype=dtype, device=thinned[0].device)
    for row, values in zip(stacked, thinned, strict=True):
        row[: values.numel()] = values
    return stacked


def _thin(values: Tensor, limit: int) -> Tensor:
    if values.numel() <= limit:
        return values
    # evenly spaced and never the same column of every batch
    return values[torch.arange(limit, device=values.device) * values.numel() // limit]


def gather_ranks(samples: Tensor, width: int) -> Tensor:
    """Samples of all ranks side by side, by one collective; every rank gets the same tensor.

    Args:
        samples: this rank's, shape [sites, n] with n <= width, NaN where missing.
        width: columns a rank contributes, equal on all ranks.

    Returns:
        Shape [sites, ranks * width]; samples itself where there is one process.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return samples
    sites = samples.shape[0]
    mine = samples.new_full((sites, width), math.nan)
    mine[:, : samples.shape[1]] = samples
    everyone = samples.new_empty((distributed.get_world_size(), sites, width))
    distributed.all_gather_into_tensor(everyone, mine)
    return everyone.transpose(0, 1).reshape(sites, -1)


class Moments(NamedTuple):
    """Moments of samples, each of shape [sites]; NaN where a site has no finite sample."""

    n: Tensor
    mean: Tensor
    std: Tensor
    skew: Tensor
    kurtosis: Tensor


def moments(samples: Tensor) -> Moments:
    """Number, mean, standard deviation, skewness and excess kurtosis of the finite samples.

    Population formulas (divided by n): std = sqrt(m2), skew = m3 / m2^(3/2), kurtosis = m4 / m2^2 - 3.

    Args:
        samples: shape [sites, n]; non-finite entries count as missing.

    Returns:
        The moments, float64; skew and kurtosis are 0 where the standard deviation is 0.
    """
    finite = samples.isfinite()
    values = samples.double().where(finite, 0.0)
    n = finite.sum(-1)
    mean = values.sum(-1) / n
    centred = (values - mean.unsqueeze(-1)).where(finite, 0.0)
    square = centred.square()
    m2 = square.sum(-1) / n
    m3 = (square * centred).sum(-1) / n
    m4 = square.square().sum(-1) / n
    positive = m2 > 0
    safe = m2.where(positive, 1.0)
    nan = torch.full_like(m2, math.nan)
    skew = (m3 / safe.pow(1.5)).where(positive, nan.where(n == 0, 0.0))
    kurtosis = (m4 / safe.square() - 3.0).where(positive, nan.where(n == 0, 0.0))
    return Moments(n, mean, m2.sqrt(), skew, kurtosis)
