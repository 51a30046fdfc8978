"""The cases: each a few lines that make what is measured and what it is held against."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.activation import CorrectedActivation as Corrected
from eafo_dynamic.activation import CRReLU
from eafo_dynamic.benchmark.peers import Pade, ThreeLineCRReLU, hook_statistics, observer
from eafo_dynamic.benchmark.steps import step_cases
from eafo_dynamic.benchmark.timing import kept_bytes, milliseconds, paired, settle_allocator
from eafo_dynamic.controller import EAFOController
from eafo_dynamic.kernels import Terms, corrected, known_module, native, resolve_backend
from eafo_dynamic.sites import find_sites
from eafo_dynamic.statistics import Collector
from eafo_dynamic.surgery import unwrap, wrap

__all__ = ["GROUPS", "Row", "run_benchmark"]

Row = dict[str, Any]
"""One measurement: group, case, beside, value (a ratio unless the unit says otherwise), low, high, ms, beside_ms, unit,
target (what the value should not exceed)."""


def _row(case: str, beside: str, value: float, target: float | None = None, unit: str = "x", **more: float) -> Row:
    return {"case": case, "beside": beside, "value": value, "unit": unit, "target": target, **more}


def _compare(
    case: str, beside: str, first: Callable[[], object], second: Callable[[], object], pairs: int, target: float | None
) -> Row:
    found = paired(first, second, pairs)
    more = {"low": found.low, "high": found.high, "ms": found.ms, "beside_ms": found.beside_ms}
    return _row(case, beside, found.ratio, target, "x", **more)


def _both_ways(module: Callable[[Tensor], Tensor], z: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward of a module, its parameters included."""
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []

    def run() -> None:
        torch.autograd.grad(module(z), [z, *parameters], grad)

    return run


class _Eager(nn.Module):
    """A corrected activation that must not use the compiled kernel."""

    def __init__(self, inner: Corrected) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> Tensor:
        inner = self.inner
        terms = Terms(inner.eps, inner.shape, inner.table, None, 8.0)
        return corrected(z, inner.base, terms, known_module(inner.base), "eager")


def activation_cases(quick: bool) -> Iterator[Row]:
    """Forward and backward of one activation, beside torch's own and others."""
    n, pairs = (200_000, 5) if quick else (2_000_000, 21)
    z = torch.randn(n, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(n, generator=torch.Generator().manual_seed(1))
    silu, gelu = _both_ways(nn.SiLU(), z, grad), _both_ways(nn.GELU(), z, grad)
    three = _both_ways(ThreeLineCRReLU(), z, grad)
    closed, backend = _both_ways(CRReLU(), z, grad), resolve_backend("auto")
    is_native = backend == "native"
    for each in (silu, gelu, three, closed):
        each()
    yield _compare(f"CRReLU, {backend}", "SiLU", closed, silu, pairs, 1.25 if is_native else None)
    yield _compare(f"CRReLU, {backend}", "three-line CRReLU", closed, three, pairs, 0.15 if is_native else 0.6)
    eager = _both_ways(_Eager(CRReLU()), z, grad)
    yield _compare("CRReLU, eager", "three-line CRReLU", eager, three, pairs, 0.6)
    table = _both_ways(Corrected(nn.SiLU()), z, grad)
    yield _compare(f"SiLU with a table, {backend}", "SiLU", table, silu, pairs, 2.0 if is_native else None)
    table = _both_ways(Corrected(nn.GELU()), z, grad)
    yield _compare(f"GELU with a table, {backend}", "GELU", table, gelu, pairs, None)
    eager = _both_ways(_Eager(Corrected(nn.GELU())), z, grad)
    yield _compare("GELU with a table, eager", "GELU", eager, gelu, pairs, None)
    for name, module in (("ReLU", nn.ReLU()), ("GELU", nn.GELU()), ("PReLU", nn.PReLU()), ("Padé unit", Pade())):
        yield _compare(name, "SiLU", _both_ways(module, z, grad), silu, pairs, None)


def memory_cases(quick: bool) -> Iterator[Row]:
    """What the autograd graph keeps for the backward."""
    z = torch.randn(1000, 1000).requires_grad_()
    one = kept_bytes(lambda: nn.GELU()(z))
    for name, module in (("CRReLU", CRReLU()), ("GELU with a table", Corrected(nn.GELU()))):
        yield _row(f"kept by {name}", "GELU", kept_bytes(lambda module=module: module(z)) / one, 1.01)
    yield _row("kept by three-line CRReLU", "GELU", kept_bytes(lambda: ThreeLineCRReLU()(z)) / one)
    yield _row("kept by Padé unit", "GELU", kept_bytes(lambda: Pade()(z)) / one)


def statistics_cases(quick: bool) -> Iterator[Row]:
    """Collecting from one batch of pre-activations of one site."""
    for exponent in (4, 5, 6) if quick else (4, 5, 6, 7, 8):
        z = torch.empty(10 ** (exponent - 2), 100)
        z[:1000].normal_()
        collector = Collector(quota=820)

        def observe(collector: Collector = collector, z: Tensor = z) -> None:
            collector.observe(z)
            collector._newest = None  # the chain is not what is measured

        yield _row(f"collect from 10^{exponent}", "", 1e3 * milliseconds(observe, 101), 60.0, "us")
    z = torch.randn(1000, 100)
    theirs = observer()
    if theirs is not None:
        yield _row("HistogramObserver, 10^5", "", 1e3 * milliseconds(lambda: theirs(z), 11), None, "us")
    yield _row("forward hook, 10^5", "", 1e3 * milliseconds(lambda: hook_statistics(z), 11), None, "us")


def _chain(sites: int, width: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [layer for _ in range(sites) for layer in (nn.Linear(width, width), activation())]
    return nn.Sequential(*layers, nn.Linear(width, 2))


def _filled_round(sites: int, activation: type[nn.Module], samples: int = 4096) -> Callable[[], None]:
    model = _chain(sites, 8, activation)
    controller = EAFOController.attach(model)
    z = torch.randn(sites, samples // 64, 64)

    def run() -> None:
        for row, site in zip(z, controller.sites, strict=True):
            site.collector.quota = samples
            site.collector.observe(row)
        controller.update(1)

    return run


def round_cases(quick: bool) -> Iterator[Row]:
    """One update round over all sites, 4096 samples each."""
    sites, runs = (10, 3) if quick else (100, 7)
    for name, activation in (("ReLU", nn.ReLU), ("GELU", nn.GELU)):
        run = _filled_round(sites, activation)
        run()
        target = None if quick else 10.0
        yield _row(f"update round, {sites} sites, {name}", "", milliseconds(run, runs), target, "ms")


def start_cases(quick: bool) -> Iterator[Row]:
    """What happens once."""
    sites = 100 if quick else 1000
    model = _chain(sites, 8)

    def start() -> None:
        wrap(model, find_sites(model))
        unwrap(model)

    yield _row(f"find, wrap and unwrap {sites} sites", "", milliseconds(start, 3) / 1e3, 1.0, "s")
    compiler = native._compiler()
    if compiler is not None:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            native._library(compiler, Path(folder))
            yield _row("compile the kernel, once a machine", "", time.perf_counter() - begin, 2.0, "s")


def _training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def growth_cases(quick: bool) -> Iterator[Row]:
    """What a step costs beyond the plain model's, per site, over the number of sites, the batch and the width."""
    counts = (1, 10, 100) if quick else (1, 3, 10, 30, 100, 300, 1000)
    shapes = [("sites", count, count, 64, 32) for count in counts]
    shapes += [("batch", batch, 10, batch, 64) for batch in ((64, 1024) if quick else (16, 64, 256, 1024, 4096))]
    shapes += [("width", width, 10, 256, width) for width in ((32, 256) if quick else (16, 64, 256, 1024))]
    for over, value, sites, batch, width in shapes:
        plain, ours = _chain(sites, width), _chain(sites, width)
        EAFOController.attach(ours).collecting = False
        x = torch.randn(batch, width)
        found = paired(_training_step(ours, x), _training_step(plain, x), 5 if quick else 11, cpu=True)
        more = {"low": found.low, "high": found.high, "ms": found.ms, "beside_ms": found.beside_ms}
        extra = 1e3 * (found.ms - found.beside_ms) / sites
        yield {**_row(f"{over} {value}", "plain", extra, None, "us/site", **more), "over": over, "at": value}


GROUPS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "activation": activation_cases,
    "memory": memory_cases,
    "statistics": statistics_cases,
    "round": round_cases,
    "start": start_cases,
    "growth": growth_cases,
    "step": step_cases,
}


def run_benchmark(
    only: list[str] | None = None, quick: bool = False, progress: Callable[[str, Row], None] | None = None
) -> list[Row]:
    """Runs groups of cases.

    Args:
        only: names of groups; None: all.
        quick: small sizes and few pairs: a look in under a minute, no basis for a claim.
        progress: called with the group and the row after each measurement.

    Returns:
        The rows, each with its group.
    """
    rows: list[Row] = []
    settle_allocator()
    for name in only or GROUPS:
        for row in GROUPS[name](quick):
            rows.append({"group": name, **row})
            if progress is not None:
                progress(name, rows[-1])
    return rows
