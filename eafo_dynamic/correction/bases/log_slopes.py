"""f''/f' of activations that saturate or have a kink, in closed form.

By automatic differentiation f''/f' is 0 / 0 where f' underflows: for tanh from |z| = 19 on, where it is -2 or 2.
"""

from __future__ import annotations

import functools
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


def _tanh() -> LogSlope:
    return LogSlope(_of_tanh, _of_tanh)


def _sigmoid() -> LogSlope:
    return LogSlope(_of_sigmoid, _of_sigmoid)


def _logsigmoid() -> LogSlope:
    return LogSlope(_of_logsigmoid, _of_logsigmoid)


def _normal_cdf() -> LogSlope:
    return LogSlope(torch.neg, torch.neg)


def _softplus(beta: float, threshold: float) -> LogSlope:
    both = functools.partial(_of_softplus, beta=beta, threshold=threshold)
    return LogSlope(both, both)


def _softsign() -> LogSlope:
    return LogSlope(_of_softsign_below, _of_softsign_above)


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
