"""What the code of a model's classes reads: which attributes, how often, in which methods."""

from __future__ import annotations

import dis
import inspect
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

from torch import nn

__all__ = ["Attributes", "methods_that_call"]


class Attributes:
    """The attributes that the classes of a model's modules read.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        classes = {type(module) for module in model.modules()}
        self._of_others: set[str] = set()
        for cls in classes:
            self._of_others |= set(_reads(cls)[1])

    def reads(self, module: nn.Module, name: str) -> int:
        """How many places in the code of a model read a submodule.

        Args:
            module: the module around it.
            name: of the submodule in it; ``"acts.3"`` for one that a list or dictionary of modules holds.

        Returns:
            How often the module's class reads it, or all of the list, of ``self``, and 1 more where some class reads an
            attribute of this name of anything else. A container whose forward is torch's own reads each of its modules
            once.
        """
        home = getattr(type(module).forward, "__module__", None) or ""  # the code of a graph has none
        if home.partition(".")[0] == "torch":
            return 1
        own, _ = _reads(type(module))
        attribute, _, _ = name.partition(".")
        spellings = {attribute, name}
        count = sum(own[spelling] for spelling in spellings)
        if isinstance(module, nn.Sequential):  # whose loop a subclass may call
            count += 1
        if spellings & self._of_others:
            count += 1
        return count


@lru_cache(maxsize=1 << 12)
def _reads(cls: type[nn.Module]) -> tuple[Counter[str], Counter[str]]:
    """How often a class reads each attribute of ``self``, and of anything else."""
    own: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for each in _of_users(cls):
        for name, value in vars(each).items():
            code = _code(value.fget if isinstance(value, property) else value)
            if code is not None and name != "__init__":  # which gives names, and calls nothing
                _count(code, own, others)
    return own, others


def methods_that_call(cls: type[nn.Module], names: set[str], functions: set[str]) -> set[str]:
    """Methods of a class that may make a call.

    Args:
        cls: a module class.
        names: by which code may call it.
        functions: names of functions, with those of their classes, that are known to lie on the way to it.

    Returns:
        Names of methods that are one of the functions, or have one of the names in their code; none with underscores at
        both ends.
    """
    found: set[str] = set()
    for each in _of_users(cls):
        for name, value in vars(each).items():
            code = _code(value) if inspect.isfunction(value) else None
            if code is None or name.startswith("__"):
                continue
            if f"{each.__qualname__}.{name}" in functions or names & _names(code):
                found.add(name)
    return found


def _of_users(cls: type[nn.Module]) -> Iterator[type]:
    return (each for each in cls.__mro__ if each is not object and each.__module__.partition(".")[0] != "torch")


def _code(value: object) -> CodeType | None:
    function: Any = getattr(value, "__func__", value)
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code if isinstance(code, CodeType) else None


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _count(code: CodeType, own: Counter[str], others: Counter[str]) -> None:
    """Counts what a function reads: ``"acts"`` of ``self.acts``, and ``"acts.3"`` of ``self.acts[3]``."""
    instructions = list(_instructions(code))
    before = ""
    for each, after in zip(instructions, [*instructions[1:], None], strict=True):
        if each.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            name = str(each.argval)
            if after is not None and after.opname == "LOAD_CONST" and isinstance(after.argval, (int, str)):
                name = f"{name}.{after.argval}"
            (own if before == "self" else others)[name] += 1
        before = str(each.argval) if each.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) else ""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _count(constant, own, others)


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    return (each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "EXTENDED_ARG"))
