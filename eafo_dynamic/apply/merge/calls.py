"""A module that has a function of its own for each of its calls in one forward, and the hooks that count the calls."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eafo_dynamic.errors import SiteError
from eafo_dynamic.internals.torch_internals import callers, current_frame

__all__ = ["CallCounter", "CorrectedCalls", "Order"]

Order = tuple[int | None, ...]
"""Which function call 0, 1, ... of a forward has; None: the base itself. Later calls have the last one's."""


class _Forward(NamedTuple):
    """A running forward of a module that calls shared activations."""

    owner: nn.Module
    orders: Mapping[str, Order]
    counts: dict[str, int]
    python_frame: FrameType | None


class _Running(threading.local):
    """Running forwards, innermost last; one list a thread."""

    def __init__(self) -> None:
        self.forwards: list[_Forward] = []


_RUNNING = _Running()


class CallCounter:
    """Forward hooks of a module that calls shared activations several times: each of its forwards counts from zero.

    Args:
        orders: for each ``CorrectedCalls``, by its name, which function the calls in one forward have.
    """

    def __init__(self, orders: Mapping[str, Order]) -> None:
        self.orders = dict(orders)

    def register(self, owner: nn.Module) -> None:
        """Registers the hooks.

        Args:
            owner: the module whose forwards count.
        """
        owner.register_forward_pre_hook(self.begin, prepend=True)
        owner.register_forward_hook(self.end, always_call=True)

    def begin(self, owner: nn.Module, args: Any) -> None:
        """Starts to count.

        Args:
            owner: whose forward begins.
            args: its arguments.
        """
        here = None
        if not torch.compiler.is_compiling():
            here = current_frame(1)
            _forget_interrupted(here)
        _RUNNING.forwards.append(_Forward(owner, self.orders, {}, here))

    def end(self, *_: Any) -> None:
        """Ends the count, also where the forward raised."""
        _RUNNING.forwards.pop()


def _forget_interrupted(here: FrameType | None) -> None:
    """Drops forwards that a KeyboardInterrupt ended: torch runs no hook for it."""
    forwards = _RUNNING.forwards
    if not forwards:
        return
    alive = {id(frame) for frame in callers(here)}
    while forwards and forwards[-1].python_frame is not None and id(forwards[-1].python_frame) not in alive:
        forwards.pop()


def _next_call(name: str) -> int | None:
    """The function of the coming call: counted by the innermost running forward that has an order for it.

    Returns:
        Its number; None for the base.

    Raises:
        SiteError: outside any such forward.
    """
    counting: _Forward | None = None
    for forward in reversed(_RUNNING.forwards):
        if counting is None:
            counting = forward if name in forward.orders else None
        elif forward.owner is counting.owner:
            counting = forward  # a module that calls itself: the outermost of its forwards counts for all
    if counting is None:
        raise SiteError(
            f"{name} has a function of its own for each call in a forward of the module around it, and is called "
            "outside of any (or recomputed by activation checkpointing of a part of one), so which call this is cannot "
            "be known. Run, or checkpoint, the whole module around it."
        )
    order = counting.orders[name]
    k = counting.counts.get(name, 0)
    counting.counts[name] = k + 1
    return order[min(k, len(order) - 1)]


class CorrectedCalls(nn.Module):
    """An activation that one forward calls several times, each time with a correction of its own.

        f_k(z) = base(z) + eps_k * sigma_k * ghat_k((z - mu_k) / sigma_k)        in call k

    The calls are counted by forward hooks of the module around them (``CallCounter``), from zero in each of its
    forwards. A call beyond the last has the last one's function.

    Args:
        name: what its counters know it by.
        base: the activation.
        functions: the functions, each a ``CorrectedActivation`` of the base.
    """

    def __init__(self, name: str, base: nn.Module, functions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.functions = nn.ModuleList(functions)

    def __prepare_scriptable__(self) -> Any:
        raise SiteError(
            f"{self.name}: torch.jit.script cannot count calls that have a function of their own each. "
            "Take torch.jit.trace(model, x), or torch.export."
        )

    def forward(self, z: Tensor | None = None, **named: Tensor) -> Tensor:
        """Applies the function of this call.

        Args:
            z: pre-activations, any shape, floating point.
            **named: the same under the name that the base's forward has for it, instead of z.

        Returns:
            f_k(z), of the shape of z; z itself, overwritten, if the base is in place.

        Raises:
            SiteError: outside the forward of any module that counts its calls.
        """
        if z is None:
            (z,) = named.values()
        k = _next_call(self.name)
        result: Tensor = self.base(z) if k is None else self.functions[k](z)
        return result
