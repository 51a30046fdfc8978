"""The correction log on disk: what was written is read back, whatever happened in between."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fabricate import SITES, fabricate_run
from hypothesis import given, settings
from hypothesis import strategies as st

from eafo_dynamic.errors import LogError
from eafo_dynamic.records import COLUMNS, SCHEMA_VERSION, CorrectionLog, LogWriter, cache
from eafo_dynamic.records.names import shortened
from eafo_dynamic.records.summary import (
    compare_runs,
    compare_sites,
    drift_changes,
    entropy_changes,
    layer_rows,
    run_labels,
    summarise,
)

MANIFEST = {"sites": [{"name": "b.1.act", "base": "gelu"}, {"name": "b.0.act", "base": "relu"}]}


def row(step: int, site: str, **more: Any) -> dict[str, Any]:
    return {"step": step, "site": site, **more}


def write_run(run: Path, steps: range = range(10, 60, 10), **more: Any) -> LogWriter:
    writer = LogWriter(run / "eafo", MANIFEST)
    for step in steps:
        writer.write([row(step, "b.0.act", eps=step / 1000, **more), row(step, "b.1.act", eps=0.5, **more)])
    return writer


def jsonl(run: Path) -> Path:
    return run / "eafo" / "corrections.jsonl"


def oracle_rows(run: Path) -> list[dict[str, Any]]:
    """Returns the rows read by nothing but json, line by line."""
    return [json.loads(line) for line in jsonl(run).read_text(encoding="utf-8").splitlines()]


def assert_same_log(left: Path, right: Path) -> None:
    for name in ("corrections.jsonl", "shapes.jsonl"):
        assert (left / "eafo" / name).read_bytes() == (right / "eafo" / name).read_bytes(), name


def assert_one_line(error: pytest.ExceptionInfo[LogError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# --- writing and reading back


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    write_run(tmp_path)
    log = CorrectionLog.load(tmp_path)
    assert log.rows == oracle_rows(tmp_path)
    assert log.steps == [10, 20, 30, 40, 50]
    assert log.sites == ["b.1.act", "b.0.act"], "the manifest's order, not that of the rows"
    assert log.notes == []
    assert len(log) == 10


@pytest.mark.parametrize("folder", ["run", "run/eafo", "above", "run/eafo/corrections.jsonl"])
def test_log_is_found_from_folder(tmp_path: Path, folder: str) -> None:
    run = tmp_path / "above" / "lightning_logs" / "version_0" / "run"
    write_run(run)
    given = tmp_path / "above" if folder == "above" else run.parent / folder
    assert CorrectionLog.load(given).path.samefile(run / "eafo")
    assert CorrectionLog.load(str(given)).name == "run"


@pytest.mark.parametrize("name", ["a run with spaces", "läufe-训练-🧪", "a'quote\"and$dollar"])
def test_paths_with_spaces_and_unicode(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / name, event="ε ≥ 0,5; Grenze\u2028neue Zeile")
    log = CorrectionLog.load(tmp_path / name)
    assert log.events()[0]["event"] == "ε ≥ 0,5; Grenze\u2028neue Zeile"
    assert len(log) == 10


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(0.25), 0.25),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (np.float32(0.125), 0.125),
        (np.int64(7), 7),
        (math.nan, None),
        (torch.tensor(math.inf), None),
        (-math.inf, None),
        (None, None),
        (1e-300, 1e-300),
    ],
)
def test_number_is_written_plainly(tmp_path: Path, value: object, expected: object) -> None:
    LogWriter(tmp_path / "eafo", {}).write([row(1, "s", eps=value)])
    assert oracle_rows(tmp_path)[0]["eps"] == expected
    assert CorrectionLog.load(tmp_path).rows[0]["eps"] == expected


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=200, deadline=None)
def test_every_float32_survives_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    run = tmp_path_factory.mktemp("run")
    LogWriter(run / "eafo", {}).write([row(1, "s", eps=value)])
    read = CorrectionLog.load(run).rows[0]["eps"]
    assert np.float32(read).tobytes() == np.float32(value).tobytes()


exact = st.integers(-100, 100).map(lambda part: part / 64)
other = st.booleans() | st.integers(-5, 5) | st.text()


@given(
    st.lists(
        st.fixed_dictionaries(
            {"step": st.integers(0, 10**9), "site": st.text(min_size=1)},
            optional={
                "policy": st.none() | st.text(),
                "eps": st.none() | exact,
                "later": st.none() | exact | other,
            },
        ),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=50, deadline=None)
def test_any_rows_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    run = tmp_path_factory.mktemp("run")
    writer = LogWriter(run / "eafo", {})
    for start in range(0, len(rows), 3):
        writer.write(rows[start : start + 3])
    log = CorrectionLog.load(run)
    names = {name for entry in rows for name in entry}
    expected = [{name: entry.get(name) for name in names} for entry in rows]
    assert log.rows == expected
    assert [type(entry.get("later")) for entry in log.rows] == [type(entry.get("later")) for entry in rows]
    assert log.last() == [
        next(entry for entry in reversed(expected) if entry["site"] == site) for site in log.sites
    ]


def test_unknown_columns_are_kept_after_the_known(tmp_path: Path) -> None:
    writer = write_run(tmp_path)
    writer.write([row(60, "b.0.act", novel={"a": [1, 2]}, eps=0.1)])
    log = CorrectionLog.load(tmp_path)
    assert log.columns == ["step", "site", "eps", "novel"]
    assert log.rows[-1]["novel"] == {"a": [1, 2]}
    assert log.rows[0]["novel"] is None
    assert log.series("b.0.act", "never logged") == [None] * 6


def test_one_update_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(data) or write(fd, data))
    write_run(tmp_path, range(10, 20, 10))
    assert len(calls) == 1
    assert calls[0].count(b"\n") == 2


def test_manifest_says_what_it_is(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "eafo", {**MANIFEST, "options": {"max_eps": 0.5}})
    found = json.loads((tmp_path / "eafo" / "manifest.json").read_text())
    assert found == writer.manifest == CorrectionLog.load(tmp_path).manifest
    assert found["schema_version"] == SCHEMA_VERSION
    assert found["options"] == {"max_eps": 0.5}
    assert CorrectionLog.load(tmp_path).rows == []
    assert CorrectionLog.load(tmp_path).steps == []


def test_writer_is_copied_and_pickled_with_its_owner(tmp_path: Path) -> None:
    writer = write_run(tmp_path)
    for twin in (copy.deepcopy(writer), pickle.loads(pickle.dumps(writer))):
        twin.write([row(60, "b.0.act")])
    assert len(CorrectionLog.load(tmp_path)) == 12


def test_reader_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "pandas", "rich")
    code = f"import sys, eafo_dynamic.records; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_column_is_documented() -> None:
    assert {name for name, _ in [*COLUMNS.items()]} >= {"step", "epoch", "site", "eps", "entropy", "event"}
    for name, column in COLUMNS.items():
        assert name == column.name
        assert column.meaning
        assert "\n" not in column.meaning
        assert bool(column.unit) == (column.kind != "text"), name


# --- selecting


@pytest.fixture(scope="module")
def fabricated(tmp_path_factory: pytest.TempPathFactory) -> CorrectionLog:
    return CorrectionLog.load(fabricate_run(tmp_path_factory.mktemp("runs") / "run"))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("head.act", ["head.act"]),
        ("blocks.1", ["blocks.1.mlp.act"]),
        ("mlp", [name for name, _ in SITES[:4]]),
        ("act", [name for name, _ in SITES]),
        ("blocks.[02].*", ["blocks.0.mlp.act", "blocks.2.mlp.act"]),
        (r"blocks\.[01]\..*", ["blocks.0.mlp.act", "blocks.1.mlp.act"]),
        ("b.3.m.act", ["blocks.3.mlp.act"]),
        ("blo…act", [name for name, _ in SITES[:4]]),
        (["head", "blocks.0"], ["blocks.0.mlp.act", "head.act"]),
    ],
)
def test_pattern_selects_sites(fabricated: CorrectionLog, pattern: Any, expected: list[str]) -> None:
    part = fabricated.select(site=pattern)
    assert part.sites == expected
    assert part.rows == [entry for entry in fabricated.rows if entry["site"] in expected]


def test_unknown_site_names_the_nearest(fabricated: CorrectionLog) -> None:
    with pytest.raises(LogError) as error:
        fabricated.select(site="blocks.2.mpl.act")
    assert_one_line(error, "site='blocks.2.mpl.act'", "Nearest: blocks.2.mlp.act")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [((100, 200), [100, 150, 200]), ((550, None), [550, 600]), ((None, 50), [50]), ((601, None), [])],
)
def test_steps_select_rows(fabricated: CorrectionLog, steps: Any, expected: list[int]) -> None:
    part = fabricated.select(steps=steps)
    assert part.steps == expected
    assert len(part) == len(expected) * len(SITES)


def test_pandas_in_one_line(fabricated: CorrectionLog) -> None:
    pandas = pytest.importorskip("pandas")
    frame = fabricated.to_pandas()
    assert list(frame.columns) == fabricated.columns
    assert frame["step"].dtype == np.int64
    assert frame["eps"].dtype == np.float64
    oracle = pandas.read_json(fabricated.path / "corrections.jsonl", lines=True)
    pandas.testing.assert_frame_equal(frame[oracle.columns], oracle, check_dtype=False)


def test_pandas_missing_is_said(fabricated: CorrectionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(LogError) as error:
        fabricated.to_pandas()
    assert_one_line(error, "pip install pandas")


def test_missing_whole_number_becomes_nan_in_pandas(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    LogWriter(tmp_path / "eafo", {}).write([row(1, "s", n=4096), row(2, "s", n=None)])
    log = CorrectionLog.load(tmp_path)
    assert [entry["n"] for entry in log.rows] == [4096, None]
    assert log.to_pandas()["n"].isna().tolist() == [False, True]


def test_shapes_come_back_for_the_selected_sites(fabricated: CorrectionLog) -> None:
    snapshots = fabricated.shapes("head.act")
    assert [entry["step"] for entry in snapshots] == [50, 100, 200, 400, 600]
    assert all(len(entry["z"]) == len(entry["function"]) == 65 for entry in snapshots)
    assert {entry["site"] for entry in fabricated.select(site="mlp").shapes()} == {
        name for name, _ in SITES[:4]
    }
    assert len(fabricated.shapes()) == 5 * len(SITES)


def test_names_are_shortened_to_what_select_understands() -> None:
    names = [f"vit.encoder.layer.{k}.intermediate.intermediate_act_fn" for k in (0, 11)]
    assert shortened(names, 24) == ["v.e.l.0.i.interme…act_fn", "v.e.l.11.i.interm…act_fn"]
    assert shortened(["blocks.0.mlp.act"], 24) == ["blocks.0.mlp.act"]
    assert shortened(["features.conv.relu"], 16) == ["f.conv.relu"]


def test_names_that_would_become_equal_stay_whole() -> None:
    names = ["encoder.activation_function", "embedder.activation_function"]
    assert shortened(names, 22) == names


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


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "missing"),
        ("", "damaged, not JSON"),
        ('{"format": "eafo-cor', "damaged, not JSON"),
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


def test_resume_drops_a_damaged_line_with_a_warning(tmp_path: Path) -> None:
    write_run(tmp_path)
    lines = jsonl(tmp_path).read_bytes().splitlines(keepends=True)
    jsonl(tmp_path).write_bytes(b"".join([*lines[:4], b'{"step":20,"x\n', *lines[4:]]))
    with pytest.warns(UserWarning, match="1 damaged lines"):
        LogWriter(tmp_path / "eafo", MANIFEST).resume(50)
    assert jsonl(tmp_path).read_bytes() == b"".join(lines)


@pytest.mark.parametrize("name", ["corrections.jsonl", "shapes.jsonl", "manifest.json"])
def test_kill_while_resuming_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
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
def test_full_disk_warns_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
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
import sys
from eafo_dynamic.records import LogWriter
writer = LogWriter(sys.argv[1], {"sites": []})
for step in range(1, 1_000_000):
    writer.write([{"step": step, "site": f"s{k}", "eps": step * 1e-3, "event": "x" * 500} for k in range(40)])
    if step == 1:
        print("begun", flush=True)
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


# --- the columnar twin of long logs


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eafo_dynamic.records.reader.WORTHWHILE", 10)


def test_short_log_has_no_twin(tmp_path: Path) -> None:
    fabricate_run(tmp_path)
    CorrectionLog.load(tmp_path)
    assert not (tmp_path / "eafo" / cache.CACHE).exists()


@pytest.mark.usefixtures("small_cache")
def test_twin_gives_the_same_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fabricate_run(tmp_path)
    first = CorrectionLog.load(tmp_path)
    parsed: list[int] = []
    monkeypatch.setattr("eafo_dynamic.records.table.Table.extend", lambda *_: parsed.append(1))
    second = CorrectionLog.load(tmp_path)
    assert not parsed, "nothing had to be parsed"
    assert (
        second.rows
        == first.rows
        == [{name: entry.get(name) for name in first.columns} for entry in oracle_rows(tmp_path)]
    )


@pytest.mark.usefixtures("small_cache")
def test_twin_and_the_rows_since(tmp_path: Path) -> None:
    writer = write_run(tmp_path)
    CorrectionLog.load(tmp_path)
    writer.write([row(60, "new.site", eps=0.25, novel="text")])
    assert CorrectionLog.load(tmp_path).rows == [
        {"step": 0, "site": "", "eps": None, "novel": None} | entry for entry in oracle_rows(tmp_path)
    ]


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("keep", [0, 1, 10, 200, -1])
def test_damaged_twin_is_passed_over(tmp_path: Path, keep: int) -> None:
    write_run(tmp_path)
    CorrectionLog.load(tmp_path)
    twin = tmp_path / "eafo" / cache.CACHE
    twin.write_bytes(twin.read_bytes()[:keep])
    assert CorrectionLog.load(tmp_path).rows == oracle_rows(tmp_path)


@pytest.mark.usefixtures("small_cache")
def test_twin_of_another_file_is_passed_over(tmp_path: Path) -> None:
    write_run(tmp_path)
    CorrectionLog.load(tmp_path)
    twin = (tmp_path / "eafo" / cache.CACHE).read_bytes()
    LogWriter(tmp_path / "eafo", MANIFEST).resume(20)
    assert not (tmp_path / "eafo" / cache.CACHE).exists()
    (tmp_path / "eafo" / cache.CACHE).write_bytes(twin)
    assert CorrectionLog.load(tmp_path).steps == [10, 20]


# --- summaries


def test_summary_against_plain_arithmetic(fabricated: CorrectionLog) -> None:
    rows = oracle_rows(fabricated.path.parent)
    last = [entry for entry in rows if entry["step"] == 600]
    first = [entry for entry in rows if entry["step"] == 50]
    facts = summarise(fabricated)
    assert facts["steps"] == [50, 600]
    assert facts["updates"] == 12
    assert facts["policies"] == {"entropy": 5}
    assert facts["mean_eps"] == pytest.approx(sum(entry["eps"] for entry in last) / 5)
    assert facts["entropy_first"] == pytest.approx(sum(entry["entropy"] for entry in first) / 5)
    largest = max(last, key=lambda entry: abs(entry["eps"]))
    assert facts["largest_eps"][0] == {"site": largest["site"], "value": largest["eps"]}
    lowest = min(last, key=lambda entry: entry["entropy"])
    assert facts["lowest_entropy"][0]["site"] == lowest["site"]
    assert facts["events"] == 2
    assert facts["event_kinds"] == {"eps held at max_eps": 1, "3 samples not finite": 1}


def test_layer_row_has_first_last_and_trend(fabricated: CorrectionLog) -> None:
    rows = {entry["site"]: entry for entry in layer_rows(fabricated)}
    history = [entry for entry in fabricated.rows if entry["site"] == "blocks.2.mlp.act"]
    found = rows["blocks.2.mlp.act"]
    assert found["entropy_trend"] == [entry["entropy"] for entry in history]
    assert found["entropy_change"] == pytest.approx(history[-1]["entropy"] - history[0]["entropy"])
    assert (found["event"], found["event_step"]) == ("eps held at max_eps", 200)
    assert (found["base"], found["updates"], found["eps"]) == ("gelu", 12, history[-1]["eps"])
    assert rows["blocks.0.mlp.act"]["event"] is None


def test_layer_row_without_any_entropy(tmp_path: Path) -> None:
    write_run(tmp_path, entropy=math.nan)
    for found in layer_rows(CorrectionLog.load(tmp_path)):
        assert found["entropy_first"] is found["entropy"] is found["entropy_change"] is None
    assert summarise(CorrectionLog.load(tmp_path))["entropy_last"] is None


@pytest.mark.parametrize("policy", ["entropy", "learned"])
def test_prediction_uses_eps_as_it_was_when_measured(tmp_path: Path, policy: str) -> None:
    writer = LogWriter(tmp_path / "eafo", {})
    measured_at = [0.0, 0.1, 0.3]
    moves = [0.1, 0.2, 0.05]
    for step, (at, move) in enumerate(zip(measured_at, moves, strict=True)):
        eps, delta = (at + move, move) if policy == "entropy" else (at, 0.9)
        entry = row(
            step, "s", eps=eps, delta_eps=delta, d_entropy_d_eps=2.0, entropy=1 + 2 * at, policy=policy
        )
        writer.write([entry])
    pairs = drift_changes(CorrectionLog.load(tmp_path), "s")
    assert pairs == [pytest.approx((0.2, 0.2)), pytest.approx((0.4, 0.4))]


def test_changes_at_an_update_are_of_the_same_samples(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "eafo", {})
    for step, (before, predicted, after) in enumerate(
        [(1.0, 0.75, 0.875), (1.0, 1.0, 1.0), (1.0, None, 2.0)]
    ):
        writer.write([row(step, "s", entropy=before, entropy_predicted=predicted, entropy_after=after)])
    which, changes = entropy_changes(CorrectionLog.load(tmp_path))
    assert "same samples" in which
    assert changes == {"s": [(-0.25, -0.125)]}


def test_changes_between_updates_where_updates_change_nothing(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "eafo", {})
    for step, eps in enumerate([0.0, 0.5]):
        same = dict.fromkeys(["entropy", "entropy_predicted", "entropy_after"], 1.0 - eps)
        writer.write([row(step, "s", eps=eps, delta_eps=0.5, d_entropy_d_eps=-2.0, policy="learned", **same)])
    which, changes = entropy_changes(CorrectionLog.load(tmp_path))
    assert "between updates" in which
    assert changes == {"s": [(-1.0, -0.5)]}


def test_name_of_a_numbered_version_has_its_folder(tmp_path: Path) -> None:
    write_run(tmp_path / "digits" / "version_0")
    assert CorrectionLog.load(tmp_path).name == "digits/version_0"


def test_runs_are_told_apart_by_the_ends_of_their_paths(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a/version_0", "b/version_0", "b/version_1")]
    for number, run in enumerate(runs):
        write_run(run, entropy=float(number))
    logs = [CorrectionLog.load(run) for run in runs]
    assert run_labels(logs) == ["a/version_0", "b/version_0", "b/version_1"]
    assert run_labels(logs[1:]) == ["version_0", "version_1"]
    assert [entry["entropy_last"] for entry in compare_runs(logs)] == [0.0, 1.0, 2.0]
    by_site = compare_sites(logs[1:], "entropy")
    assert by_site[0] == {"site": "b.1.act", "version_0": 1.0, "version_1": 2.0, "spread": 1.0}
