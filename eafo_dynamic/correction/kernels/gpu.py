"""The correction term in Triton, for CUDA tensors: which tensors it takes, and how they are cut into tiles.

Triton comes with torch's own CUDA packages. Its compiler runs once for each kind of call, some tenths of a second, and
keeps the results on disk. Nothing here reads a value of a tensor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eafo_dynamic.correction.kernels.known import NOTHING, Known
from eafo_dynamic.correction.kernels.native import NativeKernel
from eafo_dynamic.correction.kernels.terms import Terms, channels_of

__all__ = ["EVERY_BASE", "TritonKernel", "code_of"]

_TILE, _WARPS = 1024, 4  # elements and warps of 32 threads: eight a thread, 16 bytes of half precision
_LARGE = 1 << 22  # elements from which on a program of the backward goes several tiles
_STEPS = 4
_HERE = nullcontext()
_RELU, _NOTHING, _LEAKY = 1, 5, 6  # as in the code
EVERY_BASE = frozenset(range(1, 7))
"""Codes of all bases that the code has."""


class _Cut(NamedTuple):
    """A tensor as a matrix of tiles.

    Args:
        axis: 0 one amplitude for all, 1 one a column, 2 one a row.
        rows: of the matrix.
        columns: of the matrix; elements of a row lie side by side.
        channels: amplitudes.
        tile: rows and columns of a tile.
    """

    axis: int
    rows: int
    columns: int
    channels: int
    tile: tuple[int, int]

    def programs(self, steps: int = 1) -> tuple[int, int]:
        """How many programs there are down and across, each of several tiles."""
        high, wide = self.tile
        high, wide = (high * steps, wide) if self.axis == 1 else (high, wide * steps)
        return -(-self.rows // high), -(-self.columns // wide)


class TritonKernel:
    """The functions in Triton.

    Args:
        inside: which bases each dtype gets computed in the same pass: those whose bits are torch's own, by their codes.
            Amplitudes lie on the device and are not read, so that one of 0 is no case of its own; it must come out
            as the base bit for bit by itself.
    """

    name = "triton"

    def __init__(self, inside: dict[torch.dtype, frozenset[int]]) -> None:
        from eafo_dynamic.correction.kernels import triton_code

        self._code: Any = triton_code
        self._inside = inside

    def takes(self, z: Tensor, terms: Terms) -> bool:
        """Whether the functions can work on these tensors.

        Args:
            z: pre-activations, dense.
            terms: the other operands, on the same device.

        Returns:
            Whether the compiled kernel would take them on a CPU, and the check has passed for their dtype.
        """
        return z.dtype in self._inside and NativeKernel.takes(z, terms)

    def inside(self, z: Tensor, terms: Terms, known: Known) -> Known | None:
        """The base, if it is computed in the same pass.

        Args:
            z: pre-activations, dense.
            terms: the other operands.
            known: the base.

        Returns:
            The same, or None.
        """
        return known if code_of(known) in self._inside[z.dtype] else None

    def add(self, out: Tensor, z: Tensor, terms: Terms, inside: Known | None = None) -> None:
        """Adds c(z) to the base's output, in place; see the kernel in C.

        Args:
            out: base(z), strides of z; overwritten whatever it holds where the base is computed inside.
            z: pre-activations, dense.
            terms: the other operands.
            inside: the base, to be computed in the same pass.
        """
        if not z.numel():
            return
        cut = _cut(z, terms)
        down, across = cut.programs()
        with _on(z):
            self._code.forward[(down * across,)](
                z, out, *_operands(terms), *cut[1:4], *_numbers(terms, inside), **self._constants(cut, terms, inside)
            )

    def add_gradient(
        self, out: Tensor, grad: Tensor, z: Tensor, terms: Terms, inside: Known | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Adds grad * c'(z) to the base's gradient, in place; see the kernel in C.

        Args:
            out: grad * base'(z), strides of z; overwritten likewise.
            grad: gradient of the loss by the output, strides of z.
            z: pre-activations, dense.
            terms: the other operands.
            inside: see :meth:`add`.

        Returns:
            Gradients by eps and lift, of their shape and dtype; None for a lift that is none.
        """
        eps, lift = terms.eps, terms.lift
        if not z.numel():
            return torch.zeros_like(eps), None if lift is None else torch.zeros_like(lift)
        cut, steps = _cut(z, terms), _STEPS if z.numel() >= _LARGE else 1
        down, across = cut.programs(steps)
        if cut.axis == 0:
            size, summed = (down * across,), [0]
        elif cut.axis == 1:
            size, summed = (down, cut.columns), [0]
        else:
            size, summed = (cut.rows // cut.channels, cut.channels, across), [0, 2]
        partial = torch.empty(1 if lift is None else 2, *size, dtype=torch.float32, device=z.device)
        with _on(z):
            self._code.backward[(down * across,)](
                *(z, grad, out, partial),
                *_operands(terms),
                *(*cut[1:4], partial[0].numel(), *_numbers(terms, inside)),
                **self._constants(cut, terms, inside),
                STEPS=steps,
            )
        wide = torch.promote_types(eps.dtype, torch.float32)
        sums = partial.sum([1 + each for each in summed], dtype=wide).to(eps.dtype)
        by_eps, *by_lift = (each.view(eps.shape) for each in sums.unbind())
        return by_eps, by_lift[0] if by_lift else None

    def _constants(self, cut: _Cut, terms: Terms, inside: Known | None) -> dict[str, Any]:
        """What a kernel is compiled for."""
        rows, columns = cut.tile
        return {
            "BASE": 0 if inside is None else code_of(inside),
            "INTERVALS": 0 if terms.table is None else terms.table.shape[-1],
            "LIFT": terms.lift is not None,
            "AXIS": cut.axis,
            "PRECISE": not self._code.INTERPRETED,
            "ROWS": rows,
            "COLUMNS": columns,
            "num_warps": _WARPS,
        }


def code_of(known: Known) -> int:
    """The number of a base in the code.

    Args:
        known: the base.

    Returns:
        Its number; 0 for one that the code does not have.
    """
    if known is NOTHING:
        return _NOTHING
    if known.code == _RELU and known.value is not torch.relu:
        return _LEAKY  # with a slope of 0 too, where -0.0 tells the two apart
    return known.code


def _cut(z: Tensor, terms: Terms) -> _Cut:
    n, tall = z.numel(), _TILE
    if not terms.eps.dim():
        return _Cut(0, 1, n, 1, (1, tall))
    channels, inner = channels_of(z, terms.eps) or (1, n)
    axis, columns = (1, channels) if inner == 1 else (2, inner)
    # whole lines of memory a row; rows below each other share their sums where a column is a channel
    wide = min(1 << (columns - 1).bit_length(), 64 if axis == 1 else tall)
    return _Cut(axis, n // columns, columns, channels, (tall // wide, wide))


def _operands(terms: Terms) -> tuple[Tensor, ...]:
    eps, shape, table, _, lift = terms
    # what is not there is not read
    return eps, *(eps if each is None else each for each in (lift, shape, table))


def _numbers(terms: Terms, inside: Known | None) -> tuple[float, float, float]:
    """End of the table, intervals per standard deviation, and the slope below 0 of a leaky ReLU."""
    per_sd = 1.0 if terms.table is None else terms.table.shape[-1] / (2.0 * terms.half_width)
    return float(terms.half_width), per_sd, 0.0 if inside is None else float(inside.below)


def _on(z: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of z."""
    elsewhere = z.is_cuda and torch.cuda.current_device() != z.get_device()
    return torch.cuda.device(z.device) if elsewhere else _HERE
