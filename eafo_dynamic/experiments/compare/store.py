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
_CURVE_DIGITS = 4
_POINTS = 8  # of a curve that are kept
# In place of what a line does not hold: the task is the plan's, and series of the correction log would be long.
_DEFAULTS: dict[str, Any] = {
    "best_epoch": None,
    "entropy_first": None,
    "entropy_last": None,
    "eps_last": None,
    "entropy_steps": [],
    "entropy_mean": [],
    "curve": {},
}
_LEFT_OUT = ("schema", "task", "versions", "finished", "eps_last", "entropy_steps", "entropy_mean")


def append(path: Path, result: Mapping[str, Any]) -> None:
    """Adds a finished cell. Processes may add to one file at the same time.

    Args:
        path: the file; it and its folder are made if they are not there.
        result: what the cell's own file holds. Numbers are rounded to seven digits, of a curve to four, and eight of
            its points are kept; metrics of single training batches and series of the correction log are left out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    small: dict[str, Any] = {}
    for key, value in result.items():
        if key not in _LEFT_OUT and (key not in _DEFAULTS or value != _DEFAULTS[key]):
            small[key] = _rounded(value, _DIGITS)
    small["metrics"] = {name: value for name, value in small["metrics"].items() if not name.startswith("train_")}
    if "curve" in small:
        small["curve"] = _rounded(_thinned(result["curve"]), _CURVE_DIGITS)
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
        One mapping for each line: what the cell's own file holds, without schema and task.

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
        cells.append({**_DEFAULTS, **cast("dict[str, Any]", cell)})
    return cells[::-1]


def _thinned(curve: Mapping[str, list[float]]) -> Mapping[str, list[float]]:
    length = max(map(len, curve.values()), default=0)
    if length <= _POINTS:
        return curve
    last = length - 1
    places = sorted({round(last * number / (_POINTS - 1)) for number in range(_POINTS)})
    return {name: [values[place] for place in places] for name, values in curve.items()}


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each, digits) for key, each in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list):
        return [_rounded(each, digits) for each in cast("list[Any]", value)]
    return value
