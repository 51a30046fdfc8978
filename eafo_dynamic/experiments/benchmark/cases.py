"""The cases: each a few lines that make what is measured and what it is held against."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.standalone import CorrectedActivation as Corrected
from eafo_dynamic.apply.standalone import CRReLU
from eafo_dynamic.apply.surgery import unwrap, wrap
from eafo_dynamic.correction.kernels import compiled, resolve_backend
from eafo_dynamic.density.collector import Collector
from eafo_dynamic.experiments.benchmark.gpu import gpu_cases
from eafo_dynamic.experiments.benchmark.limits import floor_cases, memory_cases
from eafo_dynamic.experiments.benchmark.peers import Pade, ThreeLineCRReLU, hook_statistics, observer
from eafo_dynamic.experiments.benchmark.rows import Eager, Row, both_ways, compare, row
from eafo_dynamic.experiments.benchmark.steps import refill, step_cases
from eafo_dynamic.experiments.benchmark.timing import milliseconds, settle_allocator, time_in_pairs
from eafo_dynamic.find.sites import find_sites
from eafo_dynamic.policy.controller import EAFOController

__all__ = ["GROUPS", "run_benchmark"]


def activation_cases(quick: bool) -> Iterator[Row]:
    """Forward and backward of one activation, beside torch's own and others."""
    n, pairs = (200_000, 5) if quick else (2_000_000, 21)
    z = torch.randn(n, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(n, generator=torch.Generator().manual_seed(1))
    silu, gelu = both_ways(nn.SiLU(), z, grad), both_ways(nn.GELU(), z, grad)
    three = both_ways(ThreeLineCRReLU(), z, grad)
    closed, backend = both_ways(CRReLU(), z, grad), resolve_backend("auto")
    is_native = backend == "native"
    for each in (silu, gelu, three, closed):
        each()
    yield compare(f"CRReLU, {backend}", "SiLU", closed, silu, pairs, 1.25 if is_native else None)
    yield compare(f"CRReLU, {backend}", "three-line CRReLU", closed, three, pairs, 0.15 if is_native else 0.6)
    eager = both_ways(Eager(CRReLU()), z, grad)
    yield compare("CRReLU, eager", "three-line CRReLU", eager, three, pairs, 0.6)
    table = both_ways(Corrected(nn.SiLU()), z, grad)
    yield compare(f"SiLU with a table, {backend}", "SiLU", table, silu, pairs, 2.0 if is_native else None)
    table = both_ways(Corrected(nn.GELU()), z, grad)
    yield compare(f"GELU with a table, {backend}", "GELU", table, gelu, pairs, None)
    eager = both_ways(Eager(Corrected(nn.GELU())), z, grad)
    yield compare("GELU with a table, eager", "GELU", eager, gelu, pairs, None)
    for name, module in (("ReLU", nn.ReLU()), ("GELU", nn.GELU()), ("PReLU", nn.PReLU()), ("Padé unit", Pade())):
        yield compare(name, "SiLU", both_ways(module, z, grad), silu, pairs, None)
    yield from _other_cases(z.detach().view(-1, 100), grad.view(-1, 100), pairs)


def _other_cases(z: Tensor, grad: Tensor, pairs: int) -> Iterator[Row]:
    """The same in half precision, and with one amplitude a channel."""
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        x, g = z.to(dtype).requires_grad_(), grad.to(dtype)
        silu = both_ways(nn.SiLU(), x, g)
        channels = CRReLU()
        channels.eps = nn.Parameter(torch.full(z.shape[1:], 0.01))
        if dtype != torch.float32:
            yield compare(f"CRReLU, {name}", f"SiLU, {name}", both_ways(CRReLU(), x, g), silu, pairs, None)
        yield compare(f"CRReLU, {name}, per channel", f"SiLU, {name}", both_ways(channels, x, g), silu, pairs, None)


def statistics_cases(quick: bool) -> Iterator[Row]:
    """Collecting from one batch of pre-activations of one site."""
    for exponent in (4, 5, 6) if quick else (4, 5, 6, 7, 8):
        z = torch.empty(10 ** (exponent - 2), 100)
        z[:1000].normal_()
        collector = Collector(quota=820)

        def observe(collector: Collector = collector, z: Tensor = z) -> None:
            collector.observe(z)
            collector._newest = None  # the chain is not what is measured

        yield row(f"collect from 10^{exponent}", "", 1e3 * milliseconds(observe, 101), 60.0, "us")
    z = torch.randn(1000, 100)
    theirs = observer()
    if theirs is not None:
        yield row("HistogramObserver, 10^5", "", 1e3 * milliseconds(lambda: theirs(z), 11), None, "us")
    yield row("forward hook, 10^5", "", 1e3 * milliseconds(lambda: hook_statistics(z), 11), None, "us")


def _chain(sites: int, width: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [layer for _ in range(sites) for layer in (nn.Linear(width, width), activation())]
    return nn.Sequential(*layers, nn.Linear(width, 2))


def _filled_round(sites: int, activation: type[nn.Module], samples: int = 4096) -> tuple[Callable[[], object], ...]:
    """An update round, and what fills the collectors for it."""
    controller = EAFOController.attach(_chain(sites, 8, activation))
    collectors = [site.collector for site in controller.sites]
    for collector, z in zip(collectors, torch.randn(sites, samples // 64, 64), strict=True):
        collector.quota = samples
        collector.observe(z)
    return lambda: controller.update(1), refill(controller)


def round_cases(quick: bool) -> Iterator[Row]:
    """One update round over all sites, 4096 samples each, on the clock."""
    sites, runs = (10, 3) if quick else (100, 41)
    for name, activation in (("ReLU", nn.ReLU), ("GELU", nn.GELU)):
        update, fill = _filled_round(sites, activation)
        milliseconds(update, 2, fill)
        value, target = milliseconds(update, runs, fill, cpu=False), None if quick else 10.0
        yield row(f"update round, {sites} sites, {name}", "", value, target, "ms")


def start_cases(quick: bool) -> Iterator[Row]:
    """What happens once."""
    sites = 100 if quick else 1000
    model = _chain(sites, 8)

    def start() -> None:
        wrap(model, find_sites(model))
        unwrap(model)

    yield row(f"find, wrap and unwrap {sites} sites", "", milliseconds(start, 3) / 1e3, 1.0, "s")
    compiler = compiled.find_compiler()
    if compiler is not None:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            compiled.load_library(compiler, Path(folder))
            yield row("compile the kernel, once a machine", "", time.perf_counter() - begin, 2.0, "s")


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
        found = time_in_pairs(_training_step(ours, x), _training_step(plain, x), 5 if quick else 11, cpu=True)
        more = {"low": found.low, "high": found.high, "ms": found.ms, "beside_ms": found.beside_ms}
        extra = 1e3 * (found.ms - found.beside_ms) / sites
        yield {**row(f"{over} {value}", "plain", extra, None, "us/site", **more), "over": over, "at": value}


GROUPS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "activation": activation_cases,
    "memory": memory_cases,
    "floor": floor_cases,
    "gpu": gpu_cases,
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
        for found in GROUPS[name](quick):
            rows.append({"group": name, **found})
            if progress is not None:
                progress(name, rows[-1])
    return rows
