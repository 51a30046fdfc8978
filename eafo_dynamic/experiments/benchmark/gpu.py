"""The same activations on a CUDA device, relative to the time of copies that move as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from eafo_dynamic.apply.standalone import CorrectedActivation as Corrected
from eafo_dynamic.apply.standalone import CRReLU
from eafo_dynamic.correction.kernels import resolve_backend
from eafo_dynamic.experiments.benchmark.peers import ThreeLineCRReLU
from eafo_dynamic.experiments.benchmark.rows import Eager, Row, above_floor, both_ways, row
from eafo_dynamic.experiments.benchmark.timing import time_in_pairs

__all__ = ["gpu_cases"]

_REPLAYS = 10  # per measurement
_CHANNELS = 256


def gpu_cases(quick: bool) -> Iterator[Row]:
    """Forward and backward, replayed as CUDA graphs so that launches cost nothing; no rows without a device.

    Yields:
        Ratios, and the bandwidth of the copy.
    """
    if not torch.cuda.is_available():
        return
    device = torch.device("cuda", torch.cuda.current_device())
    backend = resolve_backend("auto", device)
    n, pairs = (1 << 22, 5) if quick else (1 << 28, 11)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        source = torch.randn(n // _CHANNELS, _CHANNELS, dtype=dtype, device=device)
        grad = torch.randn_like(source)
        target = torch.empty_like(source)
        copy = _replayed(lambda target=target, source=source: target.copy_(source))
        channels = CRReLU()
        channels.eps = nn.Parameter(torch.full((_CHANNELS,), 0.01))
        units: dict[str, nn.Module] = {
            f"CRReLU, {backend}": CRReLU(),
            f"CRReLU, {backend}, per channel": channels,
            f"free SiLU, {backend}": Corrected(nn.SiLU(), lift=0.01),
            f"free GELU, {backend}": Corrected(nn.GELU(), lift=0.01),
            f"free GELU by tanh, {backend}": Corrected(nn.GELU("tanh"), lift=0.01),
            f"free Mish, {backend}": Corrected(nn.Mish(), lift=0.01),
            f"GELU with a table, {backend}": Corrected(nn.GELU()),
            "CRReLU, formula": Eager(CRReLU()),
            "ReLU": nn.ReLU(),
            "SiLU": nn.SiLU(),
            "GELU": nn.GELU(),
            "three-line CRReLU": ThreeLineCRReLU(),
        }
        for case, unit in units.items():
            graph = _captured(both_ways(unit.to(device), source.detach().requires_grad_(), grad))
            yield above_floor(f"{case}, {name}", _replayed(graph.replay), copy, pairs, _REPLAYS)
        found = time_in_pairs(copy, copy, pairs)
        moved = 2 * source.nbytes * _REPLAYS
        yield row(f"copy of {source.nbytes >> 20} MB, {name}", "", 1e-6 * moved / found.beside_ms, None, "GB/s")


def _captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what a function does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _replayed(run: Callable[[], object]) -> Callable[[], None]:
    """A function that runs another one `_REPLAYS` times, and waits until the device has finished."""

    def repeated() -> None:
        for _ in range(_REPLAYS):
            run()
        torch.cuda.synchronize()

    return repeated
