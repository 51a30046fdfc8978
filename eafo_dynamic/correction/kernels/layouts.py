"""Which tensors can be corrected, which amplitudes they get, and the values inside nested ones."""

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
        Whether it is a dense or nested tensor of real numbers. Integer, complex, quantised and 8-bit ones, sparse,
        masked and distributed ones are none: there the plain activation runs, or raises what it raises.
    """
    if not isinstance(value, Tensor) or value.dtype not in _FLOATS or value.layout not in _LAYOUTS:
        return False
    if type(value) is not Tensor and (isinstance(value, MaskedTensor) or _is_distributed(value)):
        return False
    return not value.is_nested or _is_packed(value)


def describe(value: object) -> str:
    """Short words for a value that cannot be a pre-activation.

    Args:
        value: what an activation is called with.

    Returns:
        For example ``int64 tensor``, ``sparse_coo tensor`` or ``list``.
    """
    if not isinstance(value, Tensor) or isinstance(value, MaskedTensor) or _is_distributed(value):
        return type(value).__name__
    kind = value.layout if value.layout not in _LAYOUTS else value.dtype
    return f"{str(kind).removeprefix('torch.').strip('_')} tensor"


def per_channel(eps: Tensor, z: Tensor, dim: int | None = None) -> Tensor:
    """Amplitudes that broadcast to z along its channels.

    Args:
        eps: 0-dim, or one amplitude a channel.
        z: pre-activations, dense.
        dim: dimension of the channels, 1 or -1; None: 1 with four dimensions or more, the last one otherwise.

    Returns:
        The amplitudes; their mean where z has another number of channels.
    """
    if not eps.dim():
        return eps
    behind_batch = z.dim() > 1 and (z.dim() >= 4 if dim is None else dim == 1)
    channels = z.shape[1 if behind_batch else -1] if z.dim() else 1
    if channels != eps.numel():
        return eps.mean()
    return eps.view([-1] + [1] * (z.dim() - 2)) if behind_batch else eps


def corrected_nested(
    z: Tensor, base: Callable[[Tensor], Tensor], terms: Callable[[Tensor], Terms], inplace: bool
) -> Tensor:
    """base(z) + c(z) of a nested tensor: the base as torch runs it, the correction on the values inside.

    Args:
        z: pre-activations, nested.
        base: the base function.
        terms: gives the operands for the values.
        inplace: whether the base overwrites its argument; then so does this.

    Returns:
        A nested tensor of the structure of z.
    """
    values = values_of(z.clone() if inplace else z)  # the backward needs what is about to be overwritten
    if not values.numel():
        return base(z)
    c = _with_values(z, correction_of(values, terms(values)))
    return z.copy_(base(z.clone()) + c) if inplace else base(z) + c


def size_of(z: Tensor) -> tuple[int, ...]:
    """Sizes of a tensor; of a nested one, those of its first part after the number of parts.

    Args:
        z: any tensor.

    Returns:
        Whole numbers.
    """
    if not z.is_nested:
        return tuple(z.shape)
    parts = z.unbind()
    return (len(parts), *(parts[0].shape if parts else ()))


def values_of(z: Tensor) -> Tensor:
    """All numbers of a nested tensor as a dense one that shares its memory.

    Args:
        z: nested, contiguous.

    Returns:
        Shape [sum of the lengths, ...] where the parts differ in their length alone, else [numel].
    """
    values = cast(Any, z).values()
    if z.layout == torch.jagged or not values.numel():
        return values
    last = nested_sizes(z)[:, -1:].unique()
    return values.view(-1, int(last)) if last.numel() == 1 else values


def _with_values(z: Tensor, values: Tensor) -> Tensor:
    """A nested tensor of the structure of z, differentiable by its values."""
    if z.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(values, cast(Any, z).offsets(), jagged_dim=jagged_dim(z))
    return nested_like(z, values.reshape(-1))


def _is_distributed(value: Tensor) -> bool:
    """Whether a tensor is a DTensor, which takes no plain tensor beside it; its module is not imported for that."""
    kind = type(value)
    return kind not in (Tensor, torch.nn.Parameter) and any(each.__name__ == "DTensor" for each in kind.__mro__)


def _is_packed(z: Tensor) -> bool:
    """Whether a nested tensor's values lie one after the other, without holes."""
    return cast(Any, z).lengths() is None if z.layout == torch.jagged else z.is_contiguous()
