"""Runs the cells of a plan, in one process or in several; finished cells are kept."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import active_children, get_context
from typing import NamedTuple

from eafo_dynamic.errors import EAFOError
from eafo_dynamic.experiments.compare.cell import finished, pretrain, run_cell
from eafo_dynamic.experiments.compare.plan import Arm, Plan

__all__ = ["BACKENDS", "Failure", "cells", "run"]

BACKENDS = ("local", "ray")

_Task = tuple[str, Callable[..., object], tuple[object, ...]]
_RETRIES = 2  # of a task whose worker of Ray died
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
    """The cells of a plan, or of a part of it: seed by seed, so that the first results can be paired.

    Args:
        plan: the plan.
        arms: names of arms; None: all of the plan's.
        seeds: the seeds; None: all of the plan's.

    Returns:
        Arms and seeds.
    """
    chosen = list(plan.arms)
    if arms is not None:
        chosen = [plan.arm(name) for name in arms]
    if seeds is None:
        seeds = plan.seeds
    return [(arm, seed) for seed in seeds for arm in chosen]


def run(plan: Plan, chosen: Sequence[tuple[Arm, int]], jobs: int, backend: str = "local") -> list[Failure]:
    """Runs the cells that have no result yet, with a progress bar on stderr.

    Args:
        plan: the plan.
        chosen: cells.
        jobs: number of processes at a time, each with the plan's number of threads; ray decides that by itself.
        backend: "local", processes of this machine; "ray", a cluster of Ray, whose nodes share the plan's folder.

    Returns:
        The cells that failed; a failure does not stop the others.

    Raises:
        KeyboardInterrupt: at Ctrl-C, which stops all cells.
    """
    if backend == "ray":
        plan = _absolute(plan)
    open_cells = [(arm, seed) for arm, seed in chosen if not finished(plan, arm, seed)]
    pretraining: list[_Task] = []
    if plan.pretrain is not None:
        for seed in dict.fromkeys(seed for _, seed in open_cells):
            pretraining.append((f"pretraining, seed {seed}", pretrain, (plan, seed)))
    training: list[_Task] = [(f"{arm.name}, seed {seed}", run_cell, (plan, arm, seed)) for arm, seed in open_cells]
    failures: list[Failure] = []
    total = len(chosen) + len(pretraining)
    done = len(chosen) - len(open_cells)
    with _progress(total, done) as advance:
        for stage in (pretraining, training):
            if backend == "ray":
                failures += _in_ray(stage, advance, plan.threads)
            elif jobs == 1 or len(stage) < 2:
                failures += _in_this_process(stage, advance)
            else:
                failures += _in_processes(stage, advance, jobs)
    return failures


def _absolute(plan: Plan) -> Plan:
    """The plan with paths that hold wherever a worker is started."""
    pretrain_path = plan.pretrain
    if pretrain_path is not None:
        pretrain_path = pretrain_path.absolute()
    store = plan.store
    if store is not None:
        store = store.absolute()
    return replace(
        plan, task=plan.task.absolute(), pretrain=pretrain_path, directory=plan.directory.absolute(), store=store
    )


def _in_ray(tasks: Sequence[_Task], advance: Callable[[str], None], threads: int) -> list[Failure]:
    """Runs tasks on a cluster of Ray, or on this machine if there is none. A task whose worker dies is run again."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise EAFOError("--backend ray needs ray: pip install 'eafo-dynamic[ray]'") from None
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False)  # the cluster of RAY_ADDRESS or of this machine, or else a new one
    failures: list[Failure] = []
    try:
        attempt = ray.remote(num_cpus=threads, max_retries=_RETRIES)(_attempt)
        running = {attempt.remote(function, args): what for what, function, args in tasks}
        while running:
            done, _ = ray.wait(list(running), num_returns=1)
            what = running.pop(done[0])
            try:
                why = ray.get(done[0])
            except ray.exceptions.RayError as error:
                why = _line(error)
            if why is not None:
                failures.append(Failure(what, why))
            advance(what)
    finally:
        if started_here:
            ray.shutdown()
    return failures


def _in_this_process(tasks: Sequence[_Task], advance: Callable[[str], None]) -> list[Failure]:
    failures: list[Failure] = []
    for what, function, args in tasks:
        why = _attempt(function, args)
        if why is not None:
            failures.append(Failure(what, why))
        advance(what)
    return failures


def _in_processes(tasks: Sequence[_Task], advance: Callable[[str], None], jobs: int) -> list[Failure]:
    """Runs tasks in several processes. If one is killed, its pool ends; the tasks it ran are run again, each alone."""
    failures: list[Failure] = []
    open_tasks = list(tasks)
    while open_tasks:
        unfinished = _in_pool(open_tasks, advance, failures, jobs)
        open_tasks = unfinished.waiting
        for task in unfinished.running:
            if _in_pool([task], advance, failures, 1).running:
                failures.append(Failure(task[0], _KILLED))
                advance(task[0])
    return failures


class _Unfinished(NamedTuple):
    """The tasks that a pool of processes has left: none, unless one of the processes was killed."""

    running: list[_Task]
    waiting: list[_Task]


def _in_pool(tasks: Sequence[_Task], advance: Callable[[str], None], failures: list[Failure], jobs: int) -> _Unfinished:
    earlier_children = active_children()
    waiting = list(tasks)
    running: dict[Future[str | None], _Task] = {}
    # spawn: a forked torch may hang in its thread pool
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            while running or waiting:
                while waiting and len(running) < jobs:  # not all at once, so that it is known which ones run
                    _, function, args = task = waiting[0]
                    with _ignoring_ctrl_c():
                        running[pool.submit(_attempt, function, args)] = task
                    waiting.pop(0)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    why = _outcome(future)
                    what = running.pop(future)[0]
                    if why is not None:
                        failures.append(Failure(what, why))
                    advance(what)
        except BrokenProcessPool:
            pass  # the tasks that ran or waited are returned
        except KeyboardInterrupt:
            for child in active_children():
                if child not in earlier_children:
                    child.kill()  # safe: a result is written whole or not at all
            raise
    return _Unfinished(list(running.values()), waiting)


def _attempt(function: Callable[..., object], args: tuple[object, ...]) -> str | None:
    """Runs a task and returns its error as text, since not every exception can be sent to another process."""
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
    except Exception as error:  # the task could not be sent to the process
        return _line(error)


@contextmanager
def _ignoring_ctrl_c() -> Generator[None]:
    """Processes started within ignore Ctrl-C, which a terminal sends to all processes; the parent stops them."""
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
