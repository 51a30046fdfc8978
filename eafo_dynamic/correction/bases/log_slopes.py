"""f''/f' of activations that saturate or have a kink, in closed form.

By automatic differentiation f''/f' is 0 / 0 where f' underflows: for tanh from |z| = 19 on, where it is -2 or 2.

Integrals are those of l / (1 + b l^2) with l = f''/f', in logarithms that do not overflow:

    l = -2 k tanh(k z)      -(2 log cosh(k z) + log(1 + 4 k^2 b tanh(k z)^2)) / (1 + 4 k^2 b)
    l = -k s(k z)           -(softplus(k z) + log(1 + c s^2) / 2 + sqrt(c) atan(sqrt(c) s)) / (1 + c),  c = k^2 b
    l = -z                  -log(1 + b z^2) / (2 b)
    l = -2 sign(z) / (1 + |z|)      -log((1 + |z|)^2 + 4 b)

with s the logistic function.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from eafo_dynamic.correction.bases.descriptor import LogSlope

__all__ = ["LOG_SLOPES"]


def _of_tanh(z: Tensor) -> Tensor:
    return -2 * torch.tanh(z)


def _of_sigmoid(z: Tensor) -> Tensor:
    return -torch.tanh(0.5 * z)


def _of_logsigmoid(z: Tensor) -> Tensor:
    return -torch.sigmoid(z)


def _of_softplus(z: Tensor, beta: float, threshold: float) -> Tensor:
    curved = beta * torch.sigmoid(-beta * z)
    return torch.where(beta * z > threshold, 0.0, curved)


def _of_softsign_below(z: Tensor) -> Tensor:
    return 2 / (1 - z)


def _of_softsign_above(z: Tensor) -> Tensor:
    return -2 / (1 + z)


def _constant(z: Tensor, value: float) -> Tensor:
    return torch.full_like(z, value)


def _log_cosh(w: Tensor) -> Tensor:
    return w.abs() + torch.log1p(torch.exp(-2 * w.abs())) - math.log(2)


def _integral_of_tanh(z: Tensor, b: Tensor, k: float) -> Tensor:
    c = 4 * k**2 * b
    return -(2 * _log_cosh(k * z) + torch.log1p(c * torch.tanh(k * z).square())) / (1 + c)


def _integral_of_logistic(z: Tensor, b: Tensor, k: float) -> Tensor:
    c = k**2 * b
    s = torch.sigmoid(k * z)
    bounded = 0.5 * torch.log1p(c * s.square()) + c.sqrt() * torch.atan(c.sqrt() * s)
    return -(torch.nn.functional.logsigmoid(-k * z).neg() + bounded) / (1 + c)


def _integral_of_softplus(z: Tensor, b: Tensor, beta: float, threshold: float) -> Tensor:
    return _integral_of_logistic(z.clamp(max=threshold / beta), b, k=-beta)  # above, torch takes z itself


def _integral_of_line(z: Tensor, b: Tensor) -> Tensor:
    return -torch.log1p(b * z.square()) / (2 * b)


def _integral_of_softsign(z: Tensor, b: Tensor) -> Tensor:
    return -torch.log((1 + z.abs()).square() + 4 * b)


def _tanh() -> LogSlope:
    return LogSlope(_of_tanh, _of_tanh, functools.partial(_integral_of_tanh, k=1.0))


def _sigmoid() -> LogSlope:
    return LogSlope(_of_sigmoid, _of_sigmoid, functools.partial(_integral_of_tanh, k=0.5))


def _logsigmoid() -> LogSlope:
    return LogSlope(_of_logsigmoid, _of_logsigmoid, functools.partial(_integral_of_logistic, k=1.0))


def _normal_cdf() -> LogSlope:
    return LogSlope(torch.neg, torch.neg, _integral_of_line)


def _softplus(beta: float, threshold: float) -> LogSlope:
    both = functools.partial(_of_softplus, beta=beta, threshold=threshold)
    return LogSlope(both, both, functools.partial(_integral_of_softplus, beta=beta, threshold=threshold))


def _softsign() -> LogSlope:
    return LogSlope(_of_softsign_below, _of_softsign_above, _integral_of_softsign)


def _exponential_below(rate: float = 1.0) -> LogSlope:
    """Of a function that is c (exp(rate z) - 1) below 0 and linear above: ELU, SELU, CELU."""
    return LogSlope(functools.partial(_constant, value=rate), torch.zeros_like)


def _elu(alpha: float) -> LogSlope:
    return _exponential_below()


def _celu(alpha: float) -> LogSlope:
    return _exponential_below(1 / alpha)


LOG_SLOPES: dict[str, Callable[..., LogSlope]] = {
    "celu": _celu,
    "elu": _elu,
    "logsigmoid": _logsigmoid,
    "normal_cdf": _normal_cdf,
    "selu": _exponential_below,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "softsign": _softsign,
    "tanh": _tanh,
}
"""Makes f''/f' from a base's hyper-parameters, by the name of the base."""
