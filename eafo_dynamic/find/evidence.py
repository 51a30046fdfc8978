"""Which of the known calls a call is: by its place in the code and by the children that have run before it.

A call is the same one if the same owner calls the same function, or the same shared activation, at the same place on
the result of the same child. What an owner calls is told by a key; this file tells the calls of one key apart.

*Place*: the chain of ``places``. Two chains name one call if they are equal, if one of them goes on outwards where the
other ends (a part of the code that runs alone, or is entered in another way), or if they differ in the entry point
alone, as those of a training and a validation step do. *Children*: those that have returned since the last call at that
place, or since the owner was entered. A branch that is taken or not adds children or takes some away. Another child in
the place of one is another call, as where a loop over layers drops some of them.

What fits two known calls equally well is neither, for nobody could say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from eafo_dynamic.find.places import function_of, is_repeated

__all__ = ["MOST_CHILDREN", "Evidence", "which"]

MOST_CHILDREN = 12
"""Of the children before a call, the last ones that are kept."""


class Evidence(NamedTuple):
    """What is known of a call.

    Args:
        places: its chain, innermost first.
        after: the children before it, the last one last.
    """

    places: tuple[str, ...]
    after: tuple[str, ...]


def which(known: Sequence[Evidence], seen: Evidence) -> int | None:
    """Which of the known calls of one key a call is.

    Args:
        known: what is known of each.
        seen: what is seen of the call.

    Returns:
        Its number; None where none of them fits, or two fit equally well.
    """
    best: tuple[int, ...] = ()
    found: int | None = None
    for number, each in enumerate(known):
        if each == seen:
            return number
        by_place = _fit_of_places(each.places, seen.places)
        if by_place is None:
            continue
        others = [other for other in known if other is not each and other.places == each.places]
        by_children = _fit_of_children(each, seen, others)
        if by_children is None or (by_place[0] == _OTHER_ENTRY and not by_children):
            continue
        fit = (*by_place, by_children)
        if fit > best:
            best, found = fit, number
        elif fit == best:
            found = None
    return found


_EQUAL, _LONGER, _OTHER_ENTRY = 3, 2, 1


def _fit_of_places(known: tuple[str, ...], seen: tuple[str, ...]) -> tuple[int, int] | None:
    """How well two chains fit: the kind, and how many places they share; None where they name different calls."""
    if known == seen:
        return _EQUAL, len(known)
    same = 0
    for one, two in zip(known, seen, strict=False):
        if one != two:
            break
        same += 1
    if not same:
        return None
    if same in (len(known), len(seen)):
        return _LONGER, same
    # an entry point is the last of its chain; one function in both has gone on to another of its lines
    at_entry = same == len(known) - 1 or same == len(seen) - 1
    if at_entry and function_of(known[same]) != function_of(seen[same]):
        return _OTHER_ENTRY, same
    return None


def _fit_of_children(known: Evidence, seen: Evidence, others: Sequence[Evidence]) -> int | None:
    """How many of the last children are the same; None where one has run in place of another."""
    one, two = known.after, seen.after
    same = 0
    while same < min(len(one), len(two)) and one[-1 - same] == two[-1 - same]:
        same += 1
    rest_of_one, rest_of_two = one[: len(one) - same], two[: len(two) - same]
    if not is_repeated(known.places):
        return same if same or _may_be_left_out(rest_of_one, rest_of_two) else None
    if not same:
        return None
    if not rest_of_one or not rest_of_two:
        return same
    # what ran before the loop may differ, but none of what tells its turns apart
    of_loop = {child for other in others for child in other.after} | set(one[len(one) - same :])
    if of_loop.isdisjoint((*rest_of_one, *rest_of_two)) and _may_be_left_out(rest_of_one, rest_of_two):
        return same
    return None


def _may_be_left_out(one: tuple[str, ...], two: tuple[str, ...]) -> bool:
    """Whether two rows of children differ at their end by children that only one of them has."""
    return not one or not two or one[-1] in two or two[-1] in one
