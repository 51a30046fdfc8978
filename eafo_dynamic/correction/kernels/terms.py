"""The operands of the correction besides the pre-activations, and the layouts of tensors in memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import deterministic

from eafo_dynamic.correction.kernels.directions import EPS

__all__ = ["Terms", "channels_of", "flat", "is_dense", "uninitialised_like"]

_DETERMINISTIC: Any = deterministic  # its one option is missing from torch's type hints


class Terms(NamedTuple):
    """The operands of c(z), the sum of the terms, each amplitude times its direction; see ``directions``.

    Args:
        amplitudes: one row a term, no unit: shape [T], or [T, ...] with rows that broadcast to z.
        shape: mu and sigma, shape [2].
        table: coefficients of ghat, shape [4, intervals]; None for the closed form of eps.
        half_width: end of the table in standard deviations.
        names: of the terms, T of them, in the order of ``directions.TERMS``.
    """

    amplitudes: Tensor
    shape: Tensor
    table: Tensor | None
    half_width: float
    names: tuple[str, ...] = (EPS.name,)

    @property
    def by_channel(self) -> bool:
        """Whether there are amplitudes that differ along z."""
        return self.amplitudes.dim() > 1

    def amplitude(self, name: str) -> Tensor:
        """One row of the amplitudes.

        Args:
            name: of one of the terms.

        Returns:
            0-dim, or of a shape that broadcasts to z.
        """
        return self.amplitudes[self.names.index(name)]


def is_dense(z: Tensor) -> bool:
    """Whether a tensor's elements fill its memory without gaps, in the order of its dimensions or channels last.

    Args:
        z: any tensor.

    Returns:
        Whether they do.
    """
    if z.is_contiguous():
        return True
    if z.dim() == 4:
        return z.is_contiguous(memory_format=torch.channels_last)
    if z.dim() == 5:
        return z.is_contiguous(memory_format=torch.channels_last_3d)
    return False


def flat(z: Tensor) -> Tensor:
    """The elements of a dense tensor in their order in memory.

    Args:
        z: a dense tensor.

    Returns:
        A view, shape [numel].
    """
    return z.as_strided((z.numel(),), (1,))


def uninitialised_like(values: Tensor) -> Tensor:
    """A tensor all of whose elements are going to be written, as torch allocates outputs of its own operations.

    With deterministic algorithms, ``torch.empty_like`` fills a tensor, so that code that reads elements it has not
    written gets the same ones each time. Filling costs as much as an activation.

    Args:
        values: has the shape, strides, dtype and device that the tensor is to have.

    Returns:
        A tensor with arbitrary values.
    """
    if not torch.are_deterministic_algorithms_enabled() or not _DETERMINISTIC.fill_uninitialized_memory:
        return torch.empty_like(values)
    _DETERMINISTIC.fill_uninitialized_memory = False
    try:
        return torch.empty_like(values)
    finally:
        _DETERMINISTIC.fill_uninitialized_memory = True


def channels_of(z: Tensor, amplitudes: Tensor) -> tuple[int, int] | None:
    """Number of channels, and how many elements of one channel lie side by side in memory.

    Args:
        z: pre-activations, dense.
        amplitudes: shape [T, C] or [T, C, 1, ...], contiguous, with rows that broadcast to z.

    Returns:
        The two numbers; None where the rows have another shape.
    """
    rows, count, *others = amplitudes.shape
    channel_dim = z.dim() - 1 - len(others)
    if rows * count != amplitudes.numel() or channel_dim < 0 or z.shape[channel_dim] != count:
        return None
    if not amplitudes.is_contiguous():
        return None
    if z.is_contiguous():
        return count, math.prod(z.shape[channel_dim + 1 :])
    # dense but not contiguous: channels last
    if channel_dim == 1:
        return count, 1
    return None
