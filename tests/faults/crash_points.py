"""Where a run can be killed: a process arms one point, and dies there by SIGKILL, as a node that loses power does."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """One place in the code of a run.

    Args:
        name: what is going on there.
        target: function, as ``module:attribute``.
        when: before or after the function's work, or "torn": when half of the bytes it is to write are on the disk.
        at: which call of the function, from 1.
        contains: count only calls one of whose arguments shows this text.
    """

    name: str
    target: str
    when: str
    at: int
    contains: str = ""


_CALLBACK = "eafo_dynamic.trainers.lightning.callback:EAFOCallback"
_WRITER = "eafo_dynamic.records.writer"
_CONTROLLER = "eafo_dynamic.policy.controller:EAFOController"
_LOCAL_FILE = "fsspec.implementations.local:LocalFileOpener"

# Lightning's checkpoints are taken every second step; rounds run after steps 1, 3, 6, 9 and 12
POINTS = [
    Point("before anything is wrapped", f"{_CALLBACK}.setup", "before", 1),
    Point("sites wrapped, optimiser not made", f"{_CALLBACK}.setup", "after", 1),
    Point("the log's first manifest is being written", f"{_WRITER}:_replace", "before", 1),
    Point("before the first step", f"{_CALLBACK}.on_train_start", "after", 1),
    Point("before the first checkpoint", f"{_CONTROLLER}.update", "after", 1),
    Point("in a forward that leaves samples", "training_process:Net.forward", "after", 12),
    Point("in mid-accumulation", "lightning.pytorch:LightningModule.backward", "after", 11),
    Point("before the optimiser's step", f"{_CONTROLLER}.before_optimizer_step", "after", 5),
    Point("after the optimiser's step, before the update", f"{_CONTROLLER}.step", "before", 11),
    Point("before an update round", f"{_CONTROLLER}.update", "before", 3),
    Point("amid an update round, corrections written", "eafo_dynamic.apply.bank:Bank.commit", "after", 3),
    Point("between an update and its row", f"{_WRITER}:LogWriter.write", "before", 3),
    Point("in the middle of a row", f"{_WRITER}:os.write", "torn", 3, "entropy_after"),
    Point("between a row and its snapshot", f"{_WRITER}:LogWriter.write_shapes", "before", 2),
    Point("in the middle of a snapshot", f"{_WRITER}:os.write", "torn", 2, "function"),
    Point("between a snapshot and the loggers", "eafo_dynamic.trainers.lightning.reporter:Reporter.send", "before", 7),
    Point(
        "before a checkpoint is gathered",
        f"{_CALLBACK}.state_dict",
        "before",
        2,
    ),
    Point(
        "checkpoint gathered, not written",
        f"{_CALLBACK}.state_dict",
        "after",
        3,
    ),
    Point("in the middle of writing a checkpoint", f"{_LOCAL_FILE}.write", "torn", 3),
    Point("checkpoint written, not in its place", f"{_LOCAL_FILE}.commit", "before", 4),
    Point("checkpoint in its place, last.ckpt an older one", f"{_LOCAL_FILE}.commit", "after", 3),
    Point("between two checkpoints", "training_process:Net.training_step", "before", 14),
    Point(
        "at the end of an epoch",
        f"{_CALLBACK}.on_train_batch_end",
        "after",
        16,
    ),
    Point("before the last update round", f"{_CONTROLLER}.update", "before", 5),
    Point("after the last step", f"{_CALLBACK}.on_fit_end", "before", 1),
    Point("at teardown", f"{_CALLBACK}.teardown", "before", 1),
]

# without accumulation: rows of step 9 and its snapshot are written, and the newest checkpoint is that of step 8
AHEAD = Point("log ahead of the checkpoint", "training_process:Net.training_step", "before", 11)

# after step 13, whose rows are those of the end of the fit: the last round ran after step 12, as the last checkpoint
ENDING = [
    Point(
        "early in an epoch, the checkpoint that of the last one's end",
        "training_process:Net.training_step",
        "before",
        10,
    ),
    Point("after the last step", f"{_CALLBACK}.on_fit_end", "before", 1),
    Point("before the rows of the end", f"{_WRITER}:LogWriter.write_end", "before", 1),
    Point("in the middle of a row of the end", f"{_WRITER}:os.write", "torn", 1, '"fit_end"'),
    Point("between the rows and the snapshot of the end", f"{_WRITER}:LogWriter.write_shapes", "before", 4),
    Point("after the log's end", f"{_WRITER}:LogWriter.write_end", "after", 1),
]

# what a run does only when it goes on after another has died
RESUMING = [
    Point(
        "before the sites of a checkpoint are adopted",
        f"{_CALLBACK}.adopt",
        "before",
        1,
    ),
    Point("weights restored, log not", f"{_WRITER}:LogWriter.resume", "before", 1),
    Point("while the log is cut back to the checkpoint", f"{_WRITER}:os.replace", "before", 1),
    Point("log cut back, snapshots not", f"{_WRITER}:os.replace", "after", 1),
    Point("log and snapshots cut back, manifest not", f"{_WRITER}:os.replace", "after", 2),
    Point("in the first step after", "training_process:Net.training_step", "after", 1),
    Point("in the first update round after", f"{_CONTROLLER}.update", "after", 1),
]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: Point) -> None:
    """Makes this process die at a point.

    Args:
        point: where.
    """
    module, _, path = point.target.partition(":")
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def armed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += not point.contains or any(point.contains in str(each) for each in args)
        if calls != point.at:
            return original(*args, **kwargs)
        if point.when == "torn":
            *others, data = args
            original(*others, data[: len(data) // 2])
            for each in others:
                if hasattr(each, "flush"):
                    each.flush()
        if point.when == "after":
            original(*args, **kwargs)
        return _die()

    setattr(owner, name, armed)


def prepare(folder: Path, rank: int, options: dict[str, Any]) -> None:
    """Arms the point that the options name; see ``children.run``."""
    arm(options.pop("point"))


def kill_later(folder: Path, rank: int, options: dict[str, Any]) -> None:
    """Makes this process die a given time after it began, wherever it is then."""
    delay = options.pop("delay")

    def wait() -> None:
        time.sleep(delay)
        _die()

    threading.Thread(target=wait, daemon=True).start()
