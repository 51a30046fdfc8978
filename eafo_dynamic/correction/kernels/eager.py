"""The correction term with torch's own operations, in place, a part of the tensor at a time that fits the cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eafo_dynamic.correction.kernels.formula import MAX_U
from eafo_dynamic.correction.kernels.known import Known
from eafo_dynamic.correction.kernels.terms import Terms, flat

__all__ = ["EagerKernel"]

_CHUNK = 65536  # elements a thread: with fewer, threads wait for each other; more leave the second-level cache
_HALF_LOG2_E = 0.5 / math.log(2.0)


class EagerKernel:
    """The same functions as the compiled kernel's, for any machine; float32 and float64."""

    name = "eager"

    @staticmethod
    def takes(z: Tensor, terms: Terms) -> bool:
        """Whether these tensors can be worked on.

        Args:
            z: pre-activations, dense, on the CPU.
            terms: the other operands, on the CPU.

        Returns:
            Whether z is float32 or float64, there is one amplitude for all, and no lift beside a table.
        """
        both = terms.lift is not None and terms.table is not None
        return z.dtype in (torch.float32, torch.float64) and not terms.eps.dim() and not both

    @staticmethod
    def inside(z: Tensor, terms: Terms, known: Known) -> Known | None:
        """No base is computed in the same pass.

        Args:
            z: pre-activations.
            terms: the other operands.
            known: the base.

        Returns:
            None.
        """

    @staticmethod
    def add(out: Tensor, z: Tensor, terms: Terms, inside: Known | None = None) -> None:
        """Adds c(z) to the base's output, in place; see the compiled kernel.

        Args:
            out: base(z), strides of z.
            z: pre-activations, dense.
            terms: the other operands.
            inside: not used: the base's output is there.
        """
        eps, lift, size = float(terms.eps), _lift(terms), _size(z)
        if eps == 0.0 and not lift:
            return  # every bit of the base stays
        shape = _shape(terms, z, size)
        for into, chunk in zip(flat(out).split(size), flat(z).split(size), strict=True):
            shape.add_value(into, chunk, eps, lift)

    @staticmethod
    def add_gradient(
        out: Tensor, grad: Tensor, z: Tensor, terms: Terms, inside: Known | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Adds grad * c'(z) to the base's gradient, in place; see the compiled kernel.

        Args:
            out: grad * base'(z), strides of z.
            grad: gradient of the loss by the output, strides of z.
            z: pre-activations, dense.
            terms: the other operands.
            inside: not used: the base's gradient is there.

        Returns:
            Gradients by eps and lift, 0-dim; None for a lift that is none.
        """
        eps, lift, size = float(terms.eps), _lift(terms), _size(z)
        shape = _shape(terms, z, size)
        total = z.new_zeros(2, dtype=torch.float64)
        for into, g, chunk in zip(*(flat(each).split(size) for each in (out, grad, z)), strict=True):
            total += shape.add_slope(into, g, chunk, eps, lift)
        by_eps, by_lift = total.to(terms.eps.dtype).unbind()
        return by_eps, None if terms.lift is None else by_lift


def _lift(terms: Terms) -> float | None:
    return None if terms.lift is None else float(terms.lift)


def _size(z: Tensor) -> int:
    return max(1, min(_CHUNK * torch.get_num_threads(), z.numel()))


def _shape(terms: Terms, z: Tensor, size: int) -> _Bell | _Table:
    mu, sigma = terms.shape.tolist()
    if terms.table is None:
        return _Bell(mu, sigma, z, size)
    return _Table(terms.table, terms.half_width, mu, sigma, z, size)


class _Bell:
    """Sigma u exp(-u^2 / 2) and sigma exp(-u^2 / 2), with room for the intermediate results of one part."""

    def __init__(self, mu: float, sigma: float, z: Tensor, size: int) -> None:
        self.mu, self.sigma = mu, sigma
        self.room = z.new_empty(2, size)
        self.zero, self.one = z.new_zeros(()), z.new_ones(())  # start of a sum that then takes one pass, not two
        # where the square of z - mu leaves the range of float32, one pass more makes it u first
        self.extreme = not 1e-15 < sigma < 1e15

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Z - mu, no further from 0 than MAX_U sigma, and exp(-u^2 / 2)."""
        centred, bell = self.room[:, : z.numel()]
        reach = min(MAX_U * self.sigma, torch.finfo(z.dtype).max)
        torch.sub(z, self.mu, out=centred).clamp_(-reach, reach).nan_to_num_(nan=reach)  # the base passes a NaN on
        # exp2 is vectorised by torch itself and takes a third of the time of exp
        if self.extreme:
            torch.div(centred, self.sigma, out=bell).square_().mul_(-_HALF_LOG2_E).exp2_()
        else:
            torch.addcmul(self.zero, centred, centred, value=-_HALF_LOG2_E / self.sigma**2, out=bell).exp2_()
        return centred, bell

    def add_value(self, into: Tensor, z: Tensor, amplitude: float, lift: float | None = None) -> None:
        """Adds the correction to the outputs."""
        centred, bell = self._parts(z)
        if lift:
            into.add_(bell, alpha=lift * self.sigma)
        into.addcmul_(centred, bell, value=amplitude)

    def add_slope(self, into: Tensor, grad: Tensor, z: Tensor, amplitude: float, lift: float | None = None) -> Tensor:
        """Adds the gradient by z, and returns those by the amplitude and the lift, shape [2]."""
        centred, bell = self._parts(z)
        bell.mul_(grad)
        by_amplitude = torch.dot(bell, centred)
        # not summed for nobody: a pass over the part costs as much as any other of these
        by_lift = torch.zeros_like(by_amplitude) if lift is None else bell.sum() * self.sigma
        unit = 1.0 if self.extreme else self.sigma
        if self.extreme:
            centred.div_(self.sigma)  # u
        if lift:
            into.addcmul_(bell, centred, value=-lift / unit)
        if amplitude != 0.0:
            rest = torch.addcmul(self.one, centred, centred, value=-(unit**-2), out=centred)  # 1 - u^2
            into.addcmul_(bell, rest, value=amplitude)
        return torch.stack([by_amplitude, by_lift])


class _Table:
    """Sigma times piecewise cubics, with room for the intermediate results of one part."""

    def __init__(self, table: Tensor, half_width: float, mu: float, sigma: float, z: Tensor, size: int) -> None:
        self.mu, self.sigma, self.half_width = mu, sigma, half_width
        self.intervals = table.shape[-1]
        self.per_sd = self.intervals / (2.0 * half_width)
        table = table.to(z.dtype)
        a0, a1, a2, a3 = table[:, -1:]
        nothing = torch.zeros_like(a0)
        # one more interval stands for the right end and beyond
        end = torch.stack([a0 + a1 + a2 + a3, a1 + 2.0 * a2 + 3.0 * a3, nothing, nothing])
        self.rows = torch.cat([table, end], dim=1).unbind()
        self.slopes = [self.rows[1], 2.0 * self.rows[2], 3.0 * self.rows[3]]
        self.room = z.new_empty(4, size)
        self.index = z.new_empty(size, dtype=torch.long)

    def _places(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Interval of each pre-activation, and its place inside it in [0, 1]."""
        t, floor = self.room[:2, : z.numel()]
        index = self.index[: z.numel()]
        torch.sub(z, self.mu, out=t).mul_(1.0 / self.sigma).add_(self.half_width).mul_(self.per_sd)
        t.clamp_(0.0, float(self.intervals)).nan_to_num_(nan=0.0)  # a NaN is no place; the base passes it on
        torch.floor(t, out=floor)
        return index.copy_(floor), t.sub_(floor)

    def _read(self, rows: list[Tensor] | tuple[Tensor, ...], index: Tensor, t: Tensor) -> Tensor:
        """Polynomials with the coefficients of their intervals, lowest power first."""
        result, row = self.room[2:, : t.numel()]
        torch.index_select(rows[-1], 0, index, out=result)
        for lower in rows[-2::-1]:
            torch.index_select(lower, 0, index, out=row)
            result.mul_(t).add_(row)
        return result

    def add_value(self, into: Tensor, z: Tensor, amplitude: float, lift: float | None = None) -> None:
        """Adds the correction to the outputs; a table has no lift."""
        into.add_(self._read(self.rows, *self._places(z)), alpha=amplitude * self.sigma)

    def add_slope(self, into: Tensor, grad: Tensor, z: Tensor, amplitude: float, lift: float | None = None) -> Tensor:
        """Adds the gradient by z, and returns those by the amplitude and the lift, which is 0; shape [2]."""
        index, t = self._places(z)
        by_amplitude = torch.dot(grad, self._read(self.rows, index, t)) * self.sigma
        if amplitude != 0.0:
            slope = self._read(self.slopes, index, t)
            into.addcmul_(grad, slope, value=amplitude * self.per_sd)
        return torch.stack([by_amplitude, torch.zeros_like(by_amplitude)])
