"""Densities: moments exact, p_u' the derivative of p_u, tails reported, missing sites harmless."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import Tensor

from eafo_dynamic.density import Density, Gaussian, Histogram, gaussian, histogram, moments
from eafo_dynamic.errors import ConfigError

GRID = torch.linspace(-9.5, 9.5, 1217, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])
QUADRATURE = torch.ones(1)


def t3(count: int = 20000) -> Tensor:
    return torch.from_numpy(reference.quantiles("student_t3", count))


def assert_derivative_of(density: Density) -> None:
    """p_u' is the derivative of p_u: central differences of the one are the other."""
    step = 1e-4
    difference = (density.pdf(GRID + step) - density.pdf(GRID - step)) / (2 * step)
    torch.testing.assert_close(density.dpdf(GRID), difference, rtol=1e-5, atol=2e-5)


def assert_integral(density: Density, expected: Tensor | float) -> None:
    whole = torch.linspace(-10, 10, 1281, dtype=torch.float64)
    total = density.pdf(whole).sum(-1) * (20 / 1280)
    torch.testing.assert_close(
        total, torch.as_tensor(expected, dtype=torch.float64).expand_as(total), atol=1e-4, rtol=0
    )


def assert_moments(samples: Tensor, mean: object, std: object) -> None:
    found = moments(samples)
    torch.testing.assert_close(
        found.mean, torch.tensor(mean, dtype=torch.float64), rtol=1e-5, atol=1e-6, equal_nan=True
    )
    torch.testing.assert_close(found.std, torch.tensor(std, dtype=torch.float64), rtol=1e-5, atol=1e-6, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
        | st.sampled_from([math.nan, math.inf, -math.inf]),
    )
)
def test_moments_are_those_of_the_finite_samples(samples: np.ndarray) -> None:
    found = moments(torch.from_numpy(samples))
    for row, count, mean, std in zip(samples, found.count, found.mean, found.std, strict=True):
        known = row[np.isfinite(row)].astype(np.float64)
        assert int(count) == len(known)
        if len(known) == 0:
            assert math.isnan(mean)
            assert math.isnan(std)
        else:
            scale = np.ptp(known) * 3e-6 + 1e-300
            assert float(mean) == pytest.approx(known.mean(), abs=scale)
            assert float(std) == pytest.approx(known.std(), abs=scale)
        if len(known) and np.ptp(known) == 0:
            assert float(std) == 0.0


def test_moments_of_the_edge_cases() -> None:
    assert_moments(torch.full((2, 5), 0.1), [0.1, 0.1], [0.0, 0.0])
    assert_moments(torch.tensor([7.0]), 7.0, 0.0)
    assert_moments(torch.empty(2, 0), [math.nan, math.nan], [math.nan, math.nan])
    assert_moments(torch.tensor([math.nan, math.inf]), math.nan, math.nan)
    assert_moments(torch.tensor([1.0, 3.0, math.nan]), 2.0, 1.0)
    assert_moments(torch.tensor([3e38, -3e38]), 0.0, 3e38)
    assert float(moments(torch.tensor([1e304, -1e304], dtype=torch.float64)).std) == pytest.approx(1e304)
    assert_moments(torch.tensor([[0.0, 3e-44], [-3e38, 3e38]]), [1.5e-44, 0.0], [1.5e-44, 3e38])
    assert float(moments(torch.tensor([0.0, 3e-44])).std) == pytest.approx(1.5e-44, rel=0.1)
    assert float(moments(torch.tensor([0.0, 5e-324], dtype=torch.float64)).std) == 0.0
    assert_moments(torch.tensor([1.0, 2.0], dtype=torch.float16), 1.5, 0.5)
    assert_moments(1e6 + torch.tensor([0.0, 0.5, 1.0, 1.5]), 1e6 + 0.75, math.sqrt(0.3125))


def test_weights_are_repetitions() -> None:
    x = torch.tensor([0.3, -1.0, 2.0, 5.0])
    weights = torch.tensor([2.0, 1.0, 0.0, 3.0])
    repeated = x.repeat_interleave(weights.long())
    for weighted, plain in zip(vars(moments(x, weights)).values(), vars(moments(repeated)).values(), strict=True):
        torch.testing.assert_close(weighted, plain)
    a, b = histogram(x, weights, bandwidth=0.3), histogram(repeated, bandwidth=0.3)
    torch.testing.assert_close(a.pdf(GRID), b.pdf(GRID))


def test_gaussian_is_the_normal_density() -> None:
    density = Gaussian(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5]))
    expected = torch.from_numpy(stats.norm.pdf(GRID.numpy()))
    torch.testing.assert_close(density.pdf(GRID), expected.expand(2, -1))
    assert_derivative_of(density)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_histogram_is_a_mixture_of_gaussians_on_its_samples(dtype: torch.dtype) -> None:
    samples = torch.from_numpy(np.random.default_rng(0).gamma(2.0, size=(3, 500))).to(dtype)
    density = histogram(samples, bandwidth=0.25)
    for row, x in enumerate(samples.double().numpy()):
        u = (x - x.mean()) / x.std()
        pdf, slope = reference.mixture_density(u, np.full(500, 1 / 500), 0.25, GRID.numpy())
        np.testing.assert_allclose(density.pdf(GRID)[row], pdf, atol=3e-4)
        np.testing.assert_allclose(density.dpdf(GRID)[row], slope, atol=2e-3)
    assert_derivative_of(density)
    assert_integral(density, 1.0)


@pytest.mark.parametrize("bandwidth", [None, 0.15, 0.5])
def test_histogram_slope_is_the_derivative_at_every_bandwidth(bandwidth: float | None) -> None:
    samples = torch.from_numpy(np.random.default_rng(1).standard_t(3, size=(2, 4096)))
    assert_derivative_of(histogram(samples, bandwidth=bandwidth))


def test_histogram_of_quantiles_is_the_density() -> None:
    logistic = torch.from_numpy(reference.quantiles("logistic", 20000))
    density = histogram(logistic, QUADRATURE, bandwidth=0.1)
    z = density.mean + density.std * GRID
    expected = torch.from_numpy(stats.logistic.pdf(z.numpy())) * density.std
    torch.testing.assert_close(density.pdf(GRID), expected, rtol=0, atol=4e-3)  # b^2 p'' / 2


def test_tails_beyond_the_grid_are_reported_not_piled_up() -> None:
    samples = torch.cat([torch.linspace(-1, 1, 9990), torch.full((10,), 1000.0)])
    density = histogram(samples)
    assert float(density.out_of_range) == pytest.approx(1e-3)
    assert_integral(density, 1 - density.out_of_range)
    assert float(density.pdf(torch.tensor([9.9]))) < 1e-6
    heavy = histogram(t3(), QUADRATURE)
    assert 0 < float(heavy.out_of_range) < 1e-3
    assert_integral(heavy, 1 - heavy.out_of_range)


def test_bandwidth_follows_the_rule() -> None:
    rng = np.random.default_rng(2)
    for n in (100, 4096):
        density = histogram(torch.from_numpy(rng.standard_normal((50, n))))
        expected = (4 / (5 * n)) ** (1 / 7)
        assert float(density.bandwidth.mean()) == pytest.approx(expected, rel=0.05)
    # outliers widen the standard deviation but not the middle half, which then decides
    core = torch.from_numpy(rng.standard_normal(4000))
    outlying = histogram(torch.cat([core, torch.full((40,), 30.0)]))
    assert float(outlying.bandwidth) < 0.7 * float(histogram(core).bandwidth)


def test_noise_of_the_slope_is_what_resampling_shows() -> None:
    rng = np.random.default_rng(3)
    u = torch.linspace(-6, 6, 385, dtype=torch.float64)
    for estimate, tolerance in ((gaussian, 0.15), (histogram, 0.15)):
        density = estimate(torch.from_numpy(rng.standard_normal((200, 1000))))
        z = density.mean[:, None] + density.std[:, None] * u
        if estimate is gaussian:  # its error is in where p_u is put: read it in fixed coordinates
            v = (u - density.mean[:, None]) / density.std[:, None]
            slopes = density.dpdf(v) / density.std[:, None] ** 2
        else:
            slopes = density.dpdf(u)
        assert z.isfinite().all()
        measured = ((slopes - slopes.mean(0)).square().sum(-1) * (u[1] - u[0])).mean().sqrt()
        assert float(density.derivative_noise().mean()) == pytest.approx(float(measured), rel=tolerance)


@pytest.mark.parametrize("estimate", [gaussian, histogram])
def test_sites_are_independent_of_each_other(estimate: type[Density]) -> None:
    samples = torch.from_numpy(np.random.default_rng(4).standard_normal((4, 3, 300)))
    samples[1, 2, :] = math.nan
    samples[0, 0, 50:] = math.nan
    together = estimate(samples)
    assert together.pdf(GRID).shape == (4, 3, len(GRID))
    for place in ((0, 0), (1, 1), (3, 2)):
        alone = estimate(samples[place])
        torch.testing.assert_close(together.pdf(GRID)[place], alone.pdf(GRID))
    short = estimate(samples[0, 0, :50])
    torch.testing.assert_close(together.dpdf(GRID)[0, 0], short.dpdf(GRID))
    picked = estimate(samples[:, 0]).select([2, 0])
    torch.testing.assert_close(picked.pdf(GRID)[1], together.pdf(GRID)[0, 0])


@pytest.mark.parametrize("estimate", [gaussian, histogram])
def test_degenerate_sites_have_a_defined_density(estimate: type[Density]) -> None:
    samples = torch.tensor([[2.0, 2.0, 2.0], [math.nan, math.nan, math.nan], [1.0, math.nan, math.inf]])
    density = estimate(samples)
    assert density.std[0] == 0.0
    assert density.std[2] == 0.0
    assert density.mean[1].isnan()
    assert density.pdf(GRID).isfinite().all()
    assert density.dpdf(GRID).isfinite().all()


@pytest.mark.parametrize("estimate", [gaussian, histogram])
def test_blend_is_a_moving_average(estimate: type[Density]) -> None:
    rng = np.random.default_rng(5)
    old = estimate(torch.from_numpy(rng.standard_normal((3, 400))))
    new = estimate(torch.from_numpy(4 + 2 * rng.standard_normal((3, 400))))
    mixed = old.blend(new, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(mixed.mean[1], 0.75 * old.mean[1] + 0.25 * new.mean[1])
    torch.testing.assert_close(mixed.std[1] ** 2, 0.75 * old.std[1] ** 2 + 0.25 * new.std[1] ** 2)
    for site, same in ((0, old), (2, new)):
        torch.testing.assert_close(mixed.mean[site], same.mean[site])
        torch.testing.assert_close(mixed.dpdf(GRID)[site], same.dpdf(GRID)[site])
    assert float(mixed.count[1]) == pytest.approx(400 / (0.75**2 + 0.25**2))
    assert_derivative_of(mixed)


@pytest.mark.parametrize("estimate", [gaussian, histogram])
def test_blend_takes_the_side_that_is_there(estimate: type[Density]) -> None:
    data = torch.from_numpy(np.random.default_rng(6).standard_normal((3, 50)))
    gone = torch.full_like(data, math.nan)
    old = estimate(torch.stack([data[0], gone[0], gone[0]]))
    new = estimate(torch.stack([gone[0], data[1], gone[0]]))
    mixed = old.blend(new, 0.3)
    torch.testing.assert_close(mixed.pdf(GRID)[0], old.pdf(GRID)[0])
    torch.testing.assert_close(mixed.pdf(GRID)[1], new.pdf(GRID)[1])
    torch.testing.assert_close(mixed.std[:2], torch.stack([old.std[0], new.std[1]]))
    assert mixed.mean[2].isnan()


@pytest.mark.parametrize("bandwidth", [0.0, 0.01, 3.0, math.nan, torch.tensor([0.3, -1.0])])
def test_bandwidth_outside_the_grids_range_is_refused(bandwidth: float | Tensor) -> None:
    with pytest.raises(ConfigError, match=r"^bandwidth=.*0.0625"):
        histogram(torch.randn(2, 9, generator=torch.Generator().manual_seed(0)), bandwidth=bandwidth)


def test_kinds_do_not_blend() -> None:
    data = torch.arange(10.0)
    with pytest.raises(ConfigError, match="like with like"):
        histogram(data).blend(gaussian(data), 0.5)


def test_histogram_converges_to_the_density() -> None:
    """The squared error of p_u' falls at the rate of the rule, n^(-4/7), or faster."""
    rng = np.random.default_rng(7)
    errors = []
    for n in (500, 8000):
        density = histogram(torch.from_numpy(rng.standard_normal((40, n))))
        truth = -GRID * torch.from_numpy(stats.norm.pdf(GRID.numpy()))
        errors.append(float((density.dpdf(GRID) - truth).square().sum(-1).mean() * STEP))
    assert errors[1] < errors[0] * 16 ** (-4 / 7) * 1.3
    assert isinstance(density, Histogram)
