"""Measures time, of two functions in alternation or of one, and memory."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["TimeRatio", "kept_bytes", "milliseconds", "peak_bytes", "settle_allocator", "time_in_pairs"]

_LEAST = 2e-3  # [s]; shorter functions are repeated within one measurement


class TimeRatio(NamedTuple):
    """The times of two functions measured in alternation.

    Args:
        ms: median time of the first, in milliseconds.
        beside_ms: median time of the second.
        ratio: median of the pairs' ratios, first over second.
        low: first quartile of the ratios.
        high: third quartile of the ratios.
    """

    ms: float
    beside_ms: float
    ratio: float
    low: float
    high: float


def time_in_pairs(
    first: Callable[[], object], second: Callable[[], object], pairs: int, *, cpu: bool = False
) -> TimeRatio:
    """Times two functions in alternation, the order changing from pair to pair.

    Each is run once untimed before it is timed, so that neither suffers from what the other has left in the caches.
    With ``cpu`` it is not.

    Args:
        first: what is measured.
        second: what it is compared with.
        pairs: number of pairs, at least 2.
        cpu: whether to measure the CPU time of this process instead of wall time, for long functions while other
            jobs run.

    Returns:
        Medians and quartiles.
    """
    clock = time.process_time if cpu else time.perf_counter
    repeats_of_first = _repeats(first)
    repeats_of_second = _repeats(second)

    def measured(function: Callable[[], object], repeats: int) -> float:
        if not cpu:
            function()
        start = clock()
        for _ in range(repeats):
            function()
        return (clock() - start) / repeats

    times_of_first: list[float] = []
    times_of_second: list[float] = []
    for pair in range(pairs):
        if pair % 2 == 0:
            times_of_first.append(measured(first, repeats_of_first))
            times_of_second.append(measured(second, repeats_of_second))
        else:
            times_of_second.append(measured(second, repeats_of_second))
            times_of_first.append(measured(first, repeats_of_first))
    ratios = [one / two for one, two in zip(times_of_first, times_of_second, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return TimeRatio(
        1e3 * statistics.median(times_of_first), 1e3 * statistics.median(times_of_second), middle, low, high
    )


def _repeats(function: Callable[[], object]) -> int:
    function()
    start = time.perf_counter()
    function()
    return max(1, round(_LEAST / max(time.perf_counter() - start, 1e-7)))


def settle_allocator() -> None:
    """Brings the C library's allocator into the state that it has in a training run.

    glibc returns large blocks to the system, and has to ask for new pages each time, until it has seen such a block
    freed; then it keeps blocks of that size. The first case would otherwise be slow for this reason alone.
    """
    torch.empty(31 << 18).zero_()  # just under 32 MiB, above which glibc always asks the system


def milliseconds(
    function: Callable[[], object], runs: int, before: Callable[[], object] | None = None, *, cpu: bool = True
) -> float:
    """Median time of a function by itself.

    Args:
        function: what is measured.
        runs: how many times.
        before: called before each run, untimed.
        cpu: whether to measure CPU time, in which threads that wait for each other count too; otherwise wall time.

    Returns:
        Milliseconds.
    """
    times: list[float] = []
    clock = time.process_time if cpu else time.perf_counter
    for _ in range(runs):
        if before is not None:
            before()
        start = clock()
        function()
        times.append(clock() - start)
    return 1e3 * statistics.median(times)


def kept_bytes(function: Callable[[], Tensor]) -> int:
    """Bytes that the autograd graph of a result keeps for its backward, each block of memory counted once.

    Args:
        function: computes the result.

    Returns:
        Bytes.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(kept.values())


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that a function uses for tensors at one time, above what is used before it.

    Args:
        function: what is measured; it is run once before.

    Returns:
        Bytes, counted by torch's profiler at every allocation.
    """
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        function()  # also profiled: the profiler knows the size of a block only if it has seen it allocated
        with torch.autograd.profiler.record_function("measured"):
            function()
    results: Any = profiler
    events = sorted(results.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == "measured")
    changes = [event.nbytes() for event in events if event.name() == "[memory]" and event.start_ns() >= start]
    return max(itertools.accumulate(changes), default=0)
