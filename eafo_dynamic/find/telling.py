"""Tells the calls of a dry run apart, by the same rule as when the model runs; see ``evidence``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import NamedTuple

from eafo_dynamic.find.evidence import MOST_CHILDREN, Evidence, which
from eafo_dynamic.find.places import Piece
from eafo_dynamic.find.selection import FoundSite
from eafo_dynamic.find.trace import Call, Frame, Returned

__all__ = ["MadeCall", "Row", "told_apart"]


@dataclass(eq=False)
class MadeCall:
    """A call of the run, with the forward whose module tells it from others.

    Args:
        site: the site that the call would be.
        frame: the forward.
        at: the forward's index in the call's path.
        call: what the run has seen.

    Attributes:
        places: where the call is made, from that forward on, innermost first.
        returned: for that forward and those inside it, the children that have returned, and how many of them had
            returned before the call.
    """

    site: FoundSite
    frame: Frame
    at: int
    call: Call
    places: tuple[str, ...] = field(init=False)
    returned: list[tuple[list[Returned], int]] = field(init=False)

    def __post_init__(self) -> None:
        pieces = self.call.pieces[: len(self.call.path) - self.at]
        self.places = tuple(place for piece in pieces for place in piece.places)
        self.returned = self.call.returned[self.at :]


class Row(NamedTuple):
    """Calls that the evidence does not tell apart: turns of a loop, or of several forwards."""

    number: int
    evidence: Evidence


def told_apart(made: Sequence[MadeCall], children: Mapping[str, str]) -> list[Row]:
    """The row of each call.

    Args:
        made: the calls of a run, in their order.
        children: names of the children that count, by FQN; see ``children``.

    Returns:
        The rows; calls of one owner and key with the same number have the same evidence.
    """
    seen = _evidence(made, children)
    known: dict[tuple[str, str], list[Evidence]] = {}
    while True:
        is_complete = True
        rows: list[Row] = []
        for call, evidence in zip(made, seen, strict=True):
            of_key = known.setdefault((call.frame.module, call.site.key), [])
            number = which(of_key, evidence, strictly=True)
            if number is None:
                is_complete = False
                number = len(of_key)
                of_key.append(evidence)
            rows.append(Row(number, of_key[number]))
        if is_complete:  # else once more: a call may fit evidence that was found after it
            return rows


def _evidence(made: Sequence[MadeCall], children: Mapping[str, str]) -> list[Evidence]:
    """The evidence of each call: the children since the last call at the same place, in a loop those inside it."""
    before: dict[tuple[Frame, str, tuple[str, ...]], dict[int, int]] = {}
    seen: list[Evidence] = []
    for call in made:
        place = (call.frame, call.site.key, call.places)
        counted = before.get(place, {})
        newest_first: list[str] = []
        for (returned, count), loops in reversed(list(zip(call.returned, _loops(call), strict=True))):
            for number in range(count - 1, counted.get(id(returned), 0) - 1, -1):
                if len(newest_first) == MOST_CHILDREN:
                    break
                child = returned[number]
                is_in_loops = loops is None or bool(loops & child.loops)
                if child.name in children and is_in_loops:
                    newest_first.append(children[child.name])
        before[place] = {id(returned): count for returned, count in call.returned}
        seen.append(Evidence(call.places, tuple(reversed(newest_first))))
    return seen


def _loops(made: MadeCall) -> list[set[tuple[CodeType, int]] | None]:
    """For each forward from the owner's inwards, the loops whose children count; None: all of its children do."""
    inwards: list[Piece] = list(reversed(made.call.pieces[: len(made.returned)]))
    outermost = next((number for number, piece in enumerate(inwards) if piece.loops), None)
    if outermost is None:
        return [None] * len(inwards)
    around: list[set[tuple[CodeType, int]] | None] = [set() for _ in range(outermost)]
    return [*around, inwards[outermost].loops, *([None] * (len(inwards) - outermost - 1))]
