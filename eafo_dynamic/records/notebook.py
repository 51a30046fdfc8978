"""How rows and sites show in a notebook and in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from eafo_dynamic.errors import printable
from eafo_dynamic.records.schema import Record

__all__ = ["History", "SiteList"]

_SHOWN = (
    "step",
    "site",
    "eps",
    "lift",
    "gain",
    "slope",
    "entropy",
    "entropy_after",
    "d_entropy_d_eps",
    "n",
    "policy",
    "event",
)
_MOST_ROWS = 60


class History(list[Record]):
    """Rows of the correction log that show as a table in a notebook and in rich."""

    def _shown(self) -> list[Record]:
        return [{name: row.get(name) for name in _SHOWN} for row in self[-_MOST_ROWS:]]

    def _repr_html_(self) -> str:
        return _html(self._shown(), f"{len(self)} rows")

    def __rich__(self) -> Any:
        return _table(self._shown(), f"{len(self)} rows")


class SiteList(list[Any]):
    """Sites that show as a table with their live state in a notebook and in rich.

    Args:
        sites: the sites.
        states: eps, mu and sigma of each, as text.
    """

    def __init__(self, sites: Iterable[Any], states: Iterable[str]) -> None:
        super().__init__(sites)
        self._states = list(states)

    def _rows(self) -> list[Record]:
        return [{"site": site.name, "state": state} for site, state in zip(self, self._states, strict=True)]

    def _repr_html_(self) -> str:
        return _html(self._rows(), f"{len(self)} sites")

    def __rich__(self) -> Any:
        return _table(self._rows(), f"{len(self)} sites")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return ""
    return str(value)


def _html(rows: Sequence[Record], caption: str) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in _names(rows))
    lines: list[str] = []
    for row in rows:
        cells = "".join(f"<td>{escape(_text(value))}</td>" for value in row.values())
        lines.append(f"<tr>{cells}</tr>")
    body = "".join(lines)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _names(rows: Sequence[Record]) -> list[str]:
    if not rows:
        return []
    return list(rows[0])


def _table(rows: Sequence[Record], caption: str) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=caption, title_justify="left")
    for name in _names(rows):
        table.add_column(name)
    for row in rows:
        table.add_row(*(Text(printable(_text(value))) for value in row.values()))
    return table
