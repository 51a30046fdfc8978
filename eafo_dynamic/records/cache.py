"""A columnar twin of a long log, so that only the first reading of it has to parse JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zlib
from array import array
from pathlib import Path
from typing import Any, BinaryIO

from eafo_dynamic.records.columns import Codes, Numbers
from eafo_dynamic.records.schema import COLUMNS
from eafo_dynamic.records.table import Table

__all__ = ["CACHE", "WORTHWHILE", "read_cache", "write_cache"]

CACHE = ".corrections.cache"

# About one second of parsing; a log that is read faster needs no second file.
WORTHWHILE = 200_000

_MARK = "eafo-columns-1"
_TAIL = 4096


def read_cache(source: Path) -> tuple[Table, int, int] | None:
    """Return the rows of the twin of a file of corrections.

    Args:
        source: the file of corrections.

    Returns:
        The rows, the bytes and the lines of `source` that they stand for; None if there is no twin, it is
        damaged, or `source` is another file than the one it was made from.
    """
    try:
        with source.with_name(CACHE).open("rb") as file:
            header = json.loads(file.readline())
            if header["mark"] != _MARK or header["tail"] != _tail(source, header["offset"]):
                return None
            rows = header["rows"]
            columns = {entry["name"]: _read_column(entry, rows, file) for entry in header["columns"]}
            if not {"step", "site"} <= columns.keys():
                return None
            return Table(columns, rows), header["offset"], header["line"]
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, EOFError, MemoryError, RecursionError):
        return None


def write_cache(source: Path, table: Table, offset: int, line: int) -> None:
    """Write the twin of a file of corrections; a folder that cannot be written to goes without.

    Args:
        source: the file of corrections.
        table: its rows up to `offset`.
        offset: bytes of `source` that were read.
        line: lines of `source` that were read.
    """
    target = source.with_name(CACHE)
    temporary = target.with_name(f"{CACHE}.{os.getpid()}.tmp")
    header = {
        "mark": _MARK,
        "offset": offset,
        "line": line,
        "tail": _tail(source, offset),
        "rows": len(table),
        "columns": [_entry(name, column) for name, column in table.columns.items()],
    }
    with contextlib.suppress(OSError):
        try:
            with temporary.open("wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                for column in table.columns.values():
                    (column.values if isinstance(column, Numbers) else column.codes).tofile(file)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def _tail(source: Path, offset: int) -> list[Any]:
    """Return what the file has just before `offset`: a log is only ever appended to or replaced."""
    with source.open("rb") as file:
        file.seek(max(0, offset - _TAIL))
        return [zlib.crc32(file.read(min(_TAIL, offset))), sys.byteorder, array("I").itemsize]


def _entry(name: str, column: Numbers | Codes) -> dict[str, Any]:
    return {"name": name, "values": None if isinstance(column, Numbers) else column.seen}


def _read_column(entry: dict[str, Any], rows: int, file: BinaryIO) -> Numbers | Codes:
    if entry["values"] is None:
        numbers = Numbers(COLUMNS[entry["name"]].kind == "int")
        numbers.values.fromfile(file, rows)
        return numbers
    codes = Codes(entry["values"])
    codes.codes.fromfile(file, rows)
    if rows and max(codes.codes) >= len(entry["values"]):
        raise ValueError("a code without a value")
    return codes
