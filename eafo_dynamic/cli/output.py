"""Print rows as a table, JSON, CSV or Markdown: at any width, in a pipe, without colour."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = [
    "FORMATS",
    "add_format_option",
    "emit",
    "emit_facts",
    "is_unicode",
    "quiet_pipe",
    "sparkline",
    "table_width",
]

FORMATS = ("table", "json", "csv", "md")

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-~=+*#"

Row = Mapping[str, object]


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """Add `--format table|json|csv|md` to a command.

    Args:
        parser: the command's parser; the choice is `args.format`.
    """
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="table",
        help="table for people (default); json, csv and md (Markdown) for programs and documents",
    )


def emit(
    rows: Sequence[Row],
    *,
    columns: Sequence[str] | None = None,
    fmt: str = "table",
    title: str | None = None,
    optional: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    width: int | None = None,
    hint: str = "",
) -> None:
    """Print rows to stdout.

    Args:
        rows: what to print; a key that a row lacks counts as missing.
        columns: keys to print, in this order; None for all keys in the order they appear.
        fmt: `table`, `json` (a list of objects), `csv` or `md`.
        title: heading of a table; not printed in the other formats.
        optional: columns that a table may leave out where the terminal is too narrow, the first one first.
            The other formats never leave any out.
        labels: headings of a table for columns whose name is too long for one; the other formats have the
            names.
        width: characters of a table; None for the terminal's.
        hint: how to see the columns that a table left out, to end the line that names them.
    """
    names = list(columns) if columns is not None else list(dict.fromkeys(name for row in rows for name in row))
    with quiet_pipe():
        if fmt == "json":
            plain = [{name: _json_value(row.get(name)) for name in names} for row in rows]
            sys.stdout.write(json.dumps(plain, indent=2, ensure_ascii=not is_unicode()) + "\n")
        elif fmt == "csv":
            _write_csv(rows, names)
        elif fmt == "md":
            _write_markdown(rows, names)
        else:
            _write_table(rows, names, title, optional, labels or {}, width or table_width(), hint)
        sys.stdout.flush()


def sparkline(values: Sequence[float | None], width: int = 10) -> str:
    """Draw a series as a line of blocks.

    Args:
        values: the series; None and NaN leave a blank.
        width: number of characters at most; longer series are averaged over equal stretches.

    Returns:
        One character a stretch, low to high over the series' own range; a constant series is a flat line.
        ASCII characters where stdout cannot print blocks.
    """
    blocks = _BLOCKS if is_unicode() else _ASCII_BLOCKS
    means = [_mean(part) for part in _stretches(values, width)]
    known = [value for value in means if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else blocks[round((value - low) * scale)] for value in means)


def is_unicode() -> bool:
    """Return whether stdout can print more than ASCII.

    Returns:
        False where blocks and the ellipsis would raise an error.
    """
    try:
        (_BLOCKS + "…").encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


@contextmanager
def quiet_pipe() -> Generator[None]:
    """End in silence where the reader of a pipe has had enough, as `head` does.

    Yields:
        Nothing; a broken pipe inside is not an error.
    """
    try:
        yield
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stretches(values: Sequence[float | None], width: int) -> list[Sequence[float | None]]:
    count = min(width, len(values))
    edges = [len(values) * number // count for number in range(count + 1)] if count else []
    return [values[first:last] for first, last in itertools.pairwise(edges)]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def _json_value(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return str(value)


def _write_csv(rows: Sequence[Row], names: Sequence[str]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        values = [_json_value(row.get(name)) for name in names]
        writer.writerow(["" if value is None else value for value in values])


def _write_markdown(rows: Sequence[Row], names: Sequence[str]) -> None:
    right = _numeric_columns(rows, names)
    lines = [names, ["---:" if name in right else "---" for name in names]]
    columns = [_texts([row.get(name) for row in rows]) for name in names]
    lines += [[cell.replace("|", "\\|") for cell in cells] for cells in zip(*columns, strict=True)]
    for line in lines:
        sys.stdout.write("| " + " | ".join(" ".join(cell.split()) for cell in line) + " |\n")


def _write_table(
    rows: Sequence[Row],
    names: Sequence[str],
    title: str | None,
    optional: Sequence[str],
    labels: Mapping[str, str],
    width: int,
    hint: str,
) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heads = {name: labels.get(name, name) for name in names}
    cells = {name: _texts([row.get(name) for row in rows]) for name in names}
    shown = _fitting({name: [heads[name], *cells[name]] for name in names}, list(names), optional, width)
    right = _numeric_columns(rows, shown)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in shown:
        side = "right" if name in right else "left"
        # Names of sites are folded, never cut: they are copied into the next command.
        table.add_column(Text(heads[name]), justify=side, overflow="fold", no_wrap=name in right)
    for values in zip(*(cells[name] for name in shown), strict=True):
        table.add_row(*(Text(value) for value in values))
    if title:
        _print(width, Text(title, style="bold"))
    _print(width, table)
    left_out = [name for name in names if name not in shown]
    if left_out:
        _print(width, Text(f"not shown at this width: {', '.join(left_out)}{hint}", style="dim"))


def emit_facts(facts: Mapping[str, str], fmt: str = "table") -> None:
    """Print names and what is to be said of them.

    Args:
        facts: texts by name; a text of several lines stays in its column.
        fmt: `table`, or `md` for a Markdown table.
    """
    with quiet_pipe():
        if fmt == "md":
            rows = [{"": name, " ": text} for name, text in facts.items()]
            _write_markdown(rows, ["", " "])
        else:
            from rich.table import Table
            from rich.text import Text

            grid = Table.grid(padding=(0, 2))
            for name, text in facts.items():
                grid.add_row(Text(name, style="bold"), Text(text, overflow="fold"))
            _print(table_width(), grid)
        sys.stdout.flush()


def table_width() -> int:
    """Return the characters a table may take.

    Returns:
        The terminal's width; 80 in a pipe, unless the environment's COLUMNS says otherwise.
    """
    from rich.console import Console

    return Console(file=sys.stdout).width


def _print(width: int, part: Any) -> None:
    """Print a rich object without the blanks that fill their lines: pipes and golden files do without."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, width=width)
    with console.capture() as capture:
        console.print(part)
    sys.stdout.writelines(line.rstrip() + "\n" for line in capture.get().splitlines())


def _fitting(cells: Mapping[str, Sequence[str]], names: list[str], optional: Sequence[str], width: int) -> list[str]:
    """Return the names without as many of the optional ones, the first one first, as it takes to fit."""
    from rich.cells import cell_len

    wide = {name: max(map(cell_len, cells[name])) + 2 for name in names}
    for name in optional:
        if sum(wide[shown] for shown in names) - 2 <= width:
            break
        if name in names:
            names.remove(name)
    return names


def _numeric_columns(rows: Sequence[Row], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        values = [row.get(name) for row in rows]
        known: list[Any] = [value for value in values if value is not None]
        if known and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known):
            found.add(name)
    return found


def _texts(values: Sequence[object]) -> list[str]:
    """Return a column's values as text: numbers with as many decimals as give the largest four digits."""
    sizes = [abs(value) for value in values if isinstance(value, float) and math.isfinite(value)]
    largest = max(sizes, default=0.0)
    digits = math.floor(math.log10(largest)) if largest else 3
    decimals = 4 - digits if digits >= 0 else 3 - digits
    style = f".{decimals}f" if 1 <= decimals <= 7 else ".4g"
    return [_text(value, style) for value in values]


def _text(value: object, style: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return format(value, style) if isinstance(value, float) else str(value)
