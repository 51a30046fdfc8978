"""Which activation calls of a dry run end in the loss: the loss is made of their results, and no layer takes them."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Iterator, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from eafo_dynamic.find.channels import CONVOLUTIONS
from eafo_dynamic.find.trace import Call, Trace
from eafo_dynamic.internals.torch_internals import caller_of, code_of, variable_of

__all__ = ["Lineage", "in_method", "is_product"]

_PRODUCTS = CONVOLUTIONS | {
    "linear", "bilinear", "matmul", "rmatmul", "mm", "bmm", "mv", "addmm", "addbmm", "addmv", "baddbmm", "inner",
    "tensordot", "einsum", "cdist", "scaled_dot_product_attention", "multi_head_attention_forward",
}  # fmt: skip


def is_product(func: Any) -> bool:
    """Whether a torch function sums over products, as the layers of a network do: ``linear``, ``matmul``, ``conv2d``.

    Args:
        func: the function.

    Returns:
        Whether it does.
    """
    return getattr(func, "__name__", "").strip("_") in _PRODUCTS


class _Known(NamedTuple):
    """What is known of a tensor: the calls it comes from with no layer in between, and whether only weights made it."""

    tensor: weakref.ref[Tensor]
    calls: frozenset[Call]
    weight: bool


class Lineage:
    """The activation calls that each tensor comes from with no layer in between.

    A layer is a function that is given a parameter of several numbers, or what was made of parameters and buffers
    alone; or one that sums over products and gives several numbers.

    Args:
        model: what runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = {id(buffer) for buffer in model.buffers()}
        self._of: dict[int, _Known] = {}
        self._learned_from: set[Call] = set()
        self._counted: set[Call] = set()
        self._returned: set[Call] | None = None

    def step(self, func: Any, args: Any, kwargs: Any, out: Any, call: Call | None = None) -> None:
        """Takes down one function.

        Args:
            func: the torch function; None for an activation module.
            args: positional arguments.
            kwargs: keyword arguments.
            out: its result.
            call: what the function is, if it is an activation.
        """
        given = list(_tensors((args, kwargs)))
        made = list(_tensors(given[:1] if out is None else out))  # x[0] = y gives None
        calls = frozenset[Call]().union(*map(self._calls, given))
        weights = [tensor for tensor in given if self._is_weight(tensor)]
        several = any(tensor.numel() > 1 for tensor in made)
        if any(tensor.numel() > 1 for tensor in weights) or (several and is_product(func)):
            self._learned_from |= calls
            calls = frozenset()
        if call is not None:
            calls |= {call}
        only_weights = bool(weights) and all(self._is_weight(each) or id(each) in self._buffers for each in given)
        for tensor in made if calls or only_weights else ():
            self._of[id(tensor)] = _Known(weakref.ref(tensor), calls, only_weights)
            if tensor.numel() == 1:
                self._counted |= calls

    def made(self, out: Tensor, call: Call) -> None:
        """Takes down that a written-out activation is complete.

        Args:
            out: its result, of a function that has been taken down.
            call: the activation.
        """
        self._of[id(out)] = _Known(weakref.ref(out), self._calls(out) | {call}, False)

    def returned(self, out: Any) -> None:
        """Takes down what a step returns: the loss, alone or as an entry ``loss``.

        Args:
            out: anything.
        """
        loss = cast("Mapping[str, Any]", out)["loss"] if isinstance(out, dict) and "loss" in out else out
        for tensor in _tensors(loss):
            if tensor.numel() == 1:
                self._returned = (self._returned or set()) | self._calls(tensor)

    def _known(self, tensor: Tensor) -> _Known | None:
        known = self._of.get(id(tensor))
        return known if known is not None and known.tensor() is tensor else None

    def _calls(self, tensor: Tensor) -> frozenset[Call]:
        known = self._known(tensor)
        return frozenset() if known is None else known.calls

    def _is_weight(self, tensor: Tensor) -> bool:
        known = self._known(tensor)
        return isinstance(tensor, nn.Parameter) or (known is not None and known.weight)

    def judge(self, trace: Trace, model: nn.Module) -> None:
        """Gives the role `loss` to the calls that are parts of one, made by a step or a module without weights.

        They are the ones that the loss is made of, while no layer was given what was made of them. Where no step
        returns a loss, as in manual optimisation, any single number may be one.

        Args:
            trace: what the run wrote down; the roles in it change.
            model: what ran.
        """
        learn = {name for name, module in model.named_modules() if _learns(module)}
        losses = (self._counted if self._returned is None else self._returned) - self._learned_from
        for call in trace.calls:
            stepped = any(frame.instance and not frame.is_forward for frame in call.path)
            within = call.in_method or any(frame.is_forward and frame.module in learn for frame in call.path)
            if call.role == "hidden" and stepped and not within and call in losses:
                call.role, call.reason = "loss", "part of a loss: no layer comes after it"


def _learns(module: nn.Module) -> bool:
    """Whether a module has weights; a temperature or a margin is one number."""
    return any(parameter.numel() > 1 for parameter in module.parameters())


def in_method(frame: FrameType | None, entries: Collection[CodeType]) -> bool:
    """Whether a call is made by another method of a module with weights, as ``encode`` in place of ``forward``.

    Args:
        frame: where the call is made.
        entries: of the functions that enter a module, which they have under the name ``module``.

    Returns:
        Whether it is; methods of the module that has been entered do not count.
    """
    others: list[nn.Module] = []
    while frame is not None and code_of(frame) not in entries:
        code = code_of(frame)
        owner = variable_of(frame, code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module):
            method = inspect.getattr_static(type(owner), code.co_name, None)
            if getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None) is code:
                others.append(owner)
        frame = caller_of(frame)
    entered = None if frame is None else variable_of(frame, "module")
    return any(other is not entered and _learns(other) for other in others)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
