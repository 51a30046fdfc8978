"""Hooks that only look on do not fire in a dry run: they would count, print or keep what is no part of the training.

A hook that changes what a module takes or gives is a part of the model, and stays.
"""

from __future__ import annotations

import dis
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from eafo_dynamic.errors import UnsupportedTorchError
from eafo_dynamic.find.functional import is_function_of_name
from eafo_dynamic.internals.torch_internals import BACKWARD_HOOKS, FORWARD_HOOKS, hook_tables

__all__ = ["global_observers_silenced", "silence_observers"]

_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_KEEPERS = {"append", "appendleft", "extend", "add", "update", "print", "put", "write", "info", "debug", "warning"}


def silence_observers(probe: nn.Module) -> None:
    """Takes the hooks that only look on away from a copy of a model.

    Args:
        probe: the copy; its tables of hooks are its own.
    """
    for module in probe.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        try:
            tables = hook_tables(module)
        except UnsupportedTorchError:
            warnings.warn(
                f"EAFO: hooks fire in the dry run, since torch {torch.__version__} keeps them where they are not found",
                stacklevel=2,
            )
            return
        for name in FORWARD_HOOKS:
            table = tables.get(name) or {}
            for key in [key for key, hook in table.items() if _only_looks_on(hook)]:
                del table[key]
        for name in BACKWARD_HOOKS:
            (tables.get(name) or {}).clear()


@contextmanager
def global_observers_silenced() -> Generator[None]:
    """Takes the hooks of all modules that only look on away for a while; see ``register_module_forward_hook``.

    Yields:
        Nothing.
    """
    tables = [_table_of(register) for register in (register_module_forward_pre_hook, register_module_forward_hook)]
    before = [dict(table) for table in tables]
    for table in tables:
        for key in [key for key, hook in table.items() if _only_looks_on(hook)]:
            del table[key]
    try:
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            added = {key: hook for key, hook in table.items() if key not in hooks}
            table.clear()
            table.update(hooks | added)


def _table_of(register: Callable[..., RemovableHandle]) -> dict[int, Any]:
    """Where torch keeps the hooks that a function registers."""
    handle = register(_nothing)
    table: Any = handle.hooks_dict_ref()
    handle.remove()
    return table


def _nothing(*_: Any) -> None:
    """A hook without effect."""


def _only_looks_on(hook: Callable[..., Any]) -> bool:
    """Whether a hook returns nothing and changes no attribute, as far as its code shows; else it may be needed."""
    code = _code_of(hook)
    if code is None or code.co_filename.startswith(_TORCH):  # weight norm sets the weight in a hook
        return False
    changes = {"STORE_ATTR", "DELETE_ATTR"} & {each.opname for each in dis.get_instructions(code)}
    calls = set(code.co_names)
    in_place = any(name.endswith("_") and not name.startswith("_") for name in calls)
    if changes or in_place or "setattr" in calls or any(map(is_function_of_name, calls)):
        return False
    return _returns_nothing(code)


def _returns_nothing(code: CodeType) -> bool:
    instructions = [each for each in dis.get_instructions(code) if each.opname not in ("RESUME", "NOP", "CACHE")]
    ends = [k for k, each in enumerate(instructions) if each.opname == "RETURN_VALUE"]
    constants = [each for each in instructions if each.opname == "RETURN_CONST"]
    if any(each.argval is not None for each in constants):
        return False
    if code.co_name == "<lambda>":  # what append returns is None too
        return bool(code.co_names) and code.co_names[-1] in _KEEPERS
    before = [instructions[k - 1] for k in ends]
    return all(each.opname == "LOAD_CONST" and each.argval is None for each in before)


def _code_of(hook: Any) -> CodeType | None:
    while isinstance(hook, functools.partial):
        hook = hook.func  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    hook = inspect.unwrap(hook)
    if not inspect.isroutine(hook):
        hook = inspect.getattr_static(hook, "__call__", None)
    return getattr(hook, "__code__", None)
