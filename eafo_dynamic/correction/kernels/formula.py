"""The correction: the one formula behind every forward, and its backward, in operations that everything understands.

    f(z) = base(z) + c(z),   c(z) = sigma (eps ghat(u) + lift exp(-u^2 / 2)) + gain base(z) + slope z,
    u = (z - mu) / sigma                                                                 (Theory, section 4, (3))

``ghat`` is either the closed form ``u * exp(-u^2 / 2)`` or a piecewise cubic read from a table, which belongs to one
base and density. A correction has some of the four terms; see ``directions``. The backward keeps the pre-activations z,
and base(z) where there is a gain, and recomputes the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from eafo_dynamic.correction.kernels.directions import (
    BASE_TERM,
    EPS,
    MAX_U,
    TERMS,
    bell,
    finite,
    ghat_closed_form,
    with_number,
)
from eafo_dynamic.correction.kernels.terms import Terms
from eafo_dynamic.internals.torch_internals import (
    CAN_SWITCH_FORWARD_MODE,
    forward_mode,
    forward_mode_active,
    transforms_active,
)

__all__ = ["MAX_U", "bell", "correction", "correction_of", "correction_value", "ghat_closed_form", "ghat_table"]


def correction_of(z: Tensor, terms: Terms, base: Tensor | None = None) -> Tensor:
    """``correction`` with its operands in one tuple.

    Args:
        z: pre-activations, any shape, floating point.
        terms: amplitudes, shape, table and the names of the terms.
        base: base(z), where one of the terms is the gain.

    Returns:
        c(z), of the shape and dtype of z; twice differentiable in z, the amplitudes and base.
    """
    amplitudes, shape, table, half_width, names = terms
    return correction(z, amplitudes, shape, table, half_width, names, base)


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
        return ghat_closed_form(with_number((z - mu) / sigma, 0.0))
    # a place among hundreds of intervals needs more digits than half precision has
    wide = z if z.dtype == torch.float64 else z.float()
    value, slope = ghat_table((wide - mu) / sigma, table, half_width)
    return value.to(z.dtype), slope.to(z.dtype)


def _bell(z: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
    mu, sigma = shape.unbind()
    return bell((z - mu) / sigma)


def correction_value(
    z: Tensor,
    amplitudes: Tensor,
    shape: Tensor,
    table: Tensor | None,
    half_width: float,
    names: list[str],
    base: Tensor | None,
) -> Tensor:
    """``correction`` in operations that torch.jit.script understands too; without its promise at amplitudes of 0.

    Args:
        z: see ``correction``.
        amplitudes: see ``correction``.
        shape: see ``correction``.
        table: see ``correction``.
        half_width: see ``correction``.
        names: see ``correction``.
        base: see ``correction``.

    Returns:
        c(z), of the shape and dtype of z.
    """
    sigma = shape[1].to(z.dtype)
    c = torch.zeros_like(z) if len(names) == 0 else z
    for number, name in enumerate(names):
        amplitude = amplitudes[number].to(z.dtype)
        if name == "eps":
            part = _ghat(z, shape, table, half_width)[0] * (amplitude * sigma)
        elif name == "lift":
            part = _bell(z, shape)[0] * (amplitude * sigma)
        elif name == "gain" and base is not None:
            part = finite(base) * amplitude
        else:
            part = finite(z) * amplitude
        c = part if number == 0 else c + part
    return c


def _direction(
    name: str, z: Tensor, shape: Tensor, table: Tensor | None, half_width: float, base: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The direction g of a term divided by its scale, and its slope dg/dz; None in place of a slope of 0."""
    if name == EPS.name and table is not None:
        return _ghat(z, shape, table, half_width)
    mu, sigma = shape.unbind()
    u = (z - mu) / sigma
    term = TERMS[name]
    value = term.value(u, z, z if base is None else base)
    if name == BASE_TERM:
        return value, None
    return value, term.derivative(u, z)


def _scale(name: str, shape: Tensor) -> Tensor | float:
    return TERMS[name].scale(shape[1])


def _summed(grad: Tensor, value: Tensor, amplitude: Tensor, scale: Tensor | float) -> Tensor:
    """Gradient by an amplitude that multiplies scale * value."""
    # a sum over a batch is soon too large for half precision
    wide = torch.promote_types(value.dtype, torch.float32)
    product = grad * value
    if not amplitude.dim():
        return (product.sum(dtype=wide) * scale).to(amplitude.dtype)
    return (product.to(wide).sum_to_size(amplitude.shape) * scale).to(amplitude.dtype)


def _neutral_zeros(c: Tensor, amplitudes: Tensor) -> Tensor:
    """Turns zeros into -0.0, the only number with x + (-0.0) == x bit for bit for every x, +0.0 and -0.0 included.

    Only amplitudes of 0 promise the base's very bits. For any others the extra passes are left out where the values
    cost nothing to read, that is of a plain CPU tensor.

    Returns:
        c with every zero negative. Its derivative by c is 1 everywhere; a constant in place of the zeros would have
        derivative 0 there.
    """
    readable = amplitudes.dim() == 1 and amplitudes.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not transforms_active() and any(amplitudes.tolist()):
        return c
    # a product, since Triton's minus is 0 - x, which never gives -0.0
    return torch.where(c == 0, (c.detach() - c) * -1.0, c)


class _Correction(torch.autograd.Function):
    """c(z), twice differentiable in z, the amplitudes and base(z); keeps no intermediate result for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor,
        amplitudes: Tensor,
        shape: Tensor,
        table: Tensor | None,
        base: Tensor | None,
        half_width: float,
        names: str,
    ) -> Tensor:
        c = correction_value(z, amplitudes, shape, table, half_width, names.split(), base)
        return _neutral_zeros(c, amplitudes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.half_width, ctx.names = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        z, amplitudes, shape, table, base = ctx.saved_tensors
        names = ctx.names.split()
        found = [_direction(name, z, shape, table, ctx.half_width, base) for name in names]
        grad_z = grad_base = grad_amplitudes = None
        if ctx.needs_input_grad[0]:
            total = _slope_of_terms(found, amplitudes, z)
            if total is not None:
                grad_z = _neutral_zeros(grad * total, amplitudes)
        if ctx.needs_input_grad[1]:
            sums = [
                _summed(grad, value, amplitudes[number], _scale(name, shape))
                for number, (name, (value, _)) in enumerate(zip(names, found, strict=True))
            ]
            grad_amplitudes = torch.stack(sums)
        if ctx.needs_input_grad[4] and base is not None:
            gain = amplitudes[names.index(BASE_TERM)].to(z.dtype)
            grad_base = _neutral_zeros(grad * (gain * base.isfinite()), amplitudes)
        return grad_z, grad_amplitudes, None, None, grad_base, None, None


def _slope_of_terms(found: list[tuple[Tensor, Tensor | None]], amplitudes: Tensor, z: Tensor) -> Tensor | None:
    """dc/dz with base(z) held; None where no term depends on z itself."""
    total: Tensor | None = None
    for number, (_, slope) in enumerate(found):
        if slope is not None:
            part = slope * amplitudes[number].to(z.dtype)
            total = part if total is None else total + part
    return total


class _CorrectionInBothModes(_Correction):
    """c(z), differentiable in forward mode too; torch.compile does not take functions with a rule for that."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Correction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        # torch calls this with forward mode off for all levels, which would lose the derivatives of the outer ones
        with forward_mode():
            operands = [_primal(operand) for operand in ctx.saved_tensors]
            return _directional_derivative(tangents, ctx.half_width, ctx.names.split(), *operands)


def _primal(operand: Any) -> Any:
    if operand is None:
        return None
    return forward_ad.unpack_dual(operand, level=0).primal


def _directional_derivative(
    tangents: tuple[Tensor | None, ...],
    half_width: float,
    names: list[str],
    z: Tensor,
    amplitudes: Tensor,
    shape: Tensor,
    table: Tensor | None,
    base: Tensor | None,
) -> Tensor:
    """Derivative of c(z) along tangents of the operands of ``_Correction``."""
    along_z, along_amplitudes, _, _, along_base, *_ = tangents
    found = [_direction(name, z, shape, table, half_width, base) for name in names]
    total = torch.zeros_like(z)
    slope = _slope_of_terms(found, amplitudes, z)
    if along_z is not None and slope is not None:
        total = slope * along_z
    if along_amplitudes is not None:
        for number, (name, (value, _)) in enumerate(zip(names, found, strict=True)):
            total = total + value * (along_amplitudes[number] * _scale(name, shape)).to(z.dtype)
    if along_base is not None and base is not None:
        gain = amplitudes[names.index(BASE_TERM)].to(z.dtype)
        total = total + along_base * (gain * base.isfinite())
    return _neutral_zeros(total, amplitudes)


def correction(
    z: Tensor,
    amplitudes: Tensor,
    shape: Tensor,
    table: Tensor | None = None,
    half_width: float = 0.0,
    names: tuple[str, ...] = (EPS.name,),
    base: Tensor | None = None,
) -> Tensor:
    """The correction c(z): each term's amplitude times its direction.

        c(z) = sigma (eps ghat(u) + lift exp(-u^2 / 2)) + gain base(z) + slope z,   u = (z - mu) / sigma

    With all amplitudes 0, ``base(z) + correction(z, ...)`` equals ``base(z)`` bit for bit, and so do its gradients.
    Where z or base(z) is infinite or NaN the two tails add nothing.

    Args:
        z: pre-activations, any shape, floating point.
        amplitudes: no unit, one row a term: shape [T], or [T, ...] with rows that broadcast to z (one per channel).
        shape: mu and sigma of the pre-activations, shape [2], in the units of z.
        table: coefficients of ghat, shape [4, intervals]; None means the closed form u exp(-u^2/2).
        half_width: end of the table in standard deviations; not used without a table.
        names: of the terms, T of them.
        base: base(z), of the shape and dtype of z; needed for the gain.

    Returns:
        c(z), of the shape and dtype of z; twice differentiable in z, the amplitudes and base.
    """
    if BASE_TERM not in names:
        base = None
    joined = " ".join(names)
    compiling = torch.compiler.is_compiling()
    if not CAN_SWITCH_FORWARD_MODE and not compiling and (forward_mode_active() or transforms_active()):
        c = correction_value(z, amplitudes, shape, table, half_width, list(names), base)
        return _neutral_zeros(c, amplitudes)
    function = _Correction if compiling else _CorrectionInBothModes
    result: Tensor = function.apply(z, amplitudes, shape, table, base, half_width, joined)  # pyright: ignore[reportAssignmentType]
    return result
