"""Base and correction as one function: which back end computes it, and one backward that keeps only the input.

f(z) = base(z) + c(z),   f'(z) = base'(z) + c'(z)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling

from eafo_dynamic.correction.kernels.choice import Backend, demanded_kernel
from eafo_dynamic.correction.kernels.directions import BASE_TERM
from eafo_dynamic.correction.kernels.eager import EagerKernel
from eafo_dynamic.correction.kernels.formula import correction_of
from eafo_dynamic.correction.kernels.known import NOTHING, Known
from eafo_dynamic.correction.kernels.native import NativeKernel, native_kernel
from eafo_dynamic.correction.kernels.node import Node, node_of
from eafo_dynamic.correction.kernels.terms import Terms, is_dense, uninitialised_like
from eafo_dynamic.internals.torch_internals import (
    direct_apply,
    dispatch_modes,
    forward_mode_active,
    holds_its_numbers,
    is_batch_of_gradients,
    is_transformed,
    is_view,
    transforms_active,
)

__all__ = ["corrected", "corrected_", "node_in_cpp"]

_PLAIN = (Tensor, torch.nn.Parameter)
_EAGER = EagerKernel()

_Gradients = tuple[Tensor | None, Tensor | None]
"""Gradients by z and the amplitudes; None where one is not needed."""


class _Kernel(Protocol):
    """A back end: adds correction and gradient to those of the base, and may compute the base in the same pass."""

    name: str

    def takes(self, z: Tensor, terms: Terms) -> bool: ...
    def inside(self, z: Tensor, terms: Terms, known: Known) -> Known | None: ...
    def add(self, out: Tensor, z: Tensor, terms: Terms, inside: Known | None = None) -> None: ...
    def add_gradient(
        self,
        out: Tensor,
        grad: Tensor,
        z: Tensor,
        terms: Terms,
        inside: Known | None = None,
        value: Tensor | None = None,
    ) -> Tensor: ...


def corrected(
    z: Tensor,
    base: Callable[[Tensor], Tensor],
    terms: Terms,
    known: Known | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """f(z) = base(z) + sum of the terms, each an amplitude times its direction; see ``directions``.

    With all amplitudes 0 it equals ``base(z)`` bit for bit, and so do its gradients. Compilers, transforms and other
    devices see plain operations.

    Args:
        z: pre-activations, any shape, floating point.
        base: the base function, out of place.
        terms: amplitudes, shape and table.
        known: the same base with its gradient, where that is known.
        backend: the back end for plain tensors.

    Returns:
        f(z), of the shape and dtype of z; twice differentiable in z and the amplitudes.
    """
    kernel = _kernel_for(z, terms, backend)
    if kernel is None:
        out = base(z)
        return out + correction_of(z, terms, out.to(z.dtype)).to(out.dtype)
    if known is None and BASE_TERM in terms.names:
        return _with_gain_outside(z, base(z), terms, kernel)
    function = NOTHING if known is None else known
    if _wants_gradient(z, terms):
        if isinstance(kernel, NativeKernel):
            node = node_of(kernel, _gradients_of)
            if node is not None and node.takes(z, terms, function):
                return node(z, terms, function)
        outputs: Any = _apply(z, terms.amplitudes, terms, function, kernel)
        c: Tensor = outputs if function.gradient_by_value is None else outputs[0]
    else:
        c = _forward(z, terms, function, kernel)
    return c if known is not None else base(z) + c


def node_in_cpp() -> Node | None:
    """The node in C++ that this process uses for small tensors.

    Returns:
        The node; None where the one in Python serves for all.
    """
    kernel = native_kernel()
    if kernel is None:
        return None
    return node_of(kernel, _gradients_of)


def _with_gain_outside(z: Tensor, out: Tensor, terms: Terms, kernel: _Kernel) -> Tensor:
    """f(z) from base(z) of a base that no kernel can compute: the gain by the formula, the rest by the kernel."""
    amplitudes = terms.amplitudes
    names = terms.names
    place = names.index(BASE_TERM)
    gain = terms._replace(amplitudes=amplitudes[place : place + 1], table=None, names=(BASE_TERM,))
    others = torch.cat([amplitudes[:place], amplitudes[place + 1 :]])
    rest = terms._replace(amplitudes=others, names=tuple(name for name in names if name != BASE_TERM))
    stretched = out + correction_of(z, gain, out.to(z.dtype)).to(out.dtype)
    if not rest.names:
        return stretched
    if _wants_gradient(z, rest):
        c: Tensor = _apply(z, others, rest, NOTHING, kernel)
    else:
        c = _forward(z, rest, NOTHING, kernel)
    return stretched + c


def corrected_(
    z: Tensor,
    base: Callable[[Tensor], Tensor],
    terms: Terms,
    known: Known | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """:func:`corrected` in place: f(z) overwrites z, as bases with ``inplace=True`` do.

    Args:
        z: pre-activations, any shape, floating point; f(z) afterwards.
        base: the base function; it may overwrite its argument.
        terms: amplitudes, shape and table.
        known: the same base with its gradient, where that is known.
        backend: the back end for plain tensors.

    Returns:
        z.
    """
    kernel = None if known is None else _kernel_for(z, terms, backend)
    if kernel is None or known is None:
        kept = _twin(z, z)  # the backward needs what is about to be overwritten
        values = corrected(kept, lambda x: base(_twin(x, z)), terms, known, backend)
        watched = transforms_active() or forward_mode_active()
        if watched or is_compiling() or torch.jit.is_tracing() or type(z) not in _PLAIN:
            return z.copy_(values)
        out: Tensor = _Overwritten.apply(z, values, is_view(z))  # pyright: ignore[reportAssignmentType]
        return out
    if _wants_gradient(z, terms):
        copy = z.clone() if is_view(z) else None
        outputs: Any = _apply_in_place(copy, z, terms.amplitudes, terms, known, kernel)
        return outputs[0] if copy is None else outputs
    _overwrite(z, _twin(z, z), terms, known, kernel)
    return z


def _wants_gradient(z: Tensor, terms: Terms) -> bool:
    return (z.requires_grad or terms.amplitudes.requires_grad) and torch.is_grad_enabled()


def _kernel_for(z: Tensor, terms: Terms, backend: Backend) -> _Kernel | None:
    """The back end for these tensors; None for tensors that must be computed by the traceable formula."""
    amplitudes = terms.amplitudes
    if is_compiling() or type(z) not in _PLAIN or type(amplitudes) not in _PLAIN:
        return None
    on_gpu = z.is_cuda
    if not (on_gpu or z.is_cpu) or (terms.by_channel and not is_dense(z)):
        return None
    # transforms, tracers and modes that watch operations must see operations, and so must tensors of an outer transform
    watched = transforms_active() or dispatch_modes() > 0 or forward_mode_active()
    if watched or torch.jit.is_tracing() or is_transformed(z) or not holds_its_numbers(z):
        return None
    if on_gpu:
        if not amplitudes.device == terms.shape.device == z.device:
            return None
        kernel = demanded_kernel(z.device, backend)
        return kernel if kernel is not None and kernel.takes(z, terms) else None
    if not (amplitudes.is_cpu and terms.shape.is_cpu):
        return None
    if backend != "eager":
        native = native_kernel()
        if native is not None and native.takes(z, terms):
            return native
    return _EAGER if _EAGER.takes(z, terms) else None


def _forward(z: Tensor, terms: Terms, known: Known, kernel: _Kernel) -> Tensor:
    inside = kernel.inside(z, terms, known) if is_dense(z) else None
    if inside is None:
        out = known.value(z)
        _add(out, z, terms, None, kernel)
    else:
        out = uninitialised_like(z)
        kernel.add(out, z, terms, inside)
    return out


def _add(out: Tensor, z: Tensor, terms: Terms, inside: Known | None, kernel: _Kernel) -> None:
    """Adds c(z) to the base's output, in place, whatever its order in memory."""
    if is_dense(z) and _lie_alike(out, z):
        kernel.add(out, z, terms, inside)
        return
    values = z.contiguous()
    total = uninitialised_like(values).copy_(out)
    kernel.add(total, values, terms, None)
    out.copy_(total)


def _overwrite(z: Tensor, kept: Tensor, terms: Terms, known: Known, kernel: _Kernel) -> None:
    inside = kernel.inside(z, terms, known) if is_dense(z) else None
    # writing to an inference tensor outside inference mode is an error, and copy_ raises it
    if inside is None or (z.is_inference() and not torch.is_inference_mode_enabled()):
        z.copy_(known.value(kept))
    _add(z, kept, terms, inside, kernel)
    torch.autograd.graph.increment_version(z)  # a backward that has kept z must notice that it is overwritten


def _twin(values: Tensor, z: Tensor) -> Tensor:
    """A copy with the strides of z: over dense memory torch's loops may give other last bits than over gaps."""
    plain = type(z) in _PLAIN and z.layout == torch.strided and not is_compiling()
    if not plain or is_dense(z) or transforms_active():
        return values.clone()
    return torch.empty_strided(z.shape, z.stride(), dtype=z.dtype, device=z.device).copy_(values)


class _Corrected(torch.autograd.Function):
    """f(z), or c(z) alone; keeps z for the backward, and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, amplitudes: Tensor, terms: Terms, known: Known, kernel: _Kernel
    ) -> Tensor | tuple[Tensor, Tensor]:
        link = _link_to(z, known)
        _keep(ctx, z, amplitudes, terms, known, kernel, link)
        out = _forward(z, terms, known, kernel)
        if link is None:
            return out
        ctx.set_materialize_grads(False)
        return out, link

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = _sum_of(*grads)
        if grad is None:
            return (None,) * 5
        needed = ctx.needs_input_grad
        by_z, by_amplitudes = _gradients(ctx, grad, (needed[0], needed[1]))
        return by_z, by_amplitudes, None, None, None


def _keep(
    ctx: Any,
    z: Tensor,
    amplitudes: Tensor,
    terms: Terms,
    known: Known,
    kernel: _Kernel,
    link: Tensor | None = None,
) -> None:
    """Keeps what the backward needs; the amplitudes are the function's own input, so that torch recognises them."""
    ctx.half_width = terms.half_width
    ctx.names = terms.names
    ctx.known = known
    ctx.kernel = kernel
    ctx.save_for_backward(z, amplitudes, terms.shape, terms.table, link)


def _link_to(z: Tensor, known: Known) -> Tensor | None:
    """A zero expanded to the shape of z: an output that leads a second backward to the result, which is not kept."""
    if known.gradient_by_value is None:
        return None
    return _zero(z.dtype, z.device).expand(z.shape)


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def _sum_of(grad: Tensor | None, by_link: Tensor | None = None) -> Tensor | None:
    if grad is None or by_link is None:
        return by_link if grad is None else grad
    return grad + by_link


def _gradients(ctx: Any, grad: Tensor, needed: tuple[bool, bool]) -> _Gradients:
    z, amplitudes, shape, table, link = ctx.saved_tensors
    terms = Terms(amplitudes, shape, table, ctx.half_width, ctx.names)
    return _gradients_of(z, terms, ctx.known, ctx.kernel, grad, needed, link)


def _gradients_of(
    z: Tensor,
    terms: Terms,
    known: Known,
    kernel: _Kernel,
    grad: Tensor,
    needed: tuple[bool, bool],
    link: Tensor | None = None,
) -> _Gradients:
    if z.shape != grad.shape and type(grad) in _PLAIN:  # changed since, by z.data or a hook that brings back another
        raise RuntimeError(f"the backward has kept {tuple(z.shape)} for a gradient of {tuple(grad.shape)}")
    if torch.is_grad_enabled() and link is not None and _is_plain(grad, z):
        return _traceable_by_value(z, link, terms, known, grad, needed)
    if torch.is_grad_enabled() or not _is_plain(grad, z):
        return _traceable(z, terms, known, grad, needed)
    # of the correction alone with amplitudes of 0, z gets no gradient, not even zeros in another order in memory; only
    # where reading the amplitudes costs nothing
    if known is NOTHING and z.is_cpu and not terms.amplitudes.any().item():
        needed = (False, needed[1])
    z_is_dense = is_dense(z)
    inside = kernel.inside(z, terms, known) if z_is_dense else None
    # torch computes it from the gradient as it came, and chooses its order in memory: torch's loops over memory with
    # gaps, and the sums that the layers before this one make of the result, depend on that order in the last bit
    out = known.gradient(grad, z) if inside is None else uninitialised_like(z)
    dense = z if z_is_dense else z.contiguous()
    total = _in_order_of(dense, out)
    value = None
    if inside is None and BASE_TERM in terms.names:
        value = _in_order_of(dense, known.value(dense))
    by_amplitudes = kernel.add_gradient(total, _in_order_of(dense, grad), dense, terms, inside, value)
    if total is not out:
        out.copy_(total)
    return out if needed[0] else None, by_amplitudes if needed[1] else None


def _in_order_of(dense: Tensor, values: Tensor) -> Tensor:
    """Values in the order in memory of another tensor of their shape; the same tensor if they are in it already."""
    if _lie_alike(values, dense):
        return values
    return uninitialised_like(dense).copy_(values)


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the same shape have their elements in the same order in memory."""
    # the first check is the faster one
    return (one.is_contiguous() and other.is_contiguous()) or one.stride() == other.stride()


class _Overwritten(torch.autograd.Function):
    """``z.copy_(values)`` without a gradient by z; torch's is zeros, which it adds to the gradients of other uses of z.

    For a view there must be one, or torch drops the gradient of the rest of its base. It is -0.0, since x + (-0.0) is x
    bit for bit.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor, is_view: bool) -> Tensor:
        ctx.is_view = is_view
        ctx.mark_dirty(z)
        return z.copy_(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        by_z = torch.full_like(grad, -0.0) if ctx.is_view else None
        return by_z, grad, None


class _CorrectedInPlace(torch.autograd.Function):
    """f(z) written over z, with the copy of z that the backward needs.

    A second derivative must find its way through the copy. So it is an output; for a view, beside which torch allows no
    other output, it is an input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        copy: Tensor | None,
        z: Tensor,
        amplitudes: Tensor,
        terms: Terms,
        known: Known,
        kernel: _Kernel,
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.mark_dirty(z)
        ctx.set_materialize_grads(False)
        ctx.is_view = copy is not None
        if copy is None and isinstance(kernel, NativeKernel) and kernel.overwrites(z, terms, known):
            kept = uninitialised_like(z)
            kernel.overwrite(z, kept, terms, known)
            torch.autograd.graph.increment_version(z)
        else:
            kept = z.clone() if copy is None else copy  # dense, as the copies that torch keeps
            source = kept if kept.stride() == z.stride() else _twin(z, z)
            _overwrite(z, source, terms, known, kernel)
        if copy is not None:
            _keep(ctx, kept, amplitudes, terms, known, kernel)
            return z
        link = _link_to(z, known)
        _keep(ctx, kept, amplitudes, terms, known, kernel, link)
        if link is None:
            return z, kept
        return z, kept, link

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        by_result, *by_copy = grads
        grad = _sum_of(by_result, *by_copy[1:])
        by_z = None
        by_amplitudes = None
        if grad is not None:
            needed = ctx.needs_input_grad
            by_z, by_amplitudes = _gradients(ctx, grad, (needed[0] or needed[1], needed[2]))
        if ctx.is_view:  # torch writes the first gradient into that of the view's base
            return by_z, None, by_amplitudes, None, None, None
        if by_copy[0] is not None:
            by_z = by_copy[0] if by_z is None else by_z + by_copy[0]
        return None, by_z, by_amplitudes, None, None, None


# none of the arguments is part of a transform, see _kernel_for
_apply = direct_apply(_Corrected)
_apply_in_place = direct_apply(_CorrectedInPlace)


def _is_plain(grad: Tensor, z: Tensor) -> bool:
    """Whether the gradient is an ordinary tensor, not one of a transform, of a batch of gradients or with a tangent."""
    watched = is_batch_of_gradients(grad) or transforms_active() or forward_mode_active()
    return type(grad) in _PLAIN and grad.dtype == z.dtype and not watched and holds_its_numbers(grad)


def _traceable(z: Tensor, terms: Terms, known: Known, grad: Tensor, needed: tuple[bool, bool]) -> _Gradients:
    """The gradients by operations that can be differentiated again."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        value = known.value(z)
        out = value + correction_of(z, terms, value)
        return _differentiated(out, z, terms.amplitudes, grad, needed, differentiable)


def _differentiated(
    out: Tensor, z: Tensor, amplitudes: Tensor, grad: Tensor, needed: tuple[bool, bool], create_graph: bool
) -> _Gradients:
    """Gradients of ``out`` by z and the amplitudes, as torch's autograd computes them."""
    by_z_needed, by_amplitudes_needed = needed
    wanted: list[Tensor] = []
    if by_z_needed:
        wanted.append(z)
    if by_amplitudes_needed:
        wanted.append(amplitudes)
    # retained: in place, z is a result of the function whose backward this is, which must not be freed with out
    found = torch.autograd.grad(out, wanted, grad, retain_graph=True, create_graph=create_graph)
    by_z = found[0] if by_z_needed else None
    by_amplitudes = found[-1] if by_amplitudes_needed else None
    return by_z, by_amplitudes


def _traceable_by_value(
    z: Tensor, link: Tensor, terms: Terms, known: Known, grad: Tensor, needed: tuple[bool, bool]
) -> _Gradients:
    """The gradients by such operations for a base whose gradient torch computes from its value, as that of tanh.

    What a second backward sends to the value is added to what other uses of f(z) send there before it goes on to z;
    added afterwards, the sum would have other last bits. So with amplitudes of 0 it is sent to the result itself, by
    way of the link, less what is the correction's.

    Returns:
        Gradients by z and the amplitudes.
    """
    assert known.gradient_by_value is not None
    acts = terms.amplitudes.detach().any()
    value = known.value(z)
    c = correction_of(z, terms, value)
    by_z, by_amplitudes = _differentiated(c, z, terms.amplitudes, grad, needed, create_graph=True)
    if by_z is not None:
        # where, not if: a branch here would wait for the GPU
        value = torch.where(acts, value, value.detach() + (link - c))
        by_z = known.gradient_by_value(grad, value) + by_z
    return by_z, by_amplitudes
