"""Base and correction as one function: which back end runs it, and one backward for both that keeps the input alone.

f(z) = base(z) + c(z),   f'(z) = base'(z) + c'(z)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling

from eafo_dynamic.correction.kernels.choice import Backend, demanded_kernel
from eafo_dynamic.correction.kernels.eager import EagerKernel
from eafo_dynamic.correction.kernels.formula import correction_of
from eafo_dynamic.correction.kernels.known import NOTHING, Known
from eafo_dynamic.correction.kernels.native import NativeKernel, native_kernel
from eafo_dynamic.correction.kernels.terms import Terms, is_dense, uninitialised_like
from eafo_dynamic.internals.torch_internals import (
    direct_apply,
    dispatch_modes,
    forward_mode_active,
    is_batch_of_gradients,
    is_transformed,
    is_view,
    transforms_active,
)

__all__ = ["corrected", "corrected_"]

_PLAIN = (Tensor, torch.nn.Parameter)
_EAGER = EagerKernel()

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""By z, eps and lift, each where it is needed."""


class _Kernel(Protocol):
    """A back end: the two functions that the equation needs, and which bases it computes in the same pass."""

    name: str

    def takes(self, z: Tensor, terms: Terms) -> bool: ...
    def inside(self, z: Tensor, terms: Terms, known: Known) -> Known | None: ...
    def add(self, out: Tensor, z: Tensor, terms: Terms, inside: Known | None = None) -> None: ...
    def add_gradient(
        self, out: Tensor, grad: Tensor, z: Tensor, terms: Terms, inside: Known | None = None
    ) -> tuple[Tensor, Tensor | None]: ...


def corrected(
    z: Tensor,
    base: Callable[[Tensor], Tensor],
    terms: Terms,
    known: Known | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """f(z) = base(z) + sigma * (eps * ghat(u) + lift * exp(-u^2 / 2)), u = (z - mu) / sigma.

    With eps and lift 0 it equals ``base(z)`` bit for bit, gradient included. Compilers, transforms and other
    devices see plain operations.

    Args:
        z: pre-activations, any shape, floating point.
        base: the base function, out of place.
        terms: amplitude, shape and tables.
        known: the same base with its derivative, where that is known.
        backend: what to compute plain tensors with.

    Returns:
        f(z), of the shape and dtype of z; differentiable in z, eps and lift, also twice.
    """
    kernel = _kernel_for(z, terms, backend)
    if kernel is None:
        out = base(z)
        return out + correction_of(z, terms).to(out.dtype)
    function = NOTHING if known is None else known
    if _wants_gradient(z, terms):
        c: Tensor = _apply(z, terms.eps, terms.lift, terms, function, kernel)
    else:
        c = _forward(z, terms, function, kernel)
    return c if known is not None else base(z) + c


def corrected_(
    z: Tensor,
    base: Callable[[Tensor], Tensor],
    terms: Terms,
    known: Known | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The same function, written over z, as bases that work in place do.

    Args:
        z: pre-activations, any shape, floating point; f(z) afterwards.
        base: the base function; it may overwrite its argument.
        terms: amplitude, shape and tables.
        known: the same base with its derivative, where that is known.
        backend: what to compute plain tensors with.

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
        outputs: Any = _apply_in_place(copy, z, terms.eps, terms.lift, terms, known, kernel)
        return outputs[0] if copy is None else outputs
    _overwrite(z, _twin(z, z), terms, known, kernel)
    return z


def _wants_gradient(z: Tensor, terms: Terms) -> bool:
    needed = z.requires_grad or terms.eps.requires_grad or (terms.lift is not None and terms.lift.requires_grad)
    return needed and torch.is_grad_enabled()


def _kernel_for(z: Tensor, terms: Terms, backend: Backend) -> _Kernel | None:
    """The back end for these tensors; None where they are not plain, dense ones on a CPU or a CUDA device."""
    eps = terms.eps
    if is_compiling() or type(z) not in _PLAIN or type(eps) not in _PLAIN:
        return None
    on_gpu = z.is_cuda
    if not (on_gpu or z.is_cpu) or (eps.dim() and not is_dense(z)):
        return None
    # transforms, tracers and modes that watch operations must see operations; so must what a transform has left behind
    watched = transforms_active() or dispatch_modes() > 0 or forward_mode_active()
    if watched or torch.jit.is_tracing() or is_transformed(z):
        return None
    same = eps.device == terms.shape.device == z.device if on_gpu else eps.is_cpu and terms.shape.is_cpu
    if not same:
        return None
    if on_gpu:
        kernel = demanded_kernel(z.device, backend)
        return kernel if kernel is not None and kernel.takes(z, terms) else None
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
    """Adds c(z) to the base's output, in place and in its order of memory, whatever that is."""
    if is_dense(z) and _lie_alike(out, z):
        kernel.add(out, z, terms, inside)
        return
    values = z.contiguous()
    total = uninitialised_like(values).copy_(out)
    kernel.add(total, values, terms, None)
    out.copy_(total)


def _overwrite(z: Tensor, kept: Tensor, terms: Terms, known: Known, kernel: _Kernel) -> None:
    inside = kernel.inside(z, terms, known) if is_dense(z) else None
    if inside is None or (z.is_inference() and not torch.is_inference_mode_enabled()):  # where torch refuses to write
        z.copy_(known.value(kept))
    _add(z, kept, terms, inside, kernel)
    torch.autograd.graph.increment_version(z)  # a backward that has kept z must see that it is overwritten


def _twin(values: Tensor, z: Tensor) -> Tensor:
    """A copy with the strides of z: torch's loops over gaps differ from those over dense memory in the last bit."""
    plain = type(z) in _PLAIN and z.layout == torch.strided and not is_compiling()
    if not plain or is_dense(z) or transforms_active():
        return values.clone()
    return torch.empty_strided(z.shape, z.stride(), dtype=z.dtype, device=z.device).copy_(values)


class _Corrected(torch.autograd.Function):
    """f(z), or c(z) alone; keeps z for the backward and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, eps: Tensor, lift: Tensor | None, terms: Terms, known: Known, kernel: _Kernel
    ) -> Tensor:
        _keep(ctx, z, eps, lift, terms, known, kernel)
        return _forward(z, terms, known, kernel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        needed = ctx.needs_input_grad
        by_z, by_eps, by_lift = _gradients(ctx, grad, (needed[0], needed[1], needed[2]))
        return by_z, by_eps, by_lift, None, None, None


def _keep(ctx: Any, z: Tensor, eps: Tensor, lift: Tensor | None, terms: Terms, known: Known, kernel: _Kernel) -> None:
    """Keeps what the backward needs; eps and lift as the function got them, so that torch knows them again."""
    ctx.half_width, ctx.known, ctx.kernel = terms.half_width, known, kernel
    ctx.save_for_backward(z, eps, lift, terms.shape, terms.table)


def _gradients(ctx: Any, grad: Tensor, needed: tuple[bool, bool, bool]) -> _Gradients:
    z, eps, lift, shape, table = ctx.saved_tensors
    terms = Terms(eps, shape, table, ctx.half_width, lift)
    if torch.is_grad_enabled() or not _is_plain(grad, z):
        return _traceable(z, terms, ctx.known, grad, needed)
    # only where a look at the amplitudes costs nothing
    quiet = ctx.known is NOTHING and z.is_cpu
    if quiet and not eps.any().item() and not (lift is not None and lift.any()):
        needed = (False, *needed[1:])  # nothing to add, not even zeros in another order of memory
    inside = ctx.kernel.inside(z, terms, ctx.known) if is_dense(z) else None
    # from the gradient as it came and in torch's own order of memory: its loops over gaps, and the sums that layers
    # before this one make of the result, differ from those over other orders in the last bit
    out = ctx.known.gradient(grad, z) if inside is None else uninitialised_like(z)
    dense = z if is_dense(z) else z.contiguous()
    grad, total = _in_order_of(dense, grad), _in_order_of(dense, out)
    amplitudes = ctx.kernel.add_gradient(total, grad, dense, terms, inside)
    if total is not out:
        out.copy_(total)
    by_z, by_eps, by_lift = (each if use else None for each, use in zip((out, *amplitudes), needed, strict=True))
    return by_z, by_eps, by_lift


def _in_order_of(dense: Tensor, values: Tensor) -> Tensor:
    """Values in the order of memory of another tensor of their shape; themselves where they lie so."""
    return values if _lie_alike(values, dense) else uninitialised_like(dense).copy_(values)


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order; contiguous ones are the quicker look."""
    return (one.is_contiguous() and other.is_contiguous()) or one.stride() == other.stride()


class _Overwritten(torch.autograd.Function):
    """``z.copy_(values)``, whose gradient by z is none: torch's is zeros, which add to what z is used for else.

    Of a view it must be something, or torch drops the gradient of the rest of the memory that the view looks into;
    x + (-0.0) is x bit for bit.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor, is_view: bool) -> Tensor:
        ctx.is_view = is_view
        ctx.mark_dirty(z)
        return z.copy_(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return torch.full_like(grad, -0.0) if ctx.is_view else None, grad, None


class _CorrectedInPlace(torch.autograd.Function):
    """f(z) written over z, and the copy of z that the backward needs.

    The copy is an output, or, of a view, beside which torch allows none, an input: so that a second derivative finds
    its way through it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        copy: Tensor | None,
        z: Tensor,
        eps: Tensor,
        lift: Tensor | None,
        terms: Terms,
        known: Known,
        kernel: _Kernel,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.mark_dirty(z)
        ctx.set_materialize_grads(False)
        ctx.is_view = copy is not None
        if copy is None and isinstance(kernel, NativeKernel) and kernel.overwrites(z, terms, known):
            kept = uninitialised_like(z)
            kernel.overwrite(z, kept, terms, known)
            torch.autograd.graph.increment_version(z)
        else:
            kept = z.clone() if copy is None else copy  # dense, as torch's own
            _overwrite(z, kept if kept.stride() == z.stride() else _twin(z, z), terms, known, kernel)
        _keep(ctx, kept, eps, lift, terms, known, kernel)
        return (z, kept) if copy is None else z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, *by_copy = grads
        by_z, by_eps, by_lift = (None, None, None)
        if grad is not None:
            needed = ctx.needs_input_grad
            by_z, by_eps, by_lift = _gradients(ctx, grad, (needed[0] or needed[1], needed[2], needed[3]))
        if ctx.is_view:  # torch writes the first gradient into that of the memory that the view looks into
            return by_z, None, by_eps, by_lift, None, None, None
        if by_copy[0] is not None:
            by_z = by_copy[0] if by_z is None else by_z + by_copy[0]
        return None, by_z, by_eps, by_lift, None, None, None


# no arguments of ours are part of a transform, see _kernel_for
_apply = direct_apply(_Corrected)
_apply_in_place = direct_apply(_CorrectedInPlace)


def _is_plain(grad: Tensor, z: Tensor) -> bool:
    """Whether the gradient is a tensor with memory of its own: not one of a transform or of a batch of gradients."""
    batched = is_batch_of_gradients(grad) or transforms_active()
    return type(grad) in _PLAIN and grad.dtype == z.dtype and not batched


def _traceable(z: Tensor, terms: Terms, known: Known, grad: Tensor, needed: tuple[bool, bool, bool]) -> _Gradients:
    """The same gradients by operations that can be differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        out = known.value(z) + correction_of(z, terms)
        inputs = (z, terms.eps, terms.lift)
        wanted = [tensor for tensor, use in zip(inputs, needed, strict=True) if use and tensor is not None]
        # retained: in place, z is a result of the function whose backward this is, which must not be freed with out
        found = iter(torch.autograd.grad(out, wanted, grad, retain_graph=True, create_graph=again))
    by_z, by_eps, by_lift = (next(found) if use else None for use in needed)
    return by_z, by_eps, by_lift
