"""Put the page together: tables as HTML, so that they are there without scripts, and data for the charts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.records import COLUMNS, CorrectionLog
from eafo_dynamic.records.report.data import payload
from eafo_dynamic.records.summary import (
    changed_most,
    compare_runs,
    compare_sites,
    layer_rows,
    run_labels,
    summarise,
    with_values,
)

__all__ = ["render_report", "write_report"]

_LAYERS = [
    "site",
    "base",
    "eps",
    "eps_trend",
    "lift",
    "gain",
    "slope",
    "entropy_first",
    "entropy",
    "entropy_trend",
    "entropy_change",
    "d_entropy_d_eps",
    "atom_mass",
    "dead_fraction",
    "mean",
    "std",
    "n",
    "event",
]
_MEANINGS = {
    "base": "the activation that the model was built with",
    "eps_trend": "eps over the run",
    "entropy_first": "entropy at the site's first update [nats]",
    "entropy_change": "entropy at the last update less that at the first [nats]",
    "entropy_trend": "entropy over the run",
    "spread": "largest less smallest value",
    "quantity": "a column of the log",
    "first": "its first value",
    "last": "its last value",
    "change": "last value less first, in the quantity's unit",
    "setting": "an option, a version, or another entry of the manifest",
    "run": "the run's folder",
    "last_step": "optimiser steps at the last update",
    "entropy_last": "mean over the sites at their last update [nats]",
    "mean_eps": "mean of eps over the sites",
    "mean_abs_eps": "mean of |eps| over the sites",
}
_NOT_SETTINGS = ("sites", "format", "schema_version", "manifest_version")
_TITLES = {"entropy_first": "entropy, first", "entropy": "entropy, last", "entropy_change": "change"}


def write_report(logs: Sequence[CorrectionLog], out: str | os.PathLike[str]) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        logs: logs with rows.
        out: the HTML file.

    Returns:
        The file.

    Raises:
        ConfigError: if the file cannot be written.
    """
    path = Path(out)
    page = render_report(logs)
    try:
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise ConfigError("--out", str(out), problem, "Name a file in a folder that exists.") from None
    return path


def render_report(logs: Sequence[CorrectionLog]) -> str:
    """Return the report as the text of an HTML file.

    Args:
        logs: logs with rows, at least one.

    Returns:
        One page that loads nothing from anywhere.
    """
    labels = run_labels(logs) if len(logs) > 1 else [logs[0].name]
    folder = files("eafo_dynamic.records.report")
    parts = {
        "TITLE": escape(f"Correction log: {', '.join(labels)}"),
        "STYLE": (folder / "style.css").read_text(encoding="utf-8"),
        "CHOICE": _choice(labels),
        "SUMMARIES": _per_run([_summary(log) for log in logs]),
        "CHANGES": _per_run([_changes(log) for log in logs]),
        "COMPARISON": _comparison(logs),
        "LAYERS": _per_run([_layers(log) for log in logs]),
        "EVENTS": _per_run([_events(log) for log in logs]),
        "SETTINGS": _per_run([_settings(log) for log in logs]),
        "MEANINGS": _meanings(),
        "DATA": _embedded(payload(logs)),
        "SCRIPT": "\n".join((folder / name).read_text(encoding="utf-8") for name in ("charts.js", "page.js")),
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    # Split, not replaced one after the other: a site's name may look like a place of the template.
    pieces = page.split("@@")
    pieces[1::2] = [parts[name] for name in pieces[1::2]]
    return "".join(pieces)


def _embedded(value: object) -> str:
    """Return JSON that no HTML parser takes for the end of its element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _choice(labels: Sequence[str]) -> str:
    if len(labels) == 1:
        return ""
    options = "".join(f'<option value="{number}">{escape(label)}</option>' for number, label in enumerate(labels))
    return f'<p class="choice"><label for="run">Run</label> <select id="run">{options}</select></p>'


def _per_run(parts: Sequence[str]) -> str:
    return "".join(f'<div class="of-run" data-run="{number}">{part}</div>' for number, part in enumerate(parts))


def _summary(log: CorrectionLog) -> str:
    facts = summarise(log)
    first, last = facts["steps"]
    policies = ", ".join(f"{name}: {count}" for name, count in facts["policies"].items())
    lines = {
        "Run": escape(facts["run"]),
        **_origin(log),
        "Steps": f"{first} to {last}, {facts['updates']} updates",
        "Sites": f"{facts['sites']} ({escape(policies)})",
        "Mean entropy": f"{_number(facts['entropy_first'])} → {_number(facts['entropy_last'])} nats",
        "Mean eps": f"{_number(facts['mean_eps'])}, mean |eps| {_number(facts['mean_abs_eps'])}",
        "Largest |eps|": _sites(facts["largest_eps"]),
        "Highest entropy": _sites(facts["highest_entropy"]),
        "Lowest entropy": _sites(facts["lowest_entropy"]),
        "Events": str(facts["events"]),
    }
    if facts["resumed_at_steps"]:
        lines["Resumed at step"] = escape(", ".join(map(str, facts["resumed_at_steps"])))
    if facts["notes"]:
        lines["Note"] = escape("; ".join(facts["notes"]))
    return '<dl class="facts">' + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in lines.items()) + "</dl>"


def _origin(log: CorrectionLog) -> dict[str, str]:
    """When the run was begun and what it trained, as far as its log says so."""
    run = log.manifest.get("run")
    if not isinstance(run, Mapping):
        run = {}
    found = {
        "Begun": _date(log.manifest.get("created")),
        "Task": log.manifest.get("model"),
        "Data": run.get("data"),
    }
    return {name: escape(_words(value)) for name, value in found.items() if value is not None}


def _sites(entries: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{_number(entry['value'])} {escape(entry['site'])}" for entry in entries]
    return "<br>".join(lines) or "-"


def _comparison(logs: Sequence[CorrectionLog]) -> str:
    if len(logs) == 1:
        return ""
    runs = compare_runs(logs)
    sites = compare_sites(logs, "entropy")
    return (
        '<section aria-labelledby="compared"><h2 id="compared">Runs side by side</h2>'
        + _table("The runs", runs, list(runs[0]))
        + _differences(logs)
        + '<div class="pair scripted"><div class="chart" id="means"></div><div class="chart" id="losses"></div></div>'
        + _table("Entropy of each site at its last update, in nats", sites, list(sites[0]))
        + "</section>"
    )


def _differences(logs: Sequence[CorrectionLog]) -> str:
    """Say in which settings the runs differ."""
    labels = run_labels(logs)
    settings = [dict(_flat(log.manifest)) for log in logs]
    rows: list[dict[str, str]] = []
    for name in dict.fromkeys(name for each in settings for name in each):
        values = [each.get(name, "-") for each in settings]
        if len(set(values)) > 1:
            rows.append({"setting": name, **dict(zip(labels, values, strict=True))})
    if not rows:
        return "<p>The runs have the same settings.</p>"
    return _table("Settings in which the runs differ", rows, ["setting", *labels])


def _changes(log: CorrectionLog) -> str:
    rows = changed_most(log)
    if not rows:
        return "<p>Nothing has changed between the first update and the last.</p>"
    columns = ["site", "quantity", "first", "last", "change"]
    return _table("For each quantity the site at which it changed by most", rows, columns, chosen="site")


def _layers(log: CorrectionLog) -> str:
    rows = layer_rows(log)
    columns = with_values(_LAYERS, rows)
    return _table("Every site: amplitudes at the end, measurements of the last update", rows, columns, chosen="site")


def _events(log: CorrectionLog) -> str:
    found = log.events()
    if not found:
        return f"<p>Nothing out of the ordinary in {len(log)} rows.</p>"
    table = _table("Updates where something was out of the ordinary", found[:500], list(found[0]))
    if len(found) > 500:
        return f"<p>The first 500 of {len(found)}.</p>{table}"
    return table


def _settings(log: CorrectionLog) -> str:
    lines = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in _flat(log.manifest)
    ]
    body = "".join(lines)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Settings of the run">'
        f'<table class="settings"><caption>Settings of the run</caption><tbody>{body}</tbody></table></div>'
    )


def _flat(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield names and values of a manifest, those of its groups as `group: name`."""
    for key, value in manifest.items():
        if key in _NOT_SETTINGS:
            continue
        if key == "created":
            yield key, _words(_date(value))
        elif isinstance(value, Mapping):
            yield from ((f"{key}: {name}", _words(each)) for name, each in value.items())
        else:
            yield key, _words(value)


def _words(value: object) -> str:
    """Return what JSON holds as a reader would write it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_words(each)}" for name, each in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value)) or "none"
    return str(value)


def _date(created: object) -> object:
    """The time at which a log was begun; what is no time, as it is."""
    if not isinstance(created, (int, float)):
        return created
    try:
        return datetime.fromtimestamp(created, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return created


def _meanings() -> str:
    lines = [f"<dt>{name}</dt><dd>{escape(_meaning(name))}</dd>" for name in COLUMNS]
    return '<dl class="meanings">' + "".join(lines) + "</dl>"


def _table(caption: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], chosen: str | None = None) -> str:
    """Return a table whose headings are buttons, which the page's script makes sort it."""
    numeric = {name for name in columns if any(_is_number(row.get(name)) for row in rows)}
    head = "".join(_heading(name, name in numeric) for name in columns)
    lines: list[str] = []
    for place, row in enumerate(rows):
        cells = "".join(_cell(name, row.get(name), chosen) for name in columns)
        lines.append(f'<tr data-place="{place}">{cells}</tr>')
    body = "".join(lines)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _heading(name: str, numeric: bool) -> str:
    meaning = escape(_MEANINGS.get(name) or _meaning(name))
    if name.endswith("_trend"):
        return f'<th scope="col"><span title="{meaning}">{name.removesuffix("_trend")}</span></th>'
    title = escape(_TITLES.get(name, name))
    button = f'<button type="button" title="{meaning}">{title}</button>'
    if numeric:
        return f'<th scope="col" class="number">{button}</th>'
    return f'<th scope="col">{button}</th>'


def _meaning(name: str) -> str:
    """Return a column's meaning with its unit; empty for a column that the schema does not know."""
    column = COLUMNS.get(name)
    if column is None:
        return ""
    if not column.unit:
        return column.meaning
    return f"{column.meaning} [{column.unit}]"


def _cell(name: str, value: Any, chosen: str | None) -> str:
    if name.endswith("_trend"):
        return f'<td class="trend" data-column="{name.removesuffix("_trend")}"></td>'
    if name == chosen:
        button = f'<button type="button" class="site">{escape(str(value))}</button>'
        return f'<th scope="row" data-value="{escape(str(value))}">{button}</th>'
    if _is_number(value):
        return f'<td class="number" data-value="{value!r}">{_number(value)}</td>'
    if value is None:
        return "<td></td>"
    return f"<td>{escape(str(value))}</td>"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}".replace("-", "\u2212", 1)
