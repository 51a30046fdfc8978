"""Entropies against the oracle table, closed forms, scipy and the slow twin; (1') against central differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import Tensor, nn

from eafo_dynamic.correction.bases import as_base
from eafo_dynamic.entropy import (
    SmoothedOutput,
    differential_entropy,
    entropy_gradient,
    fisher_information,
    mixed_entropy,
    resolution_entropy,
    smoothed_score,
)
from eafo_dynamic.errors import ConfigError

EVEN = torch.ones(1, dtype=torch.float64)  # weights of a quantile grid
FLOOR = 0.5 * math.log(2 * math.pi * math.e * 0.01)  # H_r of a constant at r = 0.1
CEILING = 0.5 * math.log(2 * math.pi * math.e * 1.01)  # of a Gaussian

SMOOTH = {
    "gelu": as_base("gelu"), "silu": as_base("silu"), "mish": as_base("mish"), "tanh": as_base("tanh"),
    "sigmoid": as_base("sigmoid"), "softplus": as_base("softplus"), "softsign": as_base("softsign"),
    "elu": as_base("elu"), "logsigmoid": as_base("logsigmoid"), "leaky_relu(0.1)": as_base(nn.LeakyReLU(0.1)),
    "selu": as_base("selu"), "gelu_tanh": as_base("gelu_tanh"), "identity": as_base("identity"),
}  # fmt: skip
ATOMIC = {name: as_base(name) for name in ("relu", "hardtanh", "relu6", "softshrink", "hardswish", "squared_relu")}
DENSITIES = ("normal", "shifted", "bimodal", "student_t3")


def z_of(density: str, count: int = 20000) -> Tensor:
    return torch.from_numpy(reference.quantiles(density, count))


def draws(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def assert_close(found: Tensor | float, expected: float, tolerance: float) -> None:
    assert float(found) == pytest.approx(expected, abs=tolerance)


def assert_invariant(samples: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    torch.testing.assert_close(resolution_entropy(change(samples)), resolution_entropy(samples), rtol=0, atol=2e-4)


# values


@pytest.mark.parametrize("name", reference.ORACLE)
def test_oracle_table(name: str) -> None:
    base = as_base(name)
    found = [
        float(resolution_entropy(base(z), r, weights=EVEN))
        for z in (z_of("normal"), z_of("shifted"))
        for r in (0.1, 0.05)
    ]
    assert found == pytest.approx(reference.ORACLE[name], abs=2e-3)


def test_order_of_the_oracle_table_is_the_papers_claim() -> None:
    entropies = {name: float(resolution_entropy(as_base(name)(z_of("normal")))) for name in reference.ORACLE}
    assert min(entropies, key=entropies.__getitem__) == "relu"
    assert entropies["sigmoid"] > entropies["tanh"] > entropies["gelu"] > entropies["relu"]


@pytest.mark.parametrize("resolution", [0.02, 0.1, 0.5])
def test_gaussian_closed_forms(resolution: float) -> None:
    a = 3 + 2 * z_of("normal")
    expected = 0.5 * math.log(2 * math.pi * math.e * (1 + resolution**2))
    assert_close(resolution_entropy(a, resolution, weights=EVEN), expected, 1e-3)
    if resolution >= 0.1:  # below, the outermost quantiles stand alone, each with a Fisher information 1 / r^2
        assert_close(fisher_information(a, resolution, weights=EVEN), 1 / (1 + resolution**2), 0.01)
    middle = ((a - 3) / 2).abs() < 2
    linear = -((a - 3) / 4) / (1 + resolution**2)
    score = smoothed_score(a, resolution, weights=EVEN)
    torch.testing.assert_close(score[middle], linear[middle], rtol=0, atol=0.02)


def test_continuous_closed_forms() -> None:
    z = draws((20, 8000))
    for samples, expected in (
        (3 * z, 0.5 * math.log(2 * math.pi * math.e * 9)),
        (5 * torch.special.ndtr(z) - 1, math.log(5)),
        (torch.sigmoid(torch.logit(torch.special.ndtr(z))), 0.0),  # the worst activation of the logistic
        (z.exp(), 0.5 * math.log(2 * math.pi * math.e)),  # log-normal
    ):
        mass, continuous, _ = mixed_entropy(samples)
        assert_close(continuous.mean(), expected, 0.01)
        assert_close(mass.max(), 0.0, 0.0)
        torch.testing.assert_close(differential_entropy(samples), continuous)


def test_relu_is_half_an_atom_and_half_a_half_normal() -> None:
    mass, continuous, _ = mixed_entropy(torch.relu(draws((20, 8000))))
    assert_close(mass.mean(), 0.5, 0.004)
    assert_close(continuous.mean(), 0.5 * math.log(math.pi * math.e / 2), 0.01)
    assert (differential_entropy(torch.relu(draws((2, 800)))) == -math.inf).all()


def test_several_atoms_are_found_and_taken_out() -> None:
    z = 2 * draws((10, 6000), seed=1)
    mass, continuous, _ = mixed_entropy(torch.nn.functional.hardtanh(z))
    assert_close(mass.mean(), 2 * stats.norm.sf(0.5), 0.01)
    truncated = stats.truncnorm(-0.5, 0.5, scale=2)
    assert_close(continuous.mean(), float(truncated.entropy()), 0.01)


@pytest.mark.parametrize("name", ["identity", "gelu", "tanh", "sigmoid", "softplus", "leaky_relu"])
def test_scipy_agrees_on_continuous_outputs(name: str) -> None:
    a = as_base(name)(draws((30, 2000), seed=2))
    theirs = stats.differential_entropy(a.numpy(), axis=1)
    assert_close(mixed_entropy(a).continuous_entropy.mean(), float(theirs.mean()), 0.05)


# the twin


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.float64, st.integers(2, 60), elements=st.floats(-100, 100)), st.sampled_from([0.1, 0.3]))
def test_entropy_is_the_direct_sum(samples: np.ndarray, resolution: float) -> None:
    found = float(resolution_entropy(torch.from_numpy(samples), resolution, weights=EVEN))
    if samples.std() > 1e-9 * np.abs(samples).max(initial=0):  # else rounding decides what is a constant
        assert found == pytest.approx(reference.plug_in_entropy(samples, resolution), abs=2e-3)


def test_score_fisher_and_bias_are_the_direct_sums() -> None:
    rng = np.random.default_rng(3)
    for a in (rng.standard_normal(200), np.maximum(rng.standard_normal(200), 0), rng.standard_t(3, 200)):
        smoothed = SmoothedOutput(torch.from_numpy(a))
        unit = (a - a.mean()) / a.std()
        expected = reference.smoothed_score(a, unit) / a.std()
        np.testing.assert_allclose(smoothed.score.numpy(), expected, atol=0.02 * np.abs(expected).max())
        plain = float(SmoothedOutput(torch.from_numpy(a), sampled=False).entropy)
        removed = float(smoothed.entropy) - plain
        assert removed == pytest.approx(-reference.bias_of_plug_in(a), rel=0.02)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 50), elements=st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, 3.25, -7.0])))
def test_atoms_are_counted(samples: np.ndarray) -> None:
    assert float(mixed_entropy(torch.from_numpy(samples)).atom_mass) == pytest.approx(reference.atoms(samples))


def test_spacings_are_the_twins() -> None:
    for n in (50, 300):
        samples = np.random.default_rng(4).standard_normal(n)
        found = float(mixed_entropy(torch.from_numpy(samples)).continuous_entropy)
        assert found == pytest.approx(reference.spacing_entropy(samples), abs=0.05)


# convergence


@pytest.mark.parametrize(("name", "expected"), [("identity", 1.4239), ("gelu", 0.8780), ("relu", 0.7419)])
def test_resolution_entropy_converges_to_the_truth(name: str, expected: float) -> None:
    """Bias falls faster than 1 / n; the spread as 1 / sqrt(n)."""
    base = as_base(name)
    errors, spreads = [], []
    for n in (64, 1024):
        found = resolution_entropy(base(draws((409600 // n, n), seed=5)))
        errors.append(abs(float(found.mean()) - expected))
        spreads.append(float(found.std()))
    assert errors[0] < 0.05
    assert errors[1] < 0.003
    if name != "identity":  # at the bound the first order vanishes, and the spread falls faster
        assert spreads[1] == pytest.approx(spreads[0] / 4, rel=0.35)


def test_bias_correction_is_worth_it() -> None:
    a = draws((400, 256), seed=6)
    plain = SmoothedOutput(a, sampled=False).entropy.mean()
    assert abs(float(resolution_entropy(a).mean()) - 1.4239) < 0.3 * abs(float(plain) - 1.4239)


def test_continuous_entropy_converges_to_the_truth() -> None:
    expected = 0.5 * math.log(2 * math.pi * math.e)
    found = {n: mixed_entropy(draws((409600 // n, n), seed=7)).continuous_entropy for n in (64, 1024, 4096)}
    assert_close(found[64].mean(), expected, 0.03)
    assert_close(found[4096].mean(), expected, 0.006)
    assert float(found[1024].std()) == pytest.approx(float(found[64].std()) / 4, rel=0.2)


# invariance and bounds


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**20), st.floats(-50, 50), st.floats(1e-3, 1e3), st.sampled_from(["identity", "relu", "gelu"]))
def test_shift_and_scale_do_not_matter(seed: int, shift: float, scale: float, name: str) -> None:
    a = as_base(name)(draws((3, 200), seed))
    assert_invariant(a, lambda x: shift + scale * x)
    assert_invariant(a, lambda x: -x)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.float16]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9),
        elements=st.floats(-60000, 60000, width=16) | st.sampled_from([math.nan, math.inf, -math.inf]),
    )
)
def test_every_input_has_a_defined_entropy(samples: np.ndarray) -> None:
    mass, continuous, entropy = mixed_entropy(torch.from_numpy(samples))
    assert mass.shape == continuous.shape == entropy.shape == samples.shape[:-1]
    seen = torch.as_tensor(np.isfinite(samples).any(-1))
    for part in (mass, continuous, entropy):
        assert torch.equal(part.isnan(), ~seen)
        assert part.dtype == (torch.float64 if samples.dtype == np.float64 else torch.float32)
    n = np.isfinite(samples).sum(-1)
    bound = torch.as_tensor(CEILING + 0.6 / np.maximum(n, 1))  # what the bias correction can add
    assert (entropy[seen] >= FLOOR - 2e-3).all()
    assert (entropy[seen] <= bound[seen] + 2e-3).all()
    assert ((mass[seen] >= 0) & (mass[seen] <= 1)).all()
    assert (continuous[seen] < math.inf).all()


def test_missing_samples_do_not_count() -> None:
    a = draws((2, 300), seed=8)
    holes = torch.cat([a[0], torch.tensor([math.nan, math.inf, -math.inf])])[
        torch.randperm(303, generator=torch.Generator().manual_seed(0))
    ]
    padded = torch.stack([holes, torch.cat([a[1], torch.full((3,), math.nan)])])
    for found, expected in zip(mixed_entropy(padded), mixed_entropy(a), strict=True):
        torch.testing.assert_close(found, expected)
    g = draws((2, 303), seed=9)
    gradient = entropy_gradient(padded, g)
    keep = padded[0].isfinite()
    torch.testing.assert_close(gradient[0], entropy_gradient(padded[0][keep], g[0][keep]))
    torch.testing.assert_close(gradient[1], entropy_gradient(a[1], g[1, :300]))
    score = smoothed_score(padded)
    assert (score[0][~keep] == 0).all()
    assert score.isfinite().all()


def test_leading_dimensions_are_sites() -> None:
    a = torch.relu(draws((2, 3, 400), seed=10))
    g = draws((2, 3, 400), seed=11)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(resolution_entropy(a)[i, j], resolution_entropy(a[i, j]))
            torch.testing.assert_close(entropy_gradient(a, g)[i, j], entropy_gradient(a[i, j], g[i, j]))
            torch.testing.assert_close(mixed_entropy(a).continuous_entropy[i, j], mixed_entropy(a[i, j])[1])


def test_a_wide_site_does_not_change_its_neighbour() -> None:
    narrow = draws((1, 500), seed=12)
    wide = torch.cat([torch.zeros(1, 499), torch.ones(1, 1)], dim=1).double()
    together = resolution_entropy(torch.cat([narrow, wide]))
    torch.testing.assert_close(together[:1], resolution_entropy(narrow), rtol=0, atol=1e-7)


# degenerate outputs


def assert_mixture(samples: Tensor, mass: float, continuous: float, entropy: float) -> None:
    found = mixed_entropy(samples)
    assert [float(part) for part in found] == pytest.approx([mass, continuous, entropy], abs=2e-3, nan_ok=True)


def test_degenerate_outputs_have_the_documented_values() -> None:
    two = math.log(2) + FLOOR  # two distant noise bells of half the mass
    assert_mixture(torch.zeros(9), 1.0, -math.inf, FLOOR)
    assert_mixture(torch.full((1000,), 0.1), 1.0, -math.inf, FLOOR)
    assert_mixture(torch.tensor([5.0]), 1.0, -math.inf, FLOOR)
    assert_mixture(torch.tensor([5.0, math.nan]), 1.0, -math.inf, FLOOR)
    assert_mixture(torch.tensor([0.0, 1.0] * 2000), 1.0, -math.inf, two)
    assert_mixture(torch.tensor([-3e38, 3e38] * 2000), 1.0, -math.inf, two)
    assert_mixture(torch.tensor([0.0, 1e-44] * 2000), 1.0, -math.inf, two)
    assert_mixture(torch.tensor([0.0] * 3999 + [1.0]), 3999 / 4000, -math.inf, FLOOR + 0.0023)
    assert_mixture(torch.tensor([]), math.nan, math.nan, math.nan)
    assert_mixture(torch.tensor([math.nan, math.inf]), math.nan, math.nan, math.nan)
    assert float(fisher_information(torch.zeros(4))) == pytest.approx(100.0)


def test_gradient_of_degenerate_outputs() -> None:
    assert float(entropy_gradient(torch.zeros(5), torch.arange(5.0))) == 0.0
    assert float(entropy_gradient(torch.tensor([1.0]), torch.tensor([1.0]))) == 0.0
    assert math.isnan(float(entropy_gradient(torch.tensor([]), torch.tensor([]))))
    assert math.isnan(float(entropy_gradient(torch.tensor([math.nan]), torch.tensor([1.0]))))
    # a direction that is missing where the output is not leaves that sample out
    a, g = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([1.0, math.nan, 2.0, 0.0])
    keep = g.isfinite()
    torch.testing.assert_close(entropy_gradient(a, g), entropy_gradient(a[keep], g[keep]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_but_has_no_atoms_of_its_own(dtype: torch.dtype) -> None:
    z = draws((5, 4096), seed=13).float()
    exact, rounded = mixed_entropy(z), mixed_entropy(z.to(dtype))
    assert rounded.entropy.dtype == torch.float32
    for one, other in zip(exact, rounded, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0.01)


def test_float32_agrees_with_float64() -> None:
    for base in (*SMOOTH.values(), *ATOMIC.values()):
        a = base(draws((2, 2000), seed=14))
        g = draws((2, 2000), seed=15)
        torch.testing.assert_close(resolution_entropy(a.float()).double(), resolution_entropy(a), atol=2e-4, rtol=0)
        torch.testing.assert_close(
            entropy_gradient(a.float(), g.float()).double(), entropy_gradient(a, g), atol=2e-3, rtol=2e-3
        )


def test_weights_are_repetitions() -> None:
    a = torch.tensor([0.0, 1.0, 1.5, 4.0])
    weights = torch.tensor([1.0, 3.0, 0.0, 2.0])
    repeated = a.repeat_interleave(weights.long())
    for weighted, plain in (
        (resolution_entropy(a, weights=weights), resolution_entropy(repeated, weights=EVEN)),
        (SmoothedOutput(a, weights=weights, sampled=True).entropy, resolution_entropy(repeated)),
        (fisher_information(a, weights=weights), fisher_information(repeated)),
        (entropy_gradient(a, a**2, weights=weights), entropy_gradient(repeated, repeated**2)),
    ):
        torch.testing.assert_close(weighted, plain)


def test_curve_integrates_to_one() -> None:
    a = torch.relu(draws((3, 500), seed=16))
    values, density = SmoothedOutput(a).curve
    torch.testing.assert_close(torch.trapezoid(density, values), torch.ones(3).double(), rtol=0, atol=1e-6)


def test_bad_input_is_refused_in_one_line() -> None:
    for resolution in (0.0, -1.0, 2.0, math.nan):
        with pytest.raises(ConfigError, match=r"^resolution="):
            resolution_entropy(torch.ones(3), resolution)
    with pytest.raises(ConfigError, match="shape"):
        entropy_gradient(torch.ones(3), torch.ones(4))
    with pytest.raises(ConfigError, match="weights"):
        _ = SmoothedOutput(torch.ones(3), weights=torch.ones(3)).mixed


def test_results_are_reproducible_and_carry_no_graph() -> None:
    a = torch.relu(draws((4, 1000), seed=17)).requires_grad_()
    before = torch.random.get_rng_state()
    first, second = mixed_entropy(a), mixed_entropy(a)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert not any(part.requires_grad for part in first)
    assert torch.equal(torch.random.get_rng_state(), before)


# (1') against central differences


def central_difference(outputs: Tensor, direction: Tensor, step: float) -> float:
    up, down = (resolution_entropy(outputs + side * step * direction, weights=EVEN) for side in (1, -1))
    return float(up - down) / (2 * step)


def crrelu_direction(z: Tensor) -> Tensor:
    mean, std = z.mean(), z.std(correction=0)
    u = (z - mean) / std
    return std * u * torch.exp(-0.5 * u**2)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", [*SMOOTH, *ATOMIC])
def test_gradient_is_the_change_of_entropy(name: str, density: str) -> None:
    z = z_of(density)
    base = (SMOOTH | ATOMIC)[name]
    tolerance = 0.01 if name in SMOOTH else 0.3
    for direction in (crrelu_direction(z), torch.sin(z), torch.tanh(z - 0.3)):
        predicted = float(entropy_gradient(base(z), direction, weights=EVEN))
        actual = central_difference(base(z), direction, 1e-4)
        # relative to the size of the two parts of (1'), which cancel where the entropy is at its bound
        size = float(direction.std() / base(z).std())
        assert predicted == pytest.approx(actual, rel=tolerance, abs=tolerance * 0.05 * size)


@pytest.mark.parametrize(
    ("name", "predicted", "actual"),
    [("gelu", 0.5865, 0.5842), ("silu", 1.0803, 1.0846), ("tanh", -0.4469, -0.4469), ("leaky", 0.8648, 0.8648)],
)
def test_values_of_the_prototype(name: str, predicted: float, actual: float) -> None:
    z = -0.3 + 1.4 * z_of("normal")
    base = as_base(nn.LeakyReLU(0.1)) if name == "leaky" else as_base(name)
    g = crrelu_direction(z)
    assert_close(entropy_gradient(base(z), g, weights=EVEN), predicted, 2e-3)
    assert central_difference(base(z), g, 1e-3) == pytest.approx(actual, rel=0.01)


def test_gradient_of_the_twins_entropy() -> None:
    """The change of the direct sum, an oracle that shares nothing with the grid."""
    z = reference.quantiles("shifted", 800)
    for name in ("gelu", "tanh", "relu"):
        base = as_base(name)
        a, g = base(torch.from_numpy(z)).numpy(), crrelu_direction(torch.from_numpy(z)).numpy()
        up, down = (reference.plug_in_entropy(a + side * 1e-4 * g) for side in (1, -1))
        found = entropy_gradient(torch.from_numpy(a), torch.from_numpy(g), weights=EVEN)
        assert float(found) == pytest.approx((up - down) / 2e-4, rel=0.01)


def test_scaling_the_output_does_not_change_the_entropy_to_first_order() -> None:
    for name in ("relu", "gelu", "tanh"):
        a = as_base(name)(draws((5, 3000), seed=18))
        gradient = entropy_gradient(a, 2 * a + 1)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=2e-3)
