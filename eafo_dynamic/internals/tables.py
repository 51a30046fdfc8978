"""Rows as a table, in HTML for notebooks and for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from eafo_dynamic.errors import printable

__all__ = ["as_html", "as_table", "as_text", "clipped"]

_WIDTH = 110  # of a table that is turned into a text

Row = Mapping[str, object]


def clipped(names: Sequence[str], width: int, mark: str = "…") -> list[str]:
    """Cuts names from the left, where dotted names are most alike.

    Args:
        names: of sites.
        width: most characters of each.
        mark: one character for what was cut.

    Returns:
        The names in the same order; as they were if two of them would become equal.
    """
    short = [name if len(name) <= width else mark + name[len(name) - width + 1 :] for name in names]
    if len(set(short)) < len(set(names)):
        return list(names)
    return short


def as_html(rows: Sequence[Row], caption: str) -> str:
    """A table for a notebook.

    Args:
        rows: with the same keys each.
        caption: above it.

    Returns:
        HTML.
    """
    heads = "".join(f"<th>{escape(name)}</th>" for name in _names(rows))
    lines: list[str] = []
    for row in rows:
        cells = "".join(f"<td>{escape(_text(value))}</td>" for value in row.values())
        lines.append(f"<tr>{cells}</tr>")
    body = "".join(lines)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def as_table(rows: Sequence[Row], caption: str) -> Any:
    """A table for rich.

    Args:
        rows: with the same keys each.
        caption: above it.

    Returns:
        A ``rich.table.Table``.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=caption, title_justify="left")
    for name in _names(rows):
        table.add_column(name)
    for row in rows:
        table.add_row(*(Text(printable(_text(value))) for value in row.values()))
    return table


def as_text(table: Any) -> str:
    """A table of rich as plain text.

    Args:
        table: anything that rich can print.

    Returns:
        Its lines.
    """
    from rich.console import Console

    console = Console(width=_WIDTH, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _names(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    return list(rows[0])


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return ""
    return str(value)
