"""The result of a comparison as a table: in the terminal, in Markdown, and as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.compare.across import Across
from eafo_dynamic.experiments.compare.paired import Paired, labelled, main_reference, seeds_needed

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["MEANINGS", "across_rows", "html", "markdown", "notes", "rich_table", "rows", "write_html"]

Rows = Sequence[Mapping[str, str]]

MEANINGS = {
    "arm": "one way to train",
    "verdict": "better or worse where p < 0.05 and the interval does not hold 0",
    "n": "seeds that the arm and the reference have both finished; only these are paired",
    "mean": "mean over these seeds",
    "difference": "mean of the paired differences, arm less reference, and its 95 % bootstrap interval",
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
_TEXT = ("arm", "verdict")
# What a terminal that is too narrow goes without, the first one first.
_OPTIONAL = ("d_z", "gain per time", "difference", "mean", "w/t/l", "n", "standardised gain")


def rows(pairs: Sequence[Paired]) -> list[dict[str, str]]:
    """Return the table of one metric: the reference first, then one row an arm.

    Args:
        pairs: what `compare` returned, of one metric.

    Returns:
        Text by column, columns as in `MEANINGS`; columns that no arm has a value for are left out.
    """
    name = main_reference(pairs)
    widest = max((pair for pair in pairs if pair.reference == name), key=lambda pair: len(pair.seeds))
    reference = {"arm": f"{name} (reference)", "n": str(len(widest.seeds))}
    reference |= {"mean": _number(widest.reference_mean), "verdict": "-"}
    table = [reference, *({**_row(pair), "arm": labelled(pair, name)} for pair in pairs)]
    columns = [name for name in MEANINGS if any(row.get(name, "-") != "-" for row in table)]
    return [{name: row.get(name, "-") for name in columns} for row in table]


def _row(pair: Paired) -> dict[str, str]:
    scale = pair.relative_interval
    ratio, gain = pair.time_ratio, pair.gain_per_time
    return {
        "arm": pair.arm,
        "n": str(len(pair.seeds)),
        "mean": _number(pair.mean),
        "difference": _range(pair.difference, pair.low, pair.high, ".2g"),
        "relative [%]": "-" if pair.relative is None or scale is None else _range(pair.relative, *scale, ".2f"),
        "w/t/l": f"{pair.wins}/{pair.ties}/{pair.losses}",
        "p": _p(pair.p_corrected),
        "d_z": "-" if pair.d_z is None else f"{pair.d_z:+.2f}",
        "step time": "-" if ratio is None else f"{ratio:.3f}x",
        "gain per time": "-" if gain is None else f"{gain:+.3f}",
        "verdict": pair.verdict,
    }


def across_rows(summary: Sequence[Across]) -> list[dict[str, str]]:
    """Return the table over several tasks, one row an arm.

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
            "gain [%]": _range(one.gain, one.low, one.high, ".2f"),
            "standardised gain": _range(one.standardised, one.standardised_low, one.standardised_high, ".2f"),
            "step time": "-" if one.time_ratio is None else f"{one.time_ratio:.3f}x",
        }
        for one in summary
    ]


def notes(pairs: Sequence[Paired], unpaired: Sequence[str] = ()) -> list[str]:
    """Say what a reader of the table must know: the test, seeds that are missing, trainings that diverged.

    Args:
        pairs: what `compare` returned, of one metric.
        unpaired: what `results.unpaired` returned.

    Returns:
        One line each.
    """
    first = pairs[0]
    tests = ", ".join(dict.fromkeys(pair.test for pair in pairs if pair.test != "none")) or "none, too few seeds"
    lines = [
        f"{first.metric}: {'higher' if first.higher_is_better else 'lower'} is better. Test: {tests}; "
        f"corrected for {len(pairs)} {'arm' if len(pairs) == 1 else 'arms'} (Holm)."
    ]
    needed = seeds_needed(len(pairs))
    few = [pair.arm for pair in pairs if len(pair.seeds) < needed]
    if few:
        lines.append(
            f"With {len(pairs)} arms the test needs {needed} seeds to find anything at all; "
            f"too few: {_whose(few, pairs)}."
        )
    for text, attribute in (
        ("not paired, as the arm or the reference has not finished", "missing"),
        ("diverged in", "diverged"),
    ):
        alike: dict[tuple[int, ...], list[str]] = {}
        for pair in pairs:
            alike.setdefault(getattr(pair, attribute), []).append(pair.arm)
        lines += [
            f"{_whose(arms, pairs)}: {text} seed {', '.join(map(str, seeds))}."
            for seeds, arms in alike.items()
            if seeds
        ]
    for name in dict.fromkeys(pair.reference for pair in pairs):
        lost = sorted({seed for pair in pairs if pair.reference == name for seed in pair.reference_diverged})
        if lost:
            lines.append(f"{name} (reference): diverged in seed {', '.join(map(str, lost))}.")
    return lines + [f"Not a fair pair: {line}." for line in unpaired]


def _whose(arms: Sequence[str], pairs: Sequence[Paired]) -> str:
    return "every arm" if len(arms) == len(pairs) > 1 else ", ".join(arms)


def rich_table(table: Rows, title: str | None = None, width: int = 80) -> Table:
    """Return a table for the terminal.

    Args:
        table: from `rows` or `across_rows`.
        title: heading.
        width: characters it may take; columns that do not fit are left out and named below it.

    Returns:
        The table; verdicts are green and red.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title and Text(title))
    shown.title_justify = "left"
    colours = {"better": "green", "worse": "red", "diverged": "red"}
    wide = {name: max(len(name), *(len(row[name]) for row in table)) + 2 for name in table[0]}
    names = list(wide)
    for name in _OPTIONAL:
        if name in names and sum(wide[each] for each in names) > width:
            names.remove(name)
    for name in names:
        side = "left" if name in _TEXT else "right"
        shown.add_column(Text(name), justify=side, overflow="fold", no_wrap=name != "arm")
    for row in table:
        shown.add_row(*(Text(row[name], style=colours.get(row[name], "")) for name in names))
    left_out = [name for name in wide if name not in names]
    shown.caption = Text(f"not shown at this width: {', '.join(left_out)}") if left_out else None
    shown.caption_justify = "left"
    return shown


def markdown(table: Rows) -> str:
    """Return a table in GitHub's Markdown.

    Args:
        table: from `rows` or `across_rows`.

    Returns:
        Lines, each with its end.
    """
    names = list(table[0])
    lines = [names, ["---" if name in _TEXT else "---:" for name in names]]
    lines += [[row[name].replace("|", "\\|") for name in names] for row in table]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def html(
    title: str,
    tables: Mapping[str, tuple[Rows, Sequence[str]]],
    figures: Mapping[str, tuple[str, str]] | None = None,
) -> str:
    """Return one page that loads nothing from anywhere.

    Args:
        title: heading of the page.
        tables: by their heading: a table from `rows` or `across_rows`, and notes below it.
        figures: by their caption: the addresses (`data:` from `figures.embedded`) of a picture for a light and
            for a dark ground.

    Returns:
        The text of an HTML file.
    """
    columns = dict.fromkeys(name for table, _ in tables.values() for name in (table[0] if table else ()))
    parts = {
        "TITLE": escape(title),
        "STYLE": (files("eafo_dynamic.records.report") / "style.css").read_text(encoding="utf-8"),
        "TABLES": "".join(_section(heading, *content) for heading, content in tables.items()),
        "FIGURES": "".join(_figure(caption, *pictures) for caption, pictures in (figures or {}).items()),
        "MEANINGS": "".join(f"<dt>{escape(name)}</dt><dd>{escape(MEANINGS[name])}</dd>" for name in columns),
    }
    page = (files("eafo_dynamic.experiments.compare") / "page.html").read_text(encoding="utf-8")
    # Split, not replaced one after the other: an arm's name may look like a place of the template.
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(page.split("@@")))


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
    names = list(table[0])
    head = "".join(f'<th scope="col"{_class(name)} title="{escape(MEANINGS[name])}">{name}</th>' for name in names)
    body = "".join("<tr>" + "".join(_cell(name, row[name]) for name in names) + "</tr>" for row in table)
    return (
        f'<section><h2>{escape(heading)}</h2><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(heading)}"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><ul class="notes">'
        + "".join(f"<li>{escape(line)}</li>" for line in below)
        + "</ul></section>"
    )


def _figure(caption: str, light: str, dark: str) -> str:
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{escape(dark)}">'
        f'<img src="{escape(light)}" alt="{escape(caption)}"></picture></figure>'
    )


def _cell(name: str, text: str) -> str:
    if name == "arm":
        return f'<th scope="row">{escape(text)}</th>'
    kind = f' class="{text}"' if name == "verdict" and text in ("better", "worse") else _class(name)
    return f"<td{kind}>{escape(text)}</td>"


def _class(name: str) -> str:
    return "" if name in _TEXT else ' class="number"'


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:#.4g}" if abs(value) < 1e3 else f"{value:.6g}"


def _range(value: float, low: float, high: float, style: str) -> str:
    if math.isnan(value):
        return "-"
    ends = "" if math.isnan(low) else f" [{low:+{style}}, {high:+{style}}]"
    return f"{value:+{style}}{ends}"


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
