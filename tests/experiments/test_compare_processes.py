"""Cells in processes beside each other: what goes wrong in one comes back whole, and Ctrl-C ends them all."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from eafo_dynamic import errors
from eafo_dynamic.experiments.compare.plan import Plan, read_plan
from eafo_dynamic.experiments.compare.runner import _in_processes

ROOT = Path(__file__).parents[2]
ERRORS = [
    errors.EAFOError("plain"),
    errors.ConfigError("eps_init", 3, "is too large", "Write 1."),
    errors.PatternError("target_modules", "nope", ["ReLU", "GELU"]),
    errors.SiteError("model.2: odd"),
    errors.LogError("log: damaged"),
    errors.CompoundingError("last.ckpt"),
    errors.UnsupportedTorchError("merge", "2.4", "torch._x", "Update torch."),
]


def plan_of(folder: Path, arms: dict[str, Any], **changes: Any) -> Plan:
    path = folder / "plan.yaml"
    task = {"task": str(ROOT / "configs" / "wine_mlp.yaml"), "metric": "test_loss", "seeds": [0]}
    path.write_text(yaml.safe_dump({**task, "arms": arms, **changes}, sort_keys=False))
    return read_plan(path, folder / "out")


def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.05)


def hear_ctrl_c() -> None:
    """What a shell starts in the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_every_class_of_errors_is_tried() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]
    assert {type(error) for error in ERRORS} == set(classes)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error: errors.EAFOError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


def leave_a_mark(folder: Path, name: str) -> None:
    time.sleep(0.2)
    (folder / name).touch()


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Unsendable:
    def __reduce__(self) -> Any:
        raise TypeError("cannot leave its process")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_takes_no_other_cell_with_it(tmp_path: Path) -> None:
    names = [f"cell {number}" for number in range(6)]
    tasks: list[Any] = [(name, die if name == "cell 1" else leave_a_mark, (tmp_path, name)) for name in names]
    tasks.insert(3, ("unsendable", leave_a_mark, (tmp_path, Unsendable())))
    ended: list[str] = []
    failures = _in_processes(tasks, ended.append, jobs=2)
    assert sorted(ended) == sorted(task[0] for task in tasks)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name for name in names if name != "cell 1"]
    assert {failure.what: failure.why for failure in failures} == {
        "cell 1": "its process was killed; run the same command again",
        "unsendable": "TypeError: cannot leave its process",
    }


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_ctrl_c_ends_what_runs_and_what_waits(tmp_path: Path) -> None:
    activations = ("relu", "gelu", "silu", "elu")
    arms = {name: {"activation": name} for name in activations}
    plan = plan_of(tmp_path, arms, settings={"trainer.max_epochs": 100_000})
    command = [sys.executable, "-m", "eafo_dynamic", "compare", "--jobs", "2", "--config", str(tmp_path / "plan.yaml")]
    command += ["--out", str(plan.directory)]
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "start_new_session": True, "cwd": tmp_path}
    with subprocess.Popen(command, preexec_fn=hear_ctrl_c, **options) as child:
        try:
            until(lambda: len(list(plan.directory.rglob("config.yaml"))) == 2)
            os.killpg(child.pid, signal.SIGINT)
            said = child.communicate(timeout=60)[1]
            assert child.returncode == 130
            assert b"Traceback" not in said
            with pytest.raises(ProcessLookupError):  # no process of the group is left
                until(lambda: os.killpg(child.pid, 0), 20)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    assert len(list(plan.directory.rglob("config.yaml"))) == 2, "those that waited have not begun"
