"""All cells of a plan, in one process or in several, with what is finished kept."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import NamedTuple

from eafo_dynamic.compare.cell import finished, pretrain, run_cell
from eafo_dynamic.compare.plan import Arm, Plan

__all__ = ["Failure", "cells", "run"]

_Task = tuple[str, Callable[..., object], tuple[object, ...]]


class Failure(NamedTuple):
    """A cell that did not finish.

    Attributes:
        what: arm and seed.
        why: one line.
    """

    what: str
    why: str


def cells(plan: Plan, arms: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> list[tuple[Arm, int]]:
    """The cells that a plan, or a part of it, has: seed by seed, so that early results can be paired.

    Args:
        plan: the plan.
        arms: names; None: all.
        seeds: None: all of the plan's.

    Returns:
        Arms and seeds.
    """
    chosen = plan.arms if arms is None else [plan.arm(name) for name in arms]
    return [(arm, seed) for seed in (plan.seeds if seeds is None else seeds) for arm in chosen]


def run(plan: Plan, chosen: Sequence[tuple[Arm, int]], jobs: int) -> list[Failure]:
    """Runs the cells that have no result yet, with a progress bar on stderr.

    Args:
        plan: the plan.
        chosen: cells.
        jobs: processes that work beside each other, each with as many threads as the plan says.

    Returns:
        The cells that failed; the others have gone on.

    Raises:
        KeyboardInterrupt: at Ctrl-C; no cell runs on.
    """
    open_ = [(arm, seed) for arm, seed in chosen if not finished(plan, arm, seed)]
    seeds = dict.fromkeys(seed for _, seed in open_) if plan.pretrain is not None else {}
    stages: list[list[_Task]] = [[(f"pretraining, seed {seed}", pretrain, (plan, seed)) for seed in seeds]]
    stages.append([(f"{arm.name}, seed {seed}", run_cell, (plan, arm, seed)) for arm, seed in open_])
    failures: list[Failure] = []
    with _progress(len(chosen) + len(seeds), len(chosen) - len(open_)) as advance:
        for stage in stages:
            failures += _here(stage, advance) if jobs == 1 or len(stage) < 2 else _beside(stage, advance, jobs)
    return failures


def _here(tasks: Sequence[_Task], advance: Callable[[str], None]) -> list[Failure]:
    failures: list[Failure] = []
    for what, function, args in tasks:
        why = _attempt(function, args)
        if why is not None:
            failures.append(Failure(what, why))
        advance(what)
    return failures


def _beside(tasks: Sequence[_Task], advance: Callable[[str], None], jobs: int) -> list[Failure]:
    failures: list[Failure] = []
    others = active_children()
    # spawn: a forked torch may hang in its thread pool
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            with _deaf_children():
                running = {pool.submit(_attempt, function, args): what for what, function, args in tasks}
            for future in as_completed(running):
                why = _outcome(future)
                if why is not None:
                    failures.append(Failure(running[future], why))
                advance(running[future])
        except KeyboardInterrupt:
            for child in active_children():
                if child not in others:
                    child.kill()  # what waits fails with it; a result is there whole or not at all
            raise
    return failures


def _attempt(function: Callable[..., object], args: tuple[object, ...]) -> str | None:
    """Runs a task; what it raised goes back to another process as text, which every exception survives."""
    try:
        function(*args)
    except Exception as error:
        return _line(error)
    return None


def _outcome(future: Future[str | None]) -> str | None:
    try:
        return future.result()
    except (BrokenProcessPool, SystemExit):  # Lightning exits at SIGTERM
        return "its process was killed; run the same command again"


@contextmanager
def _deaf_children() -> Generator[None]:
    """Processes that are started meanwhile do not hear Ctrl-C, which reaches all of a terminal's; the parent does."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def _progress(total: int, done: int) -> Generator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("", total=total - done)
        yield lambda what: bar.update(task, advance=1, description=what)
