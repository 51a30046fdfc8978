"""Which attributes the code of a model's classes reads, and how often."""

from __future__ import annotations

import dis
import inspect
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType

from torch import nn

__all__ = ["Attributes"]


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

    def is_read_once(self, module: nn.Module, name: str) -> bool:
        """Whether one place alone in the code of a model reads a submodule.

        Args:
            module: the module around it.
            name: of the submodule in it.

        Returns:
            Whether there is exactly one place where the module's class reads it of ``self``, and none where some class
            reads an attribute of this name of anything else.
        """
        return _reads(type(module))[0][name] == 1 and name not in self._of_others


@lru_cache(maxsize=1 << 12)
def _reads(cls: type[nn.Module]) -> tuple[Counter[str], Counter[str]]:
    """How often a class reads each attribute of ``self``, and of anything else."""
    own: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for each in cls.__mro__:
        if each is object or each.__module__.partition(".")[0] == "torch":
            continue
        for value in vars(each).values():
            function = value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
            code = getattr(function, "__code__", None)
            if isinstance(code, CodeType):
                _count(code, own, others)
    return own, others


def _count(code: CodeType, own: Counter[str], others: Counter[str]) -> None:
    before = ""
    for each in _instructions(code):
        if each.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            (own if before == "self" else others)[str(each.argval)] += 1
        before = str(each.argval) if each.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) else ""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _count(constant, own, others)


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    return (each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "EXTENDED_ARG"))
