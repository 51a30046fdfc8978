"""Shapes of bases that saturate within the data, or have a kink between two points of the grid."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import integrate, special
from torch import nn

from eafo_dynamic.correction import correction_shape
from eafo_dynamic.correction.bases import Base, activation_names, as_base, derivatives
from eafo_dynamic.density import Gaussian
from eafo_dynamic.entropy import entropy_gradient

Array = NDArray[np.float64]
R = 0.1

# f'' / f' by hand, in numpy
LOG_SLOPE: dict[str, Callable[[Array], Array]] = {
    "tanh": lambda z: -2 * np.tanh(z),
    "sigmoid": lambda z: 1 - 2 * special.expit(z),
    "logsigmoid": lambda z: -special.expit(z),
    "softplus": lambda z: special.expit(-z),
    "normal_cdf": lambda z: -z,
    "softsign": lambda z: -2 * np.sign(z) / (1 + np.abs(z)),
    "elu": lambda z: np.where(z < 0, 1.0, 0.0),
    "selu": lambda z: np.where(z < 0, 1.0, 0.0),
    "celu": lambda z: np.where(z < 0, 1.0, 0.0),
}
SATURATING = ["tanh", "sigmoid", "logsigmoid"]
KINKED = ["elu", "selu", "celu", "softsign"]


def exact_shape(name: str, mean: float, std: float, at: Array) -> Array:
    """(3) with a Gaussian density, smoothed by direct quadrature on points that are the denser the nearer z is to 0.

    From 1e-9 standard deviations away to 12; a kink lies in the middle between two points.

    Returns:
        Values at ``at``, without the normalisation.
    """
    kink = -mean / std
    t = np.linspace(0, np.arcsinh(12 / 1e-9), 6001)
    centre, width = 0.5 * (t[1:] + t[:-1]), np.diff(t)
    right, weight = 1e-9 * np.sinh(centre), 1e-9 * np.cosh(centre) * width
    u, step = kink + np.concatenate([-right[::-1], right]), np.concatenate([weight[::-1], weight])
    p = np.exp(-0.5 * u**2) / math.sqrt(2 * math.pi)
    slope = std * LOG_SLOPE[name](mean + std * u)
    raw = -math.sqrt(2 * math.pi) * (-u * p - p * slope / (1 + (0.5 * R * slope) ** 2))
    kernel = np.exp(-0.5 * ((at[:, None] - u) / R) ** 2) / (R * math.sqrt(2 * math.pi))
    return kernel @ (raw * step)


def assert_shape_is_exact(name: str, mean: float, std: float, tolerance: float) -> None:
    at = np.linspace(-6, 6, 193)
    shape = correction_shape(name, Gaussian(torch.tensor([mean]), torch.tensor([std])), resolution=R)
    found = shape(torch.from_numpy(at))[0].numpy()
    exact = exact_shape(name, mean, std, at)
    exact *= (exact @ found) / (exact @ exact)  # a shape is normalised to its steepest slope
    assert np.abs(found - exact).max() <= tolerance * np.abs(found).max()


@pytest.mark.parametrize("name", [*SATURATING, "softplus", "normal_cdf"])
@pytest.mark.parametrize("std", [1.0, 10.0, 20.0, 50.0, 100.0, 200.0, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("shift", [0.0, 0.37 / 32, 0.7])
def test_saturation_does_not_change_the_shape(name: str, std: float, shift: float) -> None:
    assert_shape_is_exact(name, -shift * std, std, tolerance=0.005)


@pytest.mark.parametrize("name", KINKED)
@pytest.mark.parametrize("std", [1.0, 4.0])
@pytest.mark.parametrize("steps", [0.0, 0.25, 0.49, 0.51, 7.3])
def test_a_kink_lies_where_it_is_and_not_at_the_next_point_of_the_grid(name: str, std: float, steps: float) -> None:
    assert_shape_is_exact(name, -std * steps / 32, std, tolerance=0.002)


@pytest.mark.parametrize("name", SATURATING)
@pytest.mark.parametrize("std", [10.0, 20.0, 50.0, 200.0, 1e3])
def test_the_entropy_gradient_of_a_saturated_base_keeps_its_sign(name: str, std: float) -> None:
    u = special.ndtri((np.arange(20000) + 0.5) / 20000)
    outputs = as_base(name)(torch.from_numpy(std * u))
    even = torch.ones(1, dtype=torch.float64)
    exact = exact_shape(name, 0.0, std, u[::10])
    shape = correction_shape(name, Gaussian(torch.zeros(1), torch.tensor([std])), resolution=R)
    found = shape(torch.from_numpy(u))[0]
    exact *= (exact @ found.numpy()[::10]) / (exact @ exact)
    of_found = float(entropy_gradient(outputs, std * found, R, weights=even))
    of_exact = float(entropy_gradient(outputs[::10], std * torch.from_numpy(exact), R, weights=even))
    assert of_found == pytest.approx(of_exact, rel=0.05, abs=0.01 * std)
    assert of_found * of_exact > 0


@pytest.mark.parametrize("name", activation_names())
def test_log_slopes_are_those_of_automatic_differentiation(name: str) -> None:
    assert_log_slope(as_base(name))


@pytest.mark.parametrize("base", [nn.CELU(0.4), nn.ELU(1.7), nn.Softplus(2.0, 5.0)], ids=str)
def test_log_slopes_know_the_hyper_parameters(base: nn.Module) -> None:
    assert_log_slope(as_base(base))
    assert as_base(base).log_slope is not None


def assert_log_slope(base: Base) -> None:
    if base.log_slope is None:
        return
    z = torch.linspace(-6, 6, 400, dtype=torch.float64)
    _, first, second = derivatives(base, z)
    below, above, integral = base.log_slope
    torch.testing.assert_close(torch.where(z < 0, below(z), above(z)), second / first, rtol=1e-6, atol=1e-8)
    if integral is None:
        return
    for b in (1e-6, 0.3, 1e4):
        ends = torch.tensor([-700.0, -3.0, -0.2, 0.0, 0.7, 4.0, 900.0], dtype=torch.float64)
        found = integral(ends, torch.tensor(b, dtype=torch.float64)).diff()
        for k, piece in enumerate(found.tolist()):

            def ratio(z: float, b: float = b) -> float:
                log_slope = float((below if z < 0 else above)(torch.tensor(z, dtype=torch.float64)))
                return log_slope / (1 + b * log_slope**2)

            low, high = ends[k].item(), ends[k + 1].item()
            exact = integrate.quad(ratio, low, high, points=[max(low, -40.0), min(high, 40.0)], limit=500)[0]
            assert piece == pytest.approx(exact, rel=1e-5, abs=1e-7)


def test_another_function_of_the_same_name_has_no_closed_form() -> None:
    def tanh(z: torch.Tensor) -> torch.Tensor:
        return z.relu() + 0.1 * z

    assert as_base(tanh).log_slope is None
    assert as_base(nn.Tanh()).log_slope is not None
