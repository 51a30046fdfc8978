"""What an activation needs of the memory, and how far it is from the time that moving its numbers takes at least."""

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
    """What is held against GELU, with the targets."""
    return {
        "CRReLU": (CRReLU(), 1.01),
        "GELU with a table": (Corrected(nn.GELU()), 1.01),
        "three-line CRReLU": (ThreeLineCRReLU(), None),
        "Padé unit": (Pade(), None),
    }


def memory_cases(quick: bool) -> Iterator[Row]:
    """What the autograd graph keeps for the backward, and the peak of a step beyond what there is before it."""
    z = torch.randn(1000, 1000).requires_grad_()
    one = kept_bytes(lambda: nn.GELU()(z))
    for name, (module, target) in _units().items():
        yield row(f"kept by {name}", "GELU", kept_bytes(lambda module=module: module(z)) / one, target)
    x = torch.randn(512 if quick else 4096, 256)
    one = peak_bytes(_step(nn.GELU(), x))
    for name, (module, target) in _units().items():
        yield row(f"peak of a step with {name}", "GELU", peak_bytes(_step(module, x)) / one, target)


def _step(activation: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward of four wide layers, gradients made anew."""
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(256, 256), activation)], nn.Linear(256, 1))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()

    return step


def floor_cases(quick: bool) -> Iterator[Row]:
    """Forward and backward over the time that copies take which move as many bytes; below 1 what is cached helps.

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
    half, half_grad = z.detach().to(torch.bfloat16).requires_grad_(), grad.to(torch.bfloat16)
    yield _above_floor(f"CRReLU, bfloat16, {backend}", CRReLU(), half, half_grad, pairs)
    yield from _bandwidths(quick)


def _above_floor(name: str, module: nn.Module, z: Tensor, grad: Tensor, pairs: int) -> Row:
    source, target = z.detach(), torch.empty_like(grad)
    return above_floor(name, both_ways(module, z, grad), lambda: target.copy_(source), pairs)


def _bandwidths(quick: bool) -> Iterator[Row]:
    """Bytes read and written in a second by copies."""
    for megabytes in (1, 8) if quick else (1, 8, 64):
        source = torch.zeros(megabytes << 18)
        target = torch.empty_like(source)
        found = time_in_pairs(lambda a=target, b=source: a.copy_(b), lambda a=target, b=source: a.copy_(b), 7)
        yield row(f"copy of {megabytes} MB", "", 2e-6 * (megabytes << 20) / found.beside_ms, None, "GB/s")
