"""Calls that the example did not reach, by a module of the same kind that it did reach.

Experts without a token, dropped layers and blocks behind an early exit are built like those that ran. An activation
module shows without a run; which functions the code calls, and how often it calls a shared module, does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from types import CodeType
from typing import Any

from torch import nn

from eafo_dynamic.find.lineage import learns
from eafo_dynamic.find.selection import FoundSite
from eafo_dynamic.find.wrapped import plain_view
from eafo_dynamic.internals.torch_internals import MODULE_TABLES

__all__ = ["is_named", "relatives", "taken_over"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BY_NAME = {"getattr", "children", "named_children", "modules", "named_modules", "get_submodule", *MODULE_TABLES}


def taken_over(model: nn.Module, reached: Sequence[str], sites: Sequence[FoundSite]) -> list[FoundSite]:
    """Sites of modules that did not run, after those of a module with the same structure that did.

    Args:
        model: the model.
        reached: FQNs of the modules that ran, in their order.
        sites: what was found in those.

    Returns:
        Sites of functional calls and of repeated calls; none for what has no such relative.
    """
    modules = dict(model.named_modules())
    first = {id(module): name for name, module in modules.items()}
    used = {site.name for site in sites}
    found: list[FoundSite] = []
    for name, relative in relatives(model, reached).items():
        for site in _moved(sites, relative, name, modules, first):
            if site.name not in used:
                used.add(site.name)
                found.append(site)
    return found


def relatives(model: nn.Module, reached: Sequence[str]) -> dict[str, str]:
    """Modules with weights that did not run, and for each the nearest module that did run and has its structure.

    One without weights is no such module: ``DistributedDataParallel`` minds a parameter in it that is never used, and
    the plain model has none there.

    Args:
        model: the model.
        reached: FQNs of the modules that ran, in their order.

    Returns:
        FQNs; of modules inside each other only the outermost.
    """
    modules = dict(model.named_modules())
    shapes = {name: _structure(modules[name]) for name in reached if name and _own_code(modules[name])}
    inside = ""
    found: dict[str, str] = {}
    for name, module in modules.items():
        if name in reached or not _own_code(module) or (inside and name.startswith(inside)):
            continue
        structure = _structure(module)
        relative = next((other for other in _nearest(name, shapes) if shapes[other] == structure), None)
        if relative is not None and learns(module):
            inside = f"{name}."
            found[name] = relative
    return found


def is_named(model: nn.Module, name: str, reached: Mapping[str, int]) -> bool:
    """Whether a module that did not run may run another time: the code around it names it.

    Args:
        model: the model.
        name: FQN of the module.
        reached: how often each module ran.

    Returns:
        Whether a method of a module around it uses its name, or goes through all modules that there are.
    """
    holder, _, attribute = name.rpartition(".")
    if not name or reached.get(name, 0):
        return True
    around = [""]
    parent = holder
    while parent:
        around.append(parent)
        parent, _, _ = parent.rpartition(".")
    kinds = {type(plain_view(model.get_submodule(name_around))) for name_around in around}
    is_held = isinstance(model.get_submodule(holder), _CONTAINERS)
    if is_held or any(_uses(kind, attribute) for kind in kinds):
        return is_named(model, holder, reached)
    return False


def _uses(kind: type[nn.Module], attribute: str) -> bool:
    """Whether a method of a class uses a name, or goes through all modules that there are."""
    for cls in kind.__mro__:
        if cls.__module__.startswith("torch.nn.modules.module"):
            continue
        for name, method in vars(cls).items():
            if name == "__init__":
                continue
            names = _names_in(method)
            if attribute in names or _BY_NAME & names:
                return True
    return False


def _names_in(method: Any) -> set[str]:
    """The names in the code of a method, and in that of the functions inside it."""
    names: set[str] = set()
    for function in _functions(method):
        for code in _codes(_code_of(function)):
            names.update(code.co_names)
    return names


def _functions(method: Any) -> list[Any]:
    """What a method, a property or a cached property runs."""
    return [getattr(method, name, None) for name in ("fget", "fset", "func", "__func__")] + [method]


def _code_of(function: Any) -> object:
    if not callable(function):
        return None
    return getattr(inspect.unwrap(function), "__code__", None)


def _codes(code: object) -> Iterator[CodeType]:
    """The code of a function, and of the functions inside it."""
    if isinstance(code, CodeType):
        yield code
        for constant in code.co_consts:
            yield from _codes(constant)


def _own_code(module: nn.Module) -> bool:
    return bool(list(module.children())) and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _structure(module: nn.Module) -> tuple[tuple[str, type], ...]:
    return tuple((name, type(plain_view(each))) for name, each in module.named_modules(remove_duplicate=False))


def _nearest(name: str, others: Collection[str]) -> list[str]:
    """Others by how much of their path they share, the most first."""
    path = name.split(".")

    def shared(other: str) -> int:
        steps = zip(path, other.split("."), strict=False)
        return next((k for k, (a, b) in enumerate(steps) if a != b), 0)

    return sorted(others, key=shared, reverse=True)


def _moved(
    sites: Sequence[FoundSite], old: str, new: str, modules: dict[str, nn.Module], first: dict[int, str]
) -> Iterator[FoundSite]:
    """The sites inside one module as those inside another."""

    def move(name: str) -> str:
        return new + name[len(old) :]

    for site in sites:
        local = site.owner is not None and _within(site.owner, old) and _within(site.name, old)
        if not local or site.owner is None:
            continue
        if site.parameters is None:
            child = modules[new].get_submodule(site.name.rpartition("#")[0][len(old) + 1 :])
            module = first[id(child)]
        elif _within(site.module, old):
            module = move(site.module)
        else:
            continue
        reason = site.reason or f"not reached by the example input; as in {old}"
        guarded = tuple(move(name) if _within(name, old) else name for name in site.guarded)
        owner = move(site.owner)
        yield replace(site, name=move(site.name), module=module, owner=owner, reason=reason, guarded=guarded)


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith((f"{prefix}.", f"{prefix}:"))
