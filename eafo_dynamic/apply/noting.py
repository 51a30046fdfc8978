"""Plain children of an owner tell the frame around them that they have returned."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from eafo_dynamic.apply.frames import STACK
from eafo_dynamic.apply.hosting import Hosting
from eafo_dynamic.find.behaviour import looks_like_activation
from eafo_dynamic.find.children import names_of_children, parent_of
from eafo_dynamic.find.wrapped import OWNER, CarriesCorrection

__all__ = ["forget_children", "note_children", "parents_of_noted"]


_NOTED = "eafo_noted"  # where a module keeps the handle of its hook


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


def note_children(model: nn.Module, owners: Collection[str], *, for_good: bool = False) -> None:
    """Lets the children of owners tell that they have returned.

    Args:
        model: the model; those of its modules that are wrapped tell it anyway.
        owners: names of the owners, and of the modules whose forwards run between them and their calls.
        for_good: whether ``forget_children`` shall never take it back, and nothing of this package stay at the module.
    """
    names = names_of_children(model)
    first = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        child = names.get(first[id(module)])
        if child and parent_of(name, model) in owners:
            handle = _note(module, child)
            if handle is not None and not for_good:
                vars(module)[_NOTED] = handle


def _note(module: nn.Module, child: str) -> RemovableHandle | None:
    if isinstance(module, Hosting):
        forget_children(module)
        if module.eafo_kind == OWNER:
            module.eafo_child = child
        return None
    # a transformer layer of torch takes another path where it has a hook
    silent = (torch.jit.ScriptModule, CarriesCorrection, nn.TransformerEncoderLayer)
    if isinstance(module, silent) or looks_like_activation(module) or _NOTED in vars(module):
        return None
    # before the hooks of others: what they call comes after the child
    return module.register_forward_hook(_Returned(child), prepend=True)


def parents_of_noted(model: nn.Module) -> tuple[str, ...]:
    """Modules whose children tell that they have returned.

    Args:
        model: wrapped.

    Returns:
        Their names.
    """
    noted = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if (isinstance(module, Hosting) and module.eafo_child) or _NOTED in vars(module)
    ]
    return tuple(sorted({parent_of(name, model) for name in noted}))


def forget_children(module: nn.Module) -> None:
    """Takes back what ``note_children`` did.

    Args:
        module: any.
    """
    handle = vars(module).pop(_NOTED, None)
    if handle is not None:
        handle.remove()
