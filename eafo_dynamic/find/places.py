"""Where in the code a call is made.

A *chain* has the place of the call in the innermost function of the user's code, then the place where that function is
called, and so on outwards. A place is a function's name, a line counted from its first one and a column: it survives
changes of other functions. A place that one forward may reach several times has a star.
"""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import islice
from types import CodeType, FrameType

import torch

from eafo_dynamic.internals.torch_internals import (
    callers,
    code_of,
    instruction_of,
    instructions_until,
    resumed_from,
)

__all__ = ["REPEATED", "chain", "function_of", "is_repeated", "place_of", "places_of", "places_until"]

REPEATED = "*"

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_NETWORKS = os.path.join(_PACKAGE, "experiments", "")  # models, whose code is as a user's
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_MOST_KNOWN = 1 << 14
_known: dict[tuple[int, ...], tuple[list[CodeType], tuple[str, ...]]] = {}  # the code is kept: its number is no other's


UNKNOWN = "?"
"""Stands for a place that is not known, and is none of the known ones."""


@lru_cache(maxsize=1 << 14)
def _text(code: CodeType, at: int) -> str:
    original = resumed_from(code)
    if original is not code:
        found = None if original is None else _same_instruction(code, at, original)
        return UNKNOWN if original is None or found is None else _text(original, found)
    if sys.version_info >= (3, 11):
        line, _, column, _ = next(islice(code.co_positions(), at // 2, None))
        name = code.co_qualname
    else:
        start, line = next((start, line) for start, end, line in code.co_lines() if start <= at < end)
        name, column = code.co_name, at - start
    star = REPEATED if _is_repeated_in(code, at) else ""
    return f"{name}+{(line or code.co_firstlineno) - code.co_firstlineno}:{column}{star}"


def _same_instruction(code: CodeType, at: int, original: CodeType) -> int | None:
    """Where an instruction of a piece of code stands in the whole; None where that is not known."""
    if sys.version_info < (3, 11):
        return None
    position = next(islice(code.co_positions(), at // 2, None))
    for number, each in enumerate(original.co_positions()):
        if each == position and None not in position:
            return 2 * number
    return None


def _is_repeated_in(code: CodeType, at: int) -> bool:
    """Whether an instruction lies in a loop, or in an expression that others call as often as they like."""
    if code.co_name == "<lambda>":
        return True
    for each in dis.get_instructions(code):
        jumps = each.opcode in dis.hasjrel or each.opcode in dis.hasjabs
        if jumps and each.argval <= at <= each.offset:
            return True
    return False


def place_of(code: CodeType, at: int) -> str:
    """The place of an instruction.

    Args:
        code: of a function.
        at: offset of the instruction in it, in bytes.

    Returns:
        The place; empty for code of torch and of this package's machinery.
    """
    file = code.co_filename
    if file.startswith(_TORCH):
        return ""
    if file.startswith(_PACKAGE) and not file.startswith(_NETWORKS):
        return ""
    return _text(code, at)


def places_of(instructions: Iterable[tuple[CodeType, int]]) -> tuple[str, ...]:
    """The places of instructions that have led to a call.

    Args:
        instructions: code and offset, innermost first.

    Returns:
        Those in the user's code.
    """
    places = (place_of(code, at) for code, at in instructions)
    return tuple(place for place in places if place)


def places_until(frame: FrameType, last: int) -> tuple[str, ...]:
    """The places from a frame outwards.

    Args:
        frame: where a call is made, or what that has called.
        last: ``id`` of the frame at which to end, which is not counted.

    Returns:
        Those in the user's code, innermost first.
    """
    numbers = instructions_until(frame, last)
    known = _known.get(numbers)
    if known is None:
        passed: list[tuple[CodeType, int]] = []
        for each in callers(frame):
            if id(each) == last:
                break
            passed.append((code_of(each), instruction_of(each)))
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        known = _known[numbers] = [code for code, _ in passed], places_of(passed)
    return known[1]


def function_of(place: str) -> str:
    """The name of the function in which a place is.

    Args:
        place: any.

    Returns:
        The name, with those of the classes around it.
    """
    return place.rpartition("+")[0]


def is_repeated(places: Collection[str]) -> bool:
    """Whether one forward may reach a call several times.

    Args:
        places: its chain. One without places is of code that lies elsewhere, as the loop of a ``Sequential`` does.

    Returns:
        Whether it may.
    """
    return not places or any(place.endswith(REPEATED) for place in places)


def chain(frame: FrameType | None, entries: Collection[CodeType], outermost: CodeType) -> list[list[str]]:
    """The places from a call outwards, in pieces.

    Args:
        frame: where the call is made.
        entries: of functions at which a piece ends, because they enter a module.
        outermost: of the function at which the last piece ends.

    Returns:
        The places in the user's code, innermost first.
    """
    pieces: list[list[str]] = [[]]
    for each in callers(frame):
        if code_of(each) is outermost:
            break
        if code_of(each) in entries:
            pieces.append([])
        elif place := place_of(code_of(each), instruction_of(each)):
            pieces[-1].append(place)
    return pieces
