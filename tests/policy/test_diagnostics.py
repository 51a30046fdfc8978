"""Columns of the log against scipy, finite moves and the words that they stand for."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

from eafo_dynamic.correction import correction_shape, tabulate
from eafo_dynamic.correction.bases import as_base
from eafo_dynamic.correction.stacked import Functions
from eafo_dynamic.density import Gaussian
from eafo_dynamic.density.sample_moments import sample_moments
from eafo_dynamic.entropy import mixed_entropy
from eafo_dynamic.policy.diagnostics import describe_events, diagnostics, to_rows
from eafo_dynamic.policy.estimates import OutputEntropy, Pooled
from eafo_dynamic.records.schema import Record

NAMES = ["gelu", "silu", "tanh", "leaky_relu", "softplus"]
R = 0.1
SITES = len(NAMES)


def make_functions(eps: float = 0.05) -> Functions:
    """On z ~ N(-0.3, 1.4^2), the example of the theory's section 4; leaky_relu (slope 0.1) has the closed form."""
    bases = [as_base(name) if name != "leaky_relu" else as_base(torch.nn.LeakyReLU(0.1)) for name in NAMES]
    tabulated = [0, 1, 2, 4]
    density = Gaussian(torch.tensor([-0.3]), torch.tensor([1.4]))
    return Functions(
        bases=bases,
        amplitudes=torch.full((1, SITES), eps, dtype=torch.float64),
        shape=torch.tensor([[-0.3, 1.4]], dtype=torch.float64).repeat(SITES, 1),
        tables=torch.stack([tabulate(correction_shape(bases[row], density))[0] for row in tabulated]),
        tabulated=torch.tensor(tabulated),
    )


def quantiles(n: int = 20_001) -> Tensor:
    p = (np.arange(n) + 0.5) / n
    return torch.from_numpy(scipy_stats.norm.ppf(p) * 1.4 - 0.3).repeat(SITES, 1)


def describe(old: Functions, new: Functions, samples: Tensor) -> dict[str, Tensor]:
    before = OutputEntropy(old.outputs(samples), R)
    gradient = torch.stack([before.gradient(direction) for direction in old.directions(samples)])
    nothing = torch.zeros(SITES)
    collected = Pooled(samples, sample_moments(samples), nothing, nothing.long(), torch.zeros(2), [None] * SITES)
    return diagnostics(collected, before, new, old.amplitudes, gradient)


def move(size: float) -> dict[str, Tensor]:
    old = make_functions()
    shape = old.shape + size * torch.tensor([0.2, 0.3])
    return describe(old, replace(old, amplitudes=old.amplitudes + size, shape=shape), quantiles())


# ------------------------------------------------------------------ entropies


def test_the_predicted_entropy_is_right_to_first_order() -> None:
    errors = [(move(size)["entropy_predicted"] - move(size)["entropy_after"]).abs() for size in (0.08, 0.04, 0.02)]
    changes = (move(0.08)["entropy_after"] - move(0.08)["entropy"]).abs()
    assert (changes > 2e-3).all(), "the move does something"
    for coarse, fine in pairwise(errors):
        assert (fine < 0.36 * coarse + 2e-6).all(), (coarse, fine)  # a quarter, to second order
    assert (errors[-1] < 0.1 * changes).all()


def test_nothing_moved_nothing_predicted() -> None:
    columns = move(0.0)
    torch.testing.assert_close(columns["entropy_predicted"], columns["entropy"])
    torch.testing.assert_close(columns["entropy_after"], columns["entropy"])
    assert (columns["entropy_drift"] == 0).all()


@pytest.mark.parametrize("size", [0.01, -0.01])
def test_the_drift_has_the_sign_and_size_of_the_change(size: float) -> None:
    """A move of eps alone: the drift is the change of the entropy, to first order."""
    old = make_functions()
    samples = quantiles()
    columns = describe(old, replace(old, amplitudes=old.amplitudes + size), samples)
    change = columns["entropy_after"] - columns["entropy"]
    assert torch.equal(columns["entropy_drift"].sign(), change.sign())
    np.testing.assert_allclose(columns["entropy_drift"], change, rtol=0.1)
    np.testing.assert_allclose(columns["entropy_drift"], columns["d_entropy_d_eps"] * size, rtol=1e-6)


def test_the_gradient_is_the_difference_quotient_of_the_entropy() -> None:
    functions, samples, step = make_functions(0.0), quantiles(), 1e-3
    sides = [
        OutputEntropy(replace(functions, amplitudes=functions.amplitudes + s * step).outputs(samples), R).entropy
        for s in (1, -1)
    ]
    expected = (sides[0] - sides[1]) / (2 * step)
    found = OutputEntropy(functions.outputs(samples), R).gradient(functions.direction("eps", samples))
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=2e-3)
    # the theory's table, for the direction sigma u exp(-u^2 / 2) of every base
    closed = replace(functions, tables=torch.empty(0, 4, 1), tabulated=torch.empty(0, dtype=torch.long))
    found = OutputEntropy(closed.outputs(samples), R).gradient(closed.direction("eps", samples))
    np.testing.assert_allclose(found[:4], [0.5865, 1.0803, -0.4469, 0.8648], atol=5e-3)


def test_all_entropies_of_one_smoothing_agree_with_the_plain_functions() -> None:
    old = make_functions()
    samples = quantiles(4001)
    columns = describe(old, old, samples)
    expected = mixed_entropy(old.outputs(samples), resolution=R)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(columns[name], value)


# ------------------------------------------------------------------ distance from the Gaussian


def negentropies(*rows: np.ndarray) -> list[float]:
    samples = torch.from_numpy(np.stack(rows))
    functions = Functions(
        bases=[as_base("relu")] * len(rows),
        amplitudes=torch.zeros(1, len(rows)),
        shape=torch.tensor([[0.0, 1.0]]).repeat(len(rows), 1),
        tables=torch.empty(0, 4, 1),
        tabulated=torch.empty(0, dtype=torch.long),
    )
    return describe(functions, functions, samples)["negentropy"].tolist()


def test_negentropy_is_zero_for_a_gaussian_and_orders_the_others() -> None:
    rng = np.random.default_rng(0)
    n = 60_000
    side = np.where(rng.random(n) < 0.5, 2.0, -2.0)
    gaussian, shifted, t8, t3, laplace, uniform, bimodal = negentropies(
        rng.normal(size=n),
        5 + 100 * rng.normal(size=n),
        rng.standard_t(8, n),
        rng.standard_t(3, n),
        rng.laplace(size=n),
        rng.random(n),
        side + 0.5 * rng.normal(size=n),
    )
    assert abs(gaussian) < 2e-3 and abs(shifted) < 2e-3
    assert gaussian < t8 < laplace < t3
    assert uniform < bimodal
    assert min(t8, laplace, uniform) > 0.005
    # closed forms at resolution 0, which the resolution lowers a little
    assert laplace == pytest.approx(
        0.5 * math.log(2 * math.pi * math.e) - (1 + math.log(2) - 0.5 * math.log(2)), abs=0.02
    )
    assert uniform == pytest.approx(0.5 * math.log(2 * math.pi * math.e / 12), abs=0.05)


@pytest.mark.parametrize("n", [64, 512, 4096])
def test_negentropy_of_few_gaussian_samples_is_not_far_from_zero(n: int) -> None:
    rng = np.random.default_rng(1)
    values = negentropies(*rng.normal(size=(40, n)))
    assert abs(float(np.mean(values))) < 2.0 / n**0.75


# ------------------------------------------------------------------ columns


def test_columns_are_those_of_the_samples_and_of_the_new_function() -> None:
    old = make_functions()
    new = replace(old, amplitudes=old.amplitudes + 0.1, shape=old.shape * 1.5)
    samples = quantiles(999)
    samples[1, ::4] = math.nan
    columns = describe(old, new, samples)
    assert all(column.shape == (SITES,) for column in columns.values())
    assert torch.equal(columns["eps"], new.amplitudes[0])
    assert torch.equal(columns["delta_eps"], (new.amplitudes - old.amplitudes)[0])
    assert torch.equal(columns["mu"], new.shape[:, 0]) and torch.equal(columns["sigma"], new.shape[:, 1])
    clean = samples[1][samples[1].isfinite()].numpy()
    assert columns["n"][1] == clean.size < 999
    np.testing.assert_allclose(columns["mean"][1], clean.mean())
    np.testing.assert_allclose(columns["kurtosis"][1], scipy_stats.kurtosis(clean), rtol=1e-9)
    assert all(column.isfinite().all() for column in columns.values())


def test_a_site_without_samples_spoils_no_other() -> None:
    old = make_functions()
    samples = quantiles(999)
    whole = describe(old, replace(old, amplitudes=old.amplitudes * 2), samples)
    samples[2] = math.nan
    found = describe(old, replace(old, amplitudes=old.amplitudes * 2), samples)
    rest = [0, 1, 3, 4]
    for name, column in found.items():
        torch.testing.assert_close(column[rest], whole[name][rest], rtol=1e-5, atol=1e-6)
        given = ("eps", "delta_eps", "mu", "sigma", "n", "dead_fraction", "n_nonfinite")
        assert name in given or column[2].isnan(), name
    empty = describe(old, old, torch.empty(SITES, 0, dtype=torch.float64))
    assert empty["entropy"].isnan().all() and empty["n"].sum() == 0


def test_a_constant_site_has_an_entropy_and_no_gradient() -> None:
    old = make_functions()
    columns = describe(old, old, torch.full((SITES, 50), 0.7, dtype=torch.float64))
    np.testing.assert_allclose(columns["entropy"], 0.5 * math.log(2 * math.pi * math.e * R * R), rtol=1e-6)
    assert (columns["d_entropy_d_eps"] == 0).all() and (columns["atom_mass"] == 1).all()


# ------------------------------------------------------------------ words and rows


@pytest.mark.parametrize(
    "n, usable, fraction, rolled_back, nonfinite, expected",
    [
        (100, True, 1.0, False, 0, None),
        (100, True, 0.5, False, 0, "bounded"),
        (100, True, 0.0, False, 0, "held"),
        (0, False, 1.0, False, 0, "no samples"),
        (100, False, 1.0, False, 0, "no spread"),
        (100, True, 1.0, True, 0, "rolled back"),
        (100, True, 0.25, True, 3, "non-finite samples left out; rolled back; bounded"),
        (0, False, 1.0, False, 9, "non-finite samples left out; no samples"),
    ],
)
def test_events_in_words(
    n: int, usable: bool, fraction: float, rolled_back: bool, nonfinite: int, expected: str | None
) -> None:
    quiet = (torch.tensor([50, n]), torch.tensor([True, usable]), torch.tensor([1.0, fraction]))
    intact = torch.tensor([False, False])
    found = describe_events(*quiet, rolled_back, torch.tensor([0, nonfinite]), intact, [None, None])
    assert found == ["rolled back" if rolled_back else None, expected]


def test_rows_hold_numbers_in_order() -> None:
    heads: list[Record] = [{"step": 1, "site": "a"}, {"step": 1, "site": "b"}]
    columns = {
        "eps": torch.tensor([0.5, math.nan]),
        "n": torch.tensor([3, 4]),
        "n_nonfinite": torch.tensor([0, 2**40]),
        "mu": torch.tensor([1.0, 2.0], dtype=torch.float64),
    }
    first, second = to_rows(heads, columns, [{"event": None}, {"event": "held"}])
    assert first == {"step": 1, "site": "a", "eps": 0.5, "n": 3, "n_nonfinite": 0, "mu": 1.0, "event": None}
    assert list(second) == list(first) and math.isnan(second["eps"])  # type: ignore[arg-type]
    assert second["n_nonfinite"] == 2**40 and isinstance(second["n"], int)


def test_rows_without_the_optional_counts() -> None:
    (row,) = to_rows([{"site": "a"}], {"eps": torch.tensor([0.5])}, [{}])
    assert row == {"site": "a", "eps": 0.5}
