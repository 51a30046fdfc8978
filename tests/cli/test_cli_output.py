"""Rows on stdout: golden tables at a fixed width, and formats that programs read back."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys

import pytest

from eafo_dynamic.cli.output import emit, emit_facts, sparkline

ROWS = [
    {"site": "blocks.0.mlp.act", "eps": -0.30851234, "n": 4096, "event": None},
    {"site": "head.act", "eps": 0.0042, "n": 512, "event": "3 samples not finite"},
]

TABLE = """\
two sites
site                  eps     n  event
─────────────────────────────────────────────────────
blocks.0.mlp.act  -0.3085  4096  -
head.act           0.0042   512  3 samples not finite
"""

NARROW = """\
two sites
site                  eps
─────────────────────────
blocks.0.mlp.act  -0.3085
head.act           0.0042
not shown at this width: n,
event; --wide shows all
"""

MARKDOWN = """\
| site | eps | n | event |
| --- | ---: | ---: | --- |
| blocks.0.mlp.act | -0.3085 | 4096 | - |
| head.act | 0.0042 | 512 | 3 samples not finite |
"""


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_table_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    emit(ROWS, title="two sites")
    assert printed(capsys) == TABLE


def test_narrow_table_leaves_optional_columns_out(capsys: pytest.CaptureFixture[str]) -> None:
    emit(ROWS, title="two sites", width=30, optional=["n", "event"], hint="; --wide shows all")
    assert printed(capsys) == NARROW


def test_wide_table_leaves_nothing_out(capsys: pytest.CaptureFixture[str]) -> None:
    emit(ROWS, title="two sites", width=10_000, optional=["n", "event"])
    assert printed(capsys) == TABLE


def test_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    emit(ROWS, fmt="md")
    assert printed(capsys) == MARKDOWN


def test_markdown_keeps_its_cells(capsys: pytest.CaptureFixture[str]) -> None:
    emit([{"a": "x|y\nz"}], fmt="md")
    assert printed(capsys).splitlines()[2] == "| x\\|y z |"


def test_json_comes_back_whole(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"a": 1.23456789012, "b": [1, math.nan], "c": "ü", "d": {"e": math.inf}}, {"a": None}]
    emit(rows, fmt="json")
    assert json.loads(printed(capsys)) == [
        {"a": 1.23456789012, "b": [1, None], "c": "ü", "d": {"e": None}},
        {"a": None, "b": None, "c": None, "d": None},
    ]


def test_csv_comes_back_whole(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"site": 'a "b", c', "eps": 0.1 + 0.2, "event": None}, {"site": "two\nlines", "eps": math.nan}]
    emit(rows, fmt="csv")
    found = list(csv.DictReader(io.StringIO(printed(capsys))))
    assert found == [
        {"site": 'a "b", c', "eps": "0.30000000000000004", "event": ""},
        {"site": "two\nlines", "eps": "", "event": ""},
    ]


@pytest.mark.parametrize("fmt", ["table", "json", "csv", "md"])
def test_no_rows(capsys: pytest.CaptureFixture[str], fmt: str) -> None:
    emit([], columns=["site", "eps"], fmt=fmt)
    out = printed(capsys)
    assert json.loads(out) == [] if fmt == "json" else "site" in out


def test_rich_markup_in_a_cell_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    emit([{"event": "[bold]not markup[/bold] :warning:"}], title="[red]x")
    assert "[bold]not markup[/bold] :warning:" in printed(capsys)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0], ["1.0000", "2.0000", "3.0000"]),
        ([-0.012345, 0.5], ["-0.0123", "0.5000"]),
        ([1234.5678, 1.0], ["1234.6", "1.0"]),
        ([1.5e-9, 2e-8], ["1.5e-09", "2e-08"]),
        ([1.5e9], ["1.5e+09"]),
        ([0.0, 0.0], ["0.0", "0.0"]),
        ([math.nan, math.inf, 1.0], ["-", "inf", "1.0000"]),
    ],
)
def test_numbers_of_a_column_share_their_decimals(
    capsys: pytest.CaptureFixture[str], values: list[float], expected: list[str]
) -> None:
    emit([{"x": value} for value in values])
    assert [line.strip() for line in printed(capsys).splitlines()[2:]] == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([7, 0], "█▁"),
        ([5, 5, 5], "▁▁▁"),
        ([0, None, math.nan, 7], "▁  █"),
        ([], ""),
        ([None], ""),
        ([math.inf, 1.0, 2.0], " ▁█"),
        (list(range(800)), "▁▂▃▄▅▆▇█"),
    ],
)
def test_sparkline(values: list[float | None], expected: str) -> None:
    assert sparkline(values, 8) == expected


def test_output_that_can_only_be_ascii() -> None:
    code = (
        "from eafo_dynamic.cli.output import *; emit([{'a': 1, 'trend': sparkline([1, 2, 3])}], title='t');"
        "emit([{'a': 'ü'}], fmt='json')"
    )
    ascii_only = {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ascii_only)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert "_=#" in text
    assert "\\u00fc" in text


def test_reader_of_the_pipe_goes_away() -> None:
    code = "from eafo_dynamic.cli.output import emit; emit([{'a': n} for n in range(100_000)], fmt='csv')"
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"a\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_facts_keep_their_column(capsys: pytest.CaptureFixture[str]) -> None:
    emit_facts({"run": "a", "largest": "0.1  x\n0.2  y"})
    assert printed(capsys) == "run      a\nlargest  0.1  x\n         0.2  y\n"
    emit_facts({"run": "a"}, fmt="md")
    assert printed(capsys).splitlines()[2] == "| run | a |"
