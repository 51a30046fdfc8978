"""What the report's charts draw: the logs, thinned to a size that a browser takes without effort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eafo_dynamic.records import COLUMNS, CorrectionLog
from eafo_dynamic.records.names import shortened
from eafo_dynamic.records.schema import AMPLITUDES
from eafo_dynamic.records.summary import entropy_changes, run_labels

__all__ = ["payload"]

# Characters of JSON for all runs together; the page is about twice as large at most.
_SERIES_BUDGET = 1_500_000
_SHAPES_BUDGET = 1_200_000
_NUMBER = 9
_FEWEST_STEPS, _MOST_STEPS = 12, 300
_FILM = 16
_CHANGES = 2000
_NOT_DRAWN = [
    "step",
    "epoch",
    "n",
    "n_nonfinite",
    *(f"delta_{name}" for name in AMPLITUDES),
    "entropy_predicted",
    "entropy_after",
    "entropy_drift",
]


def payload(logs: Sequence[CorrectionLog]) -> dict[str, Any]:
    """Return what the page's scripts need of the logs.

    Args:
        logs: logs with rows.

    Returns:
        `columns` (unit and meaning by name) and `runs`: for each the sites, some of the steps, a value for
        each of them, site and column, snapshots of the functions, and predicted and measured changes.
    """
    labels = run_labels(logs)
    drawn = [_drawn_columns(log) for log in logs]
    fields = sum(len(log.sites) * len(names) for log, names in zip(logs, drawn, strict=True))
    affordable = _SERIES_BUDGET // _NUMBER // max(fields, 1)
    steps = max(_FEWEST_STEPS, min(_MOST_STEPS, affordable))
    share = _SHAPES_BUDGET // len(logs)
    return {
        "columns": {name: {"unit": column.unit, "meaning": column.meaning} for name, column in COLUMNS.items()},
        "runs": [
            {
                "label": label,
                "sites": log.sites,
                "short": shortened(log.sites, 26),
                **_series(log, names, steps),
                "snapshots": _snapshots(log, share),
                "changes": _changes(log),
            }
            for label, log, names in zip(labels, logs, drawn, strict=True)
        ],
    }


def _drawn_columns(log: CorrectionLog) -> list[str]:
    numbers = [name for name, column in COLUMNS.items() if column.kind != "text" and name not in _NOT_DRAWN]
    last = log.last()
    # The page needs something to choose, even of a log that has no number yet.
    return [name for name in numbers if any(row.get(name) is not None for row in last)] or ["entropy"]


def _series(log: CorrectionLog, names: Sequence[str], count: int) -> dict[str, Any]:
    steps = _evenly(log.steps, count)
    place = {step: number for number, step in enumerate(steps)}
    series: dict[str, list[list[float | None]]] = {name: [] for name in names}
    for site in log.sites:
        at = [place.get(step) for step in log.series(site, "step")]
        for name in names:
            line: list[float | None] = [None] * len(steps)
            for number, value in zip(at, log.series(site, name), strict=True):
                # The end of a fit may have the step of the last update, and has fewer values.
                if number is not None and value is not None:
                    line[number] = _short(value)
            series[name].append(line)
    return {"steps": steps, "updates": len(log.update_steps), "series": series}


def _snapshots(log: CorrectionLog, budget: int) -> dict[str, list[dict[str, Any]]]:
    """Return the snapshots by the site's place, as many sites and as many snapshots of each as the budget allows."""
    films: dict[str, list[dict[str, Any]]] = {}
    for snapshot in log.shapes():
        films.setdefault(snapshot["site"], []).append(snapshot)
    if not films:
        return {}
    sample = next(iter(films.values()))[-1]
    size = _NUMBER * sum(len(value) for value in sample.values() if isinstance(value, list))
    affordable = max(budget // max(size, 1), 2)
    sites = [site for site in log.sites if site in films]
    shown = _evenly(sites, max(affordable // 2, 1))
    length = max(2, min(_FILM, affordable // len(shown)))
    return {str(log.sites.index(site)): [_snapshot(entry) for entry in _evenly(films[site], length)] for site in shown}


def _snapshot(entry: dict[str, Any]) -> dict[str, Any]:
    lists = ("z", "base", "function", "u", "pdf", "edges", "counts")
    found: dict[str, Any] = {"step": entry["step"]}
    for name in (*AMPLITUDES, "mu", "sigma"):
        found[name] = _short(entry.get(name))
    for name in lists:
        value = entry.get(name)
        if isinstance(value, list) and value:
            found[name] = [_short(item) for item in value]
    return found


def _changes(log: CorrectionLog) -> dict[str, Any]:
    """Return predicted and measured changes of the entropy: some points, and the correlation of all."""
    which, changes = entropy_changes(log)
    pairs = [(number, *pair) for number, found in enumerate(changes.values()) for pair in found]
    points = [[number, _short(left), _short(right)] for number, left, right in _evenly(pairs, _CHANGES)]
    return {"which": which, "count": len(pairs), "correlation": _correlation(pairs), "points": points}


def _correlation(pairs: Sequence[tuple[int, float, float]]) -> float | None:
    count = len(pairs)
    if count < 3:
        return None
    mean_predicted = math.fsum(predicted for _, predicted, _ in pairs) / count
    mean_measured = math.fsum(measured for _, _, measured in pairs) / count
    centred = [(predicted - mean_predicted, measured - mean_measured) for _, predicted, measured in pairs]
    covariance = math.fsum(predicted * measured for predicted, measured in centred)
    variances = math.fsum(p * p for p, _ in centred) * math.fsum(m * m for _, m in centred)
    if variances <= 0:
        return None
    return _short(covariance / math.sqrt(variances))


def _short(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Return some of the items, evenly spaced; the last one always, and the first if two are wanted."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[-1]]
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]
