"""What the docstrings say of bias, for densities that are not normal: means over many samples against quadratures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from eafo_dynamic.correction.bases import as_base
from eafo_dynamic.entropy import entropy_gradient, mixed_entropy, resolution_entropy

EVEN = torch.ones(1, dtype=torch.float64)
REPEATS = 300
Draw = Callable[[np.random.Generator, tuple[int, int]], Any]
DENSITIES: dict[str, tuple[Any, Draw]] = {
    "normal": (stats.norm(), lambda rng, size: rng.standard_normal(size)),
    "exponential": (stats.expon(), lambda rng, size: rng.exponential(size=size)),
    "student t5": (stats.t(5), lambda rng, size: rng.standard_t(5, size)),
    "student t3": (stats.t(3), lambda rng, size: rng.standard_t(3, size)),
    "lognormal": (stats.lognorm(1.0), lambda rng, size: np.exp(rng.standard_normal(size))),
}
# nats at n = 256, as documented for H_r and dH_r/d eps
BIAS = {
    "normal": (0.006, 0.015),
    "exponential": (0.006, 0.015),
    "student t5": (0.012, 0.015),
    "student t3": (0.045, 0.03),
    "lognormal": (0.03, 0.03),
}


def samples(density: str, n: int = 256) -> torch.Tensor:
    return torch.from_numpy(DENSITIES[density][1](np.random.default_rng(1), (REPEATS, n)))


def quantiles(density: str) -> torch.Tensor:
    return torch.from_numpy(DENSITIES[density][0].ppf((np.arange(100_000) + 0.5) / 100_000))


def assert_bias(found: torch.Tensor, exact: float, bound: float) -> None:
    """The mean error is within the bound and four of its own standard errors."""
    error = float(found.mean()) - exact
    assert abs(error) <= bound + 4 * float(found.std()) / REPEATS**0.5


@pytest.mark.parametrize("name", ["identity", "relu"])
@pytest.mark.parametrize("density", DENSITIES)
def test_bias_of_the_resolution_entropy_and_its_gradient(density: str, name: str) -> None:
    base, exact = as_base(name), quantiles(density)
    mean, std = exact.mean(), exact.std(correction=0)

    def direction(z: torch.Tensor) -> torch.Tensor:
        u = (z - mean) / std
        return std * u * torch.exp(-0.5 * u.square())

    z = samples(density)
    of_entropy, of_gradient = BIAS[density]
    assert_bias(resolution_entropy(base(z)), float(resolution_entropy(base(exact), weights=EVEN)), of_entropy)
    expected = float(entropy_gradient(base(exact), direction(exact), weights=EVEN))
    assert_bias(entropy_gradient(base(z), direction(z)), expected, of_gradient)


@pytest.mark.parametrize("density", DENSITIES)
def test_bias_of_the_continuous_entropy(density: str) -> None:
    found = mixed_entropy(samples(density)).continuous_entropy
    assert_bias(found, float(DENSITIES[density][0].entropy()), 0.012)
