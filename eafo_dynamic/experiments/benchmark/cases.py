"""The groups of cases, and the function that runs them."""

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
from eafo_dynamic.experiments.benchmark.gpu_steps import gpu_step_cases
from eafo_dynamic.experiments.benchmark.limits import floor_cases, memory_cases
from eafo_dynamic.experiments.benchmark.peers import Pade, ThreeLineCRReLU, hook_statistics, observer
from eafo_dynamic.experiments.benchmark.rows import Eager, Row, both_ways, compare, row
from eafo_dynamic.experiments.benchmark.short_steps import compiled_cases, short_cases
from eafo_dynamic.experiments.benchmark.steps import refill, step_cases
from eafo_dynamic.experiments.benchmark.timing import milliseconds, settle_allocator, time_in_pairs
from eafo_dynamic.find.sites import find_sites
from eafo_dynamic.policy.controller import EAFOController

__all__ = ["GROUPS", "run_benchmark"]


def activation_cases(quick: bool) -> Iterator[Row]:
    """Forward and backward of one activation, compared with torch's own and others."""
    n, pairs = (200_000, 5) if quick else (2_000_000, 21)
    z = torch.randn(n, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(n, generator=torch.Generator().manual_seed(1))
    backend = resolve_backend("auto")
    silu = both_ways(nn.SiLU(), z, grad)
    gelu = both_ways(nn.GELU(), z, grad)
    three_lines = both_ways(ThreeLineCRReLU(), z, grad)
    crrelu = both_ways(CRReLU(), z, grad)
    crrelu_eager = both_ways(Eager(CRReLU()), z, grad)
    silu_table = both_ways(Corrected(nn.SiLU()), z, grad)
    gelu_table = both_ways(Corrected(nn.GELU()), z, grad)
    gelu_table_eager = both_ways(Eager(Corrected(nn.GELU())), z, grad)
    for run in (silu, gelu, three_lines, crrelu):
        run()  # the first call allocates, and may compile
    to_silu: float | None = None
    to_three_lines = 0.6
    table_to_silu: float | None = None
    if backend == "native":
        to_silu = 1.25
        to_three_lines = 0.15
        table_to_silu = 2.0
    yield compare(f"CRReLU, {backend}", "SiLU", crrelu, silu, pairs, to_silu)
    yield compare(f"CRReLU, {backend}", "three-line CRReLU", crrelu, three_lines, pairs, to_three_lines)
    yield compare("CRReLU, eager", "three-line CRReLU", crrelu_eager, three_lines, pairs, 0.6)
    yield compare(f"SiLU with a table, {backend}", "SiLU", silu_table, silu, pairs, table_to_silu)
    yield compare(f"GELU with a table, {backend}", "GELU", gelu_table, gelu, pairs, None)
    yield compare("GELU with a table, eager", "GELU", gelu_table_eager, gelu, pairs, None)
    for name, module in (("ReLU", nn.ReLU()), ("GELU", nn.GELU()), ("PReLU", nn.PReLU()), ("Padé unit", Pade())):
        yield compare(name, "SiLU", both_ways(module, z, grad), silu, pairs, None)
    yield from _other_cases(z.detach().view(-1, 100), grad.view(-1, 100), pairs)


def _other_cases(z: Tensor, grad: Tensor, pairs: int) -> Iterator[Row]:
    """CRReLU in half precision, and with one amplitude per channel."""
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        x = z.to(dtype).requires_grad_()
        g = grad.to(dtype)
        silu = both_ways(nn.SiLU(), x, g)
        per_channel = CRReLU()
        per_channel.eps = nn.Parameter(torch.full(z.shape[1:], 0.01))
        if dtype != torch.float32:
            yield compare(f"CRReLU, {name}", f"SiLU, {name}", both_ways(CRReLU(), x, g), silu, pairs, None)
        run = both_ways(per_channel, x, g)
        yield compare(f"CRReLU, {name}, per channel", f"SiLU, {name}", run, silu, pairs, None)


def statistics_cases(quick: bool) -> Iterator[Row]:
    """Collecting samples from one batch of pre-activations of one site."""
    exponents = (4, 5, 6) if quick else (4, 5, 6, 7, 8)
    for exponent in exponents:
        z = torch.empty(10 ** (exponent - 2), 100)
        z[:1000].normal_()
        collector = Collector(quota=820)

        def observe(collector: Collector = collector, z: Tensor = z) -> None:
            collector.observe(z)
            collector._newest = None  # drops the samples, so that every call collects into an empty collector

        yield row(f"collect from 10^{exponent}", "", 1e3 * milliseconds(observe, 101), 60.0, "us")
    z = torch.randn(1000, 100)
    histogram = observer()
    if histogram is not None:
        yield row("HistogramObserver, 10^5", "", 1e3 * milliseconds(lambda: histogram(z), 11), None, "us")
    yield row("forward hook, 10^5", "", 1e3 * milliseconds(lambda: hook_statistics(z), 11), None, "us")


def _chain(sites: int, width: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A network with this number of sites, all of the same width."""
    layers: list[nn.Module] = []
    for _ in range(sites):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 2))


def _filled_round(sites: int, activation: type[nn.Module], samples: int = 4096) -> tuple[Callable[[], object], ...]:
    """An update round, and a function that fills the collectors for it."""
    controller = EAFOController.attach(_chain(sites, 8, activation))
    collectors = [site.collector for site in controller.sites]
    for collector, z in zip(collectors, torch.randn(sites, samples // 64, 64), strict=True):
        collector.quota = samples
        collector.observe(z)
    return lambda: controller.update(1), refill(controller)


def round_cases(quick: bool) -> Iterator[Row]:
    """One update round over all sites, 4096 samples each, in wall time."""
    sites, runs, target = (10, 3, None) if quick else (100, 41, 10.0)
    for name, activation in (("ReLU", nn.ReLU), ("GELU", nn.GELU)):
        update, fill = _filled_round(sites, activation)
        milliseconds(update, 2, fill)  # not counted
        value = milliseconds(update, runs, fill, cpu=False)
        yield row(f"update round, {sites} sites, {name}", "", value, target, "ms")


def start_cases(quick: bool) -> Iterator[Row]:
    """What happens once, at the start of a training or on a machine."""
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
            seconds = time.perf_counter() - begin
        yield row("compile the kernel, once a machine", "", seconds, 2.0, "s")


def _training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def growth_cases(quick: bool) -> Iterator[Row]:
    """How much longer a step takes than the plain model's, per site: over the sites, the batch and the width."""
    if quick:
        pairs = 5
        counts = (1, 10, 100)
        batches = (64, 1024)
        widths = (32, 256)
    else:
        pairs = 11
        counts = (1, 3, 10, 30, 100, 300, 1000)
        batches = (16, 64, 256, 1024, 4096)
        widths = (16, 64, 256, 1024)
    for sites in counts:
        yield _growth("sites", sites, sites=sites, batch=64, width=32, pairs=pairs)
    for batch in batches:
        yield _growth("batch", batch, sites=10, batch=batch, width=64, pairs=pairs)
    for width in widths:
        yield _growth("width", width, sites=10, batch=256, width=width, pairs=pairs)


def _growth(over: str, value: int, *, sites: int, batch: int, width: int, pairs: int) -> Row:
    plain = _chain(sites, width)
    ours = _chain(sites, width)
    EAFOController.attach(ours).collecting = False
    x = torch.randn(batch, width)
    found = time_in_pairs(_training_step(ours, x), _training_step(plain, x), pairs, cpu=True)
    extra = 1e3 * (found.ms - found.beside_ms) / sites
    spread = {"low": found.low, "high": found.high, "ms": found.ms, "beside_ms": found.beside_ms}
    return {**row(f"{over} {value}", "plain", extra, None, "us/site", **spread), "over": over, "at": value}


GROUPS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "activation": activation_cases,
    "memory": memory_cases,
    "floor": floor_cases,
    "gpu": gpu_cases,
    "gpu_step": gpu_step_cases,
    "statistics": statistics_cases,
    "round": round_cases,
    "start": start_cases,
    "growth": growth_cases,
    "step": step_cases,
    "short": short_cases,
    "compiled": compiled_cases,
}


def run_benchmark(
    only: list[str] | None = None, quick: bool = False, progress: Callable[[str, Row], None] | None = None
) -> list[Row]:
    """Runs groups of cases.

    Args:
        only: names of groups; None: all.
        quick: small sizes and few pairs: a first look in under a minute, too noisy for a claim.
        progress: called with the group and the row after each measurement.

    Returns:
        The rows, each with the name of its group.
    """
    rows: list[Row] = []
    settle_allocator()
    for name in only or GROUPS:
        for found in GROUPS[name](quick):
            rows.append({"group": name, **found})
            if progress is not None:
                progress(name, rows[-1])
    return rows
