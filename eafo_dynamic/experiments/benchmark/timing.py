"""Two things timed in alternation, and the memory that a backward keeps."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["TimeRatio", "kept_bytes", "milliseconds", "peak_bytes", "settle_allocator", "time_in_pairs"]

_LEAST = 2e-3  # seconds: what is shorter is repeated within one measurement


class TimeRatio(NamedTuple):
    """Two things measured in alternation.

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

    Each is run once untimed before it is timed, so that neither pays for what the other has left in the caches.

    Args:
        first: what is measured.
        second: what it is held against.
        pairs: number of pairs, at least 2.
        cpu: whether to count the process's CPU time in place of the time on the clock, for what takes long while other
            jobs run.

    Returns:
        Medians and quartiles.
    """
    clock = time.process_time if cpu else time.perf_counter
    times: tuple[list[float], list[float]] = [], []
    repeats = [_repeats(function) for function in (first, second)]
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            function = (first, second)[which]
            if not cpu:
                function()
            start = clock()
            for _ in range(repeats[which]):
                function()
            times[which].append((clock() - start) / repeats[which])
    ratios = [one / two for one, two in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    mine, other = (1e3 * statistics.median(each) for each in times)
    return TimeRatio(mine, other, middle, low, high)


def _repeats(function: Callable[[], object]) -> int:
    function()
    start = time.perf_counter()
    function()
    return max(1, round(_LEAST / max(time.perf_counter() - start, 1e-7)))


def settle_allocator() -> None:
    """Brings the C library's allocator into the state that it has in a training run.

    glibc hands blocks back to the system, and pays for fresh pages each time, until it has seen a large one go; then
    it keeps blocks of that size. Whichever came first would otherwise pay for all.
    """
    torch.empty(31 << 18).zero_()  # just under the 32 MiB from which on it always asks the system


def milliseconds(
    function: Callable[[], object], runs: int, before: Callable[[], object] | None = None, *, cpu: bool = True
) -> float:
    """Median time of a function by itself.

    Args:
        function: what is measured.
        runs: how many times.
        before: what is done before each run, untimed.
        cpu: whether to count CPU time, in which threads that wait for each other count too; else time on the clock.

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
    """Bytes that the autograd graph of a result keeps for its backward, each memory counted once.

    Args:
        function: makes the result.

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
    """The most memory for tensors that a function has taken at one time, beyond what there is before it.

    Args:
        function: what is measured; it is run once before.

    Returns:
        Bytes, counted by torch's profiler at every allocation.
    """
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        function()  # under the profiler too: it knows the size of a block only when it has seen it allocated
        with torch.autograd.profiler.record_function("measured"):
            function()
    results: Any = profiler
    events = sorted(results.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == "measured")
    changes = [event.nbytes() for event in events if event.name() == "[memory]" and event.start_ns() >= start]
    return max(itertools.accumulate(changes), default=0)
