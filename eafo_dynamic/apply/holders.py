"""Activation objects that more than one model holds, such as a default argument: ``def __init__(self, act=nn.GELU())``.

A correction belongs to a model. So where somebody else holds an activation, the model that is wrapped gets an object of
its own in its place, and gets the common one back when it is unwrapped.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any, cast

from torch import nn

from eafo_dynamic.internals.torch_internals import MODULE_TABLES, own_children

__all__ = ["give_back_common", "take_own_copies"]

_COMMON = "eafo_common"


def take_own_copies(model: nn.Module, names: Iterable[str]) -> None:
    """Gives a model its own object for each activation that somebody else holds, too.

    Args:
        model: any module.
        names: FQNs of activations in it.
    """
    activations = list({id(module): module for module in map(model.get_submodule, names)}.values())
    for module in _held_by_others(model, activations):
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
        children = own_children(parent)
        for name, child in children.items():
            if child is old:
                children[name] = new


def _copied(module: nn.Module) -> nn.Module:
    """A module of its own over the same parameters, buffers and children."""
    own = copy.copy(module)
    for table in set(MODULE_TABLES) & vars(module).keys():
        vars(own)[table] = dict(vars(module)[table])
    return own


def _held_by_others(model: nn.Module, modules: list[nn.Module]) -> list[nn.Module]:
    """Those that another model, a global, a class or a default argument holds."""
    suspects = _held_more_often(model, modules)
    if not suspects:
        return []
    own_tables = {id(own_children(module)) for module in model.modules()}
    holders = {
        id(holder): holder
        for holder in gc.get_referrers(*suspects)
        if isinstance(holder, (dict, tuple, list)) and holder is not suspects and id(holder) not in own_tables
    }
    lasting = [holder for holder in holders.values() if _is_namespace(holder)]
    for owner in gc.get_referrers(*holders.values()):
        lasting += _kept_by(owner, holders)
    held = {id(value) for holder in lasting for value in gc.get_referents(holder)}
    return [module for module in suspects if id(module) in held]


def _held_more_often(model: nn.Module, modules: list[nn.Module]) -> list[nn.Module]:
    """Those with more references than the model has to them; a walk over all objects is for these alone."""
    of_model = Counter(id(child) for parent in model.modules() for child in own_children(parent).values())
    alone: list[nn.Module] = [nn.Identity()]
    (of_this_code,) = _references(alone)
    counts = _references(modules)
    return [
        module for module, count in zip(modules, counts, strict=True) if count > of_this_code + of_model[id(module)]
    ]


def _references(modules: list[nn.Module]) -> list[int]:
    return [sys.getrefcount(module) for module in modules]


def _is_namespace(holder: Any) -> bool:
    """Whether a container is a namespace: of a module of Python, of a class, or of an activation's own copy."""
    return isinstance(holder, dict) and ("__builtins__" in holder or "__qualname__" in holder or _COMMON in holder)


def _kept_by(owner: Any, holders: Mapping[int, Any]) -> list[Any]:
    """The containers that an object has as the children of a module, the defaults of a function, or a global."""
    kept: list[Any] = [holders[id(value)] for value in gc.get_referents(owner) if id(value) in holders]
    if isinstance(owner, (FunctionType, functools.partial, type)):
        return kept
    if not isinstance(owner, dict):
        return []
    known = cast("dict[str, Any]", owner)
    if "__builtins__" in known:
        return kept
    tables = [known.get(table) for table in MODULE_TABLES]
    return [holder for holder in kept if any(holder is table for table in tables)]
