"""Base activations: one frozen, hashable descriptor per pointwise function, by name, module or callable."""

from __future__ import annotations

from eafo_dynamic.correction.bases.descriptor import Base, Derivatives, LogSlope, Traits, derivatives, traits
from eafo_dynamic.correction.bases.registry import (
    PointwiseActivation,
    activation_module,
    activation_names,
    activation_types,
    as_base,
    register_activation,
)

__all__ = [
    "Base",
    "Derivatives",
    "LogSlope",
    "PointwiseActivation",
    "Traits",
    "activation_module",
    "activation_names",
    "activation_types",
    "as_base",
    "derivatives",
    "register_activation",
    "traits",
]
