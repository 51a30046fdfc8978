"""By which names a module's forward knows the children that return in it."""

from __future__ import annotations

from torch import nn

__all__ = ["has_weights", "names_of_children", "parent_of"]

_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict)


def parent_of(name: str, model: nn.Module) -> str:
    """The module around a module that may call it: lists of modules have no forward.

    Args:
        name: FQN of a module.
        model: the model.

    Returns:
        FQN of the module around it.
    """
    parent = name.rpartition(".")[0]
    while parent and isinstance(model.get_submodule(parent), _WITHOUT_FORWARD):
        parent = parent.rpartition(".")[0]
    return parent


def has_weights(module: nn.Module) -> bool:
    """Whether a module has state of its own, by which its result is another's than that of the child before it.

    Args:
        module: any; corrections do not count.

    Returns:
        Whether it does. A ``Dropout``, which may run in training only, has none.
    """
    names = (name for name, _ in (*module.named_parameters(), *module.named_buffers()))
    return any(not name.rpartition(".")[2].startswith("eafo_") for name in names)


def names_of_children(model: nn.Module) -> dict[str, str]:
    """Names of a model's modules that blocks of one kind have in common: counted from the module around them.

    Args:
        model: any module.

    Returns:
        The names of those that have weights, by FQN, such as ``layers.0`` for ``blocks.3.layers.0``. What lies inside a
        transformer layer of torch has none: that layer calls each of its children once, and takes another path where
        one of them has a hook.
    """
    modules = dict(model.named_modules())
    names: dict[str, str] = {}
    inside = ""
    for name, module in modules.items():
        if inside and name.startswith(inside):
            continue
        inside = ""
        if isinstance(module, nn.TransformerEncoderLayer):
            inside = f"{name}." if name else ""
        parent = parent_of(name, model)
        if has_weights(module):
            names[name] = name[len(parent) + 1 :] if parent else name
        if isinstance(module, nn.TransformerEncoderLayer) and not name:
            break
    return names
