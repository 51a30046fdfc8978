"""Which site a call belongs to: the frames of running forwards, and the function mode that sees functional calls.

An owner opens a frame in each of its forwards, in which the calls of shared activations and of functions are counted
from zero. Functions are seen by a TorchFunctionMode that is on only while the owner's own code runs, and only where one
of them is corrected; a module called from there shields its own code with a frame of its own.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from eafo_dynamic.apply.recompute import check_compiled_part, region_since
from eafo_dynamic.apply.site import Site
from eafo_dynamic.correction.kernels import is_correctable, known_function
from eafo_dynamic.errors import SiteError, printable
from eafo_dynamic.find.functional import function_name, is_inplace, with_input_first
from eafo_dynamic.find.places import Calls, Places
from eafo_dynamic.find.written import Node, Tracker
from eafo_dynamic.internals.torch_internals import (
    checkpointed_region,
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
    "open_frame",
    "refuse_symbols",
    "route",
]


class Owner(Protocol):
    """A module that can tell the calls of its forward apart; see ``hosting.Hosting``."""

    eafo_sites: list[Site]
    eafo_name: str
    eafo_routes: dict[str, list[Site | None]]
    eafo_places: dict[str, Places]
    eafo_functions: frozenset[str]
    eafo_written: frozenset[Node]


class _Frame:
    """One running forward of an owner: which of its shared activations and functions it has called, and how often."""

    __slots__ = ("calls", "depth", "grad", "is_forward", "mode", "owner", "region", "task", "tracker")

    def __init__(self, owner: Owner, is_forward: bool = True, calls: Calls | None = None) -> None:
        self.owner = owner
        self.is_forward = is_forward
        self.calls = Calls() if calls is None else calls
        self.depth = len(STACK.frames) + 1
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


def route(key: str) -> tuple[Owner | None, Site | None]:
    """The site of the coming call of a shared activation or function, by the innermost owner that knows it.

    Their order tells the calls apart, and in predict_step, which may make a part of them, their place in the code. A
    call beyond those discovered (a longer loop than in the example) belongs to the last site; a call from outside any
    owner (a part of the model run on its own) is not corrected.

    Returns:
        The owner and the site; None where the call is left alone.

    Raises:
        SiteError: in a recomputation whose forward could not be followed.
    """
    task = _graph_task()
    counting: _Frame | None = None
    for frame in reversed(STACK.frames):
        if frame.task != task:
            continue
        if counting is None:
            counting = frame if key in frame.owner.eafo_routes else None
        elif frame.owner is counting.owner and frame.is_forward:
            counting = frame  # a module that calls itself: the outermost of its forwards counts for all
    if counting is not None:
        owner = counting.owner
        routes = owner.eafo_routes[key]
        calls = counting.calls
        count = calls.counts.get(key, 0)
        if is_compiling():
            site = routes[min(count, len(routes) - 1)]
        else:
            call = calls.which(key, owner.eafo_places.get(key))
            site = routes[min(call, len(routes) - 1)]
            _follow_recomputation(counting, site)
        calls.counts[key] = count + 1
        return owner, site
    if task != -1:
        raise SiteError(
            f"{key} is called in a backward pass, outside the forward of the module that owns it, and which of its "
            "sites it is cannot be known. Checkpoint whole modules with torch.utils.checkpoint, or exclude it."
        )
    return None, None


def _follow_recomputation(frame: _Frame, site: Site | None) -> None:
    """If this call lies in a checkpointed part of the frame, sees to it that the recomputation finds the frame."""
    try:
        region = region_since(frame.region, frame.grad)
    except SiteError:
        if site is None:
            return  # left alone in the forward, and in whatever becomes of it
        raise
    if region is None or getattr(region, "eafo_followed", False):
        return
    region.eafo_followed = True
    outside = [each for each in STACK.frames if region_since(each.region, each.grad) is region]
    kept = [(each.owner, each.is_forward, Calls(recomputes=each.calls)) for each in outside]

    def around(recompute: Callable[..., Any]) -> Callable[..., Any]:
        def again(*args: Any, **kwargs: Any) -> Any:
            with _opened(kept):
                return recompute(*args, **kwargs)

        return again

    wrap_recomputation(region, around)


@contextmanager
def _opened(kept: list[tuple[Owner, bool, Calls]]) -> Generator[None]:
    """Opens copies of frames that have ended, the innermost last."""
    frames = STACK.frames
    before = len(frames)
    for owner, is_forward, calls in kept:
        frames.append(_Frame(owner, is_forward, Calls(recomputes=calls)))
    try:
        if frames[-1].owner.eafo_functions:
            frames[-1].mode = mode = _FunctionMode(frames[-1])
            with mode:
                yield
        else:
            yield
    finally:
        frames[-1].mode = None  # see close_frame
        del frames[before:]


class _FunctionMode(TorchFunctionMode):
    """Corrects the functions that the own code of one running forward calls."""

    def __init__(self, frame: _Frame) -> None:
        super().__init__()
        self.frame = frame

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = with_input_first(func, args, kwargs)
        frame = self.frame
        # not "is": the compiler does not always know two ways to the same object for one
        if len(STACK.frames) != frame.depth:
            return func(*args, **kwargs)
        if in_compiled_graph():
            return func(*args, **kwargs)  # a backend that runs graphs as they are; the corrections are in them
        if func is checkpoint and args and is_compiling():
            # the compiler alone shows this call to modes, and would run what it is given without them
            if kwargs.get("use_reentrant") is not False and not isinstance(args[0], nn.Module):
                check_compiled_part(frame.owner.eafo_name)
            return func(self.around(args[0]), *args[1:], **kwargs)
        name = function_name(func)
        if name is None or name not in frame.owner.eafo_functions or not args or kwargs.get("out") is not None:
            out = func(*args, **kwargs)
        elif is_correctable(args[0]):
            out = _call_function(frame.owner, func, name, args, kwargs)
        else:
            refuse_symbols(args[0], frame.owner)
            out = func(*args, **kwargs)
        if frame.tracker is not None:
            out = _follow_written(frame, func, args, kwargs, out)
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


def _call_function(caller: Owner, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    owner, site = route(_key(caller, name))
    if owner is None or site is None:
        return func(*args, **kwargs)
    inplace = is_inplace(func, name, args, kwargs)
    rest = args[1:]

    def base(z: Tensor) -> Tensor:
        return func(z, *rest, **kwargs)

    known = None
    if not is_compiling() and not (inplace and name in ("elu", "celu", "selu")):
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


def _follow_written(frame: _Frame, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
    assert frame.tracker is not None
    made = frame.tracker.step(func, args, kwargs, out)
    if made is None or made.node not in frame.owner.eafo_written or not is_correctable(made.root):
        return out
    owner, site = route(_key(frame.owner, made.node))
    if owner is None or site is None:
        return out
    return site(cast(nn.Module, owner), lambda z: out, made.root, False)


def open_frame(owner: Owner, is_forward: bool = True, by_place: bool = False) -> TorchFunctionMode | None:
    """Puts a frame of its own on top for an entry point, and switches the caller's mode off.

    Args:
        owner: the module that is entered.
        is_forward: whether by its forward.
        by_place: whether its calls go by their places, see ``places.Calls``.

    Returns:
        The mode to switch on again, for ``close_frame``.
    """
    frames = STACK.frames
    outer = frames[-1].mode if frames else None
    off = outer is not None and switch_off(outer)
    frames.append(_Frame(owner, is_forward, Calls(by_place)))
    return outer if off else None


def close_frame(outer: TorchFunctionMode | None, ended: bool = False) -> None:
    """Takes the top frame off, and switches the caller's mode on again.

    Args:
        outer: from ``open_frame``.
        ended: whether the entry point has come to its end, and made all its calls.
    """
    frame = STACK.frames.pop()
    frame.mode = None  # the two would keep each other, and the tensors that were followed, until garbage is collected
    if outer is not None:
        push_mode(outer)
    if ended and frame.calls.guessed and not frame.owner.eafo_name:
        _tell_of_parts(frame)


def _tell_of_parts(frame: _Frame) -> None:
    """Warns where a whole model, not in training, makes fewer of its calls: they may be others than the first."""
    if cast(Any, frame.owner).training:
        return
    for key in sorted(frame.calls.guessed):
        most = len(frame.owner.eafo_routes[key])
        if frame.calls.counts[key] < most:
            name = printable(key.lstrip(":"))
            warnings.warn(
                f"EAFO: {name} is called less often than in training, which calls it {most} times, and the "
                "calls get the corrections of the first ones. If these are other calls, as where a part of the model "
                "runs alone, run it in predict_step, or give every call an activation module of its own.",
                stacklevel=4,
            )


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
    outer = open_frame(owner, is_forward)
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
