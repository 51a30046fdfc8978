"""`eafo-dynamic log`: look into the per-layer correction log of a run."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from typing import Any, TypeAlias

from eafo_dynamic.cli import log_views
from eafo_dynamic.cli.helptext import examples
from eafo_dynamic.cli.log_columns import TABLE_ROWS
from eafo_dynamic.cli.output import add_format_option
from eafo_dynamic.records import COLUMNS
from eafo_dynamic.records.figures.logs import FIGURES

__all__ = ["columns_help", "register"]

Commands: TypeAlias = "argparse._SubParsersAction[Any]"  # pyright: ignore[reportPrivateUsage]

_RUN = "folder of a run, or one above a single run"


def register(commands: Commands) -> None:
    """Add `log` and its subcommands to the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    shown = examples(
        "log layers runs/digits_vit",
        "log show runs/digits_vit blocks.0 --steps 0:500 --format csv",
        "log plot runs/digits_vit --what functions --out functions.png",
        "log report runs/digits_vit --out report.html",
    )
    shown["epilog"] += f"\n\n{columns_help()}"
    parser = commands.add_parser(
        "log",
        help="inspect the per-layer correction log of a run",
        description="Inspect the per-layer correction log of a run.",
        **shown,
    )
    verbs = parser.add_subparsers(dest="log_command", metavar="COMMAND", required=True)
    _add_summary(verbs)
    _add_layers(verbs)
    _add_show(verbs)
    _add_events(verbs)
    _add_compare(verbs)
    _add_plot(verbs)
    _add_report(verbs)


def columns_help() -> str:
    """Return the columns of a log with unit and meaning, as text for a terminal.

    Returns:
        One line or more per column.
    """
    lines = ["columns of a log [unit; 1 is a pure number]:"]
    margin = max(map(len, COLUMNS)) + 4
    for name, column in COLUMNS.items():
        text = column.meaning
        if column.unit:
            text += f" [{column.unit}]"
        first, *more = textwrap.wrap(text, 79 - margin)
        lines.append(f"  {name:{margin - 2}}{first}")
        for line in more:
            lines.append(" " * margin + line)
    return "\n".join(lines)


def _add_command(
    verbs: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    help_text: str,
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=help_text, description=_sentence(help_text))
    parser.set_defaults(run=run)
    if name == "compare":
        parser.add_argument("runs", metavar="RUN", nargs="+", help=_RUN)
    else:
        parser.add_argument("folder", metavar="RUN", help=_RUN)
    add_format_option(parser)
    _add_steps(parser)
    parser.add_argument("--wide", action="store_true", help="a table with all columns and whole names")
    return parser


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _add_summary(verbs: Commands) -> None:
    parser = _add_command(verbs, "summary", log_views.summary, "the run on one screen")
    _add_site(parser)
    _add_follow(parser)


def _add_layers(verbs: Commands) -> None:
    parser = _add_command(verbs, "layers", log_views.layers, "one row per site: where it is and how it came there")
    _add_site(parser)
    _add_sort(parser)
    _add_follow(parser)


def _add_show(verbs: Commands) -> None:
    parser = _add_command(verbs, "show", log_views.show, "every update of a site")
    parser.add_argument("site", metavar="SITE", help="a site's name, a glob or a part of the dotted name")
    parser.add_argument(
        "--limit",
        type=_count,
        metavar="N",
        help=f"at most N rows, evenly spaced, 0 for all (default: all, in a table {TABLE_ROWS})",
    )
    _add_sort(parser)


def _add_events(verbs: Commands) -> None:
    parser = _add_command(verbs, "events", log_views.events, "updates where something was out of the ordinary")
    _add_site(parser)


def _add_compare(verbs: Commands) -> None:
    parser = _add_command(verbs, "compare", log_views.compare, "several runs side by side")
    _add_site(parser)
    _add_sort(parser)
    parser.add_argument("--by", choices=("run", "site"), default="run", help="one row per run (default) or per site")
    parser.add_argument(
        "--column", default="entropy", metavar="NAME", help="with --by site: the column to compare (default: entropy)"
    )


def _add_plot(verbs: Commands) -> None:
    text = "a figure of the log as PNG, SVG or PDF"
    parser = verbs.add_parser("plot", help=text, description=_sentence(text))
    parser.set_defaults(run=log_views.plot)
    parser.add_argument("folder", metavar="RUN", help=_RUN)
    parser.add_argument(
        "--what", default="heatmap", metavar="FIGURE", help=f"one of {', '.join(FIGURES)} (default: heatmap)"
    )
    parser.add_argument(
        "--column",
        default="entropy",
        metavar="NAME",
        help="what a heatmap, trajectories or a ranking show: entropy (default), eps, dead_fraction, ...",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the picture: .png, .svg or .pdf")
    parser.add_argument("--dark", action="store_true", help="draw on a dark ground")
    _add_steps(parser)
    _add_site(parser)


def _add_report(verbs: Commands) -> None:
    text = "one HTML file with everything, for any browser, offline"
    parser = verbs.add_parser("report", help=text, description=_sentence(text))
    parser.set_defaults(run=log_views.report)
    parser.add_argument("runs", metavar="RUN", nargs="+", help=_RUN)
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the HTML file (default: report.html)")
    _add_steps(parser)
    _add_site(parser)


def _add_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=_step_range, metavar="A:B", help="only updates at steps A to B, A: or :B")


def _add_site(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--site",
        action="append",
        metavar="PATTERN",
        help="only these sites: a name, a glob or a part of the dotted name; may be repeated",
    )


def _add_sort(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sort", metavar="COLUMN", help="sort by a column of the log, smallest first")
    parser.add_argument("--descending", action="store_true", help="with --sort: largest first")


def _add_follow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--follow",
        type=_seconds,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="print again when a live run has new rows, checked every SECONDS (default: 2); Ctrl-C ends",
    )


def _step_range(text: str) -> tuple[int | None, int | None]:
    first, colon, last = text.partition(":")
    if not colon:
        last = first
    try:
        low = int(first) if first else None
        high = int(last) if last else None
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of steps; write A:B, A:, :B or A") from None
    if low is not None and high is not None and low > high:
        raise argparse.ArgumentTypeError(f"{text!r} is an empty range: {low} is above {high}")
    return low, high


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows; write 0 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; write one above 0")
    return value
