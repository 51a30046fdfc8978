"""Entropies in nats, the score of an output, and the entropy's derivative along a direction."""

from eafo_dynamic.entropy.output import (
    MixedEntropy,
    SmoothedOutput,
    differential_entropy,
    entropy_gradient,
    fisher_information,
    mixed_entropy,
    resolution_entropy,
    smoothed_score,
)

__all__ = [
    "MixedEntropy",
    "SmoothedOutput",
    "differential_entropy",
    "entropy_gradient",
    "fisher_information",
    "mixed_entropy",
    "resolution_entropy",
    "smoothed_score",
]
