"""Activation objects that more than one model holds, such as a default argument: ``def __init__(self, act=nn.GELU())``.

A correction belongs to a model. So where somebody else holds an activation, the model that is wrapped gets an object of
its own in its place, and gets the common one back when it is unwrapped.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable
from types import FunctionType
from typing import Any, cast

from torch import nn

__all__ = ["give_back_common", "take_own_copies"]

_COMMON = "eafo_common"
_TABLES = ("_parameters", "_buffers", "_modules")


def take_own_copies(model: nn.Module, names: Iterable[str]) -> None:
    """Gives a model its own object for each activation that somebody else holds, too.

    Args:
        model: any module.
        names: FQNs of activations in it.
    """
    activations = {id(module): module for module in map(model.get_submodule, names)}
    for module in _held_by_others(model, list(activations.values())):
        own = _copied(module)
        vars(own)[_COMMON] = module
        _put_in_place_of(model, module, own)


def give_back_common(model: nn.Module) -> None:
    """Puts the common objects back.

    Args:
        model: a model that is not wrapped any more.
    """
    for module in list(model.modules()):
        common = vars(module).pop(_COMMON, None)
        if common is not None:
            _put_in_place_of(model, module, common)


def _put_in_place_of(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _copied(module: nn.Module) -> nn.Module:
    """A module of its own over the same parameters, buffers and children."""
    own = copy.copy(module)
    for table in _TABLES:
        vars(own)[table] = dict(vars(module)[table])
    return own


def _held_by_others(model: nn.Module, modules: list[nn.Module]) -> list[nn.Module]:
    """Those that another model, a global, a class or a default argument holds."""
    own_tables = {id(module._modules) for module in model.modules()}
    by_id = {id(module): module for module in modules}
    held: dict[int, nn.Module] = {}
    for holder in gc.get_referrers(*modules) if modules else ():
        if not isinstance(holder, (dict, tuple, list)) or holder is modules or id(holder) in own_tables:
            continue
        values: Iterable[Any] = cast("dict[Any, Any]", holder).values() if isinstance(holder, dict) else holder
        of_holder = by_id.keys() & {id(value) for value in values}
        if of_holder and (_is_lasting(holder) or any(_holds_for_good(each, holder) for each in gc.get_referrers(holder))):
            held |= {number: by_id[number] for number in of_holder}
    return list(held.values())


def _is_lasting(holder: Any) -> bool:
    """Whether a container is a namespace: of a module of Python, of a class, or of an activation that has taken over."""
    return isinstance(holder, dict) and ("__builtins__" in holder or "__qualname__" in holder or _COMMON in holder)


def _holds_for_good(owner: Any, holder: Any) -> bool:
    """Whether an object has a container as the children of a module, the defaults of a function, or a global."""
    if isinstance(owner, FunctionType):
        return True
    if not isinstance(owner, dict):
        return isinstance(owner, type)
    known = cast("dict[str, Any]", owner)
    return "__builtins__" in known or known.get("_modules") is holder
