"""The commands of `eafo-dynamic log`: each reads a log and prints a view of it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from eafo_dynamic.cli.log_columns import (
    COMPARE_OPTIONAL,
    LABELS,
    LAYERS,
    LAYERS_OPTIONAL,
    SHOW,
    SHOW_OPTIONAL,
    TABLE_ROWS,
    TRENDS,
)
from eafo_dynamic.cli.output import emit, emit_facts, is_unicode, sparkline, table_width
from eafo_dynamic.errors import ConfigError, LogError, printable
from eafo_dynamic.records import CorrectionLog
from eafo_dynamic.records.names import shortened
from eafo_dynamic.records.summary import compare_runs, compare_sites, layer_rows, summarise, with_values

__all__ = [
    "compare",
    "events",
    "layers",
    "load_rows",
    "plot",
    "report",
    "show",
    "summary",
]


_CLEAR = "\x1b[2J\x1b[H"  # clears a terminal and moves to its first line; a pipe gets one table after the other


def summary(args: argparse.Namespace) -> int:
    """Print the run on one screen, and return the exit code.

    Args:
        args: the parsed options.

    Returns:
        0.
    """

    def show(log: CorrectionLog) -> None:
        facts = summarise(log)
        if args.format in ("json", "csv"):
            emit([facts], fmt=args.format)
        else:
            emit_facts(_summary_lines(facts), fmt=args.format)

    return _shown(args, show)


def _summary_lines(facts: dict[str, Any]) -> dict[str, str]:
    """Return the facts in words, by the name of the line."""
    first, last = facts["steps"]
    events = str(facts["events"])
    if facts["events"]:
        events += f" ({_listed(facts['event_kinds'])})"
    lines = {
        "run": facts["run"],
        "steps": f"{first} to {last}, {facts['updates']} updates",
        "sites": f"{facts['sites']} ({_listed(facts['policies'])})",
        "mean entropy": f"{_number(facts['entropy_first'])} -> {_number(facts['entropy_last'])} nats",
        "mean eps": f"{_number(facts['mean_eps'])}, mean |eps| {_number(facts['mean_abs_eps'])}",
        "largest |eps|": _sites(facts["largest_eps"]),
        "highest entropy": _sites(facts["highest_entropy"]),
        "lowest entropy": _sites(facts["lowest_entropy"]),
        "events": events,
    }
    if facts["resumed_at_steps"]:
        lines["resumed at step"] = ", ".join(map(str, facts["resumed_at_steps"]))
    return lines


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def _sites(entries: Sequence[dict[str, Any]]) -> str:
    return "\n".join(f"{_number(entry['value'])}  {entry['site']}" for entry in entries) or "-"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}"


def layers(args: argparse.Namespace) -> int:
    """Print one row per site, and return the exit code.

    Args:
        args: the parsed options.

    Returns:
        0.
    """

    def show(log: CorrectionLog) -> None:
        rows = _sorted(layer_rows(log), args)
        names = None
        if args.format in ("table", "md"):
            rows = [row | {name: sparkline(row[name], 8) for name in TRENDS} for row in rows]
            names = with_values(LAYERS, rows)
        elif args.format == "csv":
            rows = [{name: value for name, value in row.items() if name not in TRENDS} for row in rows]
        _emit(args, rows, names, LAYERS_OPTIONAL, title=str(log.path))

    return _shown(args, show)


def show(args: argparse.Namespace) -> int:
    """Print the updates of one site or several, and return the exit code.

    Args:
        args: the parsed options.

    Returns:
        0.
    """
    log = load_rows(args.folder, args.steps).select(site=args.site)
    rows = _sorted(log.rows, args)
    if args.limit:
        limit = args.limit
    elif args.limit is None and args.format == "table":
        limit = TABLE_ROWS
    else:
        limit = len(rows)
    shown = _thinned(rows, limit)
    names = log.columns
    if args.format in ("table", "md"):
        names = with_values(SHOW, shown)
    title = None
    if args.format == "table" and len(log.sites) == 1:
        title = _site_title(log)
        names = [name for name in names if name != "site"]
    _emit(args, shown, names, SHOW_OPTIONAL, title)
    if len(shown) < len(rows) and args.format == "table":
        sys.stdout.write(f"{len(shown)} of {len(rows)} rows, evenly spaced; --limit 0 shows all\n")
    return 0


def _site_title(log: CorrectionLog) -> str:
    site = log.sites[0]
    known = log.site_info(site)
    parts = [site]
    for name in ("base", "class_name", "call", "shape"):
        if known.get(name) is not None:
            parts.append(f"{name} {known[name]}")
    return "  ".join(parts)


def events(args: argparse.Namespace) -> int:
    """Print the updates at which something unusual happened, and return the exit code.

    Args:
        args: the parsed options.

    Returns:
        0.
    """
    log = _selected(load_rows(args.folder, args.steps), args)
    rows = log.events()
    if not rows and args.format == "table":
        sys.stdout.write(f"no events in {len(log)} rows of {log.path}\n")
        return 0
    _emit(args, rows, ["step", "epoch", "site", "event"], ["epoch"], None)
    return 0


def compare(args: argparse.Namespace) -> int:
    """Print several runs side by side, and return the exit code.

    Args:
        args: the parsed options.

    Returns:
        0.
    """
    logs = [_selected(load_rows(run, args.steps), args) for run in args.runs]
    if args.by == "run":
        rows = compare_runs(logs)
        _emit(args, _sorted(rows, args), list(rows[0]), COMPARE_OPTIONAL, None)
        return 0
    if not any(args.column in log.columns for log in logs):
        _refuse_column("--column", args.column, sorted({name for log in logs for name in log.columns}))
    rows = compare_sites(logs, args.column)
    _emit(args, _sorted(rows, args), list(rows[0]), [], f"{args.column} at each site's last update")
    return 0


def plot(args: argparse.Namespace) -> int:
    """Draw a figure of the log, say where it is, and return the exit code.

    Args:
        args: the parsed options.

    Returns:
        0.
    """
    from eafo_dynamic.records.figures import logs, style

    log = _selected(load_rows(args.folder, args.steps), args)
    figure = logs.plot(log, args.what, args.column, args.dark)
    sys.stdout.write(f"{style.save(figure, args.out)}\n")
    return 0


def report(args: argparse.Namespace) -> int:
    """Write the report, say where it is, and return the exit code.

    Args:
        args: the parsed options.

    Returns:
        0.
    """
    from eafo_dynamic.records.report import write_report

    logs = [_selected(load_rows(run, args.steps), args) for run in args.runs]
    sys.stdout.write(f"{write_report(logs, args.out)}\n")
    return 0


def load_rows(run: str, steps: tuple[int | None, int | None] | None) -> CorrectionLog:
    """Load a log that must have rows.

    Args:
        run: folder of the run.
        steps: first and last step wanted; None for all.

    Returns:
        The log of those steps.

    Raises:
        LogError: if it has no rows, or none at these steps.
    """
    return _with_rows(CorrectionLog.load(run), steps)


def _with_rows(log: CorrectionLog, steps: tuple[int | None, int | None] | None) -> CorrectionLog:
    """Return the part of a log that `load_rows` promises."""
    for note in log.notes:
        sys.stderr.write(f"note: {printable(note)}\n")
    if not len(log):
        raise LogError(f"{log.path}: the log has no rows yet; the first come with the first update")
    if steps is None:
        return log
    part = log.select(steps=steps)
    if not len(part):
        raise LogError(f"{log.path}: no update at these steps; the log has {log.steps[0]}:{log.steps[-1]}")
    return part


def _selected(log: CorrectionLog, args: argparse.Namespace) -> CorrectionLog:
    if not args.site:
        return log
    return log.select(site=args.site)


def _shown(args: argparse.Namespace, show: Callable[[CorrectionLog], None]) -> int:
    """Show the log, with `args.follow` again whenever it grows, and return 0."""
    live = CorrectionLog.load(args.folder)  # once: rows that are written while it is shown are found by refresh
    show(_selected(_with_rows(live, args.steps), args))
    if args.follow is None:
        return 0
    try:
        while True:
            time.sleep(args.follow)
            if live.refresh():
                sys.stdout.write(_CLEAR if sys.stdout.isatty() else "\n")
                part = live
                if args.steps is not None:
                    part = live.select(steps=args.steps)
                show(_selected(part, args))
    except KeyboardInterrupt:
        return 0


def _sorted(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows in the order asked for, those without a value last."""
    if args.sort is None:
        return rows
    if not any(args.sort in row for row in rows):
        _refuse_column("--sort", args.sort, [name for name in rows[0] if not name.endswith("_trend")])
    known = [row for row in rows if row.get(args.sort) is not None]
    try:
        known.sort(key=lambda row: row[args.sort], reverse=args.descending)
    except TypeError:
        known.sort(key=lambda row: str(row[args.sort]), reverse=args.descending)
    return known + [row for row in rows if row.get(args.sort) is None]


def _refuse_column(option: str, value: str, names: Sequence[str]) -> NoReturn:
    raise ConfigError(option, value, "no such column", f"Columns: {', '.join(names)}.")


def _thinned(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    if len(rows) <= limit:
        return rows
    last = len(rows) - 1
    return [rows[round(number * last / max(limit - 1, 1))] for number in range(limit)]


def _emit(
    args: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    names: Sequence[str] | None,
    optional: Sequence[str],
    title: str | None,
) -> None:
    if args.format != "table" or args.wide:
        emit(rows, columns=names, fmt=args.format, title=title, labels=LABELS, width=10_000)
        return
    width = table_width()
    ellipsis = "…" if is_unicode() else "*"
    sites = shortened([str(row.get("site")) for row in rows], max(20, width * 3 // 10), ellipsis)
    short: list[dict[str, Any]] = []
    for row, site in zip(rows, sites, strict=True):
        short.append({**row, "site": site} if "site" in row else row)
    emit(short, columns=names, title=title, optional=optional, labels=LABELS, hint="; --wide shows all")
