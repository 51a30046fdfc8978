"""What a back end gets beside the pre-activations, and in which layout."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import deterministic

__all__ = ["Terms", "channels_of", "flat", "is_dense", "uninitialised_like"]

_DETERMINISTIC: Any = deterministic  # torch's type hints do not have its one option


class Terms(NamedTuple):
    """The operands of c(z) = sigma * (eps * ghat(u) + lift * exp(-u^2 / 2)), u = (z - mu) / sigma.

    Args:
        eps: amplitude, 0-dim, or of a shape that broadcasts to z.
        shape: mu and sigma, shape [2].
        table: coefficients of ghat, shape [4, intervals]; None for the closed form.
        half_width: end of the table in standard deviations.
        lift: amplitude of the bell, of the shape of eps; None for none.
    """

    eps: Tensor
    shape: Tensor
    table: Tensor | None
    half_width: float
    lift: Tensor | None = None


def is_dense(z: Tensor) -> bool:
    """Whether a tensor's elements lie one after the other, in the order of its dimensions or channels last.

    Args:
        z: any tensor.

    Returns:
        Whether they do.
    """
    if z.is_contiguous():
        return True
    return (z.dim() == 4 and z.is_contiguous(memory_format=torch.channels_last)) or (
        z.dim() == 5 and z.is_contiguous(memory_format=torch.channels_last_3d)
    )


def flat(z: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory.

    Args:
        z: a dense tensor.

    Returns:
        A view, shape [numel].
    """
    return z.as_strided((z.numel(),), (1,))


def uninitialised_like(values: Tensor) -> Tensor:
    """Room for values all of which are going to be written, as outputs of torch's own operations are.

    ``torch.empty_like`` fills it where algorithms are to be deterministic, so that whoever reads what he has not
    written gets the same each time; that costs as much as an activation.

    Args:
        values: shape, strides, dtype and device that it is to have.

    Returns:
        A tensor that holds anything.
    """
    if not torch.are_deterministic_algorithms_enabled() or not _DETERMINISTIC.fill_uninitialized_memory:
        return torch.empty_like(values)
    _DETERMINISTIC.fill_uninitialized_memory = False
    try:
        return torch.empty_like(values)
    finally:
        _DETERMINISTIC.fill_uninitialized_memory = True


def channels_of(z: Tensor, eps: Tensor) -> tuple[int, int] | None:
    """Number of channels, and how many elements of one lie side by side.

    Args:
        z: pre-activations, dense.
        eps: amplitudes, shape [C] or [C, 1, ...], contiguous, that broadcasts to z.

    Returns:
        The two numbers; None where eps is of another shape.
    """
    count, place = eps.shape[0], z.dim() - eps.dim()
    if count != eps.numel() or place < 0 or z.shape[place] != count or not eps.is_contiguous():
        return None
    if z.is_contiguous():
        return count, math.prod(z.shape[place + 1 :])
    return (count, 1) if place == 1 else None  # dense, and not in order: channels last
