"""What can happen to a correction log: torn, damaged, foreign, resumed, a full disk, read while it is written."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fabricate import SITES, fabricate_run
from small_logs import MANIFEST, assert_one_line, assert_same_log, jsonl, row, write_run

from eafo_dynamic.errors import LogError
from eafo_dynamic.records import CorrectionLog, LogWriter

# --- torn, damaged, foreign


def test_torn_last_line_is_left_out_with_a_note(tmp_path: Path) -> None:
    write_run(tmp_path)
    whole = jsonl(tmp_path).read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(2, last):  # at least the closing brace is missing
        jsonl(tmp_path).write_bytes(whole[:-cut])
        log = CorrectionLog.load(tmp_path)
        assert len(log) == 9
        assert len(log.notes) == (0 if cut == last else 1)
        assert "line 10, the last, is torn" in log.notes[0]


def test_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    write_run(tmp_path)
    jsonl(tmp_path).write_bytes(jsonl(tmp_path).read_bytes()[:-1])
    log = CorrectionLog.load(tmp_path)
    assert len(log) == 10
    assert log.notes == []


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"step":1,"si',
        b"\x00\x00\x00",
        b"[1, 2]",
        b'{"step":"one","site":"s"}',
        b'{"step":1}',
        b"\xff\xfe",
        b'{"step":1,"site":"s"},{"step":2,"site":"s"}',
        b"[" * 100_000,
    ],
)
def test_damaged_line_in_the_middle_is_named(tmp_path: Path, damaged: bytes) -> None:
    write_run(tmp_path)
    lines = jsonl(tmp_path).read_bytes().splitlines()
    jsonl(tmp_path).write_bytes(b"\n".join([*lines[:6], damaged, *lines[6:], b""]))
    with pytest.raises(LogError) as error:
        CorrectionLog.load(tmp_path)
    assert_one_line(error, "corrections.jsonl", "line 7 ")
    assert len(str(error.value)) < 300


def test_text_where_a_number_belongs_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    with jsonl(tmp_path).open("a") as file:
        file.write('{"step":1,"site":"s","eps":"much"}\n')
    with pytest.raises(LogError) as error:
        CorrectionLog.load(tmp_path)
    assert_one_line(error, "corrections.jsonl", "a number is damaged")


def test_rows_of_two_runs_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    jsonl(tmp_path).write_bytes(jsonl(tmp_path).read_bytes() * 2)
    with pytest.raises(LogError) as error:
        CorrectionLog.load(tmp_path)
    assert_one_line(error, "several runs are mixed", "step 50 is followed by step 10")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "missing"),
        ("", "damaged, not JSON"),
        ('{"format": "eafo-cor', "damaged, not JSON"),
        ("[" * 100_000, "damaged, not JSON"),
        ("[]", "not the manifest of a correction log"),
        ('{"name": "some model"}', "not the manifest of a correction log"),
        ('{"format": "eafo-correction-log"}', "schema_version=None"),
        ('{"format": "eafo-correction-log", "schema_version": 99}', "schema_version=99 is newer"),
    ],
)
def test_manifest_that_cannot_be_used(tmp_path: Path, content: str | None, problem: str) -> None:
    write_run(tmp_path)
    manifest = tmp_path / "eafo" / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(LogError) as error:
        CorrectionLog.load(tmp_path)
    assert_one_line(error, "manifest.json", problem)


def test_folder_without_a_log(tmp_path: Path) -> None:
    with pytest.raises(LogError) as error:
        CorrectionLog.load(tmp_path)
    assert_one_line(error, "no correction log here")
    with pytest.raises(LogError) as error:
        CorrectionLog.load(tmp_path / "nowhere")
    assert_one_line(error, "nowhere: there is no such folder")
    (tmp_path / "file").write_text("text")
    with pytest.raises(LogError) as error:
        CorrectionLog.load(tmp_path / "file")
    assert_one_line(error, "this is a file")


def test_several_logs_below_are_listed_newest_first(tmp_path: Path) -> None:
    for number in range(3):
        write_run(tmp_path / f"version_{number}")
        for file in (tmp_path / f"version_{number}" / "eafo").iterdir():
            os.utime(file, (number, number))
    with pytest.raises(LogError) as error:
        CorrectionLog.load(tmp_path)
    message = str(error.value)
    assert_one_line(error, "3 correction logs below")
    assert message.index("version_2") < message.index("version_1") < message.index("version_0")


def test_manifest_of_another_tool_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "manifest.json").write_text("{}")
    write_run(tmp_path / "run")
    assert len(CorrectionLog.load(tmp_path)) == 10


# --- resuming


def test_resume_equals_a_run_that_was_never_interrupted(tmp_path: Path) -> None:
    fabricate_run(tmp_path / "whole")
    fabricate_run(tmp_path / "resumed")
    eafo = tmp_path / "resumed" / "eafo"
    for name in ("corrections.jsonl", "shapes.jsonl"):
        with (eafo / name).open("ab") as file:
            file.write(b'{"step":300,"site":"torn')
    whole = CorrectionLog.load(tmp_path / "whole")
    writer = LogWriter(eafo, {"sites": whole.manifest["sites"]})
    assert writer.resume(300) == 6 * len(SITES)
    assert CorrectionLog.load(eafo).steps == [50, 100, 150, 200, 250, 300]
    assert CorrectionLog.load(eafo).notes == []
    for step in range(350, 601, 50):
        writer.write(whole.select(steps=(step, step)).rows)
        writer.write_shapes(step, [entry for entry in whole.shapes() if entry["step"] == step])
    assert_same_log(tmp_path / "whole", tmp_path / "resumed")


def test_resume_twice_and_past_the_end_changes_nothing(tmp_path: Path) -> None:
    write_run(tmp_path)
    before = jsonl(tmp_path).read_bytes()
    for step in (50, 1000, 50):
        assert LogWriter(tmp_path / "eafo", MANIFEST).resume(step) == 0
    assert jsonl(tmp_path).read_bytes() == before
    assert CorrectionLog.load(tmp_path).manifest["resumed_at_steps"] == [50, 1000, 50]


def test_resume_keeps_the_day_of_birth(tmp_path: Path) -> None:
    born = write_run(tmp_path).manifest["created"]
    writer = LogWriter(tmp_path / "eafo", {**MANIFEST, "created": born + 60})
    writer.resume(10)
    assert CorrectionLog.load(tmp_path).manifest["created"] == born


def test_resume_into_a_new_folder_takes_the_rows_along(tmp_path: Path) -> None:
    write_run(tmp_path / "version_0")
    writer = LogWriter(tmp_path / "version_1" / "eafo", MANIFEST)
    assert writer.resume(30, source=tmp_path / "version_0" / "eafo") == 4
    writer.write([row(40, "b.0.act")])
    assert CorrectionLog.load(tmp_path / "version_1").steps == [10, 20, 30, 40]
    assert CorrectionLog.load(tmp_path / "version_0").steps == [10, 20, 30, 40, 50]


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, "[1]", '{"created": [[]], "resumed_at_steps": 5}', '{"created": null}'],
)
def test_resume_mends_a_manifest_that_cannot_be_used(tmp_path: Path, content: str) -> None:
    """Training goes on: what the old manifest does not say is said anew."""
    write_run(tmp_path)
    (tmp_path / "eafo" / "manifest.json").write_text(content)
    writer = LogWriter(tmp_path / "eafo", MANIFEST)
    writer.resume(30)
    manifest = CorrectionLog.load(tmp_path).manifest
    assert (manifest["created"], manifest["resumed_at_steps"]) == (writer.manifest["created"], [30])
    assert isinstance(manifest["created"], float)


@pytest.mark.parametrize("damaged", [b'{"step":20,"x', b"[" * 100_000, b'{"step":' + b"9" * 5000 + b',"site":"s"}'])
def test_resume_drops_a_damaged_line_with_a_warning(tmp_path: Path, damaged: bytes) -> None:
    write_run(tmp_path)
    lines = jsonl(tmp_path).read_bytes().splitlines(keepends=True)
    jsonl(tmp_path).write_bytes(b"".join([*lines[:4], damaged + b"\n", *lines[4:]]))
    with pytest.warns(UserWarning, match="1 damaged lines"):
        LogWriter(tmp_path / "eafo", MANIFEST).resume(50)
    assert jsonl(tmp_path).read_bytes() == b"".join(lines)


@pytest.mark.parametrize("name", ["corrections.jsonl", "shapes.jsonl", "manifest.json"])
def test_kill_while_resuming_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fabricate_run(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "killed")
    LogWriter(tmp_path / "plain" / "eafo", {}).resume(300)
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        LogWriter(tmp_path / "killed" / "eafo", {}).resume(300)
    monkeypatch.undo()
    LogWriter(tmp_path / "killed" / "eafo", {}).resume(300)
    assert_same_log(tmp_path / "plain", tmp_path / "killed")
    assert not list((tmp_path / "killed" / "eafo").glob(".*tmp*"))


def test_second_run_in_the_folder_puts_the_first_aside(tmp_path: Path) -> None:
    for number in range(3):
        write_run(tmp_path, range(number, number + 2))
    assert CorrectionLog.load(tmp_path).steps == [2, 3]
    assert CorrectionLog.load(tmp_path / "eafo" / "earlier-1").steps == [0, 1]
    assert CorrectionLog.load(tmp_path / "eafo" / "earlier-2").steps == [1, 2]


# --- a disk that refuses


def refuse(error: int) -> Any:
    def write(descriptor: int, data: bytes) -> int:
        raise OSError(error, os.strerror(error))

    return write


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_full_disk_warns_once_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    writer = write_run(tmp_path)
    monkeypatch.setattr(os, "write", refuse(error))
    with pytest.warns(UserWarning, match="training goes on") as warned:
        for step in (60, 70, 80):
            writer.write([row(step, "b.0.act"), row(step, "b.1.act")])
    assert len(warned) == 1
    assert writer.dropped == 6
    monkeypatch.undo()
    writer.write([row(90, "b.0.act")])
    assert CorrectionLog.load(tmp_path).steps == [10, 20, 30, 40, 50, 90]
    with pytest.warns(UserWarning, match="6 rows of the correction log are missing"):
        writer.close()


def test_half_a_write_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = write_run(tmp_path)
    before = jsonl(tmp_path).read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
    with pytest.warns(UserWarning, match="bytes fit"):
        writer.write([row(60, "b.0.act"), row(60, "b.1.act")])
    assert jsonl(tmp_path).read_bytes() == before


def test_folder_that_cannot_be_made_warns_and_comes_back(tmp_path: Path) -> None:
    (tmp_path / "eafo").write_text("a file is in the way")
    with pytest.warns(UserWarning, match="training goes on") as warned:
        writer = LogWriter(tmp_path / "eafo", MANIFEST)
        writer.write([row(1, "s")])
        writer.resume(1)
    assert len(warned) == 1
    assert writer.dropped == 1
    (tmp_path / "eafo").unlink()
    writer.write([row(2, "s")])
    assert CorrectionLog.load(tmp_path).steps == [2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_really_full_device(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "eafo", MANIFEST)
    jsonl(tmp_path).symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="No space left"):
        writer.write([row(1, "s")])
    assert writer.dropped == 1


# --- reading while training writes

WRITER = """
import sys, time
from eafo_dynamic.records import LogWriter
writer = LogWriter(sys.argv[1], {"sites": []})
for step in range(1, 1_000_000):
    writer.write([{"step": step, "site": f"s{k}", "eps": step * 1e-3, "event": "x" * 500} for k in range(40)])
    if step == 1:
        print("begun", flush=True)
    time.sleep(0.001)  # a reader on a busy machine must be able to follow
"""


def test_reading_beside_a_writer_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "eafo")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        live = CorrectionLog.load(tmp_path)
        sizes = [len(live)]
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            live.refresh()
            sizes.append(len(live))
            assert live.series("s0", "step") == list(range(1, len(live.series("s0", "step")) + 1))
        process.send_signal(signal.SIGKILL)
    live.refresh()
    fresh = CorrectionLog.load(tmp_path)
    assert sizes[-1] > sizes[0], "the reader saw the log grow"
    assert sizes == sorted(sizes)
    assert live.rows == fresh.rows
    assert fresh.steps == list(range(1, len(fresh.steps) + 1))
    last = fresh.steps[-1]
    LogWriter(tmp_path / "eafo", {}).resume(last - 1)
    assert len(CorrectionLog.load(tmp_path)) == 40 * (last - 1), "every kept update is whole"


def test_refresh_after_a_resume_reads_anew(tmp_path: Path) -> None:
    writer = write_run(tmp_path)
    live = CorrectionLog.load(tmp_path)
    assert live.refresh() == 0
    writer.write([row(60, "b.0.act")])
    assert live.refresh() == 1
    again = LogWriter(tmp_path / "eafo", MANIFEST)
    again.resume(20)
    again.write([row(25, "b.0.act")])
    assert live.refresh() == 5
    assert live.rows == CorrectionLog.load(tmp_path).rows


def test_refresh_takes_up_a_line_that_was_torn(tmp_path: Path) -> None:
    write_run(tmp_path)
    with jsonl(tmp_path).open("ab") as file:
        file.write(b'{"step":60,"si')
        file.flush()
        live = CorrectionLog.load(tmp_path)
        assert live.notes
        file.write(b'te":"b.0.act"}\n')
    assert live.refresh() == 1
    assert live.notes == []
