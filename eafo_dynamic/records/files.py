"""Find a log on disk, read its manifest and its lines, and say in one line what is wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eafo_dynamic.errors import LogError
from eafo_dynamic.records.schema import CORRECTIONS, FORMAT, MANIFEST, SCHEMA_VERSION

__all__ = ["Lines", "find_log", "read_lines", "read_manifest"]

_DEPTH = 6
_CHUNK = 1 << 22


def find_log(run: Path) -> Path:
    """Return the folder of the one log at or below a folder.

    Args:
        run: a run's folder, its `eafo` folder, or a folder above.

    Returns:
        The folder with `manifest.json`.

    Raises:
        LogError: if there is no such folder, no log in it, or more than one.
    """
    if not run.exists():
        raise LogError(f"{run}: there is no such folder. Give the folder of a run, the one that holds eafo/")
    if not run.is_dir() and run.name in (MANIFEST, CORRECTIONS):
        run = run.parent
    if not run.is_dir():
        raise LogError(f"{run}: this is a file. Give the folder of a run, the one that holds eafo/")
    if _is_log(run):
        return run
    if _is_log(run / "eafo"):
        # Beside it lie those of runs that wrote while another process was writing there.
        logs = [run / "eafo", *filter(_is_log, run.glob("eafo-*"))]
        return _only(logs, run)
    below = list(_logs_below(run))
    if not below:
        raise LogError(f"{run}: no correction log here (no eafo/{MANIFEST} at or below this folder)")
    return _only(below, run)


def _only(logs: Sequence[Path], run: Path) -> Path:
    """Return the log if there is only one."""
    if len(logs) == 1:
        return logs[0]
    newest_first = sorted(logs, key=_changed, reverse=True)
    shown = ", ".join(str(folder) for folder in newest_first[:8])
    if len(logs) > 8:
        shown += f", ... ({len(logs)} in all)"
    raise LogError(f"{run}: {len(logs)} correction logs below, name one (newest first): {shown}")


def _is_log(folder: Path) -> bool:
    if (folder / CORRECTIONS).is_file():
        return True
    return folder.name == "eafo" and (folder / MANIFEST).is_file()


def _logs_below(run: Path) -> Iterator[Path]:
    depth = len(run.parts)
    for found, folders, _ in os.walk(run):
        folder = Path(found)
        if _is_log(folder):
            folders.clear()  # earlier logs put aside lie inside
            yield folder
        elif len(folder.parts) - depth >= _DEPTH:
            folders.clear()
        else:
            folders[:] = [name for name in folders if not name.startswith(".")]


def _changed(folder: Path) -> float:
    return max(file.stat().st_mtime for file in folder.iterdir() if file.is_file())


def read_manifest(file: Path) -> dict[str, Any]:
    """Read a manifest.

    Args:
        file: the manifest.

    Returns:
        Its content.

    Raises:
        LogError: if it is missing, damaged, not of this package or of a newer schema.
    """
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise LogError(f"{file}: missing; the folder is no correction log, or was copied in part") from None
    except OSError as error:
        raise LogError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise LogError(f"{file}: damaged, not JSON ({error})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise LogError(f'{file}: not the manifest of a correction log (no "format": "{FORMAT}")')
    version = found.get("schema_version")
    if not isinstance(version, int):
        raise LogError(f"{file}: damaged, schema_version={version!r} is not a whole number")
    if version > SCHEMA_VERSION:
        raise LogError(
            f"{file}: schema_version={version} is newer than {SCHEMA_VERSION}, "
            "the newest that this version reads. Upgrade eafo-dynamic"
        )
    return found


class Lines:
    """Rows of a JSON-lines file in lists of some thousand, and how far the file was read.

    Args:
        file: the file.
        offset: byte to start at.
        line: number of lines before that byte.
        lists: keys beside `step` and `site` that every row must have, lists.

    Attributes:
        offset: byte after the last row read.
        line: number of lines up to there.
        note: what was passed over, in words; empty if nothing was.
    """

    def __init__(self, file: Path, offset: int, line: int, lists: Sequence[str]) -> None:
        self.file = file
        self.offset = offset
        self.line = line
        self.lists = lists
        self.note = ""

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Yield rows.

        Yields:
            The next rows of the file, at least one.

        Raises:
            LogError: if the file cannot be read, or a line before the last is damaged.
        """
        if self.file.exists() and not self.file.is_file():  # reading a device may never end
            raise LogError(f"{self.file}: cannot be read (not a regular file)")
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.offset)
                rest = b""
                while chunk := stream.read(_CHUNK):
                    whole, newline, rest = (rest + chunk).rpartition(b"\n")
                    if newline:
                        yield from self._rows(whole, len(whole) + 1)
        except OSError as error:
            raise LogError(f"{self.file}: cannot be read ({error.strerror})") from None
        if rest.strip():
            yield from self._last(rest)

    def _rows(self, whole: bytes, size: int) -> Iterator[list[dict[str, Any]]]:
        lines = whole.split(b"\n")
        rows = self._parsed(lines)
        self.offset += size
        self.line += len(lines)
        if rows:
            yield rows

    def _parsed(self, lines: list[bytes]) -> list[dict[str, Any]]:
        filled = [line for line in lines if line.strip()]
        try:
            rows = json.loads(b"[" + b",".join(filled) + b"]")
            # Two objects on one line would parse too, and shift every line number after them.
            if len(rows) == len(filled) and all(self._fits(row) for row in rows):
                return rows
        except (ValueError, RecursionError):
            pass
        return [self._row(line, self.line + number) for number, line in enumerate(lines, 1) if line.strip()]

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise LogError(f"{self.file}: line {number} is damaged: {_shown(line)}") from None
        if not self._fits(row):
            lists = "".join(f", list {name}" for name in self.lists)
            raise LogError(
                f"{self.file}: line {number} is not a row with a whole step, text site{lists}: {_shown(line)}"
            )
        return row

    def _last(self, rest: bytes) -> Iterator[list[dict[str, Any]]]:
        """Yield the row of a last line without its end, if it is whole."""
        try:
            row = json.loads(rest)
        except (ValueError, RecursionError):
            row = None
        if row is not None and self._fits(row):
            self.offset += len(rest)
            yield [row]
        else:
            self.note = f"{self.file}: line {self.line + 1}, the last, is torn and was left out"

    def _fits(self, row: object) -> bool:
        return (
            isinstance(row, dict)
            and isinstance(row.get("step"), int)
            and isinstance(row.get("site"), str)
            and all(isinstance(row.get(name), list) for name in self.lists)
        )


def read_lines(file: Path, offset: int = 0, line: int = 0, lists: Sequence[str] = ()) -> Lines:
    """Read a JSON-lines file that may still be written to.

    Args:
        file: the file.
        offset: byte to start at, the `offset` of an earlier reading.
        line: the `line` of that reading.
        lists: keys beside `step` and `site` that every row must have, lists.

    Returns:
        Rows in lists, to iterate over once.
    """
    return Lines(file, offset, line, lists)


def _shown(line: bytes) -> str:
    text = line[:60].decode("utf-8", "replace")
    if len(line) > 60:
        text += "..."
    return repr(text)
