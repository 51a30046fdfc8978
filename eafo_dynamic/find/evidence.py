"""Which of the known calls a call is: by its place in the code and by the children that have run before it.

A call is the same one if the same owner calls the same function, or the same shared activation, at the same place on
the result of the same child. What an owner calls is told by a key; this file tells the calls of one key apart.

*Place*: the chain of ``places``, of which only functions count that are known to lie on the way to one of the calls:
wrappers that others put around a module do not. Two chains name one call if they are equal, or if one of them goes on
outwards where the other ends, as where a part of the code runs alone; the steps of a LightningModule stand in for each
other. *Children*: those with weights. Where no branch
leads to a call, its place decides. Behind a branch, the child that has returned last must be the same. In a loop, the
children since the last call at that place tell its turns apart: the shorter row of them must be the end of the longer
one, unless the last child alone tells the turn.

What fits two known calls equally well is neither, for nobody could say which.
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


def which(known: Sequence[Evidence], seen: Evidence, *, strictly: bool = False) -> int | None:
    """Which of the known calls of one key a call is.

    Args:
        known: what is known of each.
        seen: what is seen of the call.
        strictly: whether another way through the code is always another call.

    Returns:
        Its number; None where none of them fits, or two fit equally well.
    """
    if list(known) == [BY_ORDER]:
        return 0
    functions = {function_of(place) for each in known for place in each.places}
    seen = Evidence(tuple(place for place in seen.places if function_of(place) in functions), seen.after)
    if seen in known:
        return known.index(seen)
    fits = [_fit(known, number, seen) for number in range(len(known))]
    if not any(fits):
        known, seen = [_without_steps(each) for each in known], _without_steps(seen)
        fits = [_fit(known, number, seen) for number in range(len(known))]
    if not any(fits) and not strictly:
        fits = [_fit_by_another_way(known, number, seen) for number in range(len(known))]
    best = max((fit for fit in fits if fit is not None), default=None)
    return fits.index(best) if best is not None and fits.count(best) == 1 else None


def _without_steps(evidence: Evidence) -> Evidence:
    """Leaves out the owner's own steps: what ``training_step`` calls, ``validation_step`` calls as well."""
    places = tuple(place for place in evidence.places if function_of(place).rpartition(".")[2] not in STEPS)
    return evidence._replace(places=places)


def _fit(known: Sequence[Evidence], number: int, seen: Evidence) -> tuple[int, int] | None:
    """How many places and children a known call and a call share; None where they are different calls."""
    this = known[number]
    shared = min(len(this.places), len(seen.places))
    is_same_place = this.places == seen.places
    if this.places[:shared] != seen.places[:shared] or not (shared or is_same_place):
        return None
    if is_unbranched(this.places):
        return shared + is_same_place, 0
    children = _shared_children(known, number, seen.after)
    if children is None and not is_same_place and not is_repeated(this.places) and not (this.after and seen.after):
        children = 0  # a part that runs alone has nothing before it
    return None if children is None else (shared + is_same_place, children)


def _fit_by_another_way(known: Sequence[Evidence], number: int, seen: Evidence) -> tuple[int, int] | None:
    """The same for a call in the same function on the result of the same child, if another line calls the function."""
    this = known[number]
    if this.places[:1] != seen.places[:1] or not (this.after and seen.after):
        return None
    children = _shared_children(known, number, seen.after)
    return None if children is None else (1, children)


def _shared_children(known: Sequence[Evidence], number: int, after: tuple[str, ...]) -> int | None:
    """How many of the last children are the same; None where those before the call show that it is another."""
    this = known[number]
    one, two = this.after, after
    shared = 0
    while shared < min(len(one), len(two)) and one[-1 - shared] == two[-1 - shared]:
        shared += 1
    there = [other for other in known if other.places == this.places]
    if not shared:
        # in a loop, a known call without children comes before those that its turns make
        before_all = is_repeated(this.places) and not any(two[-1] in other.after for other in there) if two else True
        return 0 if before_all and not one else None
    if not is_repeated(this.places):
        return 1
    tells_alone = sum(one[-1] in other.after for other in there) == 1 < len(there)
    if tells_alone or shared in (len(one), len(two)):
        return shared
    return None
