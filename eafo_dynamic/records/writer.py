"""Append to a correction log so that neither a kill nor a full disk can damage what was written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eafo_dynamic.records.lock import FolderLock, lock_folder
from eafo_dynamic.records.schema import CORRECTIONS, FIT_END, FORMAT, MANIFEST, SCHEMA_VERSION, SHAPES

__all__ = ["LogWriter"]

Row = Mapping[str, object]

# Nine significant digits give every float32 back exactly and halve the file.
_ROW_DIGITS = 9
# Of float32 amplitudes of about 1, and of their mean over channels.
_ROUNDING = 1e-6
# A curve is drawn, never computed with.
_SHAPE_DIGITS = 6

# A whole line of this writer, its step first: parsing a gigabyte of JSON on resume would take a minute.
_OWN_LINE = re.compile(rb'\{"step":(\d{1,18}),[^\0]*\}\n\Z')
# In a line of the end of a fit; inside a text, such as a site's name, JSON puts a backslash before every quote.
_END_MARK = f'"{FIT_END}":"'.encode()


class LogWriter:
    """Writes one run's correction log: `manifest.json`, `corrections.jsonl` and `shapes.jsonl`.

    All rows of one update reach the file in one `os.write` on a descriptor opened with `O_APPEND`, and a
    write that fails half-way is cut off again. So a killed process leaves whole updates, at worst followed
    by one torn line, which the reader recognises. Rows are not synced one by one: they outlive the
    process, the last ones perhaps not a loss of power.

    Logging never stops the training: the first `OSError` (full disk, read-only folder) warns, later ones
    only add to `dropped`.

    Two runs are never mixed, and none is lost:

    - The folder's earlier log, if there is one, is continued by `resume`. Without that call the first write
      moves it to `earlier-1`, `earlier-2`, ... inside the folder.
    - While another process writes to the folder, this log goes to a folder of its own beside it, `eafo-2`,
      `eafo-3`, ..., with a warning. The lock ends with `close` or with the process.

    Args:
        dirpath: folder of the log, `<run>/eafo` by custom; made if missing.
        manifest: what to say about the run, among it `sites`, a list of mappings with `name` and `base`.
            `format`, `schema_version` and `created` (seconds since 1970) are added.

    Attributes:
        path: folder of the log.
        manifest: the manifest as written.
        dropped: rows that could not be written.
        put_aside: where the folder's earlier log was moved; None if there was none.
    """

    def __init__(self, dirpath: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
        self.path = Path(dirpath)
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "created": round(time.time(), 3),
            **manifest,
        }
        self.dropped = 0
        self.put_aside: Path | None = None
        self._wanted = self.path
        self._lock: FolderLock | None = None
        self._warned = False
        self._begun = False
        self._restored: tuple[int, Path] | None = None
        self._last_steps: dict[str, int] = {}  # of the last line of each file
        self._claim()
        if not _has_rows(self.path):
            self._begin()

    def __repr__(self) -> str:
        return f"LogWriter({str(self.path)!r}, dropped={self.dropped})"

    def write(self, rows: Sequence[Row]) -> None:
        """Append all rows of one update.

        Args:
            rows: one mapping per site with at least `step` and `site`; numbers may be Python's, NumPy's or
                0-dim tensors. NaN and infinity are written as null.
        """
        self._append(CORRECTIONS, rows, _ROW_DIGITS)

    def write_shapes(self, step: int, rows: Sequence[Row]) -> None:
        """Append a snapshot of the sites' functions.

        Args:
            step: optimiser steps taken when the snapshot was made.
            rows: one mapping per site: `site`, `z` (grid of pre-activations), `base` and `function` (values
                on the grid), further keys as wanted, such as `eps`, `mu`, `sigma`, `u` and `pdf` (density
                in standardised units), `edges` and `counts` (histogram of the batch, in pre-activations).
        """
        self._append(SHAPES, [{"step": step, **row} for row in rows], _SHAPE_DIGITS)

    def write_end(self, step: int, how: str, rows: Sequence[Row], shapes: Sequence[Row]) -> None:
        """Append the state in which a fit leaves the model, so that the log ends with it.

        Nothing is added to a file that ends with this step already, because the last update came after the
        last step, unless an amplitude has changed since, as weight averaging does at the end. `resume` drops
        what this method has added, so that a resumed run's log is that of a run which was never interrupted.

        Args:
            step: optimiser steps taken.
            how: how the fit ended: `completed`, `interrupted` or `failed`.
            rows: as for `write`, with `delta_eps` and `delta_lift` since the last update; `fit_end` is added.
            shapes: as for `write_shapes`; `fit_end` is added.
        """
        changed = any(_has_moved(row) for row in rows)
        if changed or self._last_steps.get(CORRECTIONS) != step:
            self.write([{**row, FIT_END: how} for row in rows])
        if changed or self._last_steps.get(SHAPES) != step:
            self.write_shapes(step, [{**shape, FIT_END: how} for shape in shapes])

    def resume(self, step: int, source: str | os.PathLike[str] | None = None) -> int:
        """Continue the log of an interrupted run after its checkpoint of `step` was restored.

        Rows and snapshots past `step`, those of the end of a fit, a torn last line and damaged lines are
        dropped. Each file is replaced atomically, so that a kill in between leaves the old or the new one,
        and a second call gives the same.

        Args:
            step: the restored global step; rows of this very step are kept.
            source: folder of the interrupted run's log where this writer's folder is another one: its rows
                are copied first. If this folder holds the log of yet another run, that one is put aside.
                Ignored if `source` has no rows, or if this folder's rows are of the same run.

        Returns:
            The number of rows of corrections dropped.
        """
        self._restored = (step, self._origin(source))
        return self._begin()

    def close(self) -> None:
        """Say how many rows are missing, if any, and let other processes write to the folder."""
        self._lock = None
        if self.dropped:
            warnings.warn(f"{self.path}: {self.dropped} rows of the correction log are missing", stacklevel=2)
            self.dropped = 0

    def _claim(self) -> None:
        """Lock the folder, or the first one beside it that nobody uses."""
        if self._lock is not None:
            return
        folder = self.path
        number = 1
        try:
            self._lock = _locked(folder)
            while self._lock is None:
                number += 1
                folder = self._wanted.with_name(f"{self._wanted.name}-{number}")
                if not _has_rows(folder):
                    self._lock = _locked(folder)
        except OSError:
            return  # `_begin` says what is wrong with the folder
        if folder != self.path:
            warnings.warn(
                f"{self.path}: another process writes its correction log here; this run's log is in {folder}",
                stacklevel=4,
            )
            self.path = folder
            self._begun = False

    def _origin(self, source: str | os.PathLike[str] | None) -> Path:
        """Return the folder whose rows `resume` continues."""
        origin = self._wanted
        if source is not None:
            origin = Path(source)
        if os.path.realpath(origin) == os.path.realpath(self.path) or not _has_rows(origin):
            return self.path
        if not _has_rows(self.path):
            return origin
        same_run = _read_manifest(origin).get("created") == _read_manifest(self.path).get("created")
        if same_run:
            return self.path
        return origin

    def describe_anew(self, about: Mapping[str, Any]) -> None:
        """Says something else about the run, as where it has got more sites.

        Args:
            about: what changes in the manifest.
        """
        self.manifest.update(about)
        if not self._begun:
            return
        try:
            _replace(self.path / MANIFEST, [_dump(self.manifest, None)])
        except OSError as error:
            self._fail(error, 0)

    def _begin(self) -> int:
        """Continue the restored run's log, or put an earlier log aside; then write this run's manifest.

        Returns:
            The number of rows dropped because they lie past the restored step.
        """
        past = 0
        self._last_steps.clear()
        self._claim()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._restored is not None:
                past = self._continue(*self._restored)
            elif _has_rows(self.path):
                self.put_aside = _put_aside(self.path)
            _replace(self.path / MANIFEST, [_dump(self.manifest, None)])
            self._begun = True
        except OSError as error:
            self._fail(error, 0)
        if self._begun and self._lock is None:
            warnings.warn(
                f"{self.path}: this folder cannot be locked; do not let another run write its log here", stacklevel=4
            )
        return past

    def _continue(self, step: int, origin: Path) -> int:
        """Bring the rows of `origin` up to `step` into this folder, and say so in the manifest."""
        old = _read_manifest(origin)
        created = old.get("created")
        if isinstance(created, (int, float)):
            self.manifest["created"] = created
        earlier = old.get("resumed_at_steps")
        if not isinstance(earlier, list):
            earlier = []
        known = [each for each in earlier if isinstance(each, int)]
        self.manifest["resumed_at_steps"] = [*known, step]
        if origin != self.path and _has_rows(self.path):
            self.put_aside = _put_aside(self.path)
        rows = self._keep(CORRECTIONS, origin, step)
        self._keep(SHAPES, origin, step)
        return rows.dropped

    def _keep(self, name: str, origin: Path, step: int) -> _Kept:
        kept = _keep_until(origin / name, self.path / name, step)
        if kept.last_step is not None:
            self._last_steps[name] = kept.last_step
        return kept

    def _append(self, name: str, rows: Sequence[Row], digits: int) -> None:
        if not rows:
            return
        self._claim()
        if not self._begun:
            self._begin()
        data = b"".join(_dump(row, digits) for row in rows)
        try:
            if not self._begun:
                raise OSError("the log could not be begun")
            _append_whole(self.path / name, data)
        except OSError as error:
            self._fail(error, len(rows))
            return
        step = rows[-1].get("step")
        if isinstance(step, int):
            self._last_steps[name] = step

    def _fail(self, error: OSError, rows: int) -> None:
        self.dropped += rows
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.path}: the correction log cannot be written ({error}); training goes on without it",
                stacklevel=4,
            )


def _has_moved(row: Row) -> bool:
    """Return whether an amplitude has changed by more than rounding since the last update."""
    moves = [value for name, value in row.items() if name.startswith("delta_")]
    return any(isinstance(move, float) and abs(move) > _ROUNDING for move in moves)


def _locked(folder: Path) -> FolderLock | None:
    folder.mkdir(parents=True, exist_ok=True)
    return lock_folder(folder)


def _append_whole(path: Path, data: bytes) -> None:
    """Append `data` in one write, or leave the file as it was.

    Args:
        path: file to append to.
        data: whole lines.

    Raises:
        OSError: if not all of it could be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, data)
            if written != len(data):
                raise OSError(f"{path.name}: only {written} of {len(data)} bytes fit")
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _replace(path: Path, chunks: Sequence[bytes] | Iterator[bytes]) -> None:
    """Replace a file by another in one step: whoever opens it sees the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Kept(NamedTuple):
    """What `_keep_until` did.

    Args:
        dropped: whole lines that were left out: past the step, or of the end of a fit.
        last_step: step of the last line that was kept; None if none was.
    """

    dropped: int
    last_step: int | None


def _keep_until(source: Path, target: Path, step: int) -> _Kept:
    """Write the whole lines of `source` with a step of at most `step` to `target`, but those of the end of a fit.

    Args:
        source: file to read; nothing happens if it does not exist.
        target: file to replace, perhaps the same.
        step: last step to keep.

    Returns:
        What was dropped and kept.
    """
    if not source.exists():
        return _Kept(0, None)
    dropped = damaged = 0
    last_step: int | None = None

    def kept() -> Iterator[bytes]:
        nonlocal dropped, damaged, last_step
        with source.open("rb") as file:
            for line in file:
                found = _step_of(line)
                if found is None:
                    damaged += line.endswith(b"\n")
                elif found > step or _END_MARK in line:
                    dropped += 1
                else:
                    last_step = found
                    yield line if line.endswith(b"\n") else line + b"\n"

    _replace(target, kept())
    if damaged:
        warnings.warn(f"{source}: {damaged} damaged lines were dropped on resuming", stacklevel=4)
    return _Kept(dropped, last_step)


def _step_of(line: bytes) -> int | None:
    """Return the step of a line, None if the line is torn or damaged."""
    own = _OWN_LINE.match(line)
    if own is not None:
        return int(own[1])
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return row["step"]


def _has_rows(folder: Path) -> bool:
    """Return whether the folder has a log with at least one byte of rows."""
    try:
        return any((folder / name).stat().st_size > 0 for name in (CORRECTIONS, SHAPES) if (folder / name).exists())
    except OSError:
        return False


def _put_aside(folder: Path) -> Path:
    """Move the folder's log into the first free `earlier-<k>` below it, and return that folder."""
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for name in (MANIFEST, SHAPES, CORRECTIONS):
        if (folder / name).exists():
            os.replace(folder / name, aside / name)
    return aside


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the folder's manifest, an empty one if it is missing or damaged: a resumed run writes it anew."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return found


def _dump(row: Row, digits: int | None) -> bytes:
    """Return a mapping as one line of strict JSON, floats rounded to `digits` significant digits."""
    plain = {key: _plain(value, digits) for key, value in row.items()}
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace") + b"\n"


def _plain(value: object, digits: int | None) -> object:
    """Return what JSON can hold: NaN and infinity become None, arrays lists, anything else its text."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return _rounded(value, digits)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, digits) for item in value]
    to_list: Callable[[], object] | None = getattr(value, "tolist", None)  # tensors and NumPy's arrays
    if to_list is not None:
        return _plain(to_list(), digits)
    return str(value)


def _rounded(value: float, digits: int | None) -> float | None:
    if not math.isfinite(value):
        return None
    if digits is None:
        return value
    return float(f"{value:.{digits}g}")
