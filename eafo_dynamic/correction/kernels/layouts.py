"""Which tensors can be corrected, which amplitudes their channels get, and the values inside nested tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor
from torch.masked import MaskedTensor

from eafo_dynamic.correction.kernels.formula import correction_of
from eafo_dynamic.correction.kernels.terms import Terms
from eafo_dynamic.internals.torch_internals import jagged_dim, nested_like, nested_sizes

__all__ = ["corrected_nested", "describe", "is_correctable", "per_channel", "size_of", "values_of"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LAYOUTS = (torch.strided, torch.jagged)


def is_correctable(value: object) -> TypeGuard[Tensor]:
    """Whether a value can be a pre-activation.

    Args:
        value: what an activation is called with.

    Returns:
        Whether it is a dense or nested tensor of floating-point numbers of at least 16 bits. Integer, complex,
        quantised, 8-bit, sparse, masked and distributed tensors cannot be corrected: the plain activation runs on
        them, or raises its own error.
    """
    if not isinstance(value, Tensor) or value.dtype not in _FLOATS or value.layout not in _LAYOUTS:
        return False
    if type(value) is not Tensor and (isinstance(value, MaskedTensor) or _is_distributed(value)):
        return False
    return not value.is_nested or _is_packed(value)


def describe(value: object) -> str:
    """Describes a value that cannot be a pre-activation, in a few words.

    Args:
        value: what an activation is called with.

    Returns:
        For example ``int64 tensor``, ``sparse_coo tensor`` or ``list``.
    """
    if not isinstance(value, Tensor) or isinstance(value, MaskedTensor) or _is_distributed(value):
        return type(value).__name__
    kind = value.dtype if value.layout in _LAYOUTS else value.layout
    return f"{str(kind).removeprefix('torch.').strip('_')} tensor"


def per_channel(amplitudes: Tensor, z: Tensor, dim: int | None = None) -> Tensor:
    """Amplitudes that broadcast to z along its channels.

    Args:
        amplitudes: one row a term, shape [T], or one column per channel, shape [T, C].
        z: pre-activations, dense.
        dim: dimension of the channels, 1 or -1. None: 1 with four dimensions or more, else the last one.

    Returns:
        The amplitudes; their mean, shape [T], where z has another number of channels.
    """
    if amplitudes.dim() == 1:
        return amplitudes
    if dim is None:
        dim = 1 if z.dim() >= 4 else -1
    behind_batch = dim == 1 and z.dim() > 1
    channels = 1
    if behind_batch:
        channels = z.shape[1]
    elif z.dim():
        channels = z.shape[-1]
    if channels != amplitudes.shape[1]:
        return amplitudes.mean(1)
    if behind_batch:
        return amplitudes.view([len(amplitudes), -1] + [1] * (z.dim() - 2))
    return amplitudes


def corrected_nested(
    z: Tensor, base: Callable[[Tensor], Tensor], terms: Callable[[Tensor], Terms], inplace: bool
) -> Tensor:
    """base(z) + c(z) of a nested tensor: torch computes the base, and the correction is computed for the values inside.

    Args:
        z: pre-activations, nested.
        base: the base function.
        terms: returns the operands for the values.
        inplace: whether the base overwrites its argument; then this function does so too.

    Returns:
        A nested tensor of the structure of z.
    """
    kept = z.clone() if inplace else z  # the backward needs what is about to be overwritten
    values = values_of(kept)
    if not values.numel():
        return base(z)
    out = base(z.clone() if inplace else z)
    c = _with_values(z, correction_of(values, terms(values), values_of(out).to(values.dtype)))
    if inplace:
        return z.copy_(out + c)
    return out + c


def size_of(z: Tensor) -> tuple[int, ...]:
    """Sizes of a tensor; for a nested one, the number of parts and the sizes of the first.

    Args:
        z: any tensor.

    Returns:
        Whole numbers.
    """
    if not z.is_nested:
        return tuple(z.shape)
    parts = z.unbind()
    if not parts:
        return (0,)
    return (len(parts), *parts[0].shape)


def values_of(z: Tensor) -> Tensor:
    """All values of a nested tensor as a dense tensor that shares its memory.

    Args:
        z: nested, contiguous.

    Returns:
        Shape [sum of the lengths, ...] if the parts differ only in their length, else [numel].
    """
    values = cast(Any, z).values()
    if z.layout == torch.jagged or not values.numel():
        return values
    last_sizes = nested_sizes(z)[:, -1:].unique()
    if last_sizes.numel() != 1:
        return values
    return values.view(-1, int(last_sizes))


def _with_values(z: Tensor, values: Tensor) -> Tensor:
    """A nested tensor of the structure of z, differentiable in its values."""
    if z.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(values, cast(Any, z).offsets(), jagged_dim=jagged_dim(z))
    return nested_like(z, values.reshape(-1))


def _is_distributed(value: Tensor) -> bool:
    """Whether a tensor is a DTensor, which cannot be combined with plain tensors; its module is not imported here."""
    kind = type(value)
    if kind is Tensor or kind is torch.nn.Parameter:
        return False
    return any(parent.__name__ == "DTensor" for parent in kind.__mro__)


def _is_packed(z: Tensor) -> bool:
    """Whether a nested tensor's values lie one after the other, without gaps."""
    if z.layout == torch.jagged:
        return cast(Any, z).lengths() is None
    return z.is_contiguous()
