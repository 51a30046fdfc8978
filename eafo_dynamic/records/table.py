"""Rows kept by columns: a tenth of the memory of a list of dicts."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from eafo_dynamic.records.columns import Codes, Numbers, new_column

__all__ = ["Table"]


class Table:
    """Rows of a correction log.

    Args:
        columns: columns of equal length by name, among them `step` and `site` unless there are no rows.
        length: number of rows.
    """

    def __init__(self, columns: Mapping[str, Numbers | Codes] | None = None, length: int = 0) -> None:
        self.columns: dict[str, Numbers | Codes] = dict(columns or {})
        self._length = length
        self._by_site: dict[str, array[int]] = {}
        self._indexed = 0

    def __len__(self) -> int:
        return self._length

    @property
    def by_site(self) -> dict[str, array[int]]:
        """Positions of each site's rows, ascending; sites in the order they first appeared."""
        if self._indexed < self._length:
            sites = self.columns["site"].take(range(self._indexed, self._length))
            for position, site in enumerate(sites, self._indexed):
                self._by_site.setdefault(site, array("Q")).append(position)
            self._indexed = self._length
        return self._by_site

    def extend(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows; a column that is new is missing in the earlier ones.

        Args:
            rows: rows as read, with `step` and `site`; at least one.
        """
        found = _transposed(rows)
        for name in found:
            if name not in self.columns:
                self.columns[name] = new_column(name, self._length)
        missing = [None] * len(rows)
        for name, column in self.columns.items():
            column.extend(found.get(name, missing))
        self._length += len(rows)

    def column(self, name: str) -> list[Any]:
        """Return a whole column.

        Args:
            name: name of the column.

        Returns:
            Its values, None where missing.
        """
        return self.take(name, range(self._length))

    def take(self, name: str, positions: Iterable[int]) -> list[Any]:
        """Return a column's values at some positions.

        Args:
            name: name of the column.
            positions: positions of rows.

        Returns:
            The values, None where missing; None throughout if there is no such column.
        """
        column = self.columns.get(name)
        if column is None:
            return [None for _ in positions]
        return column.take(positions)

    def row(self, position: int, names: Sequence[str]) -> dict[str, Any]:
        """Return one row.

        Args:
            position: position of the row.
            names: columns wanted.

        Returns:
            The row's values by column.
        """
        return {name: self.take(name, (position,))[0] for name in names}

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return all rows.

        Args:
            names: columns wanted.

        Returns:
            One mapping per row.
        """
        columns = [self.column(name) for name in names]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def of_sites(self, sites: Iterable[str]) -> Table:
        """Return the rows of some sites.

        Args:
            sites: names of sites that have rows.

        Returns:
            A table of those rows, in their order.
        """
        return self._at(sorted(position for site in sites for position in self.by_site[site]))

    def between(self, first: int | None, last: int | None) -> Table:
        """Return the rows of a range of steps.

        Args:
            first: first step, None for no limit.
            last: last step, included, None for no limit.

        Returns:
            A table of those rows, in their order.
        """
        low, high = -math.inf, math.inf
        if first is not None:
            low = first
        if last is not None:
            high = last
        return self._at([position for position, step in enumerate(self.column("step")) if low <= step <= high])

    def _at(self, positions: Sequence[int]) -> Table:
        return Table({name: column.at(positions) for name, column in self.columns.items()}, len(positions))


def _transposed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[Any]]:
    """Return the rows' values by column, None where a row lacks a column others have."""
    names = list(rows[0])
    if len(names) > 1 and all(len(row) == len(names) for row in rows):
        try:
            # The usual case, rows of one writer, at the speed of C.
            return dict(zip(names, zip(*map(itemgetter(*names), rows), strict=True), strict=True))
        except KeyError:
            pass
    every = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in every}
