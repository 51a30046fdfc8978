"""Correction shapes: CRReLU and the worst activation as special cases, two routes, bounds, tables, descent."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eafo_dynamic.correction import (
    HALF_WIDTH,
    KNOTS,
    choose_route,
    correction_shape,
    evaluate_table,
    is_closed_form,
    tabulate,
)
from eafo_dynamic.correction.bases import Base, activation_names, as_base
from eafo_dynamic.density import Density, Gaussian, gaussian, histogram
from eafo_dynamic.entropy import entropy_gradient, resolution_entropy
from eafo_dynamic.errors import ConfigError

EVEN = torch.ones(1, dtype=torch.float64)
U = torch.linspace(-8, 8, 2001, dtype=torch.float64)
DENSITIES = ("normal", "shifted", "bimodal", "student_t3")
BASES = activation_names()

LOG_SLOPE = {
    # f'' / f' by hand, an oracle that does not know automatic differentiation
    "tanh": lambda z: -2 * torch.tanh(z),
    "sigmoid": lambda z: 1 - 2 * torch.sigmoid(z),
    "softplus": lambda z: 1 - torch.sigmoid(z),
    "logsigmoid": lambda z: -torch.sigmoid(z),
    "softsign": lambda z: -2 * z.sign() / (1 + z.abs()),
    "normal_cdf": lambda z: -z,
    "identity": torch.zeros_like,
}


def known(density: str) -> Density:
    return histogram(torch.from_numpy(reference.quantiles(density, 20000)), EVEN)


def normal(mean: float = 0.0, std: float = 1.0) -> Gaussian:
    return Gaussian(torch.tensor(mean), torch.tensor(std))


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def assert_bounded(base: Base, density: Density) -> None:
    """|slope| <= 1 of the shape and of its table; value and slope continuous, and 0 at both ends."""
    shape = correction_shape(base, density)
    step = 1e-3
    fine = torch.arange(-8.2, 8.2, step, dtype=torch.float64)
    for values in (shape(fine), evaluate_table(tabulate(shape), fine.expand(*density.mean.shape, -1))):
        assert values.isfinite().all()
        slopes = values.diff(dim=-1) / step
        assert slopes.abs().max() <= 1 + 2e-3
    table = tabulate(shape)
    a0, a1, a2, a3 = table.unbind(-2)
    ends, end_slopes = a0 + a1 + a2 + a3, a1 + 2 * a2 + 3 * a3
    torch.testing.assert_close(ends[..., :-1], a0[..., 1:], rtol=0, atol=1e-12)
    torch.testing.assert_close(end_slopes[..., :-1], a1[..., 1:], rtol=0, atol=1e-12)
    for edge in (a0[..., 0], a1[..., 0], ends[..., -1], end_slopes[..., -1]):
        assert edge.abs().max() < 1e-12


# CRReLU


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "hardtanh", "relu6", "prelu", "identity", "softshrink"])
@settings(max_examples=5, deadline=None)
@given(mean=st.floats(-5, 5), std=st.floats(0.01, 100))
def test_crrelu_is_recovered(name: str, mean: float, std: float) -> None:
    base, density = as_base(name), normal(mean, std)
    assert is_closed_form(base, density)
    shape = correction_shape(base, density)
    assert shape.closed_form
    assert torch.equal(shape(U), U * torch.exp(-U.square() / 2))
    assert torch.equal(shape.slope(U), (1 - U.square()) * torch.exp(-U.square() / 2))


def test_crrelu_is_the_papers_function() -> None:
    """With mu = 0, sigma = 1: relu(x) + eps x exp(-x^2 / 2), and entropy falls for eps < 0."""
    z = torch.from_numpy(reference.quantiles("normal", 20000))
    c = correction_shape("relu", normal())(z)
    torch.testing.assert_close(c, z * torch.exp(-(z**2) / 2))
    gradient = entropy_gradient(torch.relu(z), c, weights=EVEN)
    assert float(gradient) > 0.3


def test_only_piecewise_linear_bases_under_a_gaussian_have_the_closed_form() -> None:
    closed = {name for name in BASES if is_closed_form(as_base(name), normal())}
    assert closed == {
        "identity", "relu", "relu6", "leaky_relu", "prelu", "rrelu", "hardtanh", "hardsigmoid", "softshrink",
    }  # fmt: skip
    assert not is_closed_form(as_base("relu"), known("normal"))


def test_histogram_of_a_normal_gives_nearly_the_gaussian_shape() -> None:
    exact = correction_shape("relu", normal())(U)
    torch.testing.assert_close(correction_shape("relu", known("normal"))(U), exact, rtol=0, atol=0.01)


# the worst activation


def test_no_correction_at_the_worst_activation() -> None:
    """sigmoid of logistic, normal CDF of normal: the correction vanishes, up to what the estimate leaves."""
    logistic = torch.from_numpy(reference.quantiles("logistic", 20000))
    for base, density in (
        ("sigmoid", histogram(logistic, EVEN)),
        ("normal_cdf", normal()),
        ("normal_cdf", known("normal")),
    ):
        shape = correction_shape(base, density)
        assert float(shape.gain) < 0.05
        assert shape(U).abs().max() < 0.05


@pytest.mark.parametrize("n", [256, 4096])
def test_estimation_noise_is_not_blown_up_at_the_worst_activation(n: int) -> None:
    rng = np.random.default_rng(0)
    for base, samples, estimate in (
        ("normal_cdf", rng.standard_normal((50, n)), gaussian),
        ("normal_cdf", rng.standard_normal((50, n)), histogram),
        ("sigmoid", rng.logistic(size=(50, n)), histogram),
    ):
        worst = correction_shape(base, estimate(torch.from_numpy(samples))).gain
        clear = correction_shape("relu", estimate(torch.from_numpy(samples))).gain
        assert float(worst.median()) < 0.1
        assert float(worst.mean()) < 0.2
        assert float(clear.min()) > (0.9 if n == 4096 else 0.5)


def test_gain_rises_smoothly_away_from_the_worst_activation() -> None:
    stds = torch.linspace(1.0, 1.6, 121)
    gain = correction_shape("normal_cdf", Gaussian(torch.zeros(121), stds)).gain
    assert float(gain[0]) == 0.0
    assert float(gain[-1]) == 1.0
    assert (gain.diff() >= 0).all()
    assert float(gain.diff().max()) < 0.2


# the analytic route


@pytest.mark.parametrize("name", LOG_SLOPE)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.3), (-0.7, 2.0), (0.5, 0.6)])
def test_analytic_route_is_equation_3(name: str, mean: float, std: float) -> None:
    p = torch.exp(-U.square() / 2) / math.sqrt(2 * math.pi)
    raw = -math.sqrt(2 * math.pi) * (-U * p - p * std * LOG_SLOPE[name](mean + std * U))
    found = correction_shape(name, normal(mean, std), "analytic", resolution=0.02)
    expected = raw / raw.diff().abs().max() * (U[1] - U[0])
    inside = U.abs() < 6
    if name == "softsign":  # f'' jumps at 0, where the shape is smoothed
        inside &= (U + mean / std).abs() > 0.1
        expected = expected * (found(U)[inside] * expected[inside]).sum() / expected[inside].square().sum()
    torch.testing.assert_close(found(U)[inside], expected[inside], rtol=0, atol=5e-3)
    assert found.route == "analytic"


@pytest.mark.parametrize("name", ["softplus", "sigmoid", "logsigmoid", "softsign", "elu", "tanh", "identity"])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.5)])
def test_routes_agree_as_the_resolution_falls(name: str, mean: float, std: float) -> None:
    agreement = []
    for resolution in (0.1, 0.02):
        shapes = [correction_shape(name, normal(mean, std), route, resolution)(U) for route in ("analytic", "score")]
        agreement.append(cosine(*shapes))
    assert agreement[1] > 0.95
    assert agreement[1] >= agreement[0] - 1e-3


# the score route


@pytest.mark.parametrize("name", ["gelu", "silu", "tanh"])
def test_score_route_is_weight_times_the_twins_score(name: str) -> None:
    z = torch.from_numpy(reference.quantiles("normal", 3000))
    base = as_base(name)
    u = torch.linspace(-3, 3, 121, dtype=torch.float64)
    with torch.enable_grad():
        points = u.clone().requires_grad_()
        (slope,) = torch.autograd.grad(base(points).sum(), points)
    a = base(z).numpy()
    score = reference.smoothed_score(a, (base(u).numpy() - a.mean()) / a.std()) / a.std()
    p = np.exp(-(u.numpy() ** 2) / 2)
    expected = torch.from_numpy(-slope.abs().numpy() * p * score)
    found = correction_shape(base, normal(), "score")(u)
    # the route smooths the product once more, with a width of r
    assert cosine(found, expected) > 0.99
    assert float(found @ expected) > 0


def test_one_rule_picks_the_route() -> None:
    for name in BASES:
        base = as_base(name)
        assert choose_route(base) == ("analytic" if base.traits.monotone else "score")
        assert correction_shape(base, known("normal")).route == choose_route(base)
        assert correction_shape(base, known("normal"), "score").route == "score"


def test_unknown_callable_needs_no_registration() -> None:
    shape = correction_shape(as_base(lambda z: torch.sin(2 * z) * torch.exp(-z / 4)), normal())
    assert shape.route == "score"
    assert float(shape.gain) == 1.0
    assert shape(U).isfinite().all()


# bounds and tables


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", BASES)
def test_shape_and_table_are_bounded_and_continuous(name: str, density: str) -> None:
    assert_bounded(as_base(name), known(density))
    assert_bounded(as_base(name), normal(-0.4, 1.7))


def test_shapes_of_transformers_activations_are_bounded() -> None:
    activations = pytest.importorskip("transformers.activations")
    for name in activations.ACT2FN:
        assert_bounded(as_base(name), known("shifted"))


@pytest.mark.parametrize("name", BASES)
def test_table_carries_the_shape(name: str) -> None:
    """257 knots on [-8, 8] keep every shape to 1 % of the closed form's peak, four times as many to 0.02 %."""
    for density in (known("student_t3"), normal(-0.5, 2.0)):
        shape = correction_shape(name, density)
        inner = U[U.abs() < HALF_WIDTH - 1]
        error = (evaluate_table(tabulate(shape), inner) - shape(inner)).abs().max()
        finer = (evaluate_table(tabulate(shape, knots=4 * KNOTS - 3), inner) - shape(inner)).abs().max()
        assert error < 0.006
        assert finer < 1e-4


def test_shapes_at_their_nodes_are_what_they_are_anywhere() -> None:
    shape = correction_shape("gelu", normal(0.3, 2.0))
    u = torch.linspace(-8, 8, 257, dtype=torch.float64)
    values, slopes = shape.at_nodes(257)
    assert values is not None and slopes is not None and values[-1] == slopes[-1] == 0
    torch.testing.assert_close(values[:-1], shape(u)[:-1], rtol=0.0, atol=0.0)
    torch.testing.assert_close(slopes[:-1], shape.slope(u)[:-1], rtol=0.0, atol=0.0)
    assert shape.at_nodes(258) == correction_shape("relu", normal()).at_nodes(257) == (None, None)


def test_table_is_read_as_documented() -> None:
    shape = correction_shape("gelu", Gaussian(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 2.0])))
    table = tabulate(shape, half_width=6.0, knots=49)
    assert table.shape == (2, 4, 48)
    knots = torch.linspace(-6, 6, 49, dtype=torch.float64)
    taken = evaluate_table(table, knots.expand(2, -1), half_width=6.0)
    inner = knots.abs() < 5
    scale = (taken[:, inner] * shape(knots)[:, inner]).sum(1) / shape(knots)[:, inner].square().sum(1)
    torch.testing.assert_close(taken[:, inner], scale[:, None] * shape(knots)[:, inner])
    assert (scale <= 1).all()
    outside = torch.tensor([-6.1, 6.1, math.inf, -math.inf, math.nan, 1e30]).expand(2, -1)
    assert (evaluate_table(table, outside, half_width=6.0) == 0).all()
    torch.testing.assert_close(evaluate_table(table[1], knots, half_width=6.0), taken[1])


def test_taper_is_part_of_the_function_and_of_its_slope() -> None:
    u = torch.linspace(-2.5, 2.5, 999, dtype=torch.float64)
    found = evaluate_table(tabulate(correction_shape("relu", normal()), half_width=2.5, knots=129), u, half_width=2.5)
    t = (2.5 - u.abs()).clamp(0, 1)
    expected = u * torch.exp(-(u**2) / 2) * t**2 * (3 - 2 * t)
    expected = expected / (expected.diff().abs().max() / (u[1] - u[0])).clamp(min=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_shape_is_zero_beyond_its_range() -> None:
    for name in ("gelu", "tanh", "relu"):
        assert (correction_shape(name, known("student_t3"))(torch.tensor([-9.0, 9.0, 1e30])) == 0).all()


# sites


def test_sites_are_independent_of_each_other() -> None:
    means, stds = torch.tensor([0.0, -1.0, 2.0]), torch.tensor([1.0, 3.0, 0.2])
    samples = means[:, None] + stds[:, None] * torch.from_numpy(np.random.default_rng(1).standard_normal((3, 2000)))
    for name, density in itertools.product(("relu", "gelu", "tanh"), (gaussian(samples), histogram(samples))):
        together = correction_shape(name, density)(U)
        for site in range(3):
            alone = correction_shape(name, density.select([site]))(U)
            torch.testing.assert_close(together[site], alone[0], rtol=0, atol=1e-6)


def test_degenerate_sites_give_finite_shapes() -> None:
    samples = torch.tensor([[1.0, 1.0, 1.0], [math.nan, math.nan, math.nan], [-1.0, 0.0, 1.0]])
    for name, estimate in itertools.product(("relu", "gelu", "tanh", "squared_relu"), (gaussian, histogram)):
        shape = correction_shape(name, estimate(samples))
        assert shape(U).isfinite().all()
        assert tabulate(shape).isfinite().all()
        assert (shape(U)[1] == 0).all()


def test_shapes_are_reproducible() -> None:
    before = torch.random.get_rng_state()
    samples = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 500)))
    first, second = (tabulate(correction_shape("gelu", histogram(samples))) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bad_input_is_refused_in_one_line() -> None:
    for arguments, option in (
        ({"route": "guess"}, "route"),
        ({"resolution": 0.0}, "resolution"),
        ({"resolution": math.nan}, "resolution"),
        ({"base": "gleu"}, "activation"),
    ):
        with pytest.raises(ConfigError, match=f"^{option}="):
            correction_shape(**{"base": "relu", "density": normal(), **arguments})
    for arguments, option in (({"knots": 3}, "knots"), ({"half_width": 0.5}, "half_width")):
        with pytest.raises(ConfigError, match=f"^{option}="):
            tabulate(correction_shape("relu", normal()), **arguments)


# descent


def entropy_at_fixed_bandwidth(outputs: Tensor, bandwidth: float) -> float:
    spread = float(outputs.std(correction=0))
    return float(resolution_entropy(outputs, bandwidth / spread, weights=EVEN)) + math.log(spread)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", BASES)
def test_step_along_the_correction_lowers_the_entropy(name: str, density: str) -> None:
    """eps < 0 lowers h(a + b N), b = sd(a) / 10 fixed: what section 4 promises of w(z) s(f(z)), w >= 0."""
    z = torch.from_numpy(reference.quantiles(density, 20000))
    base = as_base(name)
    estimate = known(density)
    # The normal CDF squeezes wide tails into less than a bandwidth, which the analytic route does not know.
    shape = correction_shape(base, estimate, "score" if name == "normal_cdf" else "auto")
    direction = estimate.std * shape((z - estimate.mean) / estimate.std)
    bandwidth = 0.1 * float(base(z).std(correction=0))
    change = entropy_at_fixed_bandwidth(base(z) - 1e-3 * direction, bandwidth)
    change -= entropy_at_fixed_bandwidth(base(z), bandwidth)
    assert change < -1e-6 or float(shape.gain) < 0.05


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", [*BASES, nn.LeakyReLU(0.2), nn.Softplus(3.0)])
def test_step_against_the_gradient_lowers_the_standardised_entropy(name: str | nn.Module, density: str) -> None:
    """A small step of eps along -dH_r / d eps, the entropy policy's step, lowers H_r."""
    z = torch.from_numpy(reference.quantiles(density, 20000))
    base, estimate = as_base(name), known(density)
    direction = estimate.std * correction_shape(base, estimate)((z - estimate.mean) / estimate.std)
    gradient = float(entropy_gradient(base(z), direction, weights=EVEN))
    before = float(resolution_entropy(base(z), weights=EVEN))
    after = float(resolution_entropy(base(z) - math.copysign(1e-3, gradient) * direction, weights=EVEN))
    if abs(gradient) > 0.01:
        assert after < before - 2e-4 * abs(gradient)
    else:
        assert after == pytest.approx(before, abs=1e-4)
