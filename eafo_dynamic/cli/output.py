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

from eafo_dynamic.errors import printable

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
    columns: Iterable[str] | None = None,
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
        labels: shorter headings for a table, by column; the other formats have the columns' names.
        width: number of characters of a table's line; None for the terminal's.
        hint: how to see the columns that a table left out; it ends the line that names them.
    """
    if columns is None:
        columns = dict.fromkeys(name for row in rows for name in row)
    names = list(columns)
    with quiet_pipe():
        if fmt == "json":
            plain = [{name: _json_value(row.get(name)) for name in names} for row in rows]
            text = json.dumps(plain, indent=2, ensure_ascii=not is_unicode())
            if sys.stdout.isatty():
                # JSON writes \u001b itself, but leaves DELETE and C1 control characters as they are.
                text = printable(text)
            sys.stdout.write(text + "\n")
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
        width: largest number of characters; longer series are averaged over equal parts.

    Returns:
        One character per part, from low to high over the series' own range; a constant series is a flat line.
        ASCII characters where stdout cannot print blocks.
    """
    blocks = _BLOCKS if is_unicode() else _ASCII_BLOCKS
    means = [_mean(part) for part in _equal_parts(values, width)]
    known = [value for value in means if value is not None]
    if not known:
        return ""
    low = min(known)
    high = max(known)
    scale = 0.0
    if high > low:
        scale = (len(blocks) - 1) / (high - low)
    line = ""
    for value in means:
        if value is None:
            line += " "
        else:
            line += blocks[round((value - low) * scale)]
    return line


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
    """End without an error where the reader of a pipe has closed it, as `head` does.

    Yields:
        Nothing; a broken pipe inside is not an error.
    """
    try:
        yield
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, which would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _equal_parts(values: Sequence[float | None], most: int) -> list[Sequence[float | None]]:
    count = min(most, len(values))
    if count == 0:
        return []
    edges = [len(values) * number // count for number in range(count + 1)]
    return [values[first:last] for first, last in itertools.pairwise(edges)]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    return math.fsum(known) / len(known)


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
        writer.writerow([_csv_cell(row.get(name)) for name in names])


def _csv_cell(value: Any) -> Any:
    cell = _json_value(value)
    if cell is None:
        return ""
    if isinstance(cell, str) and sys.stdout.isatty():
        return printable(cell)
    return cell


def _write_markdown(rows: Sequence[Row], names: Sequence[str]) -> None:
    numeric = _numeric_columns(rows, names)
    columns = [_texts([row.get(name) for row in rows]) for name in names]
    lines = [names, ["---:" if name in numeric else "---" for name in names]]
    for cells in zip(*columns, strict=True):
        lines.append([cell.replace("|", "\\|") for cell in cells])
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

    headings = {name: labels.get(name, name) for name in names}
    cells = {name: _texts([row.get(name) for row in rows]) for name in names}
    shown = _fitting({name: [headings[name], *cells[name]] for name in names}, optional, width)
    numeric = _numeric_columns(rows, shown)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in shown:
        side = "right" if name in numeric else "left"
        # Names of sites are folded, never cut: users copy them into the next command.
        table.add_column(Text(headings[name]), justify=side, overflow="fold", no_wrap=name in numeric)
    for values in zip(*(cells[name] for name in shown), strict=True):
        table.add_row(*map(Text, values))
    if title:
        _print(width, Text(printable(title), style="bold"))
    _print(width, table)
    left_out = [name for name in names if name not in shown]
    if left_out:
        _print(width, Text(f"not shown at this width: {', '.join(left_out)}{hint}", style="dim"))


def emit_facts(facts: Mapping[str, str], fmt: str = "table") -> None:
    """Print names, each with a text beside it.

    Args:
        facts: texts by name; the lines of a longer text stay in their column.
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
                grid.add_row(Text(name, style="bold"), Text(printable(text), overflow="fold"))
            _print(table_width(), grid)
        sys.stdout.flush()


def table_width() -> int:
    """Return the number of characters that a table's line may have.

    Returns:
        The terminal's width; 80 in a pipe, unless the environment variable COLUMNS says otherwise.
    """
    from rich.console import Console

    return Console(file=sys.stdout).width


def _print(width: int, part: Any) -> None:
    """Print a rich object without the blanks at the end of its lines."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, width=width)
    with console.capture() as capture:
        console.print(part)
    sys.stdout.writelines(line.rstrip() + "\n" for line in capture.get().splitlines())


def _fitting(cells: Mapping[str, Sequence[str]], optional: Sequence[str], width: int) -> list[str]:
    """Return the columns that fit: optional ones are left out, the first one first, as far as necessary."""
    from rich.cells import cell_len

    widths = {name: max(map(cell_len, texts)) + 2 for name, texts in cells.items()}
    for name in optional:
        if sum(widths.values()) - 2 <= width:
            break
        widths.pop(name, None)
    return list(widths)


def _numeric_columns(rows: Sequence[Row], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        known = [row[name] for row in rows if row.get(name) is not None]
        if known and all(map(_is_number, known)):
            found.add(name)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _texts(values: Sequence[object]) -> list[str]:
    """Return a column's values as text: numbers with as many decimals as show four digits of the largest."""
    sizes = [abs(value) for value in values if isinstance(value, float) and math.isfinite(value)]
    largest = max(sizes, default=0.0)
    exponent = 3
    if largest > 0:
        exponent = math.floor(math.log10(largest))
    decimals = 3 - exponent
    if exponent >= 0:
        decimals += 1  # never fewer than one for numbers below 10,000
    style = ".4g"
    if 1 <= decimals <= 7:
        style = f".{decimals}f"
    return [_text(value, style) for value in values]


def _text(value: object, style: str) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return printable(str(value))
    if math.isnan(value):
        return "-"
    return format(value, style)
