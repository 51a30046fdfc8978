"""The sample of pre-activations that one site keeps between two update rounds.

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

__all__ = ["Collector", "spread_places"]


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


def spread_places(numel: int, count: int, like: Tensor) -> Tensor:
    """Places of a sample that is spread over a tensor, the same in every call.

    Args:
        numel: elements of the tensor.
        count: size of the sample.
        like: gives the device.

    Returns:
        Places in [0, numel), shape [count], int64, one in each of ``count`` equal stretches.
    """
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
    place = spread_places(z.numel(), count, z)
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

        Takes nothing inside a transform such as ``torch.func.vmap``, whose tensors do not outlive it, and nothing of a
        tensor without data.

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
            values = chunks[0].values
            units = _units(chunks[0], self.channel_dim)
        else:
            device = chunks[0].values.device  # replicas of a module may have left samples on several devices
            values = torch.cat([chunk.values.to(device) for chunk in chunks])
            units = torch.cat([_units(chunk, self.channel_dim).to(device) for chunk in chunks])
        return values.to(torch.promote_types(values.dtype, torch.float32)), units

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
    if dim is not None and rank >= 2:
        dim = dim % rank
    elif rank >= 4:
        dim = 1
    else:
        dim = rank - 1
    return _kept_units(chunk.shape, chunk.values.numel(), chunk.channels_last, chunk.values.device, dim)


@lru_cache(maxsize=256)
def _kept_units(shape: tuple[int, ...], count: int, channels_last: bool, device: torch.device, dim: int) -> Tensor:
    place = _kept_spread(math.prod(shape), count, device)
    if dim < 0:
        return place
    sizes = list(shape)
    if channels_last:  # the places count along dimension 1 first
        order = [0, *range(2, len(sizes)), 1]
        sizes = [shape[dimension] for dimension in order]
        dim = order.index(dim)
    return (place // math.prod(sizes[dim + 1 :])) % sizes[dim]
