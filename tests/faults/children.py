"""Children of a process that has imported everything: a real process costs a fork, not ten seconds of imports."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import training_process

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["training_process", "children", "ranks", "settings"])
KILLED = -signal.SIGKILL

Prepare = Callable[[Path, int, dict[str, Any]], None]


def _child(folder: Path, rank: int, ranks: int, port: int, steps: int, options: dict[str, Any]) -> None:
    with (folder / f"out{rank}.txt").open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    warnings.simplefilter("ignore")
    if ranks > 1:  # as torchrun does: the Trainer then starts no processes of its own
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    prepare: Prepare | None = options.pop("prepare", None)
    if prepare is not None:
        prepare(folder, rank, options)
    training_process.main(folder, ranks, steps, options)


def serve() -> None:
    """Starts the process that the children are forked from, if it does not run yet."""
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # Python 3.11's server has no other way to it
        forkserver.ensure_running()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(folder: Path, ranks: int = 1, steps: int = 12, timeout: float = 120, **options: Any) -> list[int]:
    """Trains in one process a rank.

    Args:
        folder: of the run.
        ranks: number of processes.
        steps: optimiser steps to take.
        timeout: seconds until the processes are killed.
        **options: see ``training_process.main``; ``prepare`` is called in every process first.

    Returns:
        The exit status of every rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    serve()
    port = free_port()
    arguments = [(folder, rank, ranks, port, steps, options) for rank in range(ranks)]
    children = [CONTEXT.Process(target=_child, args=each, daemon=True) for each in arguments]
    for child in children:
        child.start()
    deadline = time.monotonic() + timeout
    while any(child.is_alive() for child in children) and time.monotonic() < deadline:
        if any(child.exitcode for child in children):  # as torchrun does: when one has died, the others are ended
            deadline = min(deadline, time.monotonic() + 2)
        wait([child.sentinel for child in children if child.is_alive()], timeout=0.1)
    for child in children:
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def succeed(folder: Path, ranks: int = 1, steps: int = 12, **options: Any) -> None:
    """As ``run``, and every rank has to get to its end."""
    codes = run(folder, ranks, steps, **options)
    texts = "\n".join((folder / f"out{rank}.txt").read_text()[-3000:] for rank in range(ranks))
    assert codes == [0] * ranks, f"{codes}\n{texts}"


def digests(folder: Path, rank: int) -> list[str]:
    return (folder / f"rank{rank}.txt").read_text().splitlines()
