"""Real processes that write logs to one folder: each has a log of its own, and a dead one holds nobody up."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from small_logs import MANIFEST, row, write_run

from eafo_dynamic.errors import LogError
from eafo_dynamic.records import CorrectionLog, LogWriter

# Writes a row, says where, and another row for every line that it reads. "fork" leaves a child behind, as a data
# loader does, that outlives it.
WRITER = """
import os, sys, time, warnings
from eafo_dynamic.records import LogWriter
warnings.simplefilter("ignore")
writer = LogWriter(sys.argv[1], {"sites": []})
step = 0
if "resume" in sys.argv:
    step = 3
    writer.resume(step)
if "fork" in sys.argv:
    begun, begins = os.pipe()
    if os.fork() == 0:
        os.write(begins, b"x")
        os.close(1)
        time.sleep(60)
        os._exit(0)
    os.read(begun, 1)
while sys.stdin.readline():
    step += 1
    writer.write([{"step": step, "site": f"of {os.getpid()}", "eps": 0.0}])
    print(writer.path, flush=True)
"""


class Run:
    """A process that writes a log."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def write(self) -> Path:
        """Writes one row more, and returns the folder that it is in."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return Path(self.process.stdout.readline().strip())

    def kill(self) -> None:
        """Kills the process alone; what it has forked lives on."""
        self.process.kill()
        self.process.wait()


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[Run]:
    run = Run(folder, *arguments)
    try:
        yield run
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.communicate()


def test_two_live_runs_have_a_log_each(tmp_path: Path) -> None:
    with running(tmp_path / "eafo") as first:
        folders = [first.write()]
        with running(tmp_path / "eafo") as second:
            folders += [second.write(), first.write(), second.write()]
        assert folders == [tmp_path / "eafo", tmp_path / "eafo-2"] * 2
        pids = [first.process.pid, second.process.pid]
        with pytest.warns(UserWarning, match=r"another process writes its correction log here; this run's log is in"):
            third = LogWriter(tmp_path / "eafo", MANIFEST)
        assert third.path == tmp_path / "eafo-3", "the second is dead, but its log stays"
    for folder, pid in zip(["eafo", "eafo-2"], pids, strict=True):
        log = CorrectionLog.load(tmp_path / folder)
        assert (log.steps, log.sites) == ([1, 2], [f"of {pid}"])
    with pytest.raises(LogError, match=r"2 correction logs below, name one .*eafo-2"):
        CorrectionLog.load(tmp_path)


@pytest.mark.parametrize("forks", [(), ("fork",)], ids=["alone", "with a worker that outlives it"])
def test_a_killed_run_leaves_its_folder_free(tmp_path: Path, forks: tuple[str, ...]) -> None:
    with running(tmp_path / "eafo", *forks) as first:
        first.write()
        first.kill()
        assert (tmp_path / "eafo/.lock").exists()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = LogWriter(tmp_path / "eafo", {"sites": []})
        assert again.path == tmp_path / "eafo"
        assert again.resume(1) == 0
        assert again.put_aside is None


def test_a_closed_log_leaves_its_folder_free(tmp_path: Path) -> None:
    writer = write_run(tmp_path)
    with running(tmp_path / "eafo") as other:
        assert other.write() == tmp_path / "eafo-2"
    writer.close()
    with running(tmp_path / "eafo") as other:
        assert other.write() == tmp_path / "eafo"
    assert CorrectionLog.load(tmp_path / "eafo/earlier-1").steps == [10, 20, 30, 40, 50]


def test_inside_one_process_the_next_writer_takes_over(tmp_path: Path) -> None:
    first = write_run(tmp_path)
    copies = [copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    second = LogWriter(tmp_path / "eafo", MANIFEST)
    second.resume(50)
    assert {each.path for each in (first, second, *copies)} == {tmp_path / "eafo"}
    del first, copies
    with running(tmp_path / "eafo") as other:
        assert other.write() == tmp_path / "eafo-2", "one writer is left"
    del second
    with running(tmp_path / "eafo") as other:
        assert other.write() == tmp_path / "eafo"


def test_a_resumed_run_whose_folder_is_in_use_takes_its_rows_along(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 6))
    with running(tmp_path / "eafo", "resume") as first:
        assert first.write() == tmp_path / "eafo"
        with pytest.warns(UserWarning, match="another process"):
            second = LogWriter(tmp_path / "eafo", MANIFEST)
        second.resume(2)
        second.write([row(3, "b.0.act")])
        assert CorrectionLog.load(tmp_path / "eafo-2").steps == [1, 2, 3]
        assert CorrectionLog.load(tmp_path / "eafo").steps == [1, 2, 3, 4]


def test_a_resumed_run_never_continues_the_log_of_another(tmp_path: Path) -> None:
    """The folder that it would write to has been used by another run since."""
    mine = LogWriter(tmp_path / "eafo-2", {**MANIFEST, "created": 1.0})
    mine.write([row(step, "mine") for step in (1, 2, 3)])
    other = LogWriter(tmp_path / "eafo", {**MANIFEST, "created": 2.0})
    other.write([row(step, "other") for step in (1, 2, 3)])
    again = LogWriter(tmp_path / "eafo", {**MANIFEST, "created": 3.0})
    assert again.resume(2, source=tmp_path / "eafo-2") == 1
    again.write([row(3, "mine")])
    log = CorrectionLog.load(tmp_path / "eafo")
    assert ([found["site"] for found in log.rows], log.steps) == (["mine"] * 3, [1, 2, 3])
    assert again.put_aside == tmp_path / "eafo/earlier-1"
    assert CorrectionLog.load(again.put_aside).sites == ["other"]
    once_more = LogWriter(tmp_path / "eafo", {**MANIFEST, "created": 4.0})
    once_more.resume(3, source=tmp_path / "eafo-2")
    assert once_more.put_aside is None, "the rows here are of this run"
    assert CorrectionLog.load(tmp_path / "eafo").steps == [1, 2, 3]


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("eafo_dynamic.records.writer.lock_folder", refuse)
    with pytest.warns(UserWarning, match="cannot be locked") as warned:
        writer = write_run(tmp_path)
    assert len(warned) == 1
    assert writer.dropped == 0
    assert len(CorrectionLog.load(tmp_path)) == 10
