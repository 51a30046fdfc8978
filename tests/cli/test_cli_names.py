"""Names of sites may hold any character, and none of them reaches the terminal as a command to it."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_logs import row
from torch import nn

from eafo_dynamic import find_sites
from eafo_dynamic.cli import main
from eafo_dynamic.errors import LogError, printable
from eafo_dynamic.records import CorrectionLog, LogWriter
from eafo_dynamic.records.notebook import History, SiteList

NAME = "block\x1b[31m\x07\x9b2J[bold].act"
SHOWN = r"block\x1b[31m\x07\x9b2J[bold].act"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    writer = LogWriter(tmp_path / "eafo", {"sites": [{"name": NAME, "base": "gelu\x1b"}]})
    for step in (1, 2):
        writer.write([row(step, NAME, eps=0.5, entropy=0.9, policy="learned\x1b[0m", event="held\x1b]0;title\x07")])
    yield tmp_path


def assert_harmless(text: str) -> None:
    assert not set(text) & {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))}


def test_printable_leaves_what_a_terminal_only_shows() -> None:
    assert printable("ä 漢字 …\n\t") == "ä 漢字 …\n\t"
    assert printable(NAME) == SHOWN


@pytest.mark.parametrize("form", ["table", "md"])
@pytest.mark.parametrize("command", ["summary", "layers", "events", "show", "compare"])
def test_tables_show_codes(run: Path, capsys: pytest.CaptureFixture[str], command: str, form: str) -> None:
    more = ["block*"] if command == "show" else []
    by_site = ["--by", "site"] if command == "compare" else []
    assert main(["log", command, str(run), *more, *by_site, "--format", form, "--wide"]) == 0
    out = capsys.readouterr().out
    assert_harmless(out)
    assert SHOWN in out


def test_files_keep_the_names_and_terminals_do_not_get_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("json", "csv"):
        assert main(["log", "layers", str(run), "--format", form]) == 0
        out = capsys.readouterr().out
        rows = json.loads(out) if form == "json" else list(csv.DictReader(io.StringIO(out)))
        assert rows[0]["site"] == NAME


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("form", ["json", "csv"])
def test_a_terminal_gets_codes_in_every_format(run: Path, form: str) -> None:
    ours, theirs = os.openpty()
    code = "import sys; from eafo_dynamic.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "log", "layers", str(run), "--format", form]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        data = b""
        while True:
            try:
                data += os.read(ours, 65536)
            except OSError:
                break
    os.close(ours)
    assert process.returncode == 0
    assert_harmless(data.decode().replace("\r\n", "\n"))


def test_errors_show_codes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["log", "show", str(run), "nowhere\x1b[2J"]) == 2
    assert_harmless(capsys.readouterr().err)
    with pytest.raises(LogError) as error:
        CorrectionLog.load(run).select(site="nowhere")
    assert_harmless(str(error.value))
    assert SHOWN in str(error.value)


def test_notebook_views_and_the_table_of_sites_show_codes() -> None:
    from rich.console import Console

    model = nn.Sequential()
    model.add_module("b\x1b[31m[red]x", nn.GELU())
    console = Console(width=200, file=io.StringIO())
    console.print(History([{"site": NAME}]), SiteList([*find_sites(model).sites], ["eps"]), find_sites(model))
    out = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert_harmless(out)
    assert SHOWN in out
    assert out.count(r"b\x1b[31m[red]x") == 2
