"""What one site remembers of its batches between two update rounds, and how that merges over steps and ranks.

A site keeps a sample of its pre-activations, never a running sum: entropy, density and correction then all come
from the same numbers, and merging over steps, chunks or ranks is concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from eafo_dynamic.internals.torch_internals import transforms_active

__all__ = [
    "Collector",
    "Moments",
    "dead_fraction",
    "dead_fractions",
    "gather_ranks",
    "moments",
    "pool_ranks",
    "stack_samples",
    "world_size",
]


def _spread(numel: int, count: int, device: torch.device) -> Tensor:
    """Places in [0, numel), one in each of ``count`` equal stretches, at a pseudo-random place inside it.

    Even steps would beat with the periods of the tensor: a step of one image meets one channel only. The
    places depend on the arguments alone: no random stream is touched, and ranks and repetitions agree.

    Args:
        numel: number of elements to choose from.
        count: number of places, at most numel.
        device: where the places are wanted.

    Returns:
        Places in ascending order, shape [count], int64; all of them if count equals numel.
    """
    k = torch.arange(count, device=device)
    hashed = (k * 2654435769) & 0xFFFFFFFF
    for _ in range(2):
        hashed = (((hashed >> 16) ^ hashed) * 0x45D9F3B) & 0xFFFFFFFF
    return (k * numel) // count + ((hashed * (numel // count)) >> 32)


_kept_spread = lru_cache(maxsize=256)(_spread)


def _places(numel: int, count: int, like: Tensor) -> Tensor:
    # torch.compile warns of caches, and a fake tensor must not outlive its mode in one
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return _spread(numel, count, like.device)
    return _kept_spread(numel, count, like.device)


def _is_wrapper(z: Tensor) -> bool:
    """Whether a tensor is a subclass that wraps others, by the methods that ``torch.compile`` knows one by."""
    return type(z) is not Tensor and hasattr(z, "__tensor_flatten__") and hasattr(z, "__tensor_unflatten__")


def _is_channels_last(z: Tensor) -> bool:
    return z.dim() >= 3 and not z.is_contiguous() and z.movedim(1, -1).is_contiguous()


def _unravel(place: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Index along every dimension of places counted in the order of the dimensions.

    Returns:
        One index a dimension, each of the shape of place.
    """
    index: list[Tensor] = []
    for size in reversed(shape):
        index.append(place % size)
        place = place // size
    return tuple(reversed(index))


def _take(z: Tensor, count: int, channels_last: bool) -> Tensor:
    """A copy of ``count`` elements, whatever the size and layout of z; nothing else of z is read.

    Returns:
        Shape [count].
    """
    place = _places(z.numel(), count, z)
    if z.dim() == 0 or z.is_contiguous():
        return z.view(-1)[place]
    if channels_last:
        return z.movedim(1, -1).view(-1)[place]
    return z[_unravel(place, tuple(z.shape))]


class _Chunk(NamedTuple):
    """The sample of one forward, and the one before it.

    A chain and no list: torch.compile guards on the length of a list and would compile anew at every step.
    """

    values: Tensor
    shape: tuple[int, ...]
    channels_last: bool
    previous: _Chunk | None


@dataclass(eq=False)
class Collector:
    """The sample of pre-activations of one site since its last update round.

    Costs the same for any tensor size, draws no random number and copies nothing to the host. Each forward
    adds a stratified sample of its own, so that forwards of equal size count equally.

    Args:
        quota: number of elements taken from one tensor, at most.
        channel_dim: dimension of the units, 1 or -1; None: 1 with four dimensions or more, the last one otherwise.

    Attributes:
        passed_over: kind of a value that could not be corrected and so left no sample, since it was last reset.
    """

    quota: int = 1024
    channel_dim: int | None = None
    passed_over: str | None = field(default=None, init=False)
    _newest: _Chunk | None = field(default=None, init=False, repr=False)

    def observe(self, z: Tensor) -> None:
        """Takes a sample of one batch of pre-activations.

        Inside a transform such as ``torch.func.vmap`` nothing is taken: its tensors die with it. Nor is it of a tensor
        without data.

        Args:
            z: pre-activations, any shape and layout, floating point.
        """
        if not torch.compiler.is_compiling() and transforms_active():
            return
        z = z.detach()
        count = min(z.numel(), self.quota)
        if not torch.compiler.is_compiling() and _is_wrapper(z):
            self.passed_over = type(z).__name__  # has no numbers of its own
        elif count and not z.is_meta:
            last = _is_channels_last(z)
            self._newest = _Chunk(_take(z, count, last), tuple(z.shape), last, self._newest)

    def drain(self) -> tuple[Tensor, Tensor]:
        """Hands out the sample and forgets it.

        Returns:
            The pre-activations, float32 or wider, and the unit (channel) of each, int64, both of shape [n].
        """
        chunks: list[_Chunk] = []
        while self._newest is not None:
            chunks.append(self._newest)
            self._newest = self._newest.previous
        if not chunks:
            nothing = torch.empty(0, dtype=torch.float32, device="cpu")
            return nothing, nothing.long()
        if len(chunks) == 1:  # as nearly always
            values, units = chunks[0].values, _units(chunks[0], self.channel_dim)
        else:
            device = chunks[0].values.device  # replicas of one module may have left samples on several
            parts = [(chunk.values.to(device), _units(chunk, self.channel_dim).to(device)) for chunk in chunks]
            values, units = (torch.cat(part) for part in zip(*parts, strict=True))
        wide = torch.promote_types(values.dtype, torch.float32)
        return (values if values.dtype == wide else values.to(wide)), units

    def pending(self) -> list[tuple[Tensor, list[int], bool]]:
        """The sample as tensors and primitives, for a checkpoint between two rounds; it stays where it is.

        Returns:
            One entry a forward, oldest first.
        """
        chunks: list[tuple[Tensor, list[int], bool]] = []
        chunk = self._newest
        while chunk is not None:
            chunks.append((chunk.values, list(chunk.shape), chunk.channels_last))
            chunk = chunk.previous
        return chunks[::-1]

    def restore(self, chunks: Sequence[tuple[Tensor, Sequence[int], bool]], device: torch.device) -> None:
        """Puts back what ``pending`` gave, in place of the present sample.

        Args:
            chunks: one entry a forward, oldest first.
            device: where the site lives.
        """
        self._newest = None
        for values, shape, channels_last in chunks:
            self._newest = _Chunk(values.to(device), tuple(shape), channels_last, self._newest)

    def __getstate__(self) -> dict[str, object]:
        # a copied or pickled model starts without its twin's sample
        return {"quota": self.quota, "channel_dim": self.channel_dim, "passed_over": None, "_newest": None}


def _units(chunk: _Chunk, dim: int | None) -> Tensor:
    """Unit of each sampled element; see ``Collector.channel_dim``.

    Returns:
        Units, shape [count], int64.
    """
    rank = len(chunk.shape)
    dim = (1 if rank >= 4 else rank - 1) if dim is None or rank < 2 else dim % rank
    return _kept_units(chunk.shape, chunk.values.numel(), chunk.channels_last, chunk.values.device, dim)


@lru_cache(maxsize=256)
def _kept_units(shape: tuple[int, ...], count: int, channels_last: bool, device: torch.device, dim: int) -> Tensor:
    place, sizes = _kept_spread(math.prod(shape), count, device), list(shape)
    if dim < 0:
        return place
    if channels_last:  # the places count along dimension 1 first
        sizes.append(sizes.pop(1))
        dim = len(sizes) - 1 if dim == 1 else dim - 1
    return (place // math.prod(sizes[dim + 1 :])) % sizes[dim]


def dead_fraction(values: Tensor, units: Tensor, per_unit: int = 8) -> float:
    """Fraction of units that never fired: no sampled pre-activation above zero.

    Args:
        values: pre-activations, shape [n]; NaN ones are left out.
        units: unit of each, shape [n].
        per_unit: samples a unit needs on average for the answer to mean something.

    Returns:
        The fraction, in [0, 1]; NaN with fewer than ``per_unit`` samples a unit.
    """
    return float(dead_fractions(values.unsqueeze(0), units.unsqueeze(0), per_unit))


_MOST_CELLS = 1 << 24  # sites times units that are counted in one table


def dead_fractions(values: Tensor, units: Tensor, per_unit: int = 8) -> Tensor:
    """Fraction of units that never fired, of all sites at once; see :func:`dead_fraction`.

    Args:
        values: pre-activations, shape [S, n]; NaN ones are left out.
        units: unit of each, shape [S, n], int64.
        per_unit: samples a unit needs on average for the answer to mean something.

    Returns:
        The fractions, float32, shape [S]; NaN with fewer than ``per_unit`` samples a unit.
    """
    sites, n = values.shape
    if not n:
        return torch.full((sites,), math.nan, dtype=torch.float32, device=values.device)
    width = int(units.max()) + 1
    if sites * width > _MOST_CELLS and sites > 1:
        return torch.cat([dead_fractions(v, u, per_unit) for v, u in zip(values.split(1), units.split(1), strict=True)])
    if sites * width > _MOST_CELLS:  # units of a site that are few among many numbers
        present, units = units.unique(return_inverse=True)
        width = len(present)
    known = (values == values).to(values.dtype)
    # sums of what is not negative are above zero where one term is, in any order
    positive = values.nan_to_num(0.0).clamp(min=0.0)
    present, fired = ((_sums(part, units, width) > 0).sum(1) for part in (known, positive))
    dead = (present - fired) / present
    return torch.where(known.sum(1) < per_unit * present, math.nan, dead)


def _sums(values: Tensor, units: Tensor, width: int) -> Tensor:
    """Sums of the values of each of ``width`` units, shape [S, width]."""
    return values.new_zeros(len(values), width).scatter_add_(1, units, values)


def stack_samples(samples: Sequence[Tensor], limit: int) -> Tensor:
    """Stacks samples of unequal length, the shorter ones filled with NaN.

    Args:
        samples: one tensor [n_s] a site.
        limit: number of samples kept of each, at most; a longer one is thinned, all stretches of it alike.

    Returns:
        Shape [sites, n]; of one tensor for all sites a view.
    """
    thinned = [_thin(values, limit) for values in samples]
    if len(thinned) > 1 and all(values is thinned[0] for values in thinned):  # as units of equal sites are
        return thinned[0].expand(len(thinned), -1)
    if len({values.numel() for values in thinned}) == 1:
        return torch.stack(thinned)
    width = max((values.numel() for values in thinned), default=0)
    dtype = max((values.dtype for values in thinned), key=lambda d: torch.finfo(d).bits)
    stacked = torch.full((len(thinned), width), math.nan, dtype=dtype, device=thinned[0].device)
    for row, values in zip(stacked, thinned, strict=True):
        row[: values.numel()] = values
    return stacked


def _thin(values: Tensor, limit: int) -> Tensor:
    if values.numel() <= limit:
        return values
    return values[_places(values.numel(), limit, values)]


def world_size() -> int:
    """Number of processes that train together.

    Returns:
        1 where there is no process group.
    """
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather_ranks(samples: Tensor, width: int) -> Tensor:
    """Samples of all ranks side by side, by one collective; every rank gets the same tensor.

    Args:
        samples: this rank's, shape [sites, n] with n <= width, NaN where missing.
        width: columns a rank contributes, equal on all ranks.

    Returns:
        Shape [sites, ranks * width]; samples itself where there is one process.
    """
    ranks = world_size()
    if ranks == 1:
        return samples
    mine = samples.new_full((samples.shape[0], width), math.nan)
    mine[:, : samples.shape[1]] = samples
    everyone = [torch.empty_like(mine) for _ in range(ranks)]
    torch.distributed.all_gather(everyone, mine)
    return torch.cat(everyone, dim=-1)


def pool_ranks(samples: Sequence[Tensor], width: int, beside: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """Samples of all ranks side by side, and what else they have to say, by one collective.

    Args:
        samples: this rank's, each of shape [sites, n] with n <= width, NaN where missing; of any dtype on any rank.
        width: columns a rank contributes, equal on all ranks.
        beside: further numbers of this rank, shape [sites, k].

    Returns:
        Samples, each [sites, ranks * width], and numbers, [sites, ranks, k]; float32, or what was given with one
        process.
    """
    ranks, extra = world_size(), beside.shape[1]
    if ranks == 1:
        return samples, beside.unsqueeze(1)
    # a rank without a sample does not know the dtype of the others'
    rows = torch.cat([each.to(torch.float32) for each in samples])
    mine = torch.cat([beside.to(torch.float32).repeat(len(samples), 1), rows], dim=1)
    everyone = gather_ranks(mine, extra + width).unflatten(1, (ranks, extra + width))
    numbers, kept = everyone.split([extra, width], dim=-1)
    return kept.flatten(1).chunk(len(samples)), numbers[: len(beside)]


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
    if not samples.shape[-1]:
        n = torch.zeros(samples.shape[:-1], dtype=torch.long, device=samples.device)
        nothing = torch.full(n.shape, math.nan, dtype=torch.float64, device=samples.device)
        return Moments(n, nothing, nothing, nothing, nothing)
    low, finite = samples.amin(-1, keepdim=True), None
    if not bool((low - samples.amax(-1, keepdim=True)).isfinite().all()):  # the few passes more where one is missing
        finite = samples.isfinite()
        low = samples.where(finite, math.inf).amin(-1, keepdim=True)
        low = low.where(low.isfinite(), 0.0)
    low = low.double()
    n = torch.full_like(low[..., 0], samples.shape[-1], dtype=torch.long) if finite is None else finite.sum(-1)
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
    return Moments(n, low.squeeze(-1) + mean, m2.sqrt(), skew, kurtosis)


def _only(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values.where(mask, 0.0)
