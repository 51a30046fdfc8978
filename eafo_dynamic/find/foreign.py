"""Autograd functions of other people, inside which a correction would be unknown to the backward."""

from __future__ import annotations

import inspect
from functools import lru_cache
from types import CodeType

from torch.autograd import Function
from torch.utils.checkpoint import CheckpointFunction

from eafo_dynamic.internals.torch_internals import callers, code_of, current_frame

__all__ = ["foreign_function"]

_REENTRANT = CheckpointFunction.forward.__code__
_OURS = "eafo_dynamic."


def foreign_function() -> str:
    """The autograd function whose forward is running, torch's own checkpointing and ours not counted.

    Returns:
        Its name; empty outside any.
    """
    forwards = _forwards(tuple(_functions()))
    for frame in callers(current_frame(1)):
        function = forwards.get(code_of(frame))
        if function is not None:
            return function.__name__
    return ""


def _functions() -> list[type[Function]]:
    """The autograd functions that have been defined so far."""
    functions: list[type[Function]] = Function.__subclasses__()
    for function in functions:
        functions += function.__subclasses__()
    return functions


@lru_cache(maxsize=1)
def _forwards(functions: tuple[type[Function], ...]) -> dict[CodeType, type[Function]]:
    """Autograd functions by the code of their forwards."""
    # not by the frame of Function.apply: from torch 2.14 on it runs in C++ and has none
    found: dict[CodeType, type[Function]] = {}
    for function in functions:
        code = getattr(inspect.unwrap(function.forward), "__code__", _REENTRANT)
        if code is not _REENTRANT and not function.__module__.startswith(_OURS):
            found.setdefault(code, function)
    return found
