"""Counts what the fault-injection suite has tried, and says so at the end of a run of the tests."""

from __future__ import annotations

from collections import Counter

import pytest
from tally import Tally

_FIGURES = pytest.StashKey[Counter[str]]()
_ORDER = ("crash points tried", "runs resumed equal", "trainer features tried", "distributed runs tried")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = Counter()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Call as ``tally("bad inputs tried")`` at the end of a test."""
    return Tally(request.config.stash[_FIGURES])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures = config.stash[_FIGURES]
    known = [name for name in _ORDER if figures[name]]
    lines = [f"{name}: {figures[name]}" for name in [*known, *sorted(set(figures) - set(_ORDER))]]
    if lines:
        terminalreporter.write_sep("-", "faults")
        terminalreporter.write_line(", ".join(lines))
