"""Which of the known calls a call is: by its place in the code and by the children that have run before it.

A call is a known call if the same owner calls the same function, or the same shared activation, at the same place, on
the result of the same child. Owner and function are told by a key; this file tells the calls of one key apart.

*Place*: the chain of ``places``. Only functions count that are known to lie on the way to one of the calls, so that
wrappers that others put around a module do not matter. Two chains name the same call if they are equal, or if one of
them goes on outwards where the other ends, as where a part of the code runs alone. The steps of a LightningModule
stand in for each other.

*Children*: those with weights. What they decide depends on the way to the call:

- without a branch, nothing: the place alone decides;
- behind a branch, the child that has returned last must be the same;
- in a loop, the children since the last call at that place tell the turns apart. The shorter row of children must be
  the end of the longer one, unless no other turn has its last child.

A call that fits two known calls equally well is none of them, for nobody could say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from eafo_dynamic.find.places import function_of, is_repeated, is_unbranched
from eafo_dynamic.find.wrapped import STEPS

__all__ = ["BY_ORDER", "MOST_CHILDREN", "Evidence", "which"]

MOST_CHILDREN = 12
"""Of the children before a call, the last ones that are kept."""


class Evidence(NamedTuple):
    """What is known of a call.

    Args:
        places: its chain, innermost first; empty where code that lies elsewhere makes it, as that of a ``Sequential``.
        after: the children before it, the last one last; empty where the place decides.
    """

    places: tuple[str, ...]
    after: tuple[str, ...]


BY_ORDER = Evidence((), ())
"""The calls of a key that versions before 0.2 saved, and told by their order alone."""


class _Shared(NamedTuple):
    """How much a call has in common with a known call that it may be; the greater fits better.

    Args:
        places: how many places of the chains are equal, and one more where the whole chains are.
        children: how many of the last children are equal; 0 where the children do not matter.
    """

    places: int
    children: int


def which(known: Sequence[Evidence], seen: Evidence, *, strictly: bool = False) -> int | None:
    """Which of the known calls of one key a call is.

    Args:
        known: the evidence of each known call.
        seen: the evidence of the call.
        strictly: whether a call that another line of the owner leads to is always another call.

    Returns:
        The number of the known call; None where none of them fits, or two fit equally well.
    """
    if list(known) == [BY_ORDER]:
        return 0
    seen = _without_wrappers(seen, known)
    if seen in known:
        return known.index(seen)
    numbers = range(len(known))
    fits = [_fit(known, number, seen) for number in numbers]
    if not any(fits):
        known = [_without_steps(evidence) for evidence in known]
        seen = _without_steps(seen)
        fits = [_fit(known, number, seen) for number in numbers]
    if not any(fits) and not strictly:
        fits = [_fit_by_another_way(known, number, seen) for number in numbers]
    best = max((fit for fit in fits if fit is not None), default=None)
    if best is None or fits.count(best) > 1:
        return None
    return fits.index(best)


def _without_wrappers(seen: Evidence, known: Sequence[Evidence]) -> Evidence:
    """Leaves out the places in functions that lead to none of the known calls."""
    functions = {function_of(place) for evidence in known for place in evidence.places}
    places = tuple(place for place in seen.places if function_of(place) in functions)
    return seen._replace(places=places)


def _without_steps(evidence: Evidence) -> Evidence:
    """Leaves out the owner's own steps: what ``training_step`` calls, ``validation_step`` calls as well."""
    places = tuple(place for place in evidence.places if function_of(place).rpartition(".")[2] not in STEPS)
    return evidence._replace(places=places)


def _fit(known: Sequence[Evidence], number: int, seen: Evidence) -> _Shared | None:
    """What a call shares with a known call, by its place and its children; None where it is another call."""
    candidate = known[number]
    is_same_chain = candidate.places == seen.places
    shared = min(len(candidate.places), len(seen.places))
    # one chain may go on outwards where the other ends, but they begin alike
    if candidate.places[:shared] != seen.places[:shared]:
        return None
    if shared == 0 and not is_same_chain:
        return None
    places = shared
    if is_same_chain:
        places += 1
    if is_unbranched(candidate.places):
        return _Shared(places, 0)
    children = _shared_children(known, number, seen.after)
    if children is not None:
        return _Shared(places, children)
    # a part of the code that runs alone, behind a branch, has no children before it
    lacks_children = not candidate.after or not seen.after
    if lacks_children and not is_same_chain and not is_repeated(candidate.places):
        return _Shared(places, 0)
    return None


def _fit_by_another_way(known: Sequence[Evidence], number: int, seen: Evidence) -> _Shared | None:
    """What a call shares with a known call in the same function, to which another line of the owner leads."""
    candidate = known[number]
    if candidate.places[:1] != seen.places[:1]:
        return None
    if not candidate.after or not seen.after:
        return None
    children = _shared_children(known, number, seen.after)
    return None if children is None else _Shared(1, children)


def _shared_children(known: Sequence[Evidence], number: int, after: tuple[str, ...]) -> int | None:
    """How many of the last children before a call are those of a known call; None where they make it another call."""
    candidate = known[number]
    in_loop = is_repeated(candidate.places)
    there = [evidence for evidence in known if evidence.places == candidate.places]
    if not candidate.after:
        is_first = not after or (in_loop and not any(after[-1] in evidence.after for evidence in there))
        return 0 if is_first else None  # in a loop, the first turn: no turn has made a child that is known
    shared = _common_end(candidate.after, after)
    if shared == 0:
        return None
    if not in_loop:
        return 1
    is_whole_row = shared == min(len(candidate.after), len(after))
    turns_with_last = sum(candidate.after[-1] in evidence.after for evidence in there)
    tells_alone = turns_with_last == 1 and len(there) > 1
    return shared if is_whole_row or tells_alone else None


def _common_end(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """How many of the last children of two rows are equal."""
    count = 0
    while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
        count += 1
    return count
