"""The calls of one function or shared activation that an owner knows, and which of them a call is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import lru_cache
from types import CodeType
from typing import Any

from eafo_dynamic.apply.site import Site
from eafo_dynamic.find.evidence import Evidence, which
from eafo_dynamic.find.places import places_of
from eafo_dynamic.internals.torch_internals import constant_result, traced_instructions

__all__ = ["ENTRIES", "KnownCalls", "place_in_graph", "tell_in_graph"]

_MOST_REMEMBERED = 1 << 12


class KnownCalls:
    """The known calls of one key.

    Attributes:
        rows: the evidence of each.
        sites: of each, the sites of its turns in one forward; None for a turn that is left alone.
        text: the rows, as the compiler is given them.
    """

    def __init__(self) -> None:
        self.rows: list[Evidence] = []
        self.sites: list[list[Site | None]] = []
        self.text = "[]"
        self._named: set[Evidence] = set()
        self._remembered: dict[tuple[tuple[str, ...], tuple[str, ...]], int | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "sites": self.sites, "text": self.text}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _remembered={}, _named=set())

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
            self.text = json.dumps(self.rows)
            self._remembered.clear()
        sites = self.sites[self.rows.index(evidence)]
        sites += [None] * (turn + 1 - len(sites))
        sites[turn] = site

    def __len__(self) -> int:
        return len(self.all_sites())

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
            return self._remembered[places, after]
        except KeyError:
            pass
        seen = Evidence(places, after)
        row = which(self.rows, seen)
        if row is None and seen not in self._named:
            self._named.add(seen)
            _name(key, seen)
        if len(self._remembered) >= _MOST_REMEMBERED:
            self._remembered.clear()
        self._remembered[places, after] = row
        return row


def _name(key: str, seen: Evidence) -> None:
    """Warns of a call that is not known."""
    what = key.lstrip(":")
    behind = f" after {', '.join(seen.after[-3:])}" if seen.after else ""
    where = f" ({seen.places[0]})" if seen.places else ""
    warnings.warn(
        f"EAFO: a call of {what}{behind}{where} is none that the example made, or could be several of them; it is left "
        "plain. Search with an example that takes this branch too: find_sites(model, run=...) may run the model several "
        "times.",
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
        _name(key, seen)
    return "" if row is None else str(row)


ENTRIES: set[CodeType] = set()
"""Code of the functions that open frames of owners; see ``hosting``."""
