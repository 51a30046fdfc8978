"""The Triton kernel of a device, compared with the formula before anything is computed with it."""

from __future__ import annotations

import functools
import importlib.util
import threading
import warnings

import torch
from torch import Tensor

from eafo_dynamic.correction.kernels.directions import TERMS
from eafo_dynamic.correction.kernels.formula import correction_of
from eafo_dynamic.correction.kernels.gpu import EVERY_BASE, TritonKernel, code_of
from eafo_dynamic.correction.kernels.known import INSIDE, NOTHING, Known
from eafo_dynamic.correction.kernels.terms import Terms
from eafo_dynamic.errors import one_line

__all__ = ["exact_bases", "gpu_kernel", "gpu_problem"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHAPE, _AMPLITUDES, _HALF_WIDTH = (0.2, 1.4), (0.3, -0.2, 0.15, -0.1), 4.0  # of every term, in order
_POINTS = 3200

_kernels: dict[torch.device, TritonKernel | None] = {}
_problems: dict[torch.device, str] = {}
_lock = threading.Lock()  # nn.DataParallel runs one thread per device


def gpu_kernel(device: torch.device) -> TritonKernel | None:
    """The kernel for a device, checked on first use.

    The check compiles, which takes seconds once per machine, and waits for the device. If it fails, one warning says
    why.

    Args:
        device: a CUDA device, with its index.

    Returns:
        The kernel; None without Triton, if its results differ from the formula's, and while a graph is captured that
        began before the check.
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
        device: a CUDA device for which the kernel has been asked for; None for any device.

    Returns:
        What is missing; None where nothing is known to be missing.
    """
    if not _has_triton():
        return "needs the package triton"
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch sees none"
    return None if device is None else _problems.get(device)


@functools.cache
def _has_triton() -> bool:
    """Whether Triton is installed; found without importing it."""
    return importlib.util.find_spec("triton") is not None


def _checked(device: torch.device) -> TritonKernel | None:
    """The kernel for those dtypes that pass the check; None if none does."""
    inside: dict[torch.dtype, frozenset[int]] = {}
    problems: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    if mode:  # only then, since setting it makes torch warn
        torch.cuda.set_sync_debug_mode(0)  # the check may wait for the device
    try:
        for dtype in _DTYPES:
            if dtype == torch.bfloat16 and not _has_bfloat16(device):
                continue
            try:
                inside[dtype] = exact_bases(device, dtype)
            except Exception as error:  # of a compiler, a driver or the check: the formula computes instead
                problems.append(f"{str(dtype).removeprefix('torch.')}: {one_line(error)}")
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)
    if problems:
        _problems[device] = f"does not work on {torch.cuda.get_device_name(device)} ({'; '.join(problems)})"
        warnings.warn(f"EAFO: the Triton kernel {_problems[device]}; the formula runs in its place.", stacklevel=2)
    return TritonKernel(inside) if inside else None


def _has_bfloat16(device: torch.device) -> bool:
    """Whether Triton can compute in bfloat16: on NVIDIA devices since Ampere."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def exact_bases(device: torch.device, dtype: torch.dtype) -> frozenset[int]:
    """Compares the kernel with the formula in float64, and its bases with torch's.

    Args:
        device: where to compute.
        dtype: dtype of the pre-activations.

    Returns:
        Codes of the bases that the kernel computes bit for bit as torch does.

    Raises:
        ArithmeticError: if a result differs from the formula's.
    """
    kernel = TritonKernel({dtype: EVERY_BASE})
    # whatever modes the first forward runs in
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        for z, known, terms in _cases(device, dtype):
            if not _agrees(kernel, z, known, terms):
                raise ArithmeticError(f"its results differ from the formula's, base {code_of(known)}")
        z = _special_points(device, dtype)
        return frozenset(code_of(known) for known in (*INSIDE, NOTHING) if _is_exact(kernel, z, known))


def _cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Known, Terms]]:
    """Every base, and in float32 every form: dtypes differ only in loads and stores, and compiling takes time."""
    z = torch.linspace(-9.0, 9.0, _POINTS, dtype=torch.float32, device=device)
    knots = torch.cos(torch.arange(17, dtype=z.dtype, device=device))
    table = torch.stack([knots[:-1], knots.diff(), knots[1:], -knots[1:]])  # continuous, as in the check of native
    shape = z.new_tensor(_SHAPE)
    amplitudes = z.new_tensor(_AMPLITUDES)
    names = tuple(TERMS)
    local = Terms(amplitudes[:2], shape, None, _HALF_WIDTH, names[:2])
    every = Terms(amplitudes, shape, None, _HALF_WIDTH, names)
    cases = [(z, known, every) for known in INSIDE]
    if dtype == torch.float32:
        five = torch.linspace(-0.4, 0.4, 5, dtype=z.dtype, device=device)
        per_column = torch.stack([five, -five, 0.5 * five, -0.5 * five])
        with_table = Terms(amplitudes[:1], shape, table, _HALF_WIDTH)
        cases += [(z, INSIDE[0], local), (z, NOTHING, local._replace(amplitudes=amplitudes[:1], names=names[:1]))]
        cases += [(z, NOTHING, with_table)]
        cases += [(z.view(-1, 5), INSIDE[0], every._replace(amplitudes=per_column))]
        cases += [(z.view(-1, 5, 16), INSIDE[0], every._replace(amplitudes=per_column.view(4, 5, 1)))]
    return [(each.to(dtype), known, terms) for each, known, terms in cases]


def _agrees(kernel: TritonKernel, z: Tensor, known: Known, terms: Terms) -> bool:
    """Whether value and gradients are the formula's; for the first base, also where it is not computed inside."""
    grad = torch.cos(torch.arange(z.numel(), dtype=torch.float32, device=z.device)).view_as(z).to(z.dtype)
    value, *gradients = _in_float64(z, grad, known, terms)
    near = 1e-5 if z.dtype == torch.float32 else 0.05
    computed: list[Known | None] = [known]
    if known is INSIDE[0]:
        computed.append(None)
    for inside in computed:
        base = None
        if inside is None:
            out = known.value(z)
            base = out.clone()
            by_z = known.gradient(grad, z)
        else:
            out = torch.full_like(z, torch.nan)
            by_z = torch.full_like(z, torch.nan)
        kernel.add(out, z, terms, inside)
        by_amplitudes = kernel.add_gradient(by_z, grad, z, terms, inside, base)
        tolerances = [near, near, 1e-2]  # of the sums over all elements: larger numbers
        for found, exact, tolerance in zip([out, by_z, by_amplitudes], [value, *gradients], tolerances, strict=True):
            if not torch.allclose(found.double(), exact, rtol=near, atol=tolerance):
                return False
    return True


def _in_float64(z: Tensor, grad: Tensor, known: Known, terms: Terms) -> list[Tensor]:
    """f(z) by the formula, and its gradients by z and the amplitudes."""
    with torch.enable_grad():
        wide_z = z.double().requires_grad_()
        amplitudes = terms.amplitudes.double().requires_grad_()
        table = None if terms.table is None else terms.table.double()
        base = known.value(wide_z)
        wide = Terms(amplitudes, terms.shape.double(), table, terms.half_width, terms.names)
        value = base + correction_of(wide_z, wide, base)
        return [value, *torch.autograd.grad(value, [wide_z, amplitudes], grad.double())]


def _special_points(device: torch.device, dtype: torch.dtype) -> Tensor:
    """All numbers of 16 bits; for float32, those of both 16-bit dtypes and many others."""
    patterns = torch.arange(-(2**15), 2**15, device=device).to(torch.int16)
    if dtype == torch.float32:
        dense = torch.linspace(-30.0, 30.0, 1 << 18, dtype=dtype, device=device)
        z = torch.cat([*(patterns.view(half).to(dtype) for half in _DTYPES[1:]), dense])
    else:
        z = patterns.view(dtype)
    z = z[~z.isnan()]
    return z[: len(z) // 16 * 16]


def _is_exact(kernel: TritonKernel, z: Tensor, known: Known) -> bool:
    """Whether amplitudes of 0 give torch's own base and gradient, bit for bit."""
    zero = torch.zeros(len(TERMS), dtype=torch.float32, device=z.device)
    shape = torch.tensor(_SHAPE, dtype=torch.float32, device=z.device)
    terms = Terms(zero, shape, None, _HALF_WIDTH, tuple(TERMS))
    grad = torch.linspace(-2.0, 2.0, len(z), dtype=torch.float32, device=z.device).to(z.dtype)
    out = torch.full_like(z, torch.nan)
    by_z = torch.full_like(z, torch.nan)
    kernel.add(out, z, terms, known)
    kernel.add_gradient(by_z, grad, z, terms, known)
    return _same_bits(out, known.value(z)) and _same_bits(by_z, known.gradient(grad, z))


def _same_bits(one: Tensor, two: Tensor) -> bool:
    bits = torch.int32 if one.dtype == torch.float32 else torch.int16
    same = one.view(bits) == two.view(bits)
    both_nan = one.isnan() & two.isnan()
    return bool((same | both_nan).all().item())
