"""Which activation calls of a dry run end in the loss: their results become one number, and no layer takes them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from eafo_dynamic.trace import Call, Trace

__all__ = ["LAYERS", "Lineage"]

LAYERS = frozenset({"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "einsum", "conv1d", "conv2d", "conv3d"})


class Lineage:
    """The activation calls that each tensor comes from with no layer in between.

    A layer is a function that is given a parameter, or one of ``LAYERS``.
    """

    def __init__(self) -> None:
        self._of: dict[int, tuple[weakref.ref[Tensor], frozenset[Call]]] = {}
        self._learned_from: set[Call] = set()
        self._counted: set[Call] = set()

    def step(self, name: str, args: Any, kwargs: Any, out: Any, call: Call | None = None) -> None:
        """Takes down one function.

        Args:
            name: of the function.
            args: positional arguments.
            kwargs: keyword arguments.
            out: its result.
            call: what the function is, if it is an activation.
        """
        given = list(_tensors((args, kwargs)))
        calls = frozenset[Call]().union(*map(self._calls, given))
        if name in LAYERS or any(isinstance(tensor, nn.Parameter) for tensor in given):
            self._learned_from |= calls
            calls = frozenset()
        if call is not None:
            calls |= {call}
        for tensor in _tensors(out) if calls else ():
            self._of[id(tensor)] = weakref.ref(tensor), calls
            if not tensor.dim():
                self._counted |= calls

    def _calls(self, tensor: Tensor) -> frozenset[Call]:
        kept = self._of.get(id(tensor))
        return kept[1] if kept is not None and kept[0]() is tensor else frozenset()

    def judge(self, trace: Trace, model: nn.Module) -> None:
        """Gives the role `loss` to the calls that are parts of one, made by a step or a module without parameters.

        They are the ones whose result became a single number, while no layer was given what was made of it.

        Args:
            trace: what the run wrote down; the roles in it change.
            model: what ran.
        """
        learn = {name for name, module in model.named_modules() if next(module.parameters(), None) is not None}
        for call in trace.calls:
            stepped = any(frame.instance and not frame.is_forward for frame in call.path)
            within = any(frame.is_forward and frame.module in learn for frame in call.path)
            ends = call in self._counted and call not in self._learned_from
            if call.role == "hidden" and stepped and not within and ends:
                call.role, call.reason = "loss", "part of a loss: no layer comes after it"


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
