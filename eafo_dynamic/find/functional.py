"""Activations that are called as functions: ``F.relu(x)``, ``x.relu()``, ``torch.tanh``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import get_overridable_functions

from eafo_dynamic.correction.bases import Base, as_base
from eafo_dynamic.errors import SiteError
from eafo_dynamic.find.written import WRITTEN, written_base, written_node
from eafo_dynamic.internals.torch_internals import function_namespace

__all__ = [
    "WRITTEN",
    "function_base",
    "function_name",
    "hyper_parameters",
    "is_function_of_name",
    "is_hidden_from_compiler",
    "is_inplace",
    "kernel_name",
    "unbound",
    "with_input_first",
]

_HYPER: dict[str, tuple[str, ...]] = {
    "relu": (),
    "relu6": (),
    "leaky_relu": ("negative_slope",),
    "elu": ("alpha",),
    "selu": (),
    "celu": ("alpha",),
    "gelu": ("approximate",),
    "silu": (),
    "mish": (),
    "hardswish": (),
    "hardtanh": ("min_val", "max_val"),
    "hardsigmoid": (),
    "softplus": ("beta", "threshold"),
    "softsign": (),
    "tanh": (),
    "sigmoid": (),
    "logsigmoid": (),
    "softshrink": ("lambd",),
    "hardshrink": ("lambd",),
    "tanhshrink": (),
    "threshold": ("threshold", "value"),
    "prelu": ("weight",),
    "rrelu": ("lower", "upper"),
}
_OTHER_NAMES = {"_threshold": "threshold", "special_expit": "sigmoid", "log_sigmoid": "logsigmoid", "expit": "sigmoid"}


def _function_table() -> dict[Any, str]:
    spellings = {spelling: name for name in _HYPER for spelling in (name, f"{name}_")} | _OTHER_NAMES
    table: dict[Any, str] = {}
    # not torch.ops.aten: compiled code calls those operators too
    for home in (F, torch, torch.Tensor, torch.special, function_namespace):
        for spelling, name in spellings.items():
            found = getattr(home, spelling, None)
            if found is not None:
                table[found] = name
    return table


_FUNCTIONS = _function_table()
_IN_PLACE = {func: True for func in _FUNCTIONS if func.__name__.endswith("_")}
_KERNELS = {"log_sigmoid_forward": "logsigmoid", "_prelu_kernel": "prelu", "rrelu_with_noise": "rrelu"}


def function_name(func: Any) -> str | None:
    """The activation that a torch function computes.

    Args:
        func: as a TorchFunctionMode gets it.

    Returns:
        Its name, as in ``as_base``; None for any other function.
    """
    return _FUNCTIONS.get(func)


def with_input_first(func: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a torch function, those of an activation with the pre-activation first, however it was given.

    Args:
        func: as a TorchFunctionMode gets it.
        args: positional arguments.
        kwargs: keyword arguments, or None.

    Returns:
        Positional and keyword arguments.
    """
    if kwargs and not args and "input" in kwargs and func in _FUNCTIONS:
        rest = dict(kwargs)
        return (rest.pop("input"),), rest
    return args, kwargs or {}


def kernel_name(func: Any) -> str | None:
    """The activation that a kernel computes.

    Args:
        func: an ``aten`` operator, as a TorchDispatchMode gets it.

    Returns:
        Its name, as in ``as_base``; None for any other kernel.
    """
    if getattr(func, "namespace", "") != "aten":
        return None
    name = func.overloadpacket.__name__
    name = _KERNELS.get(name, name.removesuffix("_"))
    return name if name in _HYPER else None


def is_inplace(func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an activation function overwrites its input.

    Args:
        func: as a TorchFunctionMode gets it.
        name: what ``function_name`` calls it.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        Whether it does: ``x.relu_()``, ``F.relu(x, inplace=True)``, ``F.elu(x, 1.0, True)``.
    """
    if func in _IN_PLACE or kwargs.get("inplace", False):
        return True
    place = 4 if name == "rrelu" else len(_HYPER[name]) + 1
    return len(args) > place and args[place] is True


def is_hidden_from_compiler(func: Any, caller: CodeType) -> bool:
    """Whether torch.compile shows a call to no function mode: ``F.relu_(x)``, ``F.hardswish(x)``, ``F.tanh(x)``.

    It shows ``x.relu_()``, ``F.relu(x, inplace=True)`` and ``x.tanh()``.

    Args:
        func: as a TorchFunctionMode gets it.
        caller: code of the function that called it: eager torch shows the ``x.tanh()`` inside ``F.tanh(x)``.

    Returns:
        Whether it does not.
    """
    shown = _shown_by_compiler()
    if func not in shown:
        return True
    hidden = _FUNCTIONS.keys() - shown
    return any(getattr(function, "__code__", None) is caller for function in hidden)


@functools.cache
def _shown_by_compiler() -> frozenset[Any]:
    """Functions of torch that its compiler shows to modes: those that it calls overridable."""
    return frozenset().union(*get_overridable_functions().values())


def is_function_of_name(name: str) -> bool:
    """Whether an identifier in somebody's code looks like an activation function, a gate not counted.

    Args:
        name: the identifier.

    Returns:
        Whether it does.
    """
    return name.rstrip("_") in _HYPER and name.rstrip("_") not in ("sigmoid", "hardsigmoid", "softplus", "threshold")


def hyper_parameters(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, object]:
    """Hyper-parameters of one functional call, by name; only those the call gives.

    Args:
        name: of the function.
        args: positional arguments, the pre-activation first.
        kwargs: keyword arguments.

    Returns:
        Numbers and strings; a tensor (the weight of a PReLU) as its mean.
    """
    given = dict(zip(_HYPER[name], args[1:], strict=False))
    given |= {key: value for key, value in kwargs.items() if key in _HYPER[name]}
    for key, value in given.items():
        if isinstance(value, Tensor):
            given[key] = float(value.detach().mean())
    return given


def function_base(name: str, parameters: Mapping[str, object]) -> Base:
    """The base of a functional call.

    Args:
        name: of the function, or WRITTEN.
        parameters: from ``hyper_parameters``; for a written-out activation, ``expression``: its Node.

    Returns:
        The base.

    Raises:
        SiteError: if no activation has that name and those hyper-parameters.
    """
    # the name may come from anybody's checkpoint, and torch has functions that write files
    if name != WRITTEN and not (name in _HYPER and set(parameters) <= set(_HYPER[name])):
        raise SiteError(f"{name}({', '.join(map(str, parameters))}) is no activation that is known.")
    if name == WRITTEN:
        constants: Any = parameters.get("constants", ())
        return written_base(written_node(parameters), tuple(constants))
    values: Any = dict(parameters)
    if name == "prelu":
        return as_base(nn.LeakyReLU(values["weight"]))
    if name == "rrelu":
        return as_base(nn.RReLU(values.get("lower", 1 / 8), values.get("upper", 1 / 3)))
    return as_base(functools.partial(getattr(F, name, getattr(torch, name, None)), **values))  # pyright: ignore[reportArgumentType]


def unbound(cls: type[nn.Module], name: str) -> Callable[..., Any] | None:
    """A method as a function that takes the module first.

    Args:
        cls: a module class.
        name: of the method.

    Returns:
        The function; None if the class has no such method.
    """
    method = getattr(cls, name, None)
    if not callable(method):
        return None
    found = inspect.getattr_static(cls, name)
    if isinstance(found, (staticmethod, classmethod)) or not hasattr(found, "__get__"):
        return functools.partial(_without_module, method)  # nor does a built-in function want the module
    return method


def _without_module(method: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)
