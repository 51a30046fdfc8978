"""What a log says in a few rows: of the run, of each site, of several runs side by side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import compress, pairwise
from typing import Any

from eafo_dynamic.records.reader import CorrectionLog
from eafo_dynamic.records.schema import AMPLITUDES, COLUMNS, FIT_END

__all__ = [
    "changed_most",
    "compare_runs",
    "compare_sites",
    "drift_changes",
    "entropy_changes",
    "layer_rows",
    "run_labels",
    "summarise",
    "with_values",
]


_CHANGING = ("entropy", *AMPLITUDES, "mean", "std", "kurtosis", "atom_mass", "dead_fraction", "flat_fraction")


def summarise(log: CorrectionLog, top: int = 3) -> dict[str, Any]:
    """Summarise a run.

    Args:
        log: the run's log, with rows.
        top: number of sites in each of the lists of extremes.

    Returns:
        Facts by name; entropies in nats, means over the sites. `largest_eps`, `highest_entropy` and
        `lowest_entropy` are lists of `{site, value}` by each site's last row.
    """
    layers, steps = layer_rows(log), log.steps
    found = log.events()
    return {
        "run": str(log.path),
        "steps": [steps[0], steps[-1]],
        "updates": len(log.update_steps),
        "sites": len(layers),
        "rows": len(log),
        "policies": dict(Counter(layer["policy"] or "unknown policy" for layer in layers)),
        "entropy_first": _mean(layer["entropy_first"] for layer in layers),
        "entropy_last": _mean(layer["entropy"] for layer in layers),
        "mean_eps": _mean(layer["eps"] for layer in layers),
        "mean_abs_eps": _mean(_absolute(layer["eps"]) for layer in layers),
        "largest_eps": _extremes(layers, "eps", top, lambda value: -abs(value)),
        # of few sites no one is among the highest and among the lowest
        "highest_entropy": _extremes(layers, "entropy", min(top, (len(layers) + 1) // 2), lambda value: -value),
        "lowest_entropy": _extremes(layers, "entropy", min(top, len(layers) // 2), lambda value: value),
        "events": len(found),
        "event_kinds": dict(Counter(str(row["event"]) for row in found).most_common(top)),
        "resumed_at_steps": list(log.manifest.get("resumed_at_steps", [])),
        "notes": log.notes,
    }


def layer_rows(log: CorrectionLog) -> list[dict[str, Any]]:
    """Return one row per site: its last row, and how eps and entropy came there.

    Args:
        log: the run's log.

    Returns:
        Rows in the model's order: the columns of the last row as `CorrectionLog.last` gives it (`event` and
        `event_step` of the last row that has one), `base`, `updates`, `eps_first`, `entropy_first`,
        `entropy_change` (nats), `eps_trend` (a list, one value per row) and `entropy_trend` (a list, one value
        per update).
    """
    return [_layer_row(log, last) for last in log.last()]


def changed_most(log: CorrectionLog) -> list[dict[str, Any]]:
    """Return for each quantity the site at which it changed by most.

    Args:
        log: the run's log.

    Returns:
        Rows with `site`, `quantity` (a column of the log), `first` and `last` (its first and last known value there)
        and `change`, in the quantity's unit; none for a quantity that did not change anywhere.
    """
    rows: list[dict[str, Any]] = []
    for quantity in _CHANGING:
        courses = [(site, log.series(site, quantity)) for site in log.sites]
        changes = [(site, _first_known(values), _first_known(reversed(values))) for site, values in courses]
        moved = [(site, first, last) for site, first, last in changes if first != last]
        if moved:
            site, first, last = max(moved, key=lambda entry: abs(entry[2] - entry[1]))
            rows.append({"site": site, "quantity": quantity, "first": first, "last": last, "change": last - first})
    return rows


def with_values(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the columns of a table; those that not every log has only where some row has one.

    Args:
        names: columns.
        rows: rows of the table.

    Returns:
        The columns that are shown.
    """
    sparse = (*AMPLITUDES, FIT_END)
    return [name for name in names if name not in sparse or any(row.get(name) is not None for row in rows)]


def _layer_row(log: CorrectionLog, last: dict[str, Any]) -> dict[str, Any]:
    site = last["site"]
    eps = log.series(site, "eps")
    is_update = [end is None for end in log.series(site, FIT_END)]
    entropy = list(compress(log.series(site, "entropy"), is_update))
    steps = log.series(site, "step")
    events = [(step, event) for step, event in zip(steps, log.series(site, "event"), strict=True) if event]
    event_step, event = events[-1] if events else (None, None)
    entropy_first = _first_known(entropy)
    entropy_last = _first_known(reversed(entropy))
    return {
        **dict.fromkeys(COLUMNS),
        **last,
        "base": log.site_info(site).get("base"),
        "updates": sum(is_update),
        "eps_first": _first_known(eps),
        "eps_trend": eps,
        "entropy": entropy_last,
        "entropy_first": entropy_first,
        "entropy_change": _difference(entropy_last, entropy_first),
        "entropy_trend": entropy,
        "event": event,
        "event_step": event_step,
    }


Changes = dict[str, list[tuple[float, float]]]


def entropy_changes(log: CorrectionLog) -> tuple[str, Changes]:
    """Return predicted and measured changes of the entropy.

    Within an update the prediction is first order, and the measurement is of the same samples: they differ by
    what first order leaves out. Where no update changed a function (eps left to the optimiser, a fixed shape)
    the changes are those between updates, see `drift_changes`.

    Args:
        log: the run's log.

    Returns:
        Which changes they are, in words, and pairs (predicted, measured) in nats by site.
    """
    within = {site: _update_changes(log, site) for site in log.sites}
    if any(within.values()):
        return "at updates, on the same samples", within
    return "between updates, while the weights moved too", {site: drift_changes(log, site) for site in log.sites}


def _update_changes(log: CorrectionLog, site: str) -> list[tuple[float, float]]:
    names = ("entropy", "entropy_predicted", "entropy_after")
    rows = zip(*(log.series(site, name) for name in names), strict=True)
    known = [
        (predicted - before, after - before)
        for before, predicted, after in rows
        if None not in (before, predicted, after)
    ]
    return [pair for pair in known if pair != (0.0, 0.0)]


def drift_changes(log: CorrectionLog, site: str) -> list[tuple[float, float]]:
    """Return what moving the amplitudes was predicted to do to a site's entropy between updates, and how it changed.

    Between two rows the prediction is the sum over the terms of d_entropy_d_eps x (change of eps), eps taken as it was
    when each row's entropy was measured: before the update's own step under the policy `entropy`, else as logged. The
    weights move meanwhile too, so the two agree only as far as the amplitudes are what moved the entropy.

    Args:
        log: the run's log.
        site: name of the site.

    Returns:
        Pairs (predicted, measured) in nats, one for each two rows in which nothing is missing.
    """
    entropy, policy = log.series(site, "entropy"), log.series(site, "policy")
    drifts = [_drifts(log, site, name, policy) for name in AMPLITUDES]
    terms = [drift for drift in drifts if any(value is not None for value in drift)]
    found: list[tuple[float, float]] = []
    for number, (before, after) in enumerate(pairwise(entropy)):
        parts = [drift[number] for drift in terms]
        if terms and None not in (before, after, *parts):
            found.append((math.fsum(parts), after - before))
    return found


def _drifts(log: CorrectionLog, site: str, name: str, policy: Sequence[Any]) -> list[Any]:
    """Return what the change of one amplitude between each row and the next was worth, None where unknown."""
    columns = (log.series(site, f"{stem}{name}") for stem in ("", "delta_", "d_entropy_d_"))
    rows = [
        (_measured_at(value, delta, mover), slope) for value, delta, slope, mover in zip(*columns, policy, strict=True)
    ]
    return [None if None in (old, slope, new) else slope * (new - old) for (old, slope), (new, _) in pairwise(rows)]


def _measured_at(eps: float | None, delta: float | None, policy: str | None) -> Any:
    """Return eps as it was when the entropy of a row was measured."""
    if policy != "entropy" or eps is None:
        return eps
    return _difference(eps, delta)


def run_labels(logs: Sequence[CorrectionLog]) -> list[str]:
    """Return a short name for each run, all different.

    Args:
        logs: logs of the runs.

    Returns:
        The ends of the runs' paths, as long as it takes to tell them apart.
    """
    paths = [log.path.resolve() for log in logs]
    parts = [path.parent.parts if path.name == "eafo" else path.parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def compare_runs(logs: Sequence[CorrectionLog]) -> list[dict[str, Any]]:
    """Return one row per run.

    Args:
        logs: logs of the runs, with rows.

    Returns:
        Rows with `run`, `policy`, `updates`, `last_step`, `sites`, `mean_eps`, `mean_abs_eps`, and
        `entropy_first`, `entropy_last` and `entropy_change`, means over the sites in nats, and `events`.
    """
    rows: list[dict[str, Any]] = []
    for label, log in zip(run_labels(logs), logs, strict=True):
        facts = summarise(log)
        first, last = facts["entropy_first"], facts["entropy_last"]
        rows.append(
            {
                "run": label,
                "policy": ", ".join(facts["policies"]),
                "updates": facts["updates"],
                "last_step": facts["steps"][-1],
                "sites": facts["sites"],
                "mean_eps": facts["mean_eps"],
                "mean_abs_eps": facts["mean_abs_eps"],
                "entropy_first": first,
                "entropy_last": last,
                "entropy_change": _difference(last, first),
                "events": facts["events"],
            }
        )
    return rows


def compare_sites(logs: Sequence[CorrectionLog], column: str) -> list[dict[str, Any]]:
    """Return one row per site with the last value of a column in each run.

    Args:
        logs: logs of the runs.
        column: name of the column.

    Returns:
        Rows with `site`, one key for each run's label, and `spread`, the largest less the smallest of its
        numbers; None where a run has no such site.
    """
    labels = run_labels(logs)
    last = [{row["site"]: row.get(column) for row in log.last()} for log in logs]
    sites = dict.fromkeys(site for log in logs for site in log.sites)
    rows: list[dict[str, Any]] = []
    for site in sites:
        values = [run.get(site) for run in last]
        numbers = [value for value in values if isinstance(value, (int, float))]
        spread = max(numbers) - min(numbers) if len(numbers) > 1 else None
        rows.append({"site": site, **dict(zip(labels, values, strict=True)), "spread": spread})
    return rows


def _extremes(
    layers: Sequence[dict[str, Any]], column: str, top: int, order: Callable[[float], float]
) -> list[dict[str, Any]]:
    known = [layer for layer in layers if layer.get(column) is not None]
    known.sort(key=lambda layer: order(layer[column]))
    return [{"site": layer["site"], "value": layer[column]} for layer in known[:top]]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _difference(minuend: float | None, subtrahend: float | None) -> float | None:
    if minuend is None or subtrahend is None:
        return None
    return minuend - subtrahend


def _absolute(value: float | None) -> float | None:
    return None if value is None else abs(value)


def _first_known(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)
