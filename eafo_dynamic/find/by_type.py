"""Code of a model that asks for the exact type of a module: ``type(m) is nn.ReLU``, or a table by type.

A wrapped module is an instance of a subclass of its own class, which such code does not know. What it would do then
cannot be known, so it is named.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

from torch import nn

from eafo_dynamic.find.wrapped import plain_view

__all__ = ["questions_of_type"]

_FUSES = {"fuse_modules", "fuse_modules_qat", "_fuse_modules"}
_COMPARISONS = (ast.Is, ast.IsNot, ast.Eq, ast.NotEq, ast.In, ast.NotIn)


def questions_of_type(model: nn.Module, wrapped: Collection[str]) -> str:
    """What a model's own code asks of the types of modules that are to be wrapped.

    Args:
        model: any module.
        wrapped: FQNs of the modules that will have another class: activations, and owners of calls.

    Returns:
        A sentence that names the methods, and what to do; empty if there are none.
    """
    kinds = {type(plain_view(model.get_submodule(name))) for name in wrapped}
    classes = {type(plain_view(module)): None for module in model.modules()}
    asking: list[str] = []
    for cls in classes:
        if cls.__module__.startswith("torch.nn.modules."):
            continue
        for name, method in vars(cls).items():
            if _asks(method, cls, kinds):
                asking.append(f"{cls.__qualname__}.{name}")
    if not asking:
        return ""
    return (
        f"{', '.join(asking)} asks for the exact type of a module, and a wrapped one has a subclass of it: write "
        "isinstance(m, nn.ReLU) for type(m) is nn.ReLU, and merge or unwrap the model before fuse_modules."
    )


def _asks(method: Any, cls: type, kinds: Collection[type]) -> bool:
    function: Any = inspect.unwrap(method) if inspect.isroutine(method) else None
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    names = set(code.co_names)
    if names & _FUSES:
        return True
    if not names & {"type", "__class__"}:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # typed in, or a lambda amid other code
        return False

    def value_of(node: ast.expr) -> Any:
        return _value_of(node, function.__globals__, cls)

    return any(_holds(value, kinds) for value in _compared(tree, value_of))


def _compared(tree: ast.AST, value_of: Callable[[ast.expr], Any]) -> Iterator[Any]:
    """What the code compares with something, or looks something up in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(isinstance(each, _COMPARISONS) for each in node.ops):
            yield from map(value_of, (node.left, *node.comparators))
        elif isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr == "get"):
            yield value_of(node.value)


def _value_of(node: ast.expr, names: dict[str, Any], cls: type) -> Any:
    """The object that a name, an attribute of one, or a tuple or table of them stands for; None if it is not known."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        return getattr(cls if of_self else _value_of(node.value, names, cls), node.attr, None)
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return [_value_of(each, names, cls) for each in node.elts]
    if isinstance(node, ast.Dict):
        return [_value_of(each, names, cls) for each in node.keys if each is not None]
    return None


def _holds(value: Any, kinds: Collection[type]) -> bool:
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return any(isinstance(each, type) and each in kinds for each in cast("Collection[Any]", value))
    return isinstance(value, type) and value in kinds
