"""Activation modules by the names that configurations use."""

from __future__ import annotations

import inspect

from torch import nn

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.learnable import LEARNABLE, XIELU, GainSlope, Pade, SquaredReLU, SwishBeta

__all__ = ["ACTIVATIONS", "is_learnable", "make_activation"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "pade": Pade,
    "prelu": nn.PReLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "squared_relu": SquaredReLU,
    "swish_beta": SwishBeta,
    "tanh": nn.Tanh,
    "xielu": XIELU,
}
_GAIN_SLOPE = "gain_slope_"


def make_activation(name: str, *, inplace: bool = False) -> nn.Module:
    """A new activation module with torch's default hyper-parameters.

    Args:
        name: a key of `ACTIVATIONS`, or "gain_slope_" and a key, as in "gain_slope_relu": a `GainSlope` of that base.
        inplace: overwrite the input, for activations that have this option in torch; the others ignore it.

    Returns:
        The module.

    Raises:
        ConfigError: for a name that is not in `ACTIVATIONS`.
    """
    if name.startswith(_GAIN_SLOPE):
        return GainSlope(make_activation(name.removeprefix(_GAIN_SLOPE)))
    if name not in ACTIVATIONS:
        raise ConfigError("activation", name, "no such activation", f"Use one of {', '.join(ACTIVATIONS)}.")
    cls = ACTIVATIONS[name]
    if inplace and "inplace" in inspect.signature(cls).parameters:
        return cls(inplace=True)
    return cls()


def is_learnable(name: str) -> bool:
    """Whether an activation has parameters.

    Args:
        name: as `make_activation` takes it.

    Returns:
        True for "prelu" and the like, False also for names that are unknown.
    """
    return name.startswith(_GAIN_SLOPE) or ACTIVATIONS.get(name) in LEARNABLE
