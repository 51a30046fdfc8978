"""Counts what the fault-injection suite has tried."""

from __future__ import annotations

from collections import Counter


class Tally:
    """Call as ``tally("bad inputs tried")`` at the end of a test, so that one that fails counts nothing.

    Args:
        figures: of the session.
    """

    def __init__(self, figures: Counter[str]) -> None:
        self._figures = figures

    def __call__(self, what: str, number: int = 1) -> None:
        self._figures[what] += number
