"""How rows and sites show in a notebook and in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from eafo_dynamic.internals.tables import as_html, as_table, as_text
from eafo_dynamic.records.schema import Record

__all__ = ["History", "SiteList", "newest"]

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
_ROWS_AS_TEXT = 10


def newest(rows: list[Record], most: int = _MOST_ROWS) -> list[Record]:
    """The newest rows, with the columns that say most.

    Args:
        rows: of the correction log.
        most: how many.

    Returns:
        Rows with those columns alone.
    """
    return [{name: row.get(name) for name in _SHOWN} for row in rows[-most:]]


class History(list[Record]):
    """Rows of the correction log that show as a table in a notebook, in rich and at the prompt."""

    @property
    def _caption(self) -> str:
        return f"{len(self)} rows"

    def _repr_html_(self) -> str:
        return as_html(newest(self), self._caption)

    def __rich__(self) -> Any:
        return as_table(newest(self), self._caption)

    def __repr__(self) -> str:
        return as_text(as_table(newest(self, _ROWS_AS_TEXT), f"{self._caption}, the newest:"))

    def plot(self, what: str = "heatmap", column: str = "entropy") -> Any:
        """Draws these rows.

        Args:
            what: ``heatmap``, ``trajectories``, ``prediction`` or ``ranking``; the other figures of a log need its
                snapshots of the functions.
            column: of the log, for the figures that show one.

        Returns:
            A matplotlib figure.

        Raises:
            LogError: if there are no rows.
        """
        reader = import_module("eafo_dynamic.records.reader")  # which imports this module
        return reader.CorrectionLog.of_rows(self, {}).plot(what, column)


class SiteList(list[Any]):
    """Sites that show as a table with their live state in a notebook, in rich and at the prompt.

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
        return as_html(self._rows(), f"{len(self)} sites")

    def __rich__(self) -> Any:
        return as_table(self._rows(), f"{len(self)} sites")

    def __repr__(self) -> str:
        return as_text(self.__rich__())
