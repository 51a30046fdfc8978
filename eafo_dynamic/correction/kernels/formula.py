"""The correction: the one formula behind every forward, and its backward, in operations that everything understands.

    f(z) = base(z) + c(z),   c(z) = eps * sigma * ghat(u),   u = (z - mu) / sigma        (Theory, section 4, (3))

``ghat`` is either the closed form ``u * exp(-u^2 / 2)`` (piecewise linear base, Gaussian density) or a piecewise
cubic read from a table. With free terms the bell ``exp(-u^2 / 2)`` is added with an amplitude of its own, the lift.
The backward keeps the pre-activations z and recomputes the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from eafo_dynamic.correction.kernels.terms import Terms
from eafo_dynamic.internals.torch_internals import (
    CAN_SWITCH_FORWARD_MODE,
    forward_mode,
    forward_mode_active,
    transforms_active,
)

__all__ = ["MAX_U", "bell", "correction", "correction_of", "correction_value", "ghat_closed_form", "ghat_table"]

MAX_U = 13.0
"""Standardised pre-activations are clamped to [-MAX_U, MAX_U]. exp(-MAX_U^2 / 2) = 2e-37 is still a float32, MAX_U^2 is
still a float16, and an infinite z gives a finite correction."""


def correction_of(z: Tensor, terms: Terms) -> Tensor:
    """``correction`` with its operands in one tuple.

    Args:
        z: pre-activations, any shape, floating point.
        terms: amplitudes, shape and table.

    Returns:
        c(z), of the shape and dtype of z; twice differentiable in z, eps and lift.
    """
    eps, shape, table, half_width, lift = terms
    return correction(z, eps, shape, table, half_width, lift)


def _clamped(u: Tensor) -> Tensor:
    # MAX_U as a literal: torch.jit.script cannot read a global number, and torch.compile with dynamic=True makes one an
    # input of the graph, which fails at the second site
    return u.clamp(-13.0, 13.0)


def ghat_closed_form(u: Tensor) -> tuple[Tensor, Tensor]:
    """Shape of the correction for a piecewise linear base and a Gaussian density, and its slope.

        ghat(u) = u exp(-u^2/2),   ghat'(u) = (1 - u^2) exp(-u^2/2)

    Args:
        u: standardised pre-activations, any shape, no unit.

    Returns:
        ghat and ghat', both of the shape of u.
    """
    u = _clamped(u)
    square = u * u
    peak = torch.exp(-0.5 * square)
    return u * peak, (1.0 - square) * peak


def bell(u: Tensor) -> tuple[Tensor, Tensor]:
    """Shape of the lift, and its slope.

        bell(u) = exp(-u^2/2),   bell'(u) = -u exp(-u^2/2)

    Args:
        u: standardised pre-activations, any shape, no unit; a NaN counts as infinitely far away.

    Returns:
        The bell and its slope, both of the shape of u.
    """
    u = _clamped(u.nan_to_num(nan=13.0))
    value = torch.exp(-0.5 * u * u)
    return value, -u * value


def ghat_table(u: Tensor, table: Tensor, half_width: float) -> tuple[Tensor, Tensor]:
    """Shape of the correction read from a table, and its slope.

    On interval k of the equal intervals of [-half_width, half_width], with t in [0, 1] the place inside it:

        ghat(u) = a0 + a1 t + a2 t^2 + a3 t^3

    Args:
        u: standardised pre-activations, any shape, no unit.
        table: coefficients a0..a3, shape [4, intervals].
        half_width: end of the table, in standard deviations; beyond it ghat keeps its value there, zero.

    Returns:
        ghat and ghat', both of the shape of u.
    """
    intervals = table.shape[-1]
    per_sd = intervals / (2.0 * half_width)
    # NaN cannot be an index; the base passes it on
    place = ((u + half_width) * per_sd).nan_to_num(nan=0.0).clamp(0.0, float(intervals))
    index = place.detach().to(torch.long).clamp(max=intervals - 1)
    t = place - index
    a0, a1, a2, a3 = table[0][index], table[1][index], table[2][index], table[3][index]
    value = ((a3 * t + a2) * t + a1) * t + a0
    slope = ((3.0 * a3 * t + 2.0 * a2) * t + a1) * per_sd
    return value, slope


def _ghat(z: Tensor, shape: Tensor, table: Tensor | None, half_width: float) -> tuple[Tensor, Tensor]:
    mu, sigma = shape.unbind()
    if table is None:
        # a NaN gets no correction: the base passes it on, and the gradient by eps ignores it
        return ghat_closed_form(((z - mu) / sigma).nan_to_num(nan=0.0))
    # a place among hundreds of intervals needs more digits than half precision has
    wide = z if z.dtype == torch.float64 else z.float()
    value, slope = ghat_table((wide - mu) / sigma, table, half_width)
    return value.to(z.dtype), slope.to(z.dtype)


def _bell(z: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
    mu, sigma = shape.unbind()
    return bell((z - mu) / sigma)


def correction_value(
    z: Tensor,
    eps: Tensor,
    shape: Tensor,
    table: Tensor | None,
    half_width: float,
    lift: Tensor | None,
) -> Tensor:
    """``correction`` in operations that torch.jit.script understands too; without its promise at eps = 0.

    Args:
        z: see ``correction``.
        eps: see ``correction``.
        shape: see ``correction``.
        table: see ``correction``.
        half_width: see ``correction``.
        lift: see ``correction``.

    Returns:
        c(z), of the shape and dtype of z.
    """
    sigma = shape[1].to(z.dtype)
    value, _ = _ghat(z, shape, table, half_width)
    c = value * (eps.to(z.dtype) * sigma)
    if lift is not None:
        c = c + _bell(z, shape)[0] * (lift.to(z.dtype) * sigma)
    return c


def _summed(grad: Tensor, value: Tensor, amplitude: Tensor, shape: Tensor) -> Tensor:
    """Gradient by an amplitude that multiplies sigma * value."""
    # a sum over a batch is soon too large for half precision
    wide = torch.promote_types(value.dtype, torch.float32)
    product = grad * value
    sigma = shape[1]
    if not amplitude.dim():
        return (product.sum(dtype=wide) * sigma).to(amplitude.dtype)
    return (product.to(wide).sum_to_size(amplitude.shape) * sigma).to(amplitude.dtype)


def _neutral_zeros(c: Tensor, eps: Tensor) -> Tensor:
    """Turns zeros into -0.0, the only number with x + (-0.0) == x bit for bit for every x, +0.0 and -0.0 included.

    Only eps = 0 promises the base's very bits. For any other eps the extra passes are left out where the value costs
    nothing to read, that is of a plain CPU tensor.

    Returns:
        c with every zero negative. Its derivative by c is 1 everywhere; a constant in place of the zeros would have
        derivative 0 there.
    """
    readable = eps.dim() == 0 and eps.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not transforms_active() and eps.item() != 0.0:
        return c
    # a product, since Triton's minus is 0 - x, which never gives -0.0
    return torch.where(c == 0, (c.detach() - c) * -1.0, c)


class _Correction(torch.autograd.Function):
    """c(z), twice differentiable in z and the amplitudes; keeps no intermediate result for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor,
        eps: Tensor,
        shape: Tensor,
        table: Tensor | None,
        half_width: float,
        lift: Tensor | None,
    ) -> Tensor:
        return _neutral_zeros(correction_value(z, eps, shape, table, half_width, lift), eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, eps, shape, table, ctx.half_width, lift = inputs
        ctx.save_for_backward(z, eps, shape, table, lift)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        z, eps, shape, table, lift = ctx.saved_tensors
        value, slope = _ghat(z, shape, table, ctx.half_width)
        bell_value = bell_slope = None
        if lift is not None:
            bell_value, bell_slope = _bell(z, shape)
        grad_z = grad_eps = grad_lift = None
        if ctx.needs_input_grad[0]:
            total = slope * eps.to(z.dtype)
            if lift is not None and bell_slope is not None:
                total = total + bell_slope * lift.to(z.dtype)
            grad_z = _neutral_zeros(grad * total, eps)
        if ctx.needs_input_grad[1]:
            grad_eps = _summed(grad, value, eps, shape)
        if ctx.needs_input_grad[5] and lift is not None and bell_value is not None:
            grad_lift = _summed(grad, bell_value, lift, shape)
        return grad_z, grad_eps, None, None, None, grad_lift


class _CorrectionInBothModes(_Correction):
    """The same, differentiable in forward mode too; torch.compile does not take functions with a rule for that."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Correction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4], inputs[5])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        # torch calls this with forward mode off for all levels, which would lose the derivatives of the outer ones
        with forward_mode():
            operands = [_primal(each) for each in ctx.saved_tensors]
            return _directional_derivative(tangents, ctx.half_width, *operands)


def _primal(operand: Any) -> Any:
    return None if operand is None else forward_ad.unpack_dual(operand, level=0).primal


def _directional_derivative(
    tangents: tuple[Tensor | None, ...],
    half_width: float,
    z: Tensor,
    eps: Tensor,
    shape: Tensor,
    table: Tensor | None,
    lift: Tensor | None,
) -> Tensor:
    """Derivative of c(z) along tangents of the operands of ``_Correction``."""
    along_z, along_eps, *_, along_lift = tangents
    value, slope = _ghat(z, shape, table, half_width)
    total = torch.zeros_like(z)
    if along_z is not None:
        slope = slope * eps.to(z.dtype)
        if lift is not None:
            slope = slope + _bell(z, shape)[1] * lift.to(z.dtype)
        total = slope * along_z
    if along_eps is not None:
        total = total + value * (along_eps * shape[1]).to(z.dtype)
    if along_lift is not None:
        total = total + _bell(z, shape)[0] * (along_lift * shape[1]).to(z.dtype)
    return _neutral_zeros(total, eps)


def correction(
    z: Tensor,
    eps: Tensor,
    shape: Tensor,
    table: Tensor | None = None,
    half_width: float = 0.0,
    lift: Tensor | None = None,
) -> Tensor:
    """The correction term c(z) = sigma * (eps * ghat(u) + lift * exp(-u^2 / 2)), u = (z - mu) / sigma.

    With eps and lift 0, ``base(z) + correction(z, ...)`` equals ``base(z)`` bit for bit, and so do its gradients.

    Args:
        z: pre-activations, any shape, floating point.
        eps: amplitude, no unit; 0-dim, or of a shape that broadcasts to z (one amplitude per channel).
        shape: mu and sigma of the pre-activations, shape [2], in the units of z.
        table: coefficients of ghat, shape [4, intervals]; None means the closed form u exp(-u^2/2).
        half_width: end of the table in standard deviations; not used without a table.
        lift: amplitude of the bell, no unit, of the shape of eps; None for none.

    Returns:
        c(z), of the shape and dtype of z; twice differentiable in z, eps and lift.
    """
    compiling = torch.compiler.is_compiling()
    if not CAN_SWITCH_FORWARD_MODE and not compiling and (forward_mode_active() or transforms_active()):
        return _neutral_zeros(correction_value(z, eps, shape, table, half_width, lift), eps)
    function = _Correction if compiling else _CorrectionInBothModes
    result: Tensor = function.apply(z, eps, shape, table, half_width, lift)  # pyright: ignore[reportAssignmentType]
    return result
