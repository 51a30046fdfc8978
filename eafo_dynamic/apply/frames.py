"""Which site a call belongs to: the frames of running forwards, and the function mode that sees functional calls.

An owner opens a frame in each of its forwards. It notes which of its children have returned, and with the place of the
call in the code that tells which of the known calls this one is (``find.evidence``). Functions are seen by a
TorchFunctionMode that is on only while the owner's own code runs, and only where one of them is corrected; a module
called from there shields its own code with a frame of its own.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from eafo_dynamic.apply.known import KnownCalls, place_in_graph, tell_in_graph
from eafo_dynamic.apply.recompute import Region, check_compiled_part, in_new_region, regions_within
from eafo_dynamic.apply.site import Site
from eafo_dynamic.correction.kernels import is_correctable, known_function
from eafo_dynamic.errors import SiteError, printable
from eafo_dynamic.find.evidence import MOST_CHILDREN
from eafo_dynamic.find.functional import function_name, is_inplace, with_input_first
from eafo_dynamic.find.places import places_until
from eafo_dynamic.find.wrapped import OWNER
from eafo_dynamic.find.written import Node, Tracker
from eafo_dynamic.internals.torch_internals import (
    checkpointed_region,
    current_frame,
    in_compiled_graph,
    push_mode,
    running_backward,
    switch_off,
    wrap_recomputation,
)

__all__ = [
    "STACK",
    "Owner",
    "close_frame",
    "entered",
    "function_mode",
    "in_backward",
    "name_missing_turns",
    "name_outside",
    "open_frame",
    "refuse_symbols",
    "route",
]


class Owner(Protocol):
    """A module that can tell the calls of its forward apart; see ``hosting.Hosting``."""

    eafo_sites: list[Site]
    eafo_kind: str
    eafo_name: str
    eafo_routes: dict[str, KnownCalls]
    eafo_functions: frozenset[str]
    eafo_written: frozenset[Node]


class _Record:
    """The sites of the calls that a part of a forward makes, in their order; a recomputation makes the same calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Site | None]] = []


class _Replay:
    """Reads a record again.

    Args:
        record: of the first run.
    """

    def __init__(self, record: _Record) -> None:
        self._left = iter(record.calls)

    def next(self, key: str) -> Site | None:
        """The site of the coming call.

        Args:
            key: what is called.

        Returns:
            The site; None where the call is left alone.

        Raises:
            SiteError: if the first run did not make this call.
        """
        recorded, site = next(self._left, ("nothing", None))
        if recorded != key:
            raise SiteError(
                f"{key} is called in a recomputation where the forward called {recorded}, so which of its sites it is "
                "cannot be known. Let the checkpointed part make the same calls each time, or exclude it."
            )
        return site


class _Frame:
    """One running forward of an owner: the children that have returned, and the calls that it has made.

    Args:
        owner: the module.
        entry: ``id`` of the frame of Python that has entered it; 0 if that is compiled.
        is_forward: whether by its forward.
        replay: the calls of a recomputation.
    """

    __slots__ = (
        "depth", "entry", "grad", "hits", "is_forward", "mode", "owner", "python", "region", "replay", "returned",
        "task", "tracker", "turns",
    )  # fmt: skip

    def __init__(self, owner: Owner, entry: int, is_forward: bool = True, replay: _Replay | None = None) -> None:
        self.owner = owner
        self.entry = entry
        self.is_forward = is_forward
        self.replay = replay
        self.depth = len(STACK.frames) + 1
        self.returned: list[str] = []
        # of each call: how many children had returned in the frames from this one on, when it was made last
        self.hits: dict[Any, Any] = {}
        self.turns: dict[Any, int] = {}
        self.python: FrameType | None = None  # where a KeyboardInterrupt may leave a frame on the stack
        self.mode: TorchFunctionMode | None = None
        self.tracker = Tracker(owner.eafo_written) if owner.eafo_written else None
        if is_compiling():
            self.grad, self.region, self.task = False, None, -1
        else:
            self.grad, self.region, self.task = torch.is_grad_enabled(), checkpointed_region(), running_backward()


class _FrameStack(threading.local):
    """Running forwards of owners, innermost last; one stack a thread."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        self.idle = 0  # forwards of owners that have opened none, since nothing in them acts


STACK = _FrameStack()


def _graph_task() -> int:
    """Number of the backward that this code runs in; -1 outside any."""
    return -1 if is_compiling() else running_backward()


def in_backward() -> bool:
    """Whether this code runs in a backward, as a recomputation does.

    Returns:
        Whether it does.
    """
    return _graph_task() != -1


def route(key: str, compiling: bool, depth: int = 4) -> tuple[Owner | None, Site | None]:
    """The site of the coming call of a shared activation or function, by the innermost owner that knows it.

    A call that cannot be told for certain is left alone, as is one from outside any owner.

    Args:
        key: what is called.
        compiling: whether ``torch.compile`` reads this code.
        depth: how many functions lie between ``_told`` and whoever makes the call.

    Returns:
        The owner and the site; None where the call is left alone.

    Raises:
        SiteError: in a recomputation whose forward could not be followed.
    """
    task = -1 if compiling else running_backward()
    frames = STACK.frames
    found = -1
    # one alone, as in most models: there is nobody else to ask
    if len(frames) == 1 and frames[0].task == task and key in frames[0].owner.eafo_routes:
        found = 0
    for number in range(len(frames) - 1, -1, -1) if found < 0 else ():
        frame = frames[number]
        if frame.task != task:
            continue
        if found < 0:
            if key in frame.owner.eafo_routes:
                found = number
        elif frame.owner is frames[found].owner and frame.is_forward:
            found = number  # a module that calls itself: the outermost of its forwards tells for all
    if found >= 0:
        site = _told_in_graph(found, key) if compiling else _told(found, key, depth)
        return frames[found].owner, site
    if task != -1:
        raise SiteError(
            f"{key} is called in a backward pass, outside the forward of the module that owns it, and which of its "
            "sites it is cannot be known. Checkpoint whole modules with torch.utils.checkpoint, or exclude it."
        )
    return None, None


_named_outside: set[str] = set()


def name_outside(key: str, compiling: bool) -> None:
    """Warns once of an activation that is called outside every forward that could tell which call it is.

    Args:
        key: what is called.
        compiling: whether ``torch.compile`` reads this code.
    """
    if not compiling and not STACK.idle and key not in _named_outside:
        _named_outside.add(key)
        warnings.warn(
            f"EAFO: {printable(key)} is called outside the forward of the module that tells its calls apart; it is "
            "left plain there. Call it from that forward, or from a method of the same module.",
            stacklevel=3,
        )


def _told(number: int, key: str, depth: int) -> Site | None:
    """The site of the coming call of a key that a frame's owner knows.

    Args:
        number: of the frame.
        key: what is called.
        depth: how many functions lie between this one and whoever makes the call.

    Returns:
        The site; None where the call is left alone.
    """
    frame = STACK.frames[number]
    if frame.replay is not None:
        site = frame.replay.next(key)
    else:
        known = frame.owner.eafo_routes[key]
        places = places_until(depth, frame.entry)
        returned = frame.returned
        single = known.single.get(places)
        last = returned[-1] if returned else ""
        innermost = number == len(STACK.frames) - 1
        # no other call is made there, and the child before it is the same
        if single is not None and (single[0] is None or (innermost and single[0] == last)):
            site = single[1]
        else:
            row = known.tell(key, places, _children_since(number, key, places))
            site = None if row is None else _turn(frame, key, known, row)
    if in_new_region(frame.region, frame.grad):
        _follow_recomputation(frame, key, site)
    return site


def _told_in_graph(number: int, key: str) -> Site | None:
    """The same, while ``torch.compile`` reads the code: it keeps the site as a constant."""
    frame = STACK.frames[number]
    known = frame.owner.eafo_routes[key]
    depth = 0
    for inner in STACK.frames[number:]:
        if inner.owner.eafo_kind == OWNER:
            depth += 1
    places = place_in_graph(depth)
    after = "\n".join(_children_since(number, key, places))
    row = tell_in_graph(known.text, key, places, after)
    return _turn(frame, key, known, int(row)) if row else None


def _turn(frame: _Frame, key: str, known: KnownCalls, row: int) -> Site | None:
    turn = frame.turns.get((key, row), 0)
    frame.turns[key, row] = turn + 1
    return known.at(row, turn)


def _children_since(number: int, key: str, places: object) -> tuple[str, ...]:
    """The children that have returned since the last call like this one.

    Args:
        number: of the frame whose owner knows the call.
        key: what is called.
        places: where.

    Returns:
        Their names.
    """
    frames = STACK.frames
    frame = frames[number]
    returned = frame.returned
    call = key, places
    if number == len(frames) - 1:
        start = frame.hits.get(call, 0)
        frame.hits[call] = len(returned)
        return tuple(returned[max(start, len(returned) - MOST_CHILDREN) :])
    now: list[tuple[list[str], int]] = []
    found: list[str] = []
    for each in frames[number:]:
        start = 0
        for names, count in frame.hits.get((call, "inside"), ()):
            if names is each.returned:  # of the same forward
                start = count
        found += each.returned[start:]
        now.append((each.returned, len(each.returned)))
    frame.hits[call, "inside"] = now
    return tuple(found[-MOST_CHILDREN:])


def _follow_recomputation(frame: _Frame, key: str, site: Site | None) -> None:
    """If a call lies in a checkpointed part of the frame, sees to it that the recomputation finds the frame and it."""
    frames = STACK.frames
    by_entry = {each.entry: each for each in frames}
    try:
        regions = regions_within(frame.entry, by_entry.keys(), frame.region, frame.grad)
    except SiteError:
        if site is None:
            return  # left alone in the forward, and in whatever becomes of it
        raise
    for region in regions:
        record = getattr(region.torchs, "eafo_record", None)
        if record is None:
            record = region.torchs.eafo_record = _Record()
            outside = [(each.owner, each.is_forward) for each in frames if _is_around(each, region)]
            wrap_recomputation(region.torchs, functools.partial(_replayed, record, outside))
        record.calls.append((key, site))


def _is_around(frame: _Frame, region: Region) -> bool:
    if frame.entry:
        return frame.entry in region.around
    return in_new_region(frame.region, frame.grad)  # opened by compiled code, which is on no stack


def _replayed(record: _Record, outside: list[tuple[Owner, bool]], recompute: Callable[..., Any]) -> Callable[..., Any]:
    """A recomputation in copies of the frames that were around it."""

    def again(*args: Any, **kwargs: Any) -> Any:
        entry = id(current_frame())
        frames = STACK.frames
        before = len(frames)
        replay = _Replay(record)
        for owner, is_forward in outside:
            frames.append(_Frame(owner, entry, is_forward, replay))
        try:
            if frames[-1].owner.eafo_functions:
                frames[-1].mode = mode = _FunctionMode(frames[-1])
                with mode:
                    return recompute(*args, **kwargs)
            return recompute(*args, **kwargs)
        finally:
            frames[-1].mode = None  # see close_frame
            del frames[before:]

    return again


class _FunctionMode(TorchFunctionMode):
    """Corrects the functions that the own code of one running forward calls."""

    def __init__(self, frame: _Frame) -> None:
        super().__init__()
        self.frame = frame

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs is None:
            kwargs = {}
        elif kwargs and not args:
            args, kwargs = with_input_first(func, args, kwargs)
        frame = self.frame
        # not "is": the compiler does not always know two ways to the same object for one
        if len(STACK.frames) != frame.depth:
            return func(*args, **kwargs)
        name = function_name(func)
        wanted = name is not None and name in frame.owner.eafo_functions
        if not wanted and frame.tracker is None and func is not checkpoint:
            return func(*args, **kwargs)
        compiling = is_compiling()
        if not compiling and in_compiled_graph():
            return func(*args, **kwargs)  # a backend that runs graphs as they are; the corrections are in them
        if compiling and func is checkpoint and args:
            # the compiler alone shows this call to modes, and would run what it is given without them
            if kwargs.get("use_reentrant") is not False and not isinstance(args[0], nn.Module):
                check_compiled_part(frame.owner.eafo_name)
            return func(self.around(args[0]), *args[1:], **kwargs)
        if name is None or not wanted or not args or kwargs.get("out") is not None:
            out = func(*args, **kwargs)
        elif is_correctable(args[0]):
            out = _call_function(frame.owner, func, name, args, kwargs, compiling)
        else:
            refuse_symbols(args[0], frame.owner)
            out = func(*args, **kwargs)
        if frame.tracker is not None:
            out = _follow_written(frame, func, args, kwargs, out, compiling)
        return out

    def around(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """A part of the forward that corrects its functions by this mode.

        Args:
            part: the part as it is.

        Returns:
            A function of the same arguments.
        """

        def corrected(*args: Any, **kwargs: Any) -> Any:
            with self:
                return part(*args, **kwargs)

        return corrected


def refuse_symbols(value: object, host: Owner) -> None:
    """Refuses a trace by ``torch.fx``: the graph would be made without the corrections, and nobody would know.

    Args:
        value: what cannot be corrected.
        host: whose sites it would have.

    Raises:
        SiteError: if it is a symbol of torch.fx that stands for a tensor.
    """
    if isinstance(value, torch.fx.Proxy):
        raise SiteError(
            f"{host.eafo_name or 'the model'}: torch.fx traces the plain activations only. Trace "
            "merge(model, example_input), which has the corrections in it, or take torch.export."
        )


def _call_function(caller: Owner, func: Any, name: str, args: Any, kwargs: dict[str, Any], compiling: bool) -> Any:
    key = _key(caller, name)
    owner, site = route(key, compiling)
    if owner is None:
        name_outside(key, compiling)
    if owner is None or site is None:
        return func(*args, **kwargs)
    inplace = is_inplace(func, name, args, kwargs)
    rest = args[1:]

    def base(z: Tensor) -> Tensor:
        return func(z, *rest, **kwargs)

    known = None
    if not compiling and not (inplace and name in ("elu", "celu", "selu")):
        known = known_function(name, rest, kwargs)
    return site(cast(nn.Module, owner), base, args[0], inplace, known)


def _key(caller: Owner, function: object) -> str:
    """What counts the calls of a function; without a name where the caller counts them itself.

    Blocks of one kind then share one compiled graph.

    Returns:
        The key of the caller's routes, or of the routes of the module that counts for it.
    """
    own = f":{function}"
    return own if own in caller.eafo_routes else f"{caller.eafo_name}{own}"


def _follow_written(frame: _Frame, func: Any, args: Any, kwargs: dict[str, Any], out: Any, compiling: bool) -> Any:
    assert frame.tracker is not None
    made = frame.tracker.step(func, args, kwargs, out)
    if made is None or made.node not in frame.owner.eafo_written or not is_correctable(made.root):
        return out
    owner, site = route(_key(frame.owner, made.node), compiling)
    if owner is None or site is None:
        return out
    return site(cast(nn.Module, owner), lambda z: out, made.root, False)


def open_frame(owner: Owner, entry: int, is_forward: bool = True) -> TorchFunctionMode | None:
    """Puts a frame of its own on top for an entry point, and switches the caller's mode off.

    Args:
        owner: the module that is entered.
        entry: ``id`` of the frame of Python that enters it.
        is_forward: whether by its forward.

    Returns:
        The mode to switch on again, for ``close_frame``.
    """
    frames = STACK.frames
    outer = frames[-1].mode if frames else None
    off = outer is not None and switch_off(outer)
    frames.append(_Frame(owner, entry, is_forward))
    return outer if off else None


def close_frame(outer: TorchFunctionMode | None) -> None:
    """Takes the top frame off, and switches the caller's mode on again.

    Args:
        outer: from ``open_frame``.
    """
    frame = STACK.frames.pop()
    frame.mode = None  # the two would keep each other, and the tensors that were followed, until garbage is collected
    if outer is not None:
        push_mode(outer)


def name_missing_turns() -> None:
    """Warns, at the end of a forward, of loops whose turns may have had the corrections of other turns."""
    frame = STACK.frames[-1]
    for (key, row), count in frame.turns.items():
        frame.owner.eafo_routes[key].note_turns(key, row, count)


def entered(
    owner: Owner,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_forward: bool,
    functions: bool,
) -> Any:
    """Runs an entry point in a frame of its own, in functions that the compiler can leave one by one.

    Args:
        owner: the module that is entered.
        method: its original entry point.
        args: positional arguments.
        kwargs: keyword arguments.
        is_forward: whether it is its forward.
        functions: whether functions are to be corrected.

    Returns:
        What the entry point returns.
    """
    outer = open_frame(owner, 0 if is_compiling() else id(current_frame()), is_forward)
    try:
        return _with_functions(owner, method, args, kwargs) if functions else method(owner, *args, **kwargs)
    finally:
        close_frame(outer)


def _with_functions(owner: Owner, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    frame = STACK.frames[-1]
    frame.mode = mode = _FunctionMode(frame)
    with mode:  # not "as", and no other function's: the compiler must find it again
        return method(owner, *args, **kwargs)


def function_mode() -> TorchFunctionMode:
    """The mode that corrects the functions of the top frame's owner.

    Returns:
        The mode; it is not on yet.
    """
    frame = STACK.frames[-1]
    frame.mode = mode = _FunctionMode(frame)
    return mode
