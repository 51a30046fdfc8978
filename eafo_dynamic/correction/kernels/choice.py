"""The names of the back ends, and which of them a device gets."""

from __future__ import annotations

from typing import Literal

import torch

from eafo_dynamic.correction.kernels.gpu import TritonKernel
from eafo_dynamic.correction.kernels.gpu_check import gpu_kernel, gpu_problem
from eafo_dynamic.correction.kernels.native import native_kernel
from eafo_dynamic.correction.kernels.rounds import RoundKernel, compiled_rounds
from eafo_dynamic.errors import ConfigError

__all__ = ["BACKENDS", "Backend", "check_backend", "demanded_kernel", "prepare", "resolve_backend", "round_kernel"]

Backend = Literal["auto", "eager", "native", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "eager", "native", "triton")


def check_backend(backend: str) -> Backend:
    """Checks the name of a back end.

    Args:
        backend: "auto", "eager", "native" or "triton".

    Returns:
        The same name.

    Raises:
        ConfigError: if there is no back end of that name.
    """
    for known in BACKENDS:
        if backend == known:
            return known
    raise ConfigError("backend", backend, "is no back end", f"Choose one of {', '.join(BACKENDS)}.")


def resolve_backend(
    backend: Backend, device: torch.device | None = None
) -> Literal["eager", "native", "triton", "formula"]:
    """The back end that computes plain tensors. The first call on a machine compiles it, on a CPU in about 1 s.

    Native takes float32, bfloat16 and float16, with one amplitude for all elements or one per channel; triton takes
    the same on CUDA devices. Eager takes float32 and float64, with one amplitude for all elements. Other tensors are
    computed by the traceable formula.

    Args:
        backend: the back end that was asked for; "auto" is native or triton where they work.
        device: where the tensors are. None: on the CPU, or, if "triton" was asked for, on a GPU that is not known yet.

    Returns:
        The back end; "formula" on a GPU where triton does not work.

    Raises:
        ConfigError: if "native" was asked for and no compiler makes it, or "triton" and it cannot run.
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
        raise ConfigError(
            "backend",
            backend,
            "needs a C compiler that makes a working library",
            "Install cc, gcc or clang, or name one in the environment variable CC; or leave it at 'auto'.",
        )
    return "eager"


def demanded_kernel(device: torch.device, backend: Backend) -> TritonKernel | None:
    """The kernel that computes tensors on a CUDA device.

    Args:
        device: the device, with its index.
        backend: the back end that was asked for.

    Returns:
        The kernel; None where the traceable formula is to be used.

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
    """Compiles and checks the kernel of a CUDA device now, so that the first forward need not wait for it.

    Args:
        device: the device that a model is on; for other devices than CUDA nothing is done.
        backend: the back end that was asked for.
    """
    if device.type == "cuda":
        demanded_kernel(device, backend)


def round_kernel(backend: Backend) -> RoundKernel | None:
    """The compiled functions for update rounds on the CPU.

    Args:
        backend: the back end that was asked for.

    Returns:
        The functions; None where torch's operations are to be used.
    """
    if backend == "eager":
        return None
    return compiled_rounds()


def _demand(problem: str | None) -> None:
    if problem is not None:
        raise ConfigError("backend", "triton", problem, "Install what is missing, or leave it at 'auto'.")
