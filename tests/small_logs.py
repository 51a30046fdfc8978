"""Small logs for the tests of the correction log, and what they check again and again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eafo_dynamic.errors import LogError
from eafo_dynamic.records import LogWriter

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
