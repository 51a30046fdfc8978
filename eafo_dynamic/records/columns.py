"""The two ways a column of a log is kept in memory: doubles, and numbered texts."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from eafo_dynamic.records.schema import COLUMNS

__all__ = ["Codes", "Numbers", "new_column"]


class Numbers:
    """A column of numbers as doubles, NaN where missing.

    Args:
        whole: whether the values are whole numbers and are given back as `int`.
        values: the values to begin with.
    """

    def __init__(self, whole: bool, values: Iterable[float] = ()) -> None:
        self.whole = whole
        self.values = array("d", values)

    def extend(self, values: Sequence[Any]) -> None:
        """Append values, None where missing."""
        try:
            self.values += array("d", values)
        except TypeError:
            self.values += array("d", [math.nan if value is None else value for value in values])

    def take(self, positions: Iterable[int]) -> list[Any]:
        """Return the values at some positions, None where missing."""
        values = map(self.values.__getitem__, positions)
        if self.whole:
            return [None if value != value else int(value) for value in values]
        return [None if value != value else value for value in values]

    def at(self, positions: Sequence[int]) -> Numbers:
        """Return a column of the values at some positions."""
        return Numbers(self.whole, map(self.values.__getitem__, positions))

    def numpy(self) -> Any:
        """Return the values as float64, or as int64 where all are whole and none is missing."""
        import numpy

        values = numpy.array(self.values, dtype=numpy.float64)
        if self.whole and not numpy.isnan(values).any():
            return values.astype(numpy.int64)
        return values


class Codes:
    """A column of texts, or of anything else JSON holds, each different value kept once.

    Args:
        values: the different values to begin with.
        codes: for each row the position of its value among them.
    """

    def __init__(self, values: Sequence[Any] = (), codes: Iterable[int] = ()) -> None:
        self.index = _Index(values)
        self.codes = array("I", codes)

    @property
    def seen(self) -> list[Any]:
        """The different values in the order they first appeared."""
        return self.index.seen

    def extend(self, values: Sequence[Any]) -> None:
        """Append values, None where missing."""
        self.codes.extend(map(self.index.__getitem__, map(_key, values)))

    def take(self, positions: Iterable[int]) -> list[Any]:
        """Return the values at some positions, None where missing."""
        return [self.seen[self.codes[position]] for position in positions]

    def at(self, positions: Sequence[int]) -> Codes:
        """Return a column of the values at some positions."""
        return Codes(self.seen, map(self.codes.__getitem__, positions))

    def numpy(self) -> Any:
        """Return the values as an object array."""
        import numpy

        seen = numpy.empty(len(self.seen), dtype=object)
        seen[:] = self.seen
        return seen[numpy.array(self.codes, dtype=numpy.int64)]


class _Index(dict[Any, int]):
    """Numbers values in the order in which they are asked for."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.seen: list[Any] = list(values)
        super().__init__((_key(value), code) for code, value in enumerate(values))

    def __missing__(self, key: Any) -> int:
        value = key
        if isinstance(key, tuple):
            value = json.loads(key[0])
        self.seen.append(value)
        self[key] = len(self)
        return self[key]


def _key(value: Any) -> Any:
    """Return something hashable that differs for 1, 1.0 and True, which are one key to a dict."""
    if value is None or type(value) is str:
        return value
    return (json.dumps(value),)


def new_column(name: str, length: int) -> Numbers | Codes:
    """Return a column whose values are all missing.

    Args:
        name: name of the column; the schema's numbers are kept as such.
        length: number of rows.

    Returns:
        The column.
    """
    known = COLUMNS.get(name)
    if known is not None and known.kind != "text":
        return Numbers(known.kind == "int", [math.nan] * length)
    return Codes([None], [0] * length)
