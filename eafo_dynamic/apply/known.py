"""The calls of one function or shared activation that an owner knows, and which of them a call is."""

from __future__ import annotations

import json
import warnings
import weakref
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from types import CodeType
from typing import Any

from eafo_dynamic.apply.site import Site
from eafo_dynamic.errors import printable
from eafo_dynamic.find.evidence import BY_ORDER, Evidence, which
from eafo_dynamic.find.places import is_repeated, is_unbranched, line_of, places_of
from eafo_dynamic.internals.torch_internals import (
    callers,
    code_of,
    constant_result,
    current_frame,
    instruction_of,
    traced_instructions,
)

__all__ = ["ENTRIES", "KnownCalls", "place_in_graph", "tell_in_graph", "warn_of_order"]

_MOST_REMEMBERED = 1 << 12


_ALL: weakref.WeakSet[KnownCalls] = weakref.WeakSet()


class KnownCalls:
    """The known calls of one key.

    Attributes:
        rows: the evidence of each.
        sites: of each, the sites of its turns in one forward; None for a turn that is left alone.
        text: the rows, as the compiler is given them.
        single: by its places, the site of each call that is the only one there, with the child before it; None where
            the place decides.
        unknown: what to say of calls that were left plain, since they are none of these.
    """

    def __init__(self) -> None:
        self.rows: list[Evidence] = []
        self.sites: list[list[Site | None]] = []
        self.text = "[]"
        self.single: dict[tuple[str, ...], tuple[str | None, Site | None]] = {}
        self.unknown: dict[Evidence, str] = {}
        _ALL.add(self)
        self._remembered: dict[tuple[tuple[str, ...], tuple[str, ...]], int | None] = {}

    @classmethod
    def by_order(cls, sites: Sequence[Site | None]) -> KnownCalls:
        """Calls that only their order tells apart, as versions before 0.2 did.

        Args:
            sites: of call 0, 1, ... in a forward.

        Returns:
            The calls.
        """
        known = cls()
        for turn, site in enumerate(sites):
            known.put(BY_ORDER, turn, site)
        return known

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "sites": self.sites}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        vars(self).update(state)
        self._look_again()

    def put(self, evidence: Evidence, turn: int, site: Site | None) -> None:
        """Takes in one call.

        Args:
            evidence: of it.
            turn: how often there was a call by the same evidence before, in one forward.
            site: its site; None if it is left alone.
        """
        if evidence not in self.rows:
            self.rows.append(evidence)
            self.sites.append([])
        sites = self.sites[self.rows.index(evidence)]
        sites += [None] * (turn + 1 - len(sites))
        sites[turn] = site
        self._look_again()

    def _look_again(self) -> None:
        self.text = json.dumps(self.rows)
        self._remembered.clear()
        there = Counter(row.places for row in self.rows)
        self.single = {}
        for row, sites in zip(self.rows, self.sites, strict=True):
            if there[row.places] == 1 and len(sites) == 1 and not is_repeated(row.places):
                last = row.after[-1] if row.after else ""
                self.single[row.places] = None if is_unbranched(row.places) else last, sites[0]

    def has(self, evidence: Evidence, turn: int) -> bool:
        """Whether a call is known, with or without a site.

        Args:
            evidence: of it.
            turn: how often there was a call by the same evidence before, in one forward.

        Returns:
            Whether it is.
        """
        return evidence in self.rows and turn < len(self.sites[self.rows.index(evidence)])

    def all_sites(self) -> list[Site | None]:
        """The sites of all calls.

        Returns:
            The sites, in the order of the rows.
        """
        return [site for turns in self.sites for site in turns]

    def at(self, row: int, turn: int) -> Site | None:
        """The site of a call.

        Args:
            row: which of the rows it is.
            turn: how often there was a call of that row before, in this forward; a longer loop than in the example
                goes on with its last turn's site.

        Returns:
            The site; None where the call is left alone.
        """
        turns = self.sites[row]
        return turns[turn if turn < len(turns) else -1]

    def tell(self, key: str, places: tuple[str, ...], after: tuple[str, ...]) -> int | None:
        """Which row a call is; a call that is none of them is named once.

        Args:
            key: what is called.
            places: where the call is made.
            after: the children before it.

        Returns:
            The row's number; None if it cannot be told.
        """
        try:
            row = self._remembered[places, after]
        except KeyError:
            row = self._look_up(key, places, after)
        if row is None:
            self._meet()
        return row

    def _look_up(self, key: str, places: tuple[str, ...], after: tuple[str, ...]) -> int | None:
        row = which(self.rows, Evidence(places, after))
        if row is None:
            here = ((code_of(frame), instruction_of(frame)) for frame in callers(current_frame(2)))
            self.note_unknown(key, Evidence(places, after), line_of(here))
        if len(self._remembered) >= _MOST_REMEMBERED:
            self._remembered.clear()
        self._remembered[places, after] = row
        return row

    def note_turns(self, key: str, row: int, count: int) -> None:
        """Warns once if a loop has run fewer turns than its example, and nothing but their number tells which.

        In a loop that calls no child, as over a ``ParameterList``, a turn that is skipped gives its correction to the
        next one.

        Args:
            key: what is called.
            row: which row the turns are.
            count: how many turns one forward has run.
        """
        evidence, turns = self.rows[row], self.sites[row]
        if count >= len(turns) or evidence.after or evidence == BY_ORDER or evidence in self.unknown:
            return
        what = printable(key.lstrip(":"))
        self.unknown[evidence] = (
            f"a loop that calls {what} ran {count} of the {len(turns)} turns of its example, and no layer tells which"
        )
        warnings.warn(
            f"EAFO: {self.unknown[evidence]}; they go by their number. Let each turn call a layer of its own, such as "
            "nn.Linear in place of a weight in a list, or exclude the activation.",
            stacklevel=2,
        )
        for site in self._own_sites()[:1]:
            site.collector.passed_over = self.unknown[evidence]

    def note_unknown(self, key: str, seen: Evidence, line: str) -> None:
        """Takes in a call that is left plain: the first time it is warned of, and goes to the log with the next round.

        Args:
            key: what is called.
            seen: what is seen of the call.
            line: where a reader finds it.
        """
        # of a loop, one of its turns stands for all that come after the same child
        name = Evidence(seen.places, seen.after[-1:])
        self._meet()
        if name not in self.unknown:
            self.unknown[name] = _message(key, seen, line)
            _warn(self.unknown[name])
            for site in self._own_sites()[:1]:
                site.collector.passed_over = self.unknown[name]

    def _own_sites(self) -> list[Site]:
        return [site for site in self.all_sites() if isinstance(site, Site)]  # a merged model has numbers instead

    def _meet(self) -> None:
        for site in self._own_sites()[:1]:
            site.switch.met_unknown = True


def _message(key: str, seen: Evidence, line: str) -> str:
    what = printable(key.lstrip(":"))
    where = f" at {line}" if line else ""
    behind = f" after {printable(', '.join(seen.after[-3:]))}" if seen.after else ""
    return f"a call of {what}{where}{behind} is none that the example made, or could be several of them"


def _warn(message: str) -> None:
    warnings.warn(
        f"EAFO: {message}; it is left plain. Search with an example that makes this call: find_sites(model, run=...) "
        "may run the model several times. Where the code has changed since a checkpoint, give an example with it.",
        stacklevel=2,
    )


def warn_of_order(what: str) -> None:
    """Warns that the calls of a model are told by their order, as version 0.1.0 did.

    Args:
        what: what was read.
    """
    warnings.warn(
        f"EAFO: {what} is of version 0.1.0, which told the calls of one function or shared activation by their order: "
        "where another part of a forward runs than in its example, calls get each other's corrections. Give an example "
        "input with the checkpoint, as apply_from_checkpoint(model, checkpoint, example), to tell them for certain.",
        stacklevel=2,
    )


@lru_cache(maxsize=1 << 10)
def _rows(text: str) -> list[Evidence]:
    rows: Sequence[tuple[list[str], list[str]]] = json.loads(text)
    return [Evidence(tuple(places), tuple(after)) for places, after in rows]


@constant_result
def place_in_graph(depth: int) -> str:
    """Where a call is made, while ``torch.compile`` reads the code.

    Args:
        depth: how many entry points lie between the call and what is outside the owner's forward.

    Returns:
        The places, innermost first, with line breaks in between.
    """
    passed: list[tuple[CodeType, int]] = []
    for code, at in traced_instructions():
        if code in ENTRIES:
            depth -= 1
            if depth == 0:
                break
        if at is not None:
            passed.append((code, at))
    return "\n".join(places_of(passed))


@constant_result
def tell_in_graph(text: str, key: str, places: str, after: str) -> str:
    """Which row a call is, while ``torch.compile`` reads the code.

    Args:
        text: the rows.
        key: what is called.
        places: from ``place_in_graph``.
        after: the children before the call, with line breaks in between.

    Returns:
        The row's number; empty if it cannot be told.
    """
    seen = Evidence(*(tuple(each.split("\n")) if each else () for each in (places, after)))
    row = which(_rows(text), seen)
    if row is None:
        here = ((code, at) for code, at in traced_instructions() if at is not None)
        line = line_of(here)
        for known in [each for each in _ALL if each.text == text]:
            known.note_unknown(key, seen, line)
    return "" if row is None else str(row)


ENTRIES: set[CodeType] = set()
"""Code of the functions that open frames of owners; see ``hosting``."""
