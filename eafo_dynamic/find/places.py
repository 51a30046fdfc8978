"""Where in the code a call is made.

A *chain* has the place of the call in the innermost function of the user's code, then the place where that function is
called, and so on outwards to the entry of the module that owns the call. A *place* is an instruction of a function:
its name, the number of the instruction, and a digest of the function's code, so that a place of code that has changed
since is never taken for another one. A mark at its end says whether the instructions before it decide what ran before:
none if they always do, ``BRANCHED`` behind a branch, ``REPEATED`` in a loop.
"""

from __future__ import annotations

import dis
import hashlib
import os
import sys
from bisect import bisect_right
from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import islice
from types import CodeType, FrameType
from typing import NamedTuple

import torch

from eafo_dynamic.internals.torch_internals import (
    callers,
    code_of,
    current_frame,
    instruction_of,
    instructions_until,
    resumed_from,
)

__all__ = [
    "BRANCHED",
    "REPEATED",
    "Piece",
    "function_of",
    "is_repeated",
    "is_unbranched",
    "line_of",
    "pieces",
    "place_of",
    "places_of",
    "places_until",
]

REPEATED = "*"
BRANCHED = "?"
UNKNOWN = "unknown"
"""Stands for a place that cannot be read; it is none of the known ones."""

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_NETWORKS = os.path.join(_PACKAGE, "experiments", "")  # models, whose code is as a user's
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_MOST_KNOWN = 1 << 14
# by ids of code and offsets; the code is kept with the places, so that no other code gets its id
_known: dict[tuple[int, ...], tuple[list[CodeType], tuple[str, ...]]] = {}


class _Instructions(NamedTuple):
    """The instructions of a function, and which of them jump where.

    Args:
        offsets: of all instructions, in bytes, in ascending order.
        firsts: for each instruction, the number of the first instruction of the same expression.
        jumps: offsets from which and to which the code may jump.
        digest: of all instructions, with the names and numbers in them.
    """

    offsets: list[int]
    firsts: list[int]
    jumps: list[tuple[int, int]]
    digest: str


@lru_cache(maxsize=1 << 12)
def _read(code: CodeType) -> _Instructions:
    offsets: list[int] = []
    firsts: list[int] = []
    expressions: dict[object, int] = {}
    jumps: list[tuple[int, int]] = []
    digest = hashlib.blake2s(digest_size=4)
    for instruction in dis.get_instructions(code):
        position = getattr(instruction, "positions", None) or instruction.offset  # Python 3.10 knows no positions
        firsts.append(expressions.setdefault(position, len(offsets)))
        offsets.append(instruction.offset)
        argument = instruction.argrepr
        if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
            jumps.append((instruction.offset, instruction.argval))
            argument = ""
        elif isinstance(instruction.argval, CodeType):
            argument = _read(instruction.argval).digest
        digest.update(f"{instruction.opname} {argument}\n".encode())
    return _Instructions(offsets, firsts, jumps, digest.hexdigest())


@lru_cache(maxsize=1 << 14)
def _text(code: CodeType, at: int) -> str:
    original = resumed_from(code)
    if original is None:
        return UNKNOWN
    if original is not code:
        found = _same_instruction(code, at, original)
        return UNKNOWN if found is None else _text(original, found)
    instructions = _read(code)
    number = instructions.firsts[bisect_right(instructions.offsets, at) - 1]
    name = code.co_qualname if sys.version_info >= (3, 11) else code.co_name
    mark = _mark(code, instructions, at)
    return f"{name}#{instructions.digest}+{number}{mark}"


def _mark(code: CodeType, instructions: _Instructions, at: int) -> str:
    is_in_loop = any(to <= at <= start for start, to in instructions.jumps)
    if is_in_loop:
        return REPEATED
    is_behind_jump = any(start < at for start, _ in instructions.jumps)
    is_lambda = code.co_name == "<lambda>"  # its caller may call it as often as it likes
    if is_behind_jump or is_lambda:
        return BRANCHED
    return ""


def _same_instruction(code: CodeType, at: int, original: CodeType) -> int | None:
    """The offset of an instruction in the code that the compiler has cut this piece from; None if it is not known."""
    if sys.version_info < (3, 11):
        return None
    position = next(islice(code.co_positions(), at // 2, None))
    if None in position:
        return None
    for number, other in enumerate(original.co_positions()):
        if other == position:
            return 2 * number
    return None


def place_of(code: CodeType, at: int) -> str:
    """The place of an instruction.

    Args:
        code: of a function.
        at: offset of the instruction in it, in bytes.

    Returns:
        The place; empty for code of torch, of this package's machinery, and of graphs of ``torch.fx``.
    """
    file = code.co_filename
    if file.startswith((_TORCH, "<eval_with_key>")):
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


def places_until(depth: int, last: int) -> tuple[str, ...]:
    """The places from a frame outwards.

    Args:
        depth: how many callers further out than the function that calls this one the frame is.
        last: ``id`` of the frame at which to end, which is not counted.

    Returns:
        Those in the user's code, innermost first; the same object for the same instructions.
    """
    numbers = instructions_until(depth + 1, last)
    known = _known.get(numbers)
    if known is None:
        return _read_places(current_frame(depth + 1), last, numbers)
    return known[1]


def _read_places(frame: FrameType, last: int, numbers: tuple[int, ...]) -> tuple[str, ...]:
    """Reads the places from a frame outwards and remembers them under their numbers."""
    passed: list[tuple[CodeType, int]] = []
    for caller in callers(frame):
        if id(caller) == last:
            break
        passed.append((code_of(caller), instruction_of(caller)))
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    places = places_of(passed)
    codes = [code for code, _ in passed]
    _known[numbers] = (codes, places)
    return places


def line_of(instructions: Iterable[tuple[CodeType, int]]) -> str:
    """Where a reader finds the innermost instruction that is in the user's code.

    Args:
        instructions: code and offset, innermost first.

    Returns:
        File and line; empty if there is none.
    """
    for code, at in instructions:
        if place_of(code, at):
            line = next((line for start, end, line in code.co_lines() if start <= at < end), None)
            return f"{os.path.basename(code.co_filename)}:{line or code.co_firstlineno}"
    return ""


def function_of(place: str) -> str:
    """The name of the function in which a place is.

    Args:
        place: any.

    Returns:
        The name, with those of the classes around it.
    """
    return place.rpartition("#")[0]


def is_repeated(places: Collection[str]) -> bool:
    """Whether one forward may reach a call several times.

    Args:
        places: its chain; empty for a call of code that is not the user's, such as the loop of a ``Sequential``.

    Returns:
        Whether it may.
    """
    return not places or any(place.endswith(REPEATED) for place in places)


def is_unbranched(places: Collection[str]) -> bool:
    """Whether the same instructions have run before whenever a call is reached.

    Args:
        places: its chain.

    Returns:
        Whether neither a branch nor a loop lies between the entry of the owner and the call.
    """
    return bool(places) and not any(place.endswith((REPEATED, BRANCHED)) for place in places)


class Piece(NamedTuple):
    """The part of a chain that lies in one forward.

    Args:
        places: innermost first.
        loops: the outermost loop around each place that lies in a loop: the function's code, and where the loop begins.
    """

    places: list[str]
    loops: set[tuple[CodeType, int]]


def pieces(frame: FrameType | None, entries: Collection[CodeType], outermost: CodeType) -> list[Piece]:
    """The places from a call outwards, in pieces.

    Args:
        frame: where the call is made.
        entries: of functions at which a piece ends, because they enter a module.
        outermost: of the function at which the last piece ends.

    Returns:
        The places in the user's code, innermost first.
    """
    found = [Piece([], set())]
    for caller in callers(frame):
        code = code_of(caller)
        if code is outermost:
            break
        if code in entries:
            found.append(Piece([], set()))
            continue
        at = instruction_of(caller)
        place = place_of(code, at)
        if not place:
            continue
        piece = found[-1]
        piece.places.append(place)
        loops_around = [to for start, to in _read(code).jumps if to <= at <= start]
        if loops_around:
            piece.loops.add((code, min(loops_around)))
    return found


class Places:
    """What pickles of version 0.1.0 hold of the places of calls; nobody uses it after they are read."""


Node = Places
