"""Where in the code a call is made, which tells the calls of one function apart where only some of them run.

A *chain* has the place of the call in the innermost function of the user's code, then the place where that function is
called, and so on outwards. A place is a function's name, a line counted from its first one and a column: it survives
changes of other functions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from itertools import islice
from types import CodeType, FrameType

import torch

from eafo_dynamic.internals.torch_internals import caller_of, callers, code_of, current_frame, instruction_of

__all__ = ["Calls", "Places", "chain", "shortest"]

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_NETWORKS = os.path.join(_PACKAGE, "experiments", "")  # models, whose code is as a user's
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_MOST_KNOWN = 1 << 14

_known: dict[tuple[int, int], tuple[CodeType, str]] = {}  # the code is kept, so that no number is given twice


def _place(frame: FrameType) -> str:
    """The place at which a function of the user's code is; empty for code of torch and of this package's machinery."""
    code, at = code_of(frame), instruction_of(frame)
    known = _known.get((id(code), at))
    if known is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        known = _known[id(code), at] = code, _text(code, at)
    return known[1]


def _text(code: CodeType, at: int) -> str:
    file = code.co_filename
    if file.startswith(_TORCH):
        return ""
    if file.startswith(_PACKAGE) and not file.startswith(_NETWORKS):
        return ""
    if sys.version_info >= (3, 11):
        line, _, column, _ = next(islice(code.co_positions(), at // 2, None))
        return f"{code.co_qualname}+{(line or code.co_firstlineno) - code.co_firstlineno}:{column}"
    start, line = next((start, line) for start, end, line in code.co_lines() if start <= at < end)
    return f"{code.co_name}+{(line or code.co_firstlineno) - code.co_firstlineno}:{at - start}"


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
        elif place := _place(each):
            pieces[-1].append(place)
    return pieces


class Node:
    """Calls whose chains are the same up to here.

    Args:
        calls: their numbers, in their order.
        chains: of all calls.
        depth: how many places they share.

    Attributes:
        nodes: the calls by their next place, unless all their chains are the same.
    """

    __slots__ = ("calls", "nodes")

    def __init__(self, calls: Sequence[int], chains: Sequence[tuple[str, ...]], depth: int = 0) -> None:
        self.calls = calls
        self.nodes: dict[str, Node] = {}
        if (not depth and all(chains)) or len({chains[call][depth:] for call in calls}) > 1:  # the first place counts
            for place in {chains[call][depth] for call in calls if len(chains[call]) > depth}:
                same = [call for call in calls if chains[call][depth : depth + 1] == (place,)]
                self.nodes[place] = Node(same, chains, depth + 1)


def shortest(chains: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """As many places of each call as tell it from the others, and one at least.

    Args:
        chains: of all calls of one function in a forward.

    Returns:
        Their innermost places; none where one's are unknown.
    """
    found: list[tuple[str, ...]] = [()] * len(chains)
    nodes = [(Node(range(len(chains)), chains), 0)] if all(chains) else []
    for node, depth in nodes:
        nodes += [(inner, depth + 1) for inner in node.nodes.values()]
        for call in node.calls:
            found[call] = chains[call][:depth]
    return found


class Places:
    """The chains of all calls of one function or shared module in a forward of their owner.

    Args:
        calls: how many there are.
    """

    def __init__(self, calls: int) -> None:
        self.chains: list[tuple[str, ...]] = [()] * calls
        self._root: Node | None = None

    def put(self, call: int, places: tuple[str, ...]) -> None:
        """Takes in one call.

        Args:
            call: its number.
            places: its chain; empty if it is not known.
        """
        self.chains[call] = places
        self._root = None

    def find(self, frame: FrameType | None) -> Sequence[int]:
        """The calls that a call from here may be one of, by as many places as it takes.

        Args:
            frame: where the call is made, or what that has called.

        Returns:
            Their numbers; none where the places do not tell.
        """
        if self._root is None:
            known = all(self.chains)
            self._root = Node(range(len(self.chains)), self.chains if known else [()] * len(self.chains))
        node = self._root
        while node.nodes and frame is not None:
            place = _place(frame)
            if place and place not in node.nodes:
                return ()
            node = node.nodes[place] if place else node
            frame = caller_of(frame)
        return () if node.nodes or node is self._root else node.calls


class Calls:
    """Counts the calls that one running entry point of an owner makes.

    Args:
        by_place: whether the calls go by their places, as in an entry point that may make a part of them only.
        recomputes: the calls of a forward of which this one runs a part again, counted up to that part.

    Attributes:
        counts: how many calls there were of each function or shared module, by their keys.
        guessed: keys of which a call was told by its order alone.
    """

    __slots__ = ("_again", "_by_place", "_made", "counts", "guessed")

    def __init__(self, by_place: bool = False, recomputes: Calls | None = None) -> None:
        self.counts: dict[str, int] = {} if recomputes is None else dict(recomputes.counts)
        self.guessed: set[str] = set()
        self._made: dict[str, list[int]] = {} if recomputes is None else recomputes._made
        self._by_place = by_place
        self._again = recomputes is not None

    def which(self, key: str, places: Places | None) -> int:
        """Which call the coming one is: again the same one in a recomputation.

        By place it is the next one that is made there, else the one after the last.

        Args:
            key: what is called.
            places: where the owner makes its calls of it.

        Returns:
            Its number; beyond the last one where the order goes on.
        """
        count = self.counts.get(key, 0)
        if not self._by_place and not self._again:
            self.guessed.add(key)
            return count
        made = self._made.setdefault(key, [])
        if self._again:
            return made[count] if count < len(made) else count
        if len(made) < count:  # calls in graphs of torch.compile, which go by their order
            made.extend(range(len(made), count))
        after = made[-1] + 1 if made else 0
        here = () if places is None else places.find(current_frame())
        if here:
            longer = bool(made) and made[-1] in here  # a loop, of more turns than in the example; else begun anew
            made.append(next((call for call in here if call >= after), here[-1 if longer else 0]))
        else:
            self.guessed.add(key)
            made.append(after)
        return made[-1]
