"""Read finished cells, write them as one tidy table, and see whether they may be paired."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from eafo_dynamic.errors import ConfigError, LogError

__all__ = ["Cell", "TidyRow", "read_cell", "read_cells", "step_times", "tidy", "unpaired", "values", "write_csv"]

_SCHEMA = 1
_Table = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Cell:
    """One finished training.

    Attributes:
        path: its file.
        task: name of the task.
        arm: name of the arm.
        seed: the seed.
        metrics: value by name; NaN where the training diverged.
        seconds: wall time of the fit.
        step_ms: time of one training step [ms].
        steps: optimiser steps.
        parameters: number of them in the model.
        weights: hash of the initial weights.
        batches: hash of the order of the batches.
        entropy_first: mean of H_r over the sites at the first update [nats]; None without a correction log.
        entropy_last: the same at the last update.
        eps_last: eps of each site at the end.
        entropy_steps: optimiser steps of `entropy_mean`.
        entropy_mean: mean of H_r over the sites [nats].
        option: name of the swept option, or None.
        value: its value in this cell.
    """

    path: Path
    task: str
    arm: str
    seed: int
    metrics: dict[str, float]
    seconds: float
    step_ms: float
    steps: int
    parameters: int
    weights: str
    batches: str
    entropy_first: float | None
    entropy_last: float | None
    eps_last: dict[str, float] | None
    entropy_steps: list[int]
    entropy_mean: list[float]
    option: str | None = None
    value: Any = None


@dataclass(frozen=True)
class TidyRow:
    """One metric of one cell: a line of `results.csv`.

    Attributes:
        task: name of the task.
        arm: name of the arm.
        seed: the seed.
        metric: name of the metric.
        value: its value.
        seconds: wall time of the fit.
        step_ms: time of one training step [ms].
    """

    task: str
    arm: str
    seed: int
    metric: str
    value: float
    seconds: float
    step_ms: float


def read_cell(path: Path) -> Cell:
    """Read the result of one cell.

    Args:
        path: a `result.json`.

    Returns:
        The cell.

    Raises:
        LogError: if the file cannot be read, is torn, is not the result of a cell or of another schema.
    """
    try:
        raw: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LogError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise LogError(f"{path}: is torn or no JSON ({error}). Delete the file; its cell is then run again.") from None
    if not isinstance(raw, dict) or "schema" not in raw:
        raise LogError(f"{path}: is not the result of a cell: it has no 'schema'. Remove it from the folder.")
    given = cast("dict[str, Any]", raw)
    if given["schema"] != _SCHEMA:
        raise LogError(f"{path}: has schema {given['schema']!r}, this version reads {_SCHEMA}. Run its cell again.")
    entropies = [_maybe(path, given, name) for name in ("entropy_first", "entropy_last")]
    eps = _mapped(path, given, "eps_last") if given.get("eps_last") is not None else None
    cell = Cell(
        path=path,
        **{name: _one(path, given, name, str) for name in ("task", "arm", "weights", "batches")},
        **{name: _one(path, given, name, int) for name in ("seed", "steps", "parameters")},
        **{name: _one(path, given, name, float) for name in ("seconds", "step_ms")},
        metrics=_mapped(path, given, "metrics"),
        entropy_first=entropies[0],
        entropy_last=entropies[1],
        eps_last=eps,
        entropy_steps=[int(each) for each in _numbers(path, given, "entropy_steps")],
        entropy_mean=_numbers(path, given, "entropy_mean"),
        option=given.get("option"),
        value=given.get("value"),
    )
    if len(cell.entropy_steps) != len(cell.entropy_mean):
        raise LogError(f"{path}: 'entropy_steps' and 'entropy_mean' differ in length. Run its cell again.")
    return cell


def read_cells(directory: Path, arms: Sequence[str] | None = None) -> list[Cell]:
    """Read all finished cells of one comparison.

    Args:
        directory: holds `cells/<arm>/seed-<n>/result.json`.
        arms: names in the order wanted; cells of other arms are left out. None: all, by name.

    Returns:
        The cells, arm by arm, seeds ascending.

    Raises:
        LogError: if there is none, or one of the files is not the result of a cell, or two are of the same one,
            or they are of several tasks.
    """
    found = [read_cell(path) for path in sorted(directory.glob("cells/*/seed-*/result.json"))]
    if not found:
        raise LogError(f"{directory}: has no finished cell (cells/<arm>/seed-<n>/result.json)")
    seen: dict[tuple[str, int], Cell] = {}
    for cell in found:
        other = seen.setdefault((cell.arm, cell.seed), cell)
        if other is not cell:
            raise LogError(f"{cell.path}: is arm {cell.arm!r}, seed {cell.seed}, and so is {other.path}. Remove one.")
        if cell.task != found[0].task:
            raise LogError(f"{cell.path}: is of task {cell.task!r}, but {found[0].path} of {found[0].task!r}")
    order = list(arms) if arms is not None else sorted({cell.arm for cell in found})
    kept = [cell for cell in found if cell.arm in order]
    return sorted(kept, key=lambda cell: (order.index(cell.arm), cell.seed))


def values(cells: Sequence[Cell], metric: str) -> _Table:
    """Return one metric by arm and seed.

    Args:
        cells: cells of one task.
        metric: name of the metric.

    Returns:
        `{arm: {seed: value}}`, arms in the order of the cells.

    Raises:
        ConfigError: if no cell has the metric.
        LogError: if some have it and one has not.
    """
    if not any(metric in cell.metrics for cell in cells):
        known = ", ".join(dict.fromkeys(name for cell in cells for name in cell.metrics))
        raise ConfigError("metric", metric, "no cell has such a metric", f"Metrics: {known}.")
    table: _Table = {}
    for cell in cells:
        if metric not in cell.metrics:
            raise LogError(f"{cell.path}: has no metric {metric!r}, which other cells have. Run its cell again.")
        table.setdefault(cell.arm, {})[cell.seed] = cell.metrics[metric]
    return table


def step_times(cells: Sequence[Cell]) -> _Table:
    """Return the time of one training step by arm and seed.

    Args:
        cells: cells of one task.

    Returns:
        `{arm: {seed: milliseconds}}`.
    """
    table: _Table = {}
    for cell in cells:
        table.setdefault(cell.arm, {})[cell.seed] = cell.step_ms
    return table


def unpaired(cells: Sequence[Cell], reference: str) -> list[str]:
    """Say which cells did not start as the reference did: with them a paired difference means nothing.

    Args:
        cells: cells of one task.
        reference: name of the arm that the others are compared with.

    Returns:
        One line a cell whose initial weights or order of batches are not those of the reference with the
        same seed; empty if all is well.
    """
    starts = {cell.seed: cell for cell in cells if cell.arm == reference}
    lines: list[str] = []
    for cell in cells:
        start = starts.get(cell.seed, cell)
        wrong = [
            what
            for what, one, other in (
                ("initial weights", cell.weights, start.weights),
                ("order of batches", cell.batches, start.batches),
            )
            if one != other
        ]
        if wrong:
            lines.append(f"{cell.arm}, seed {cell.seed}: other {' and '.join(wrong)} than {reference}")
    return lines


def tidy(cells: Sequence[Cell]) -> list[TidyRow]:
    """Return one row for each cell and metric.

    Args:
        cells: cells, of any number of tasks.

    Returns:
        The rows, in the order of the cells and of their metrics.
    """
    return [
        TidyRow(cell.task, cell.arm, cell.seed, name, value, cell.seconds, cell.step_ms)
        for cell in cells
        for name, value in cell.metrics.items()
    ]


def write_csv(cells: Sequence[Cell], out: Path) -> Path:
    """Write the tidy table: `task,arm,seed,metric,value,seconds,step_ms`.

    Args:
        cells: cells, of any number of tasks.
        out: the file.

    Returns:
        The file. Numbers are written so that reading them gives the same bits.

    Raises:
        ConfigError: if the file cannot be written.
    """
    try:
        with out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(TidyRow.__dataclass_fields__)
            writer.writerows(list(vars(row).values()) for row in tidy(cells))
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise ConfigError("--out", str(out), problem, "Name a file in a folder that exists.") from None
    return out


def _one(path: Path, given: Mapping[str, Any], name: str, kind: Callable[[Any], Any]) -> Any:
    value = given.get(name)
    # type, not isinstance: True is no number here
    if type(value) is not kind and not (kind is float and type(value) is int):
        wanted = getattr(kind, "__name__", kind)
        raise LogError(f"{path}: {name}={value!r} is no {wanted}. Delete the file; its cell is then run again.")
    return kind(value)


def _maybe(path: Path, given: Mapping[str, Any], name: str) -> float | None:
    value: float | None = None if given.get(name) is None else _one(path, given, name, float)
    return value


def _mapped(path: Path, given: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return numbers by name; null, which strict writers put for NaN, is NaN."""
    found = given.get(name)
    if not isinstance(found, dict):
        raise LogError(f"{path}: {name}={found!r} is no mapping of names to numbers. Run its cell again.")
    known = cast("dict[str, Any]", found)
    return {key: math.nan if value is None else _one(path, known, key, float) for key, value in known.items()}


def _numbers(path: Path, given: Mapping[str, Any], name: str) -> list[float]:
    found = given.get(name)
    if not isinstance(found, list):
        raise LogError(f"{path}: {name}={found!r} is no list of numbers. Run its cell again.")
    return [_one(path, {name: value}, name, float) for value in cast("list[Any]", found)]
