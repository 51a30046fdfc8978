"""Tables of a comparison: for the terminal, in Markdown, and on one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.compare.across import Across
from eafo_dynamic.experiments.compare.paired import Paired, labelled, main_reference, seeds_needed

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["MEANINGS", "across_rows", "html", "markdown", "notes", "p_text", "rich_table", "rows", "write_html"]

Rows = Sequence[Mapping[str, str]]

MEANINGS = {
    "arm": "one way to train",
    "rate": "learning rate that was chosen for the arm, in units of the task's; x: that of its own parameters, in "
    "units of the model's",
    "verdict": "better or worse where p < 0.05 and the interval does not hold 0",
    "n": "seeds that the arm and the reference have both finished; only these are paired",
    "mean": "mean over these seeds",
    "difference": "mean of the paired differences, arm minus reference, and its 95 % bootstrap interval",
    "relative [%]": "the same in percent of its reference's mean",
    "w/t/l": "seeds in which the arm wins, ties and loses",
    "p": "paired sign-flip test, corrected for the number of arms (Holm)",
    "d_z": "mean of the paired differences in their standard deviations",
    "step time": "time of a training step, arm / reference, median over the seeds",
    "gain per time": "relative gain in percent for each percent of extra step time; - below 1 % extra",
    "better": "tasks in which the arm is better than the reference",
    "no difference": "tasks in which no difference was found",
    "worse": "tasks in which the arm is worse",
    "undecided": "tasks in which a training diverged, too few seeds are finished, or the arm is absent",
    "gain [%]": "mean relative gain over the tasks, positive is better, and its 95 % interval over tasks",
    "standardised gain": "the same, each task's gain in standard deviations of its paired differences",
}
_TEXT = ("arm", "verdict", "task", "against")
# Columns that a narrow terminal leaves out, the first one first.
_OPTIONAL = ("d_z", "gain per time", "difference", "mean", "w/t/l", "n", "standardised gain")


def rows(pairs: Sequence[Paired]) -> list[dict[str, str]]:
    """Return the table of one metric: the reference first, then one row per arm.

    Args:
        pairs: what `compare` returned, of one metric.

    Returns:
        Text by column, columns as in `MEANINGS`; columns in which no arm has a value are left out.
    """
    main = main_reference(pairs)
    table = [_reference_row(pairs, main)]
    for pair in pairs:
        table.append({**_row(pair), "arm": labelled(pair, main)})
    columns = [name for name in MEANINGS if any(row.get(name, "-") != "-" for row in table)]
    return [{name: row.get(name, "-") for name in columns} for row in table]


def _reference_row(pairs: Sequence[Paired], main: str) -> dict[str, str]:
    """Return the reference's seeds and mean, as paired with the arm that shares most seeds with it."""
    paired_with_it = [pair for pair in pairs if pair.reference == main]
    widest = max(paired_with_it, key=lambda pair: len(pair.seeds))
    return {
        "arm": f"{main} (reference)",
        "n": str(len(widest.seeds)),
        "mean": _number(widest.reference_mean),
        "verdict": "-",
    }


def _row(pair: Paired) -> dict[str, str]:
    row = {
        "arm": pair.arm,
        "n": str(len(pair.seeds)),
        "mean": _number(pair.mean),
        "difference": _with_interval(pair.difference, pair.low, pair.high, ".2g"),
        "w/t/l": f"{pair.wins}/{pair.ties}/{pair.losses}",
        "p": p_text(pair.p_corrected),
        "d_z": _optional(pair.d_z, "+.2f"),
        "step time": _ratio(pair.time_ratio),
        "gain per time": _optional(pair.gain_per_time, "+.3f"),
        "verdict": pair.verdict,
    }
    if pair.relative is not None and pair.relative_interval is not None:
        low, high = pair.relative_interval
        row["relative [%]"] = _with_interval(pair.relative, low, high, ".2f")
    return row


def across_rows(summary: Sequence[Across]) -> list[dict[str, str]]:
    """Return the table over several tasks, one row per arm.

    Args:
        summary: what `summarise` returned.

    Returns:
        Text by column.
    """
    return [
        {
            "arm": one.arm,
            "better": str(len(one.better)),
            "no difference": str(len(one.no_difference)),
            "worse": str(len(one.worse)),
            "undecided": str(len(one.undecided) + len(one.absent)),
            "gain [%]": _with_interval(one.gain, one.low, one.high, ".2f"),
            "standardised gain": _with_interval(one.standardised, one.standardised_low, one.standardised_high, ".2f"),
            "step time": _ratio(one.time_ratio),
        }
        for one in summary
    ]


def notes(pairs: Sequence[Paired], unpaired: Sequence[str] = ()) -> list[str]:
    """Say what a reader of the table must know: the test, seeds that are missing, trainings that diverged.

    Args:
        pairs: what `compare` returned, of one metric.
        unpaired: what `results.unpaired` returned.

    Returns:
        One note per line.
    """
    lines = [_test_note(pairs)]
    needed = seeds_needed(len(pairs))
    few = [pair.arm for pair in pairs if len(pair.seeds) < needed]
    if few:
        lines.append(
            f"With {_counted(pairs)} the test needs {needed} seeds to find anything at all; "
            f"too few: {_arms(few, pairs)}."
        )
    missing = "not paired, as the arm or the reference has not finished"
    lines += _seed_notes(missing, {pair.arm: pair.missing for pair in pairs}, pairs)
    lines += _seed_notes("diverged in", {pair.arm: pair.diverged for pair in pairs}, pairs)
    for name in dict.fromkeys(pair.reference for pair in pairs):
        diverged = sorted({seed for pair in pairs if pair.reference == name for seed in pair.reference_diverged})
        if diverged:
            lines.append(f"{name} (reference): diverged in seed {_listed(diverged)}.")
    lines += [f"Not a fair pair: {line}." for line in unpaired]
    return lines


def _test_note(pairs: Sequence[Paired]) -> str:
    first = pairs[0]
    direction = "higher" if first.higher_is_better else "lower"
    tests = dict.fromkeys(pair.test for pair in pairs if pair.test != "none")
    named = ", ".join(tests) or "none, too few seeds"
    return f"{first.metric}: {direction} is better. Test: {named}; corrected for {_counted(pairs)} (Holm)."


def _counted(pairs: Sequence[Paired]) -> str:
    return "1 arm" if len(pairs) == 1 else f"{len(pairs)} arms"


def _seed_notes(what: str, seeds_by_arm: Mapping[str, tuple[int, ...]], pairs: Sequence[Paired]) -> list[str]:
    """Return one line for all arms that have the same seeds."""
    arms_by_seeds: dict[tuple[int, ...], list[str]] = {}
    for arm, seeds in seeds_by_arm.items():
        if seeds:
            arms_by_seeds.setdefault(seeds, []).append(arm)
    return [f"{_arms(arms, pairs)}: {what} seed {_listed(seeds)}." for seeds, arms in arms_by_seeds.items()]


def _arms(arms: Sequence[str], pairs: Sequence[Paired]) -> str:
    if len(arms) == len(pairs) > 1:
        return "every arm"
    return ", ".join(arms)


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))


def rich_table(table: Rows, title: str | None = None, width: int = 80) -> Table:
    """Return a table for the terminal.

    Args:
        table: from `rows` or `across_rows`.
        title: heading.
        width: number of characters it may take; columns that do not fit are left out and named below it.

    Returns:
        The table; verdicts are green and red.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    widths = {name: max(len(name), *(len(row[name]) for row in table)) + 2 for name in table[0]}
    columns = list(widths)
    for name in _OPTIONAL:
        if name in columns and sum(widths[column] for column in columns) > width:
            columns.remove(name)
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    if title:
        shown.title = Text(title)
    shown.title_justify = "left"
    for name in columns:
        side = "left" if name in _TEXT else "right"
        shown.add_column(Text(name), justify=side, overflow="fold", no_wrap=name != "arm")
    colours = {"better": "green", "worse": "red", "diverged": "red"}
    for row in table:
        shown.add_row(*(Text(row[name], style=colours.get(row[name], "")) for name in columns))
    left_out = [name for name in widths if name not in columns]
    if left_out:
        shown.caption = Text(f"not shown at this width: {', '.join(left_out)}")
    shown.caption_justify = "left"
    return shown


def markdown(table: Rows) -> str:
    """Return a table in GitHub's Markdown.

    Args:
        table: from `rows` or `across_rows`.

    Returns:
        Lines, each with its line end.
    """
    columns = list(table[0])
    lines = [columns, ["---" if name in _TEXT else "---:" for name in columns]]
    for row in table:
        lines.append([row[name].replace("|", "\\|") for name in columns])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def html(
    title: str,
    tables: Mapping[str, tuple[Rows, Sequence[str]]],
    figures: Mapping[str, tuple[str, str]] | None = None,
) -> str:
    """Return one page that loads nothing from elsewhere.

    Args:
        title: heading of the page.
        tables: by heading, a table from `rows` or `across_rows` and the notes below it.
        figures: by caption, a picture for a light and one for a dark background, as `data:` addresses from
            `figures.embedded`.

    Returns:
        The text of an HTML file.
    """
    columns: dict[str, None] = {}
    for table, _ in tables.values():
        for row in table[:1]:
            columns.update(dict.fromkeys(row))
    parts = {
        "TITLE": escape(title),
        "STYLE": (files("eafo_dynamic.records.report") / "style.css").read_text(encoding="utf-8"),
        "TABLES": "".join(_section(heading, table, below) for heading, (table, below) in tables.items()),
        "FIGURES": "".join(_figure(caption, light, dark) for caption, (light, dark) in (figures or {}).items()),
        "MEANINGS": "".join(f"<dt>{escape(name)}</dt><dd>{escape(MEANINGS[name])}</dd>" for name in columns),
    }
    template = (files("eafo_dynamic.experiments.compare") / "page.html").read_text(encoding="utf-8")
    # Split once, not replaced one part after the other: an arm's name may look like a place of the template.
    pieces = template.split("@@")
    pieces[1::2] = [parts[name] for name in pieces[1::2]]
    return "".join(pieces)


def write_html(page: str, out: Path) -> Path:
    """Write a page.

    Args:
        page: from `html`.
        out: the file.

    Returns:
        The file.

    Raises:
        ConfigError: if it cannot be written.
    """
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise ConfigError("--out", str(out), problem, "Name a file in a folder that exists.") from None
    return out


def _section(heading: str, table: Rows, below: Sequence[str]) -> str:
    columns = list(table[0])
    head = "".join(_heading_cell(name) for name in columns)
    body = "".join("<tr>" + "".join(_cell(name, row[name]) for name in columns) + "</tr>" for row in table)
    lines = "".join(f"<li>{escape(line)}</li>" for line in below)
    return (
        f'<section><h2>{escape(heading)}</h2><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(heading)}"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><ul class="notes">{lines}</ul></section>'
    )


def _figure(caption: str, light: str, dark: str) -> str:
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{escape(dark)}">'
        f'<img src="{escape(light)}" alt="{escape(caption)}"></picture></figure>'
    )


def _heading_cell(name: str) -> str:
    return f'<th scope="col"{_class(name)} title="{escape(MEANINGS[name])}">{name}</th>'


def _cell(name: str, text: str) -> str:
    if name == "arm":
        return f'<th scope="row">{escape(text)}</th>'
    if name == "verdict" and text in ("better", "worse"):
        return f'<td class="{text}">{text}</td>'
    return f"<td{_class(name)}>{escape(text)}</td>"


def _class(name: str) -> str:
    if name in _TEXT:
        return ""
    return ' class="number"'


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    if abs(value) < 1e3:
        return f"{value:#.4g}"
    return f"{value:.6g}"


def _optional(value: float | None, style: str) -> str:
    if value is None:
        return "-"
    return format(value, style)


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}x"


def _with_interval(value: float, low: float, high: float, style: str) -> str:
    if math.isnan(value):
        return "-"
    text = f"{value:+{style}}"
    if math.isnan(low):
        return text
    return f"{text} [{low:+{style}}, {high:+{style}}]"


def p_text(value: float) -> str:
    """A p-value as tables show it.

    Args:
        value: the p-value.

    Returns:
        Three digits; - where there is none.
    """
    if math.isnan(value):
        return "-"
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}"
