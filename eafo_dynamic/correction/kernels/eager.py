"""The correction term with torch's own operations, in place, part by part so that a part stays in the cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eafo_dynamic.correction.kernels.directions import EPS, GAIN, LIFT, MAX_U, SLOPE, finite
from eafo_dynamic.correction.kernels.known import Known
from eafo_dynamic.correction.kernels.terms import Terms, flat

__all__ = ["EagerKernel"]

# elements of a part per thread: with fewer, threads wait for each other; with more, parts outgrow the second-level
# cache
_PART = 65536
_HALF_LOG2_E = 0.5 / math.log(2.0)  # exp(-u^2 / 2) = 2^(-_HALF_LOG2_E u^2)


class EagerKernel:
    """The same functions as those of the compiled kernel, for any machine; float32 and float64."""

    name = "eager"

    @staticmethod
    def takes(z: Tensor, terms: Terms) -> bool:
        """Whether this back end can compute with these tensors.

        Args:
            z: pre-activations, dense, on the CPU.
            terms: the other operands, on the CPU.

        Returns:
            Whether z is float32 or float64, no amplitudes differ along it, and there is no lift beside a table.
        """
        both = terms.table is not None and LIFT.name in terms.names
        return z.dtype in (torch.float32, torch.float64) and not terms.by_channel and not both

    @staticmethod
    def inside(z: Tensor, terms: Terms, known: Known) -> Known | None:
        """No base is computed in the same pass as the correction.

        Args:
            z: pre-activations.
            terms: the other operands.
            known: the base.

        Returns:
            None.
        """

    @staticmethod
    def add(out: Tensor, z: Tensor, terms: Terms, inside: Known | None = None) -> None:
        """Adds c(z) to the base's output, in place.

        Args:
            out: base(z), with the strides of z; f(z) afterwards.
            z: pre-activations, dense.
            terms: the other operands.
            inside: not used; see :meth:`inside`.
        """
        amplitudes = _amplitudes_of(terms)
        if not any(amplitudes.values()):
            return  # every bit of the base stays
        size = _part_size(z)
        shape = _shape_of(terms, z, size)
        for out_part, z_part in zip(flat(out).split(size), flat(z).split(size), strict=True):
            base = finite(out_part) if amplitudes.get(GAIN.name) else None
            if shape is not None:
                shape.add_value(out_part, z_part, amplitudes.get(EPS.name, 0.0), amplitudes.get(LIFT.name))
            if base is not None:
                out_part.add_(base, alpha=amplitudes[GAIN.name])
            if amplitudes.get(SLOPE.name):
                out_part.add_(finite(z_part), alpha=amplitudes[SLOPE.name])

    @staticmethod
    def add_gradient(
        out: Tensor,
        grad: Tensor,
        z: Tensor,
        terms: Terms,
        inside: Known | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """Adds grad * c'(z) to the base's gradient, in place.

        Args:
            out: grad * base'(z), with the strides of z; grad * f'(z) afterwards.
            grad: gradient of the loss by the output, with the strides of z.
            z: pre-activations, dense.
            terms: the other operands.
            inside: not used; see :meth:`inside`.
            value: base(z), with the strides of z; needed where there is a gain.

        Returns:
            Gradient by the amplitudes, of their shape and dtype.
        """
        amplitudes = _amplitudes_of(terms)
        size = _part_size(z)
        shape = _shape_of(terms, z, size)
        total = z.new_zeros(len(amplitudes), dtype=torch.float64)
        values = flat(z if value is None else value).split(size)
        parts = zip(flat(out).split(size), flat(grad).split(size), flat(z).split(size), values, strict=True)
        for out_part, grad_part, z_part, value_part in parts:
            sums: list[Tensor] = []
            if amplitudes.get(GAIN.name):
                out_part.add_(torch.where(value_part.isfinite(), out_part, 0.0), alpha=amplitudes[GAIN.name])
            if shape is not None:
                both = shape.add_slope(
                    out_part, grad_part, z_part, amplitudes.get(EPS.name, 0.0), amplitudes.get(LIFT.name)
                )
                sums += [each for name, each in zip((EPS.name, LIFT.name), both, strict=True) if name in amplitudes]
            if GAIN.name in amplitudes:
                sums.append(torch.dot(grad_part, finite(value_part)))
            if SLOPE.name in amplitudes:
                sums.append(torch.dot(grad_part, finite(z_part)))
                if amplitudes[SLOPE.name]:
                    out_part.add_(torch.where(z_part.isfinite(), grad_part, 0.0), alpha=amplitudes[SLOPE.name])
            total += torch.stack(sums)
        return total.to(terms.amplitudes.dtype)


def _amplitudes_of(terms: Terms) -> dict[str, float]:
    return dict(zip(terms.names, terms.amplitudes.tolist(), strict=True))


def _part_size(z: Tensor) -> int:
    return max(1, min(_PART * torch.get_num_threads(), z.numel()))


def _shape_of(terms: Terms, z: Tensor, size: int) -> _ClosedForm | _Table | None:
    """What computes the local terms; None where there are none."""
    if EPS.name not in terms.names and LIFT.name not in terms.names:
        return None
    mu, sigma = terms.shape.tolist()
    if terms.table is None:
        return _ClosedForm(mu, sigma, z, size)
    return _Table(terms.table, terms.half_width, mu, sigma, z, size)


class _ClosedForm:
    """Sigma u exp(-u^2 / 2) and sigma exp(-u^2 / 2), with memory for the intermediate results of one part.

    Args:
        mu: mean of the pre-activations.
        sigma: their standard deviation.
        z: has the dtype and device of the parts.
        size: elements of the largest part.
    """

    def __init__(self, mu: float, sigma: float, z: Tensor, size: int) -> None:
        self.mu = mu
        self.sigma = sigma
        self.room = z.new_empty(2, size)
        # with one of these as its start, addcmul takes one pass where a product and a sum would take two
        self.zero = z.new_zeros(())
        self.one = z.new_ones(())
        # (z - mu)^2 may leave the range of float32; then one pass more makes it u first
        self.extreme = not 1e-15 < sigma < 1e15

    def _centred_and_bell(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Z - mu, no further from 0 than MAX_U sigma, and exp(-u^2 / 2)."""
        centred, bell = self.room[:, : z.numel()]
        reach = min(MAX_U * self.sigma, torch.finfo(z.dtype).max)
        torch.sub(z, self.mu, out=centred).clamp_(-reach, reach).nan_to_num_(nan=reach)  # the base passes a NaN on
        # exp2 is vectorised by torch itself, and takes a third of the time of exp
        if self.extreme:
            torch.div(centred, self.sigma, out=bell).square_().mul_(-_HALF_LOG2_E).exp2_()
        else:
            torch.addcmul(self.zero, centred, centred, value=-_HALF_LOG2_E / self.sigma**2, out=bell).exp2_()
        return centred, bell

    def add_value(self, out: Tensor, z: Tensor, eps: float, lift: float | None = None) -> None:
        """Adds c(z) to the outputs."""
        centred, bell = self._centred_and_bell(z)
        if lift:
            out.add_(bell, alpha=lift * self.sigma)
        out.addcmul_(centred, bell, value=eps)

    def add_slope(self, out: Tensor, grad: Tensor, z: Tensor, eps: float, lift: float | None = None) -> Tensor:
        """Adds grad * c'(z) to the gradients by z, and returns those by eps and the lift, shape [2]."""
        centred, bell = self._centred_and_bell(z)
        weighted = bell.mul_(grad)
        by_eps = torch.dot(weighted, centred)
        by_lift = torch.zeros_like(by_eps)
        if lift is not None:  # else nobody uses the sum, which takes one more pass
            by_lift = weighted.sum() * self.sigma
        unit = self.sigma  # of `centred`
        if self.extreme:
            centred.div_(self.sigma)
            unit = 1.0
        if lift:
            out.addcmul_(weighted, centred, value=-lift / unit)
        if eps != 0.0:
            one_minus_square = torch.addcmul(self.one, centred, centred, value=-(unit**-2), out=centred)
            out.addcmul_(weighted, one_minus_square, value=eps)
        return torch.stack([by_eps, by_lift])


class _Table:
    """Sigma times piecewise cubics, with memory for the intermediate results of one part.

    Args:
        table: coefficients of ghat, shape [4, intervals].
        half_width: end of the table in standard deviations.
        mu: mean of the pre-activations.
        sigma: their standard deviation.
        z: has the dtype and device of the parts.
        size: elements of the largest part.
    """

    def __init__(self, table: Tensor, half_width: float, mu: float, sigma: float, z: Tensor, size: int) -> None:
        self.mu = mu
        self.sigma = sigma
        self.half_width = half_width
        self.intervals = table.shape[-1]
        self.per_sd = self.intervals / (2.0 * half_width)
        table = table.to(z.dtype)
        a0, a1, a2, a3 = table[:, -1:]
        zero = torch.zeros_like(a0)
        # one more interval stands for the right end and everything beyond it
        end = torch.stack([a0 + a1 + a2 + a3, a1 + 2.0 * a2 + 3.0 * a3, zero, zero])
        self.value_coefficients = list(torch.cat([table, end], dim=1).unbind())
        _, b1, b2, b3 = self.value_coefficients
        self.slope_coefficients = [b1, 2.0 * b2, 3.0 * b3]
        self.room = z.new_empty(4, size)
        self.index = z.new_empty(size, dtype=torch.long)

    def _places(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Interval of each pre-activation, and its place inside it in [0, 1]."""
        t, floor = self.room[:2, : z.numel()]
        index = self.index[: z.numel()]
        torch.sub(z, self.mu, out=t).mul_(1.0 / self.sigma).add_(self.half_width).mul_(self.per_sd)
        t.clamp_(0.0, float(self.intervals)).nan_to_num_(nan=0.0)  # NaN cannot be an index; the base passes it on
        torch.floor(t, out=floor)
        return index.copy_(floor), t.sub_(floor)

    def _polynomials(self, coefficients: list[Tensor], index: Tensor, t: Tensor) -> Tensor:
        """Value at t of the polynomial of each interval; coefficients from the lowest power to the highest."""
        result, coefficient = self.room[2:, : t.numel()]
        torch.index_select(coefficients[-1], 0, index, out=result)
        for lower in coefficients[-2::-1]:
            torch.index_select(lower, 0, index, out=coefficient)
            result.mul_(t).add_(coefficient)
        return result

    def add_value(self, out: Tensor, z: Tensor, eps: float, lift: float | None = None) -> None:
        """Adds c(z) to the outputs; beside a table there is no lift."""
        index, t = self._places(z)
        ghat = self._polynomials(self.value_coefficients, index, t)
        out.add_(ghat, alpha=eps * self.sigma)

    def add_slope(self, out: Tensor, grad: Tensor, z: Tensor, eps: float, lift: float | None = None) -> Tensor:
        """Adds grad * c'(z) to the gradients by z, and returns those by eps and the lift, which is 0; shape [2]."""
        index, t = self._places(z)
        by_eps = torch.dot(grad, self._polynomials(self.value_coefficients, index, t)) * self.sigma
        if eps != 0.0:
            slope = self._polynomials(self.slope_coefficients, index, t)
            out.addcmul_(grad, slope, value=eps * self.per_sd)
        return torch.stack([by_eps, torch.zeros_like(by_eps)])
