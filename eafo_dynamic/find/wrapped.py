"""What a search must know of a model that is wrapped already: which modules are, and what they were before.

A wrapped module is an instance of a generated subclass of its own class (``apply.hosting``).
"""

from __future__ import annotations

from abc import ABCMeta
from typing import Any, cast

from torch import nn

__all__ = [
    "ACTIVATION",
    "ENTRY_POINTS",
    "OWNER",
    "STEPS",
    "CarriesCorrection",
    "Wrapped",
    "class_before",
    "derived_class",
    "is_activation",
    "plain_view",
    "rebased",
]

ACTIVATION, OWNER = "activation", "owner"

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
ENTRY_POINTS = ("forward", *STEPS)


class Wrapped:
    """A module that hosts sites.

    Attributes:
        eafo_class: the class the module had before.
        eafo_kind: ACTIVATION or OWNER.
        eafo_functions: of an owner: names of the functions that its own code calls and a site corrects.
    """

    eafo_class: type[nn.Module]
    eafo_kind: str
    eafo_functions: frozenset[str]


class CarriesCorrection:
    """Part of every module that is a corrected activation by itself, without a host; a search leaves it alone."""


def derived_class(name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type[nn.Module]:
    """A class without its metaclass being told, where that is somebody's own and may keep a register."""
    meta = max((type(base) for base in bases), key=lambda kind: len(type.mro(kind)))
    made = type(name, bases, body) if meta in (type, ABCMeta) else type.__new__(meta, name, bases, body)
    return cast("type[nn.Module]", made)


def rebased(cls: type, old: type, new: type) -> dict[str, Any]:
    """What a class is made of that equals another but for one of its bases, as arguments of ``_derived``."""
    body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return {"name": cls.__name__, "bases": tuple(new if base is old else base for base in cls.__bases__), "body": body}


def class_before(module: Wrapped) -> type[nn.Module]:
    """The class that a module gets back: that before it was wrapped, with what others have done to it since."""
    cls = type(module)
    if "eafo_kind" in vars(cls):
        return cls.eafo_class
    names = vars(cls).get("eafo_names")
    if names is not None and names == set(vars(cls)) - {"eafo_class", "eafo_names"}:
        return cls.eafo_class
    generated = next(base for base in cls.__mro__ if "eafo_kind" in vars(base))
    made = rebased(cls, generated, cast(Any, generated).eafo_class)
    for name in ("eafo_class", "eafo_names"):
        made["body"].pop(name, None)
    return derived_class(**made)


def plain_view(module: nn.Module) -> nn.Module:
    """The module without its correction: an object of the original class that shares all its state, live.

    Args:
        module: wrapped or not.

    Returns:
        The view; the module itself where it is not wrapped.
    """
    if not isinstance(module, Wrapped):
        return module
    before = class_before(module)
    view = before.__new__(before)
    view.__dict__ = module.__dict__
    return view


def is_activation(module: nn.Module) -> bool:
    """Whether a module is a wrapped activation.

    Args:
        module: wrapped or not.

    Returns:
        Whether it is.
    """
    return isinstance(module, Wrapped) and module.eafo_kind == ACTIVATION
