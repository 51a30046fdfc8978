"""Which dimension of a tensor holds its channels, by the layer that made it; noted on the tensors of a dry run."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

__all__ = ["CONVOLUTIONS", "channel_dim", "mark_channels"]

CONVOLUTIONS = frozenset(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3))
"""Names of torch's functions."""

_LAST = {"linear", "bilinear", "layer_norm", "rms_norm", "embedding", "addmm", "matmul", "__matmul"}
_NORMS = {"batch_norm", "group_norm", "instance_norm"}
_FIRST = CONVOLUTIONS | _NORMS
_REORDERING = {"transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "__get"}


def channel_dim(tensor: Tensor) -> int | None:
    """The dimension that holds the channels of a tensor made in a dry run.

    Args:
        tensor: any.

    Returns:
        1 after a convolution or batch norm, -1 after a Linear or layer norm; None where it is not known.
    """
    return getattr(tensor, "eafo_channel_dim", None)


def mark_channels(func: Any, args: Any, out: Any) -> None:
    """Notes the dimension of the channels on what a function has made; what keeps the channels in place keeps it.

    Args:
        func: a torch function.
        args: its positional arguments.
        out: what it returned.
    """
    name = getattr(func, "__name__", "").rstrip("_")
    if not isinstance(out, Tensor) or out.is_nested or not out.is_floating_point() or name in _REORDERING:
        return
    dim = _dim_made(name, args, out)
    if dim is not None:
        cast(Any, out).eafo_channel_dim = dim


def _dim_made(name: str, args: Any, out: Tensor) -> int | None:
    if name in _LAST:
        return -1
    if name in _FIRST and out.dim() > 1:
        return 1
    for each in args:
        dim = channel_dim(each) if isinstance(each, Tensor) else None
        if dim is not None and _keeps(each, out, dim):
            return dim
    return None


def _keeps(before: Tensor, after: Tensor, dim: int) -> bool:
    """Whether the channels are where they were: behind the batch, in as many dimensions, or in the last one."""
    if dim == -1:
        return after.dim() > 0 and after.shape[-1] == before.shape[-1]
    return after.dim() == before.dim() and after.shape[:2] == before.shape[:2]
