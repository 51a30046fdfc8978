"""The correction log on disk: what was written is read back, and what is asked for is found."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fabricate import SITES, fabricate_run
from hypothesis import given, settings
from hypothesis import strategies as st
from small_logs import MANIFEST, assert_one_line, oracle_rows, row, write_run

from eafo_dynamic.errors import LogError
from eafo_dynamic.records import COLUMNS, SCHEMA_VERSION, CorrectionLog, LogWriter
from eafo_dynamic.records.names import shortened

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
    rows.sort(key=lambda entry: entry["step"])
    writer = LogWriter(run / "eafo", {})
    for start in range(0, len(rows), 3):
        writer.write(rows[start : start + 3])
    log = CorrectionLog.load(run)
    names = {name for entry in rows for name in entry}
    expected = [{name: entry.get(name) for name in names} for entry in rows]
    assert log.rows == expected
    assert [type(entry.get("later")) for entry in log.rows] == [type(entry.get("later")) for entry in rows]
    assert log.last() == [next(entry for entry in reversed(expected) if entry["site"] == site) for site in log.sites]


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


def test_arrow_has_the_same_rows(fabricated: CorrectionLog) -> None:
    pytest.importorskip("pyarrow")
    assert fabricated.to_arrow().to_pylist() == fabricated.rows


def test_arrow_missing_is_said(fabricated: CorrectionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LogError) as error:
        fabricated.to_arrow()
    assert_one_line(error, "pip install pyarrow")


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
    assert {entry["site"] for entry in fabricated.select(site="mlp").shapes()} == {name for name, _ in SITES[:4]}
    assert len(fabricated.shapes()) == 5 * len(SITES)


def test_names_are_shortened_to_what_select_understands() -> None:
    names = [f"vit.encoder.layer.{k}.intermediate.intermediate_act_fn" for k in (0, 11)]
    assert shortened(names, 24) == ["v.e.l.0.i.interme…act_fn", "v.e.l.11.i.interm…act_fn"]
    assert shortened(["blocks.0.mlp.act"], 24) == ["blocks.0.mlp.act"]
    assert shortened(["features.conv.relu"], 16) == ["f.conv.relu"]


def test_names_that_would_become_equal_stay_whole() -> None:
    names = ["encoder.activation_function", "embedder.activation_function"]
    assert shortened(names, 22) == names
