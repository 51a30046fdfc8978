"""The memory that an activation needs, and its time relative to the least that moving its numbers takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.standalone import CorrectedActivation as Corrected
from eafo_dynamic.apply.standalone import CRReLU
from eafo_dynamic.correction.kernels import resolve_backend
from eafo_dynamic.experiments.benchmark.peers import Pade, ThreeLineCRReLU
from eafo_dynamic.experiments.benchmark.rows import Eager, Row, above_floor, both_ways, row
from eafo_dynamic.experiments.benchmark.timing import kept_bytes, peak_bytes, time_in_pairs

__all__ = ["floor_cases", "memory_cases"]


def _units() -> dict[str, tuple[nn.Module, float | None]]:
    """The activations that are compared with GELU, with their targets."""
    return {
        "CRReLU": (CRReLU(), 1.01),
        "GELU with a table": (Corrected(nn.GELU()), 1.01),
        "three-line CRReLU": (ThreeLineCRReLU(), None),
        "Padé unit": (Pade(), None),
    }


def memory_cases(quick: bool) -> Iterator[Row]:
    """Memory that the autograd graph keeps for the backward, and the peak of a step above what is used before it."""
    z = torch.randn(1000, 1000).requires_grad_()
    kept_by_gelu = kept_bytes(lambda: nn.GELU()(z))
    for name, (module, target) in _units().items():
        kept = kept_bytes(lambda module=module: module(z))
        yield row(f"kept by {name}", "GELU", kept / kept_by_gelu, target)
    x = torch.randn(512 if quick else 4096, 256)
    peak_of_gelu = peak_bytes(_step(nn.GELU(), x))
    for name, (module, target) in _units().items():
        peak = peak_bytes(_step(module, x))
        yield row(f"peak of a step with {name}", "GELU", peak / peak_of_gelu, target)


def _step(activation: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward of four wide layers, with newly allocated gradients."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(256, 256), activation]
    model = nn.Sequential(*layers, nn.Linear(256, 1))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()

    return step


def floor_cases(quick: bool) -> Iterator[Row]:
    """Forward and backward, relative to the time of copies that move as many bytes; below 1 where caches help.

    Yields:
        Ratios, and the bandwidths of copies of several sizes.
    """
    n, pairs = (200_000, 5) if quick else (2_000_000, 15)
    z = torch.randn(n, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(n, generator=torch.Generator().manual_seed(1))
    backend = resolve_backend("auto")
    units = {
        f"CRReLU, {backend}": CRReLU(),
        "CRReLU, eager": Eager(CRReLU()),
        f"SiLU with a table, {backend}": Corrected(nn.SiLU()),
        f"GELU with a table, {backend}": Corrected(nn.GELU()),
        "ReLU": nn.ReLU(),
        "SiLU": nn.SiLU(),
        "GELU": nn.GELU(),
        "three-line CRReLU": ThreeLineCRReLU(),
    }
    for name, module in units.items():
        yield _above_floor(name, module, z, grad, pairs)
    half = z.detach().to(torch.bfloat16).requires_grad_()
    half_grad = grad.to(torch.bfloat16)
    yield _above_floor(f"CRReLU, bfloat16, {backend}", CRReLU(), half, half_grad, pairs)
    yield from _bandwidths(quick)


def _above_floor(name: str, module: nn.Module, z: Tensor, grad: Tensor, pairs: int) -> Row:
    source = z.detach()
    target = torch.empty_like(grad)
    return above_floor(name, both_ways(module, z, grad), lambda: target.copy_(source), pairs)


def _bandwidths(quick: bool) -> Iterator[Row]:
    """Bytes that copies read and write per second."""
    sizes = (1, 8) if quick else (1, 8, 64)
    for megabytes in sizes:
        source = torch.zeros(megabytes << 18)
        target = torch.empty_like(source)

        def copy(target: Tensor = target, source: Tensor = source) -> Tensor:
            return target.copy_(source)

        found = time_in_pairs(copy, copy, 7)
        yield row(f"copy of {megabytes} MB", "", 2e-6 * (megabytes << 20) / found.beside_ms, None, "GB/s")
