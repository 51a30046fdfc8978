"""Base functions whose gradient is one of torch's operations, so that base and correction can share one backward."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eafo_dynamic.internals.torch_internals import gradient_kernel

__all__ = [
    "INSIDE",
    "NOTHING",
    "Known",
    "known_base",
    "known_function",
    "known_inside",
    "known_module",
    "known_pointwise",
]

_ATEN: Any = torch.ops.aten
_GRADIENTS: dict[str, Any] = {
    name: gradient_kernel(name)
    for name in (
        "elu", "gelu", "hardswish", "leaky_relu", "mish", "sigmoid", "silu", "softplus", "tanh", "threshold",
    )
}  # fmt: skip
_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)  # alpha, scale; as in torch


@dataclass(frozen=True, eq=False)
class Known:
    """A base function, and the gradient that torch's autograd computes for it, bit for bit.

    Args:
        value: computes base(z) in a new tensor.
        gradient: computes grad * base'(z) from grad and z, in a new tensor.
        code: number of the function in the compiled kernel; 0 for a function that it cannot compute.
        below: slope for z < 0 of a function with code 1, which is z for z > 0.
        gradient_by_value: computes grad * base'(z) from grad and base(z), where torch's autograd keeps that.
    """

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    code: int = 0
    below: float = 0.0
    gradient_by_value: Callable[[Tensor, Tensor], Tensor] | None = None


def _minus_zeros(*tensors: Tensor) -> Tensor:
    # x + (-0.0) is x bit for bit for every x, +0.0 and -0.0 included
    return torch.full_like(tensors[0], -0.0)


NOTHING = Known(_minus_zeros, _minus_zeros)
"""No base at all: the correction term alone."""


def _relu() -> Known:
    # autograd keeps the output; the input has the same sign, and is kept anyway
    return Known(torch.relu, lambda g, z: _GRADIENTS["threshold"](g, z, 0), 1)


def _leaky_relu(negative_slope: float = 0.01) -> Known:
    def gradient(g: Tensor, z: Tensor) -> Tensor:
        return _GRADIENTS["leaky_relu"](g, z, negative_slope, False)

    return Known(lambda z: _ATEN.leaky_relu.default(z, negative_slope), gradient, 1, negative_slope)


def _gelu(approximate: str = "none") -> Known:
    def gradient(g: Tensor, z: Tensor) -> Tensor:
        return _GRADIENTS["gelu"](g, z, approximate=approximate)

    code = 4 if approximate == "tanh" else 3
    return Known(lambda z: _ATEN.gelu.default(z, approximate=approximate), gradient, code)


def _silu() -> Known:
    return Known(_ATEN.silu.default, lambda g, z: _GRADIENTS["silu"](g, z), 2)


def _mish() -> Known:
    return Known(_ATEN.mish.default, lambda g, z: _GRADIENTS["mish"](g, z))


def _hardswish() -> Known:
    return Known(_ATEN.hardswish.default, lambda g, z: _GRADIENTS["hardswish"](g, z))


def _elu(alpha: float = 1.0) -> Known:
    return _scaled_elu(alpha, 1.0)


def _selu() -> Known:
    return _scaled_elu(*_SELU)


def _scaled_elu(alpha: float, scale: float) -> Known:
    def gradient(g: Tensor, z: Tensor) -> Tensor:
        return _GRADIENTS["elu"](g, alpha, scale, 1.0, False, z)

    return Known(lambda z: _ATEN.elu.default(z, alpha, scale), gradient)


def _tanh() -> Known:
    by_value = _GRADIENTS["tanh"]
    return Known(torch.tanh, lambda g, z: by_value(g, torch.tanh(z)), gradient_by_value=by_value)


def _sigmoid() -> Known:
    by_value = _GRADIENTS["sigmoid"]
    return Known(torch.sigmoid, lambda g, z: by_value(g, torch.sigmoid(z)), gradient_by_value=by_value)


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Known:
    def gradient(g: Tensor, z: Tensor) -> Tensor:
        return _GRADIENTS["softplus"](g, z, beta, threshold)

    return Known(lambda z: _ATEN.softplus.default(z, beta, threshold), gradient)


# name of the function, what makes it, and its hyper-parameters
_ALL: dict[type[nn.Module], tuple[str, Callable[..., Known], tuple[str, ...]]] = {
    nn.ReLU: ("relu", _relu, ()),
    nn.LeakyReLU: ("leaky_relu", _leaky_relu, ("negative_slope",)),
    nn.GELU: ("gelu", _gelu, ("approximate",)),
    nn.SiLU: ("silu", _silu, ()),
    nn.Mish: ("mish", _mish, ()),
    nn.Hardswish: ("hardswish", _hardswish, ()),
    nn.ELU: ("elu", _elu, ("alpha",)),
    nn.SELU: ("selu", _selu, ()),
    nn.Tanh: ("tanh", _tanh, ()),
    nn.Sigmoid: ("sigmoid", _sigmoid, ()),
    nn.Softplus: ("softplus", _softplus, ("beta", "threshold")),
}
_GRADIENT_NAMES = {"relu": "threshold", "selu": "elu"}  # the gradients of the others have their own name


def _has_gradient(name: str) -> bool:
    """Whether this version of torch has the operation that computes a function's gradient."""
    return _GRADIENTS[_GRADIENT_NAMES.get(name, name)] is not None


_BY_MODULE = {kind: entry for kind, entry in _ALL.items() if _has_gradient(entry[0])}
_BY_NAME = {name: (maker, keys) for name, maker, keys in _BY_MODULE.values()}
_POINTWISE: dict[object, str] = {F.relu: "relu", F.leaky_relu: "leaky_relu", F.gelu: "gelu", F.silu: "silu"}

INSIDE = (_relu(), _leaky_relu(), _silu(), _gelu(), _gelu("tanh"))
"""The functions that the compiled kernel can compute."""

_BY_CODE = {known.code: known for known in INSIDE if known.code != 1}  # those of code 1 differ in their slope


@functools.lru_cache(maxsize=256)
def known_inside(code: int, below: float) -> Known:
    """A function that the compiled kernel can compute.

    Args:
        code: see ``Known``.
        below: see ``Known``.

    Returns:
        The function.
    """
    if code in _BY_CODE:
        return _BY_CODE[code]
    return _relu() if below == 0 else _leaky_relu(below)


@functools.lru_cache(maxsize=256)
def _made(maker: Callable[..., Known], keys: tuple[str, ...], values: tuple[object, ...]) -> Known | None:
    """The function with hyper-parameters that are numbers or text, those of numpy included; None with others."""
    given: dict[str, object] = {}
    for key, value in zip(keys, values, strict=True):
        if isinstance(value, (int, float, str)):
            given[key] = value
        elif isinstance(value, numbers.Real):
            given[key] = float(value)
        else:
            return None
    return maker(**given)


def known_module(module: nn.Module, cls: type[nn.Module] | None = None) -> Known | None:
    """The function of an activation module, with its present hyper-parameters.

    Args:
        module: the activation.
        cls: the class to look up, if it is not ``type(module)``.

    Returns:
        The function; None for a class that is not in the table, subclasses included: they may compute anything.
    """
    entry = _BY_MODULE.get(cls or type(module))
    if entry is None:
        return None
    _, maker, keys = entry
    if not keys:
        return _made(maker, (), ())
    return _made(maker, keys, tuple([getattr(module, key) for key in keys]))


def known_function(name: str, rest: tuple[object, ...], options: Mapping[str, object]) -> Known | None:
    """The function that a call such as ``F.gelu(z, approximate="tanh")`` computes.

    Args:
        name: name of the function.
        rest: positional arguments after z.
        options: keyword arguments.

    Returns:
        The function; None where it is not in the table, or a hyper-parameter is given by position.
    """
    entry = _BY_NAME.get(name)
    if entry is None or rest:
        return None
    maker, keys = entry
    given = {key: value for key, value in options.items() if key != "inplace"}
    if not set(given) <= set(keys) or not all(isinstance(value, Hashable) for value in given.values()):
        return None
    return _made(maker, tuple(given), tuple(given.values()))


def known_pointwise(function: Callable[[Tensor], Tensor]) -> Known | None:
    """The function that a callable computes, if the compiled kernel can compute it.

    Args:
        function: one of torch's functions, or a ``functools.partial`` of one with keyword arguments.

    Returns:
        The function; None for all others.
    """
    called: object = function
    rest: tuple[object, ...] = ()
    options: Mapping[str, object] = {}
    if isinstance(function, functools.partial):
        called = function.func
        rest = function.args
        options = function.keywords
    name = _POINTWISE.get(called) if isinstance(called, Hashable) else None
    if name is None:
        return None
    return known_function(name, rest, options)


@functools.lru_cache(maxsize=256)
def known_base(function: Callable[[Tensor], Tensor]) -> Known:
    """Any pointwise function with its gradient: one of the table's, or by torch's autograd.

    Args:
        function: out of place and differentiable.

    Returns:
        The function.
    """
    known = known_pointwise(function)
    if known is not None:
        return known

    def gradient(grad: Tensor, z: Tensor) -> Tensor:
        with torch.enable_grad():
            points = z.detach().requires_grad_()
            value = function(points)
            return torch.autograd.grad(value, points, grad.to(value.dtype))[0]

    return Known(function, gradient)
