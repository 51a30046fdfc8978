"""All cells of a plan, in one process or in several, with what is finished kept."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import NamedTuple

from eafo_dynamic.experiments.compare.cell import finished, pretrain, run_cell
from eafo_dynamic.experiments.compare.plan import Arm, Plan

__all__ = ["Failure", "cells", "run"]

_Task = tuple[str, Callable[..., object], tuple[object, ...]]
_KILLED = "its process was killed; run the same command again"


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
    """Runs tasks in several processes. One that is killed takes its pool with it; what ran there runs again, alone."""
    failures: list[Failure] = []
    open_ = list(tasks)
    while open_:
        cut = _in_pool(open_, advance, failures, jobs)
        open_ = cut.waiting
        for task in cut.running:
            if _in_pool([task], advance, failures, 1).running:
                failures.append(Failure(task[0], _KILLED))
                advance(task[0])
    return failures


class _Cut(NamedTuple):
    """What a pool of processes has left when one of them was killed."""

    running: list[_Task]
    waiting: list[_Task]


def _in_pool(tasks: Sequence[_Task], advance: Callable[[str], None], failures: list[Failure], jobs: int) -> _Cut:
    others = active_children()
    waiting, running = list(tasks), dict[Future[str | None], _Task]()
    # spawn: a forked torch may hang in its thread pool
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            while running or waiting:
                while waiting and len(running) < jobs:  # no more, so that it is known what runs
                    with _deaf_children():
                        running[pool.submit(_attempt, *waiting[0][1:])] = waiting[0]
                    waiting.pop(0)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    why = _outcome(future)
                    what = running.pop(future)[0]
                    if why is not None:
                        failures.append(Failure(what, why))
                    advance(what)
        except BrokenProcessPool:
            pass  # what ran, and what waits, is returned
        except KeyboardInterrupt:
            for child in active_children():
                if child not in others:
                    child.kill()  # what waits fails with it; a result is there whole or not at all
            raise
    return _Cut(list(running.values()), waiting)


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
    except BrokenProcessPool:
        raise
    except SystemExit:  # Lightning exits at SIGTERM
        return _KILLED
    except Exception as error:  # it could not be sent there
        return _line(error)


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
