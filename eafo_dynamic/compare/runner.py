"""All cells of a plan, in one process or in several, with what is finished kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
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
        try:
            function(*args)
        except Exception as error:
            failures.append(Failure(what, _line(error)))
        advance(what)
    return failures


def _beside(tasks: Sequence[_Task], advance: Callable[[str], None], jobs: int) -> list[Failure]:
    failures: list[Failure] = []
    # spawn: a forked torch may hang in its thread pool
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(function, *args): what for what, function, args in tasks}
        for future in as_completed(running):
            try:
                future.result()
            except BrokenProcessPool:
                failures.append(Failure(running[future], "its process was killed; run the same command again"))
            except Exception as error:
                failures.append(Failure(running[future], _line(error)))
            advance(running[future])
    return failures


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
