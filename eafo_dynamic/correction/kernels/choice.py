"""The names of the back ends, and which one computes tensors on a device."""

from __future__ import annotations

from typing import Literal

import torch

from eafo_dynamic.correction.kernels.gpu import TritonKernel
from eafo_dynamic.correction.kernels.gpu_check import gpu_kernel, gpu_problem
from eafo_dynamic.correction.kernels.native import native_kernel
from eafo_dynamic.correction.kernels.rounds import RoundKernel
from eafo_dynamic.errors import ConfigError

__all__ = ["BACKENDS", "Backend", "check_backend", "demanded_kernel", "prepare", "resolve_backend", "round_kernel"]

Backend = Literal["auto", "eager", "native", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "eager", "native", "triton")


def check_backend(backend: str) -> Backend:
    """The back end of that name.

    Args:
        backend: "auto", "eager", "native" or "triton".

    Returns:
        The same.

    Raises:
        ConfigError: if there is none of that name.
    """
    for known in BACKENDS:
        if backend == known:
            return known
    raise ConfigError("backend", backend, "is no back end", f"Choose one of {', '.join(BACKENDS)}.")


def resolve_backend(
    backend: Backend, device: torch.device | None = None
) -> Literal["eager", "native", "triton", "formula"]:
    """Which back end plain tensors get; the first call on a machine compiles, on a CPU for about 1 s.

    Native takes float32, bfloat16 and float16, with one amplitude for all or one a channel, and triton the same on
    CUDA devices; eager takes float32 and float64 with one for all. What none of them takes goes by the traceable
    formula.

    Args:
        backend: what was asked for; "auto" is native or triton where it can be had.
        device: where the tensors are; None: on the CPU, or, if "triton" was asked for, on a GPU that need not be
            known yet.

    Returns:
        The back end; "formula" on a GPU that gets none.

    Raises:
        ConfigError: if "native" was asked for and there is no compiler that makes it, or "triton" and it cannot run.
    """
    if device is not None and device.type == "cuda":
        return "formula" if demanded_kernel(device, backend) is None else "triton"
    if backend == "triton" and device is None:
        _demand(gpu_problem())
        return "triton"
    if backend == "eager":
        return "eager"
    if native_kernel() is not None:
        return "native"
    if backend == "native":
        mend = "Install cc, gcc or clang, or name one in the environment variable CC; or leave it at 'auto'."
        raise ConfigError("backend", backend, "needs a C compiler that makes a working library", mend)
    return "eager"


def demanded_kernel(device: torch.device, backend: Backend) -> TritonKernel | None:
    """What computes tensors on a CUDA device.

    Args:
        device: the device, with its index.
        backend: what was asked for.

    Returns:
        The kernel; None for the traceable formula.

    Raises:
        ConfigError: if "triton" was asked for and it cannot run there.
    """
    if backend not in ("auto", "triton"):
        return None
    kernel = gpu_kernel(device)
    if backend == "triton" and kernel is None:
        _demand(gpu_problem(device))
    return kernel


def prepare(device: torch.device, backend: Backend = "auto") -> None:
    """Compiles and checks now what the first forward would otherwise wait for.

    Args:
        device: where a model has just come to be; nothing is done for other devices than CUDA.
        backend: what was asked for.
    """
    if device.type == "cuda":
        demanded_kernel(device, backend)


def round_kernel(backend: Backend) -> RoundKernel | None:
    """What computes update rounds on the CPU.

    Args:
        backend: what was asked for.

    Returns:
        The compiled functions; None for torch's operations.
    """
    native = native_kernel() if backend != "eager" else None
    return None if native is None else native.rounds


def _demand(problem: str | None) -> None:
    if problem is not None:
        raise ConfigError("backend", "triton", problem, "Install what is missing, or leave it at 'auto'.")
