"""The correction term in Triton, for CUDA tensors: which tensors it takes, and how they are divided into tiles.

Triton is installed with torch's CUDA packages. Its compiler runs once for each kind of call, for some tenths of a
second, and keeps the results on disk. Nothing here reads a value of a tensor, which would wait for the GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eafo_dynamic.correction.kernels.directions import code_of_terms
from eafo_dynamic.correction.kernels.known import NOTHING, Known
from eafo_dynamic.correction.kernels.native import NativeKernel
from eafo_dynamic.correction.kernels.terms import Terms, channels_of

__all__ = ["EVERY_BASE", "TritonKernel", "code_of"]

_TILE = 1024  # elements of a tile
_WARPS = 4  # of 32 threads: eight elements per thread, which are 16 bytes in half precision
_LARGE = 1 << 22  # elements from which on a program of the backward works on several tiles
_STEPS = 4  # so many
_HERE = nullcontext()
_RELU, _NOTHING, _LEAKY_RELU = 1, 5, 6  # codes of bases in triton_code
EVERY_BASE = frozenset(range(1, 7))
"""Codes of all bases that ``triton_code`` can compute."""


class _Tiling(NamedTuple):
    """A tensor as a matrix, divided into tiles.

    Args:
        axis: 0 for one amplitude for all elements, 1 for one per column, 2 for one per row.
        rows: number of rows of the matrix.
        columns: number of columns; the elements of a row lie side by side in memory.
        channels: number of amplitudes.
        tile: rows and columns of a tile.
    """

    axis: int
    rows: int
    columns: int
    channels: int
    tile: tuple[int, int]

    def programs(self, steps: int = 1) -> tuple[int, int]:
        """How many programs there are down and across, if each works on `steps` tiles."""
        high, wide = self.tile
        if self.axis == 1:
            high *= steps
        else:
            wide *= steps
        return -(-self.rows // high), -(-self.columns // wide)


class TritonKernel:
    """The functions in Triton.

    Args:
        inside: for each dtype, codes of the bases that are computed in the same pass as the correction: those whose
            bits are torch's own. The amplitudes lie on the device and are not read, so the case that one is 0 cannot be
            treated by itself; the result must equal the base bit for bit all the same.
    """

    name = "triton"

    def __init__(self, inside: dict[torch.dtype, frozenset[int]]) -> None:
        from eafo_dynamic.correction.kernels import triton_code

        self._code: Any = triton_code
        self._inside = inside

    def takes(self, z: Tensor, terms: Terms) -> bool:
        """Whether the functions can compute with these tensors.

        Args:
            z: pre-activations, dense.
            terms: the other operands, on the same device.

        Returns:
            Whether the compiled kernel would take them on a CPU, and the check has passed for the dtype of z.
        """
        return z.dtype in self._inside and NativeKernel.takes(z, terms)

    def inside(self, z: Tensor, terms: Terms, known: Known) -> Known | None:
        """The base, if it is computed in the same pass as the correction.

        Args:
            z: pre-activations, dense.
            terms: the other operands.
            known: the base.

        Returns:
            The base, or None.
        """
        return known if code_of(known) in self._inside[z.dtype] else None

    def add(self, out: Tensor, z: Tensor, terms: Terms, inside: Known | None = None) -> None:
        """Adds c(z) to the base's output, in place.

        Args:
            out: base(z), with the strides of z; f(z) afterwards. If the base is computed inside, what it holds before
                does not matter.
            z: pre-activations, dense.
            terms: the other operands.
            inside: the base, if it is to be computed in the same pass.
        """
        if not z.numel():
            return
        tiling = _tiling_of(z, terms)
        down, across = tiling.programs()
        launch = self._code.forward[(down * across,)]
        sizes = tiling.rows, tiling.columns, tiling.channels
        with _on(z):
            launch(
                z,
                out,
                *_operands(terms),
                *sizes,
                *_numbers(terms, inside),
                **self._constants(tiling, terms, inside),
            )

    def add_gradient(
        self,
        out: Tensor,
        grad: Tensor,
        z: Tensor,
        terms: Terms,
        inside: Known | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """Adds grad * c'(z) to the base's gradient, in place.

        Args:
            out: grad * base'(z), with the strides of z; grad * f'(z) afterwards. If the base is computed inside, what
                it holds before does not matter.
            grad: gradient of the loss by the output, with the strides of z.
            z: pre-activations, dense.
            terms: the other operands.
            inside: see :meth:`add`.
            value: base(z), with the strides of z; needed where there is a gain and the base is not computed inside.

        Returns:
            Gradient by the amplitudes, of their shape and dtype.
        """
        amplitudes = terms.amplitudes
        if not z.numel():
            return torch.zeros_like(amplitudes)
        tiling = _tiling_of(z, terms)
        steps = _STEPS if z.numel() >= _LARGE else 1
        down, across = tiling.programs(steps)
        # partial sums of each amplitude, and over which dimensions they are added up
        summed = [1]
        if tiling.axis == 0:
            shape = (down * across,)
        elif tiling.axis == 1:
            shape = (down, tiling.columns)
        else:
            shape = (tiling.rows // tiling.channels, tiling.channels, across)
            summed = [1, 3]
        partial = torch.empty(len(terms.names), *shape, dtype=torch.float32, device=z.device)
        launch = self._code.backward[(down * across,)]
        sizes = tiling.rows, tiling.columns, tiling.channels, partial[0].numel()
        with _on(z):
            launch(
                z,
                grad,
                z if value is None else value,
                out,
                partial,
                *_operands(terms),
                *sizes,
                *_numbers(terms, inside),
                **self._constants(tiling, terms, inside),
                STEPS=steps,
            )
        wide = torch.promote_types(amplitudes.dtype, torch.float32)
        return partial.sum(summed, dtype=wide).to(amplitudes.dtype).view(amplitudes.shape)

    def _constants(self, tiling: _Tiling, terms: Terms, inside: Known | None) -> dict[str, Any]:
        """What a kernel is compiled for."""
        rows, columns = tiling.tile
        return {
            "BASE": 0 if inside is None else code_of(inside),
            "INTERVALS": 0 if terms.table is None else terms.table.shape[-1],
            "TERMS": code_of_terms(terms.names),
            "AXIS": tiling.axis,
            "PRECISE": not self._code.INTERPRETED,
            "ROWS": rows,
            "COLUMNS": columns,
            "num_warps": _WARPS,
        }


def code_of(known: Known) -> int:
    """Code of a base in ``triton_code``.

    Args:
        known: the base.

    Returns:
        Its code; 0 for a base that is not computed there.
    """
    if known is NOTHING:
        return _NOTHING
    if known.code == _RELU and known.value is not torch.relu:
        return _LEAKY_RELU  # with a slope of 0 too: its zeros for z < 0 are -0.0, those of ReLU are +0.0
    return known.code


def _tiling_of(z: Tensor, terms: Terms) -> _Tiling:
    n = z.numel()
    if not terms.by_channel:
        return _Tiling(axis=0, rows=1, columns=n, channels=1, tile=(1, _TILE))
    channels, inner = channels_of(z, terms.amplitudes) or (1, n)
    if inner == 1:
        # a column is a channel: narrow and high tiles, since the rows of a tile share their sums
        axis = 1
        columns = channels
        widest = 64
    else:
        axis = 2
        columns = inner
        widest = _TILE
    next_power_of_2 = 1 << (columns - 1).bit_length()
    wide = min(next_power_of_2, widest)
    return _Tiling(axis, n // columns, columns, channels, tile=(_TILE // wide, wide))


def _operands(terms: Terms) -> tuple[Tensor, ...]:
    """Pointers to amplitudes, shape and table; for a table that there is not, any pointer: it is not read."""
    amplitudes, shape, table, *_ = terms
    return amplitudes.contiguous(), shape, amplitudes if table is None else table


def _numbers(terms: Terms, inside: Known | None) -> tuple[float, float, float]:
    """End of the table, intervals per standard deviation, and the slope of a leaky ReLU for z < 0."""
    per_sd = 1.0
    if terms.table is not None:
        per_sd = terms.table.shape[-1] / (2.0 * terms.half_width)
    below = 0.0 if inside is None else float(inside.below)
    return float(terms.half_width), per_sd, below


def _on(z: Tensor) -> AbstractContextManager[object]:
    """Makes the device of z the current one, on which Triton launches."""
    if z.is_cuda and torch.cuda.current_device() != z.get_device():
        return torch.cuda.device(z.device)
    return _HERE
