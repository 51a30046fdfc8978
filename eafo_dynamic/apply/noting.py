"""Plain children of an owner tell the frame around them that they have returned."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from eafo_dynamic.apply.frames import STACK
from eafo_dynamic.apply.hosting import Hosting
from eafo_dynamic.find.behaviour import looks_like_activation
from eafo_dynamic.find.children import names_of_children, parent_of
from eafo_dynamic.find.wrapped import OWNER, CarriesCorrection
from eafo_dynamic.internals.torch_internals import hook_tables

__all__ = ["forget_children", "note_children", "parents_of_noted"]


class _Returned:
    """A forward hook; copied and pickled with its module.

    Args:
        child: by which name the frame knows it.
    """

    def __init__(self, child: str) -> None:
        self.child = child

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        frames = STACK.frames
        if frames:
            frames[-1].returned.append(self.child)


def note_children(model: nn.Module, owners: Collection[str]) -> None:
    """Lets the children of owners tell that they have returned.

    Args:
        model: the model; those of its modules that are wrapped tell it anyway.
        owners: names of the owners, and of the modules whose forwards run between them and their calls.
    """
    names = names_of_children(model)
    first = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        child = names.get(first[id(module)])
        if child and parent_of(name, model) in owners:
            _note(module, child)


def parents_of_noted(model: nn.Module) -> tuple[str, ...]:
    """Modules whose children tell that they have returned.

    Args:
        model: wrapped, or merged.

    Returns:
        Their names.
    """
    noted = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if (isinstance(module, Hosting) and module.eafo_child) or _hooks(module)
    ]
    return tuple(sorted({parent_of(name, model) for name in noted}))


def _note(module: nn.Module, child: str) -> None:
    if isinstance(module, Hosting):
        forget_children(module)
        if module.eafo_kind == OWNER:
            module.eafo_child = child
    elif isinstance(module, nn.TransformerEncoderLayer):
        pass  # it takes another path where it has a hook
    elif not (
        isinstance(module, (torch.jit.ScriptModule, CarriesCorrection))
        or looks_like_activation(module)
        or _hooks(module)
    ):
        # before those of others: what they call comes after the child
        module.register_forward_hook(_Returned(child), prepend=True)


def _hooks(module: nn.Module) -> list[tuple[Any, Any]]:
    return [
        (table, number)
        for table in hook_tables(module).values()
        if isinstance(table, dict)
        for number, hook in table.items()
        if isinstance(hook, _Returned)
    ]


def forget_children(module: nn.Module) -> None:
    """Takes back what ``note_children`` did.

    Args:
        module: any.
    """
    for table, number in _hooks(module):
        del table[number]
