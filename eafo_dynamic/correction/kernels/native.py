"""Activations on a CPU: base and correction in C, in one pass over memory each way."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from eafo_dynamic.correction.kernels.compiled import bind, sound_kernel
from eafo_dynamic.correction.kernels.directions import EPS, GAIN, LIFT, SLOPE, TERMS, code_of_terms
from eafo_dynamic.correction.kernels.formula import MAX_U, correction_of
from eafo_dynamic.correction.kernels.known import INSIDE, Known
from eafo_dynamic.correction.kernels.terms import Terms, channels_of, is_dense, uninitialised_like

__all__ = ["LARGEST_SINGLE", "NativeKernel", "native_kernel"]

# as in native.c and mixed.c
_BLOCK = 4096  # elements that one thread takes at a time
_FEW_BLOCKS = 64  # so many blocks need no room for their sums
LARGEST_SINGLE = _FEW_BLOCKS * _BLOCK
"""Elements up to which a backward needs no room for sums."""
_MOST_INTERVALS = 1024
_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # numbered in this order

_LEAST_PARALLEL = 32768  # elements from which on several threads work, as in torch's own pointwise kernels
_LEAST_KEPT = 65536  # elements from which on one pass over memory is faster than a copy and a pass
_MOST_TERMS = len(TERMS)  # of which there are sums, whichever a correction has
# partial sums of a gradient by the amplitudes: a fixed number, so that results do not depend on the threads
_PIECES = 64


class NativeKernel:
    """The compiled functions for activations.

    Args:
        library: the loaded library.
    """

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer = ctypes.c_void_p
        size = ctypes.c_int64
        integer = ctypes.c_int
        real = ctypes.c_float
        # amplitudes, which, shape, table, intervals, half_width, clamp, base, below, threads
        terms = [pointer, integer, pointer, pointer, integer, real, real, integer, real, integer]
        layout = [integer, size, size]  # type, channels, elements of a channel that lie side by side
        into = [pointer, pointer, pointer, pointer, size]  # z, grad, given, out, n
        sums = [pointer, pointer]  # partial, by_amplitudes
        self._forward = bind(library, "eafo_forward", [pointer, pointer, pointer, size, *terms])
        self._backward = bind(library, "eafo_backward", [*into, *terms, *sums])
        self._mixed_forward = bind(library, "eafo_mixed_forward", [pointer, pointer, size, *layout, *terms])
        self._mixed_backward = bind(library, "eafo_mixed_backward", [*into, *layout, *terms, integer, *sums])

    def addresses(self) -> tuple[int, int]:
        """Where the functions ``eafo_forward`` and ``eafo_backward`` are in memory.

        Returns:
            The two addresses.
        """
        first, second = (ctypes.cast(each, ctypes.c_void_p).value for each in (self._forward, self._backward))
        assert first is not None and second is not None
        return first, second

    @staticmethod
    def takes(z: Tensor, terms: Terms) -> bool:
        """Whether the compiled functions can compute with these tensors.

        Args:
            z: pre-activations, dense, on the CPU.
            terms: the other operands, on the CPU.

        Returns:
            Whether z is float32, bfloat16 or float16, there are amplitudes for all elements or for each channel, the
            table is not too long, and there is no lift beside a table.
        """
        if terms.table is not None and LIFT.name in terms.names:
            return False
        if z.dtype not in _TYPES or (terms.by_channel and channels_of(z, terms.amplitudes) is None):
            return False
        return terms.table is None or terms.table.shape[-1] <= _MOST_INTERVALS

    @staticmethod
    def inside(z: Tensor, terms: Terms, known: Known) -> Known | None:
        """The base, if it may be computed in the same pass as the correction.

        Where all amplitudes are 0 it may not: there the output must have the bits of torch's own base.

        Args:
            z: pre-activations, dense.
            terms: the other operands.
            known: the base.

        Returns:
            The base, or None.
        """
        if known.code == 0:
            return None
        return known if _acts_everywhere(terms) else None

    def add(self, out: Tensor, z: Tensor, terms: Terms, inside: Known | None = None) -> None:
        """Adds c(z) to the base's output, in place.

        Args:
            out: base(z), with the strides of z; f(z) afterwards. If the base is computed inside, what it holds before
                does not matter.
            z: pre-activations, dense.
            terms: the other operands.
            inside: the base, if it is to be computed in the same pass. Its values may differ from torch's in the last
                bits.
        """
        n = z.numel()
        given = _float32(terms)  # alive until the call returns: the arguments are addresses
        arguments = _arguments(given, inside, n)
        if _is_simple(z, terms):
            _call(self._forward, z.data_ptr(), out.data_ptr(), None, n, *arguments)
        else:
            _call(self._mixed_forward, z.data_ptr(), out.data_ptr(), n, *_layout(z, terms), *arguments)

    def overwrites(self, z: Tensor, terms: Terms, known: Known) -> bool:
        """Whether :meth:`overwrite` can be used, and pays.

        Args:
            z: pre-activations.
            terms: the other operands.
            known: the base.

        Returns:
            Whether base and correction take one pass, over a tensor so large that a separate copy would cost time.
        """
        if z.numel() < _LEAST_KEPT or not is_dense(z) or not _is_simple(z, terms):
            return False
        return self.inside(z, terms, known) is not None

    def overwrite(self, z: Tensor, kept: Tensor, terms: Terms, known: Known) -> None:
        """Writes f(z) over z, and z to `kept`, in one pass over memory instead of two.

        Args:
            z: pre-activations for which :meth:`overwrites` holds.
            kept: receives the pre-activations; has the strides of z.
            terms: the other operands.
            known: the base.
        """
        n = z.numel()
        given = _float32(terms)  # alive until the call returns: the arguments are addresses
        address = z.data_ptr()
        _call(self._forward, address, address, kept.data_ptr(), n, *_arguments(given, known, n))

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
        n = z.numel()
        given = _float32(terms)
        by_amplitudes = uninitialised_like(given.amplitudes)
        sums = by_amplitudes.data_ptr()
        value_address = None if value is None else value.data_ptr()
        tensors = z.data_ptr(), grad.data_ptr(), value_address, out.data_ptr()
        arguments = _arguments(given, inside, n)
        if _is_simple(z, terms):
            partial = None
            partial_address = None
            if n > LARGEST_SINGLE:
                partial = torch.empty(n // _BLOCK + 1, _MOST_TERMS, dtype=torch.float64)
                partial_address = partial.data_ptr()
            _call(self._backward, *tensors, n, *arguments, partial_address, sums)
        else:
            pieces = min(_PIECES, n // _BLOCK + 1)
            layout = _layout(z, terms)
            partial = torch.zeros(pieces, _MOST_TERMS, layout[1], dtype=torch.float64)
            _call(self._mixed_backward, *tensors, n, *layout, *arguments, pieces, partial.data_ptr(), sums)
        if given is terms:
            return by_amplitudes
        return by_amplitudes.to(terms.amplitudes.dtype)

    def is_sound(self) -> bool:
        """Whether the results are those of the formula; a compiler may be broken.

        Returns:
            Whether they are, for every form of the correction, every base computed inside and every dtype.
        """
        z = torch.linspace(-9.0, 9.0, 301, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        knots = torch.cos(torch.arange(17, dtype=z.dtype, device=z.device))
        # t^2 - t^3 vanishes at both ends: the table is continuous, and a place rounded across a knot does not matter
        table = torch.stack([knots[:-1], knots.diff(), knots[1:], -knots[1:]])
        shape = z.new_tensor([0.2, 1.4])
        every = tuple(TERMS)
        amplitudes = z.new_tensor([0.3, -0.2, 0.15, -0.1])
        one_each = torch.stack([z / 18.0, 0.05 - z / 20.0, z / 30.0, 0.04 - z / 40.0])
        closed_form = Terms(amplitudes, shape, None, 4.0, every)
        with_table = Terms(amplitudes[[0, 2, 3]], shape, table, 4.0, (EPS.name, GAIN.name, SLOPE.name))
        return (
            self._agrees(z, Terms(amplitudes[:1], shape, None, 4.0), INSIDE[:2])
            and self._agrees(z, Terms(amplitudes[:2], shape, None, 4.0, every[:2]), INSIDE)
            and self._agrees(z, closed_form, INSIDE)
            and self._agrees(z, Terms(amplitudes[:1], shape, table, 4.0), INSIDE)
            and self._agrees(z, with_table, INSIDE[:2])
            and self._agrees(z, Terms(amplitudes[2:], shape, None, 4.0, every[2:]), INSIDE[:2])
            and self._agrees_per_channel(z, closed_form._replace(amplitudes=one_each))
            and self._agrees_per_channel(z, with_table._replace(amplitudes=one_each[[0, 2, 3]].contiguous()))
        )

    def _agrees(self, z: Tensor, terms: Terms, bases: tuple[Known, ...]) -> bool:
        """Whether values are the formula's, of the correction alone and with each base computed inside."""
        out = torch.sin(z)
        expected = out + correction_of(z, terms, out)
        self.add(out, z, terms)
        if not torch.allclose(out, expected, rtol=0.0, atol=1e-5):
            return False
        for base in bases:
            self.add(out, z, terms, base)
            plain = base.value(z)
            if not torch.allclose(out, plain + correction_of(z, terms, plain), rtol=0.0, atol=1e-5):
                return False
        return True

    def _agrees_per_channel(self, z: Tensor, terms: Terms) -> bool:
        """Whether values are the formula's in every dtype, with an amplitude of its own for each element."""
        plain = torch.sin(z)
        expected = plain + correction_of(z, terms, plain)
        for dtype in _TYPES:
            out = plain.to(dtype, copy=True)
            self.add(out, z.to(dtype), terms)
            tolerance = 1e-5 if dtype == torch.float32 else 0.05
            if not torch.allclose(out.float(), expected, rtol=0.0, atol=tolerance):
                return False
        return True


@functools.cache
def native_kernel() -> NativeKernel | None:
    """The compiled functions for activations, compiled now if this machine has not compiled them before.

    Returns:
        The functions; None, with one warning that says why, where they cannot be compiled or give wrong results.
    """
    return sound_kernel(NativeKernel, "activations")


def _call(function: Callable[..., None], *arguments: object) -> None:
    """Calls a compiled function; at the end of Python's stack, raises the error that Python raises elsewhere.

    Raises:
        RecursionError: if the conversion of an argument raised it, which ctypes wraps.
        ArgumentError: any other error of a conversion.
    """
    try:
        function(*arguments)
    except ctypes.ArgumentError as error:
        if "RecursionError" not in str(error):
            raise
        raise RecursionError("maximum recursion depth exceeded") from error


def _acts_everywhere(terms: Terms) -> bool:
    """Whether no element has amplitudes of 0 only, and so keeps the value of the base."""
    if not terms.by_channel:
        return any(terms.amplitudes.tolist())
    return bool(terms.amplitudes.ne(0).any(0).all().item())


def _is_simple(z: Tensor, terms: Terms) -> bool:
    return z.dtype == torch.float32 and not terms.by_channel


def _float32(terms: Terms) -> Terms:
    """The terms in float32; the same object where they are float32 already."""
    amplitudes, shape, table, half_width, names = terms
    # spelled out: every call of every site comes through here, and a generator would take as long as all the rest
    fits = amplitudes.dtype == shape.dtype == torch.float32 and (table is None or table.dtype == torch.float32)
    if fits and amplitudes.is_contiguous():
        return terms
    if table is not None:
        table = table.to(torch.float32)
    return Terms(amplitudes.to(torch.float32).contiguous(), shape.to(torch.float32), table, half_width, names)


def _layout(z: Tensor, terms: Terms) -> tuple[int, int, int]:
    """Number of the dtype, number of channels, and how many elements of a channel lie side by side."""
    channels = channels_of(z, terms.amplitudes) if terms.by_channel else None
    count, inner = channels or (1, max(z.numel(), 1))
    return _TYPES.index(z.dtype), count, inner


def _arguments(terms: Terms, inside: Known | None, n: int) -> tuple[object, ...]:
    """The arguments that all functions share, from ``amplitudes`` to ``threads``."""
    amplitudes, shape, table, half_width, names = terms
    table_address = None
    intervals = 0
    if table is not None:
        table_address = table.data_ptr()
        intervals = table.shape[-1]
    base = 0
    below = 0.0
    if inside is not None:
        base = inside.code
        below = inside.below
    threads = torch.get_num_threads() if n >= _LEAST_PARALLEL else 1
    return (
        amplitudes.data_ptr(),
        code_of_terms(names),
        shape.data_ptr(),
        table_address,
        intervals,
        half_width,
        MAX_U,
        base,
        below,
        threads,
    )
