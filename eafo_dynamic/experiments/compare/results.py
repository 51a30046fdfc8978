"""Finished cells: read them, write them as one tidy table, and check that they may be paired."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
        seconds: wall time of the fit [s].
        step_ms: time of one training step [ms].
        steps: number of optimiser steps.
        parameters: number of parameters of the model.
        weights: hash of the initial weights.
        batches: hash of the order of the batches.
        entropy_first: mean of H_r over the sites at the first update [nats]; None without a correction log.
        entropy_last: the same at the last update.
        eps_last: eps of each site at the end; None without a correction log.
        entropy_steps: optimiser steps at which `entropy_mean` was taken.
        entropy_mean: mean of H_r over the sites at each of these steps [nats].
        option: name of the swept option; None without a sweep.
        value: its value in this cell.
        curve: by "step", "seconds" and the name of a metric, one number for each validation; empty in older results.
        fingerprint: of the settings that it was trained with, see `compose.fingerprint`.
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
    curve: dict[str, list[float]] = field(default_factory=dict)
    fingerprint: str = ""


@dataclass(frozen=True)
class TidyRow:
    """One metric of one cell: a line of `results.csv`.

    Attributes:
        task: name of the task.
        arm: name of the arm.
        seed: the seed.
        metric: name of the metric.
        value: its value.
        seconds: wall time of the fit [s].
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
    eps_last = None
    if given.get("eps_last") is not None:
        eps_last = _numbers_by_name(path, given, "eps_last")
    cell = Cell(
        path=path,
        task=_typed(path, given, "task", str),
        arm=_typed(path, given, "arm", str),
        seed=_typed(path, given, "seed", int),
        metrics=_numbers_by_name(path, given, "metrics"),
        seconds=_typed(path, given, "seconds", float),
        step_ms=_typed(path, given, "step_ms", float),
        steps=_typed(path, given, "steps", int),
        parameters=_typed(path, given, "parameters", int),
        weights=_typed(path, given, "weights", str),
        batches=_typed(path, given, "batches", str),
        entropy_first=_number_or_none(path, given, "entropy_first"),
        entropy_last=_number_or_none(path, given, "entropy_last"),
        eps_last=eps_last,
        entropy_steps=[int(each) for each in _numbers(path, given, "entropy_steps")],
        entropy_mean=_numbers(path, given, "entropy_mean"),
        option=given.get("option"),
        value=given.get("value"),
        curve={str(name): _numbers(path, given["curve"], name) for name in given.get("curve") or {}},
        fingerprint=_typed(path, given, "fingerprint", str),
    )
    if len(cell.entropy_steps) != len(cell.entropy_mean):
        raise LogError(f"{path}: 'entropy_steps' and 'entropy_mean' differ in length. Run its cell again.")
    return cell


def read_cells(directory: Path, arms: Sequence[str] | None = None) -> list[Cell]:
    """Read all finished cells of one comparison.

    Args:
        directory: holds `cells/<arm>/seed-<n>/result.json`.
        arms: names of the arms wanted, in this order; None: all, sorted by name.

    Returns:
        The cells, arm by arm, seeds ascending.

    Raises:
        LogError: if there is none, if a file is not the result of a cell, if two files are of the same cell, or if
            they are of several tasks.
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
    if arms is None:
        arms = sorted({cell.arm for cell in found})
    order = {arm: number for number, arm in enumerate(arms)}
    wanted = [cell for cell in found if cell.arm in order]
    return sorted(wanted, key=lambda cell: (order[cell.arm], cell.seed))


def values(cells: Sequence[Cell], metric: str) -> _Table:
    """Return one metric by arm and seed.

    Args:
        cells: cells of one task.
        metric: name of the metric.

    Returns:
        `{arm: {seed: value}}`, arms in the order of the cells.

    Raises:
        ConfigError: if no cell has the metric.
        LogError: if some cells have it and one does not.
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
    """Name the cells that did not start as the reference did: a paired difference with them means nothing.

    Args:
        cells: cells of one task.
        reference: name of the arm that the others are compared with.

    Returns:
        One line per cell whose initial weights or order of batches are not those of the reference with the
        same seed; empty if there is none.
    """
    reference_cells = {cell.seed: cell for cell in cells if cell.arm == reference}
    lines: list[str] = []
    for cell in cells:
        if cell.seed not in reference_cells:
            continue
        start = reference_cells[cell.seed]
        different: list[str] = []
        if cell.weights != start.weights:
            different.append("initial weights")
        if cell.batches != start.batches:
            different.append("order of batches")
        if different:
            lines.append(f"{cell.arm}, seed {cell.seed}: other {' and '.join(different)} than {reference}")
    return lines


def tidy(cells: Sequence[Cell]) -> list[TidyRow]:
    """Return one row for each cell and metric.

    Args:
        cells: cells, of any number of tasks.

    Returns:
        The rows, in the order of the cells and of their metrics.
    """
    rows: list[TidyRow] = []
    for cell in cells:
        for name, value in cell.metrics.items():
            rows.append(TidyRow(cell.task, cell.arm, cell.seed, name, value, cell.seconds, cell.step_ms))
    return rows


def write_csv(cells: Sequence[Cell], out: Path) -> Path:
    """Write the tidy table: `task,arm,seed,metric,value,seconds,step_ms`.

    Args:
        cells: cells, of any number of tasks.
        out: the file.

    Returns:
        The file; reading its numbers gives the same bits.

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


def _typed(path: Path, given: Mapping[str, Any], name: str, kind: Callable[[Any], Any]) -> Any:
    value = given.get(name)
    # type, not isinstance: True is not a number here
    is_whole_float = kind is float and type(value) is int
    if type(value) is not kind and not is_whole_float:
        wanted = getattr(kind, "__name__", kind)
        raise LogError(f"{path}: {name}={value!r} is no {wanted}. Delete the file; its cell is then run again.")
    return kind(value)


def _number_or_none(path: Path, given: Mapping[str, Any], name: str) -> float | None:
    if given.get(name) is None:
        return None
    number: float = _typed(path, given, name, float)
    return number


def _numbers_by_name(path: Path, given: Mapping[str, Any], name: str) -> dict[str, float]:
    found = given.get(name)
    if not isinstance(found, dict):
        raise LogError(f"{path}: {name}={found!r} is no mapping of names to numbers. Run its cell again.")
    numbers: dict[str, float] = {}
    for key, value in cast("dict[str, Any]", found).items():
        if value is None:  # what strict writers put for NaN
            numbers[key] = math.nan
        else:
            numbers[key] = _typed(path, {key: value}, key, float)
    return numbers


def _numbers(path: Path, given: Mapping[str, Any], name: str) -> list[float]:
    found = given.get(name)
    if not isinstance(found, list):
        raise LogError(f"{path}: {name}={found!r} is no list of numbers. Run its cell again.")
    return [_typed(path, {name: value}, name, float) for value in cast("list[Any]", found)]
