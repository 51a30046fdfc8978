"""The Triton kernel of a device: held against the formula before anything is computed with it, and kept."""

from __future__ import annotations

import functools
import importlib.util
import threading
import warnings

import torch
from torch import Tensor

from eafo_dynamic.correction.kernels.formula import correction_of
from eafo_dynamic.correction.kernels.gpu import EVERY_BASE, TritonKernel, code_of
from eafo_dynamic.correction.kernels.known import INSIDE, NOTHING, Known
from eafo_dynamic.correction.kernels.terms import Terms
from eafo_dynamic.errors import one_line

__all__ = ["exact_bases", "gpu_kernel", "gpu_problem"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHAPE, _EPS, _LIFT, _HALF_WIDTH = (0.2, 1.4), 0.3, -0.2, 4.0
_POINTS = 3200

_kernels: dict[torch.device, TritonKernel | None] = {}
_problems: dict[torch.device, str] = {}
_lock = threading.Lock()  # nn.DataParallel runs a thread a device


def gpu_kernel(device: torch.device) -> TritonKernel | None:
    """The kernel for a device, checked when it is first asked for.

    The check compiles, which takes seconds once a machine, and waits for the device. What is wrong it says in a
    warning, once.

    Args:
        device: a CUDA device, with its index.

    Returns:
        The kernel; None without Triton, where its results are not what the formula says, and, for the time being,
        while a graph is captured.
    """
    if device in _kernels:
        return _kernels[device]
    if not _has_triton() or torch.cuda.is_current_stream_capturing():
        return None
    with _lock:
        if device not in _kernels:
            _kernels[device] = _checked(device)
    return _kernels[device]


def gpu_problem(device: torch.device | None = None) -> str | None:
    """Why there is no kernel.

    Args:
        device: a CUDA device that the kernel has been asked for; None: any that there may be.

    Returns:
        What is missing; None where nothing is known to be.
    """
    if not _has_triton():
        return "needs the package triton"
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch sees none"
    return None if device is None else _problems.get(device)


@functools.cache
def _has_triton() -> bool:
    """Whether Triton is installed; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


def _checked(device: torch.device) -> TritonKernel | None:
    """A kernel for the dtypes that pass."""
    inside: dict[torch.dtype, frozenset[int]] = {}
    problems: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    if mode:  # torch warns of setting it
        torch.cuda.set_sync_debug_mode(0)  # here it is right to wait
    try:
        for dtype in _DTYPES:
            if dtype == torch.bfloat16 and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
                continue  # Triton has it from Ampere on
            try:
                inside[dtype] = exact_bases(device, dtype)
            except Exception as error:  # of a compiler, a driver or the check: training goes on by the formula
                problems.append(f"{str(dtype).removeprefix('torch.')}: {one_line(error)}")
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)
    if problems:
        _problems[device] = f"does not work on {torch.cuda.get_device_name(device)} ({'; '.join(problems)})"
        warnings.warn(f"EAFO: the Triton kernel {_problems[device]}; the formula runs in its place.", stacklevel=2)
    return TritonKernel(inside) if inside else None


def exact_bases(device: torch.device, dtype: torch.dtype) -> frozenset[int]:
    """Holds the kernel against the formula in float64, and its bases against torch's.

    Args:
        device: where to compute.
        dtype: of the pre-activations.

    Returns:
        Codes of the bases that the kernel computes to the bit as torch does there.

    Raises:
        ArithmeticError: if a result is not what the formula says.
    """
    kernel = TritonKernel({dtype: EVERY_BASE})
    # whatever surrounds the first forward: it may be a training step in mixed precision, or none at all
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        for z, known, terms in _cases(device, dtype):
            if not _agrees(kernel, z, known, terms):
                raise ArithmeticError(f"its results differ from the formula's, base {code_of(known)}")
        every = _special_points(device, dtype)
        return frozenset(code_of(known) for known in (*INSIDE, NOTHING) if _is_exact(kernel, every, known))


def _cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Known, Terms]]:
    """Every base, and in float32 every form: dtypes differ in reading and writing alone, and compiling takes time."""
    z = torch.linspace(-9.0, 9.0, _POINTS, dtype=torch.float32, device=device)
    knots = torch.cos(torch.arange(17, dtype=z.dtype, device=device))
    table = torch.stack([knots[:-1], knots.diff(), knots[1:], -knots[1:]])  # continuous, as in the check of native
    shape, eps, lift = z.new_tensor(_SHAPE), z.new_tensor(_EPS), z.new_tensor(_LIFT)
    free = Terms(eps, shape, None, _HALF_WIDTH, lift)
    tabulated = Terms(eps, shape, table, _HALF_WIDTH)
    cases = [(z, known, free) for known in INSIDE]
    if dtype == torch.float32:
        five = torch.linspace(-0.4, 0.4, 5, dtype=z.dtype, device=device)
        rows, images = (free._replace(eps=each, lift=-each) for each in (five, five.view(5, 1)))
        cases += [(z, NOTHING, free._replace(lift=None)), (z, NOTHING, tabulated)]
        cases += [(z.view(-1, 5), NOTHING, rows), (z.view(-1, 5, 16), NOTHING, images)]
    return [(each.to(dtype), known, terms) for each, known, terms in cases]


def _agrees(kernel: TritonKernel, z: Tensor, known: Known, terms: Terms) -> bool:
    """Whether value and gradients are the formula's, the base computed inside and given."""
    grad = torch.cos(torch.arange(z.numel(), dtype=torch.float32, device=z.device)).view_as(z).to(z.dtype)
    with torch.enable_grad():
        wide = z.double().requires_grad_()
        eps, lift = (None if each is None else each.double().requires_grad_() for each in (terms.eps, terms.lift))
        shape, table = (None if each is None else each.double() for each in (terms.shape, terms.table))
        exact = correction_of(wide, Terms(eps, shape, table, terms.half_width, lift))  # pyright: ignore[reportArgumentType]
        exact = exact if known is NOTHING else exact + known.value(wide)
        wanted = [each for each in (wide, eps, lift) if each is not None]
        exact_z, *exact_sums = torch.autograd.grad(exact, wanted, grad.double())
    near = 1e-5 if z.dtype == torch.float32 else 0.05
    for inside in (known, None) if known is INSIDE[0] else (known,):
        out = known.value(z) if inside is None else torch.full_like(z, torch.nan)
        by_z = known.gradient(grad, z) if inside is None else torch.full_like(z, torch.nan)
        kernel.add(out, z, terms, inside)
        sums = kernel.add_gradient(by_z, grad, z, terms, inside)
        pairs = [(out, exact, near), (by_z, exact_z, near)]
        pairs += [(one, two, 1e-2) for one, two in zip(sums, exact_sums, strict=False) if one is not None]
        if not all(torch.allclose(one.double(), two, rtol=near, atol=within) for one, two, within in pairs):
            return False
    return True


def _special_points(device: torch.device, dtype: torch.dtype) -> Tensor:
    """All numbers of 16 bits; in float32 many others too."""
    patterns = torch.arange(-(2**15), 2**15, device=device).to(torch.int16)
    if dtype == torch.float32:
        dense = torch.linspace(-30.0, 30.0, 1 << 18, dtype=dtype, device=device)
        z = torch.cat([*(patterns.view(half).to(dtype) for half in _DTYPES[1:]), dense])
    else:
        z = patterns.view(dtype)
    z = z[~z.isnan()]
    return z[: len(z) // 16 * 16]


def _is_exact(kernel: TritonKernel, z: Tensor, known: Known) -> bool:
    """Whether amplitudes of 0 give what torch gives, to the bit."""
    zero = torch.zeros((), dtype=torch.float32, device=z.device)
    terms = Terms(zero, torch.tensor(_SHAPE, dtype=torch.float32, device=z.device), None, _HALF_WIDTH, zero)
    grad = torch.linspace(-2.0, 2.0, len(z), dtype=torch.float32, device=z.device).to(z.dtype)
    out, by_z = torch.full_like(z, torch.nan), torch.full_like(z, torch.nan)
    kernel.add(out, z, terms, known)
    kernel.add_gradient(by_z, grad, z, terms, known)
    return _same_bits(out, known.value(z)) and _same_bits(by_z, known.gradient(grad, z))


def _same_bits(one: Tensor, two: Tensor) -> bool:
    kind = torch.int32 if one.dtype == torch.float32 else torch.int16
    return bool(((one.view(kind) == two.view(kind)) | (one.isnan() & two.isnan())).all().item())
