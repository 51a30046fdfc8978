"""One small file with a line for each finished cell, which goes with the plan to other machines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from eafo_dynamic.errors import LogError

__all__ = ["append", "read_store"]

_DIGITS = 7  # significant ones; float32 has no more
_POINTS = 16  # of a curve that are kept
_LEFT_OUT = {"versions": {}, "entropy_steps": [], "entropy_mean": [], "eps_last": None}


def append(path: Path, result: Mapping[str, Any]) -> None:
    """Adds a finished cell. Processes may add to one file at the same time.

    Args:
        path: the file; it and its folder are made if they are not there.
        result: what the cell's own file holds. Numbers are rounded to seven digits, of a curve sixteen points are kept,
            and series of the correction log are left out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    small = {key: _rounded(value) for key, value in {**result, **_LEFT_OUT, "curve": _thinned(result)}.items()}
    line = json.dumps(small, separators=(",", ":")) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())  # in one piece, so that lines of several processes do not mix
    finally:
        os.close(handle)


def read_store(path: Path) -> list[dict[str, Any]]:
    """Finished cells of a file, the newest first.

    Args:
        path: the file; it need not be there.

    Returns:
        One mapping for each line.

    Raises:
        LogError: for a line that is no result of a cell.
    """
    if not path.exists():
        return []
    cells: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            cell = json.loads(line)
            known = {"arm", "seed", "fingerprint"} <= cell.keys()
        except (ValueError, AttributeError):
            known = False
            cell = None
        if not known:
            raise LogError(f"{path}: line {number} is torn or no finished cell. Delete it; its cell is run again.")
        cells.append(cast("dict[str, Any]", cell))
    return cells[::-1]


def _thinned(result: Mapping[str, Any]) -> dict[str, list[float]]:
    curve = cast("dict[str, list[float]]", result.get("curve") or {})
    length = max(map(len, curve.values()), default=0)
    if length <= _POINTS:
        return curve
    last = length - 1
    places = sorted({round(last * number / (_POINTS - 1)) for number in range(_POINTS)})
    return {name: [values[place] for place in places] for name, values in curve.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list):
        return [_rounded(each) for each in cast("list[Any]", value)]
    return value
