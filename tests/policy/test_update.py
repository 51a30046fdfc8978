"""One update round against per-site loops, fine grids and hostile moves."""

from __future__ import annotations

import copy
import datetime
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eafo_dynamic.correction import HALF_WIDTH, KNOTS, correction_shape, tabulate
from eafo_dynamic.correction.bases import as_base
from eafo_dynamic.correction.kernels import correction
from eafo_dynamic.correction.stacked import Functions
from eafo_dynamic.density import Density, Gaussian, Histogram, gaussian, histogram
from eafo_dynamic.density.estimators import make_estimator
from eafo_dynamic.density.running import RunningDensity
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.policy.moves import refreshed
from eafo_dynamic.policy.rollback import LossWatch
from eafo_dynamic.policy.trust_region import TrustRegion, bounded_move

NAMES = ["relu", "gelu", "leaky_relu", "tanh", "relu"]
CURVED = [1, 3]  # the sites without a closed form
EPS = [0.1, -0.2, 0.3, 0.25, -0.4]
SHAPES = [[0.0, 1.0], [-0.5, 2.0], [3.0, 0.1], [0.2, 0.7], [-10.0, 5.0]]


def standard(sites: int) -> Gaussian:
    return Gaussian(torch.zeros(sites), torch.ones(sites))


def make_functions(tabulated: Sequence[int] = CURVED, dtype: torch.dtype = torch.float64) -> Functions:
    bases = [as_base(name) for name in NAMES]
    tables = [tabulate(correction_shape(bases[row], standard(1), route="score"))[0] for row in tabulated]
    return Functions(
        bases=bases,
        amplitudes=torch.tensor([EPS], dtype=dtype),
        shape=torch.tensor(SHAPES, dtype=dtype),
        tables=torch.stack(tables).to(dtype) if tables else torch.empty(0, 4, 1, dtype=dtype),
        tabulated=torch.tensor(list(tabulated), dtype=torch.long),
    )


def make_tabulated(seed: int = 0, eps: float = 0.2) -> Functions:
    """All sites tabulated, with tables of a size of their own."""
    functions = make_functions(range(5))
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(5, generator=generator, dtype=torch.float64) - 0.5
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    return replace(
        functions, amplitudes=(eps * sign).unsqueeze(0), tables=functions.tables * (1 + 0.2 * scale).view(-1, 1, 1)
    )


def spread(functions: Functions, n: int = 501, reach: float = HALF_WIDTH) -> Tensor:
    u = torch.linspace(-reach, reach, n, dtype=functions.shape.dtype)
    return functions.shape[:, :1] + functions.sigma * u


def read_table(table: Tensor, u: float) -> float:
    """The definition, in plain numbers: cubic number k of [-L, L], zero outside."""
    coefficients = table.double().numpy()
    intervals = coefficients.shape[1]
    if not -HALF_WIDTH <= u <= HALF_WIDTH:
        return 0.0
    place = (u + HALF_WIDTH) * intervals / (2 * HALF_WIDTH)
    k = min(int(place), intervals - 1)
    return float(np.polyval(coefficients[::-1, k], place - k))


def reference_direction(functions: Functions, row: int, z: float) -> float:
    mu, sigma = functions.shape[row].tolist()
    u = (z - mu) / sigma
    rows = functions.tabulated.tolist()
    if row in rows:
        return sigma * read_table(functions.tables[rows.index(row)], u)
    return sigma * u * math.exp(-0.5 * u * u)


def assert_no_site_is_new(new: Functions, old: Functions, rows: Sequence[int]) -> None:
    for row in rows:
        assert new.amplitudes[0, row] == old.amplitudes[0, row] and torch.equal(new.shape[row], old.shape[row])
        if row in old.tabulated.tolist():
            place = old.tabulated.tolist().index(row)
            assert torch.equal(new.tables[place], old.tables[place])


# ------------------------------------------------------------------ Functions


def test_direction_correction_and_outputs_against_a_loop() -> None:
    functions = make_functions()
    z = spread(functions, 41, 9.5)
    plain = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh}
    plain["leaky_relu"] = lambda x: torch.where(x > 0, x, 0.01 * x)
    for row, name in enumerate(NAMES):
        expected = torch.tensor([reference_direction(functions, row, x) for x in z[row].tolist()], dtype=torch.float64)
        close = {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(functions.direction("eps", z)[row], expected, **close)
        torch.testing.assert_close(functions.correction(z)[row], EPS[row] * expected, **close)
        torch.testing.assert_close(functions.outputs(z)[row], plain[name](z[row]) + EPS[row] * expected, **close)


def test_the_update_and_the_forward_compute_the_same_correction() -> None:
    functions = make_tabulated()
    z = spread(functions, 301, 9.0)
    for row in range(5):
        found = correction(
            z[row], functions.amplitudes[:, row], functions.shape[row], functions.tables[row], HALF_WIDTH
        )
        torch.testing.assert_close(found, functions.correction(z)[row], rtol=1e-9, atol=1e-11)


def test_missing_samples_stay_missing_and_alone() -> None:
    functions = make_functions()
    z = spread(functions, 11)
    holes = z.clone()
    holes[:, 3] = math.nan
    out = functions.outputs(holes)
    assert out[:, 3].isnan().all()
    keep = [i for i in range(11) if i != 3]
    assert torch.equal(out[:, keep], functions.outputs(z)[:, keep])


def test_sites_with_equal_bases_are_one_group() -> None:
    groups = make_functions().groups()
    assert sorted(groups.values()) == [[0, 4], [1], [2], [3]]


def test_part_of_the_way() -> None:
    old, new = make_tabulated(0), make_tabulated(1, eps=-0.1)
    new = replace(new, shape=old.shape * 2)
    fraction = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    between = old.towards(new, fraction)
    for name in ("amplitudes", "shape", "tables"):
        a, b, c = (getattr(each, name) for each in (old, new, between))
        if name == "amplitudes":
            a, b, c = a.T, b.T, c.T  # one row a site, as the others
        share = fraction.view(-1, *[1] * (a.dim() - 1))
        torch.testing.assert_close(c, (1 - share) * a + share * b)
        assert torch.equal(c[0], a[0]) and torch.equal(c[-1], b[-1])


def test_a_move_that_is_refused_leaves_no_trace_even_of_nan() -> None:
    old = make_tabulated()
    poison = replace(
        old, amplitudes=old.amplitudes * math.nan, shape=old.shape * math.inf, tables=old.tables * math.nan
    )
    assert_no_site_is_new(old.towards(poison, torch.zeros(5, dtype=torch.float64)), old, range(5))


# ------------------------------------------------------------------ estimators


@pytest.mark.parametrize("density", ["kde", "", 3, None])
def test_no_such_density(density: Any) -> None:
    with pytest.raises(ConfigError) as error:
        make_estimator(density)
    assert f"density={density!r}: no such density" in str(error.value)
    assert "gaussian, histogram" in str(error.value)


def test_estimators_by_name_or_as_they_are() -> None:
    assert make_estimator("gaussian") is gaussian and make_estimator("histogram") is histogram

    def mine(samples: Tensor) -> Density:
        return gaussian(samples)

    assert make_estimator(mine) is mine


def rounds_of_samples(rounds: int = 6, n: int = 400) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, n, generator=generator) * (1 + k) + 2 * k for k in range(rounds)]


def test_first_a_plain_mean_then_an_exponential_one() -> None:
    running = RunningDensity(gaussian, momentum=0.3)
    usable = torch.ones(3, dtype=torch.bool)
    mean = variance = np.zeros(3)
    for number, samples in enumerate(rounds_of_samples(), start=1):
        density = running.follow(samples, usable)
        weight = max(1 / number, 0.3)
        mean = (1 - weight) * mean + weight * samples.double().numpy().mean(-1)
        variance = (1 - weight) * variance + weight * samples.double().numpy().var(-1)
        np.testing.assert_allclose(density.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(density.std, np.sqrt(variance), rtol=1e-5)


@pytest.mark.parametrize("estimator", [gaussian, histogram])
def test_a_site_without_usable_samples_waits(estimator: Any) -> None:
    running = RunningDensity(estimator, momentum=0.5)
    samples = rounds_of_samples()
    first = samples[0].clone()
    first[1], first[2] = 7.0, math.nan
    running.follow(first, torch.tensor([True, False, False]))
    density = running.follow(samples[1], torch.tensor([False, True, True]))
    alone = [estimator(samples[0]).select([0]), estimator(samples[1]).select([1, 2])]
    for name in ("mean", "std"):
        expected = torch.cat([getattr(each, name) for each in alone])
        torch.testing.assert_close(getattr(density, name), expected, rtol=1e-6, atol=0)
    u = torch.linspace(-3, 3, 13)
    torch.testing.assert_close(density.pdf(u), torch.cat([each.pdf(u) for each in alone]), rtol=1e-4, atol=1e-6)
    assert running.rounds is not None and running.rounds.tolist() == [1, 1, 1]


@pytest.mark.parametrize("estimator", [gaussian, histogram])
def test_the_running_estimate_survives_a_checkpoint(estimator: Any, tmp_path: Path) -> None:
    samples, usable = rounds_of_samples(), torch.tensor([True, True, False])
    whole, first, second = (RunningDensity(estimator, 0.25) for _ in range(3))
    fresh = first.state_dict()
    for each in samples[:3]:
        whole.follow(each, usable)
        first.follow(each, usable)
    first.density.pdf(torch.zeros(1))  # type: ignore[union-attr]  # caches are no state
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), usable)
    assert isinstance(second.density, (Gaussian, Histogram))
    u = torch.linspace(-4, 4, 9)
    for each in samples[3:]:
        one, two = whole.follow(each, usable), second.follow(each, usable)
        for a, b in ((one.mean, two.mean), (one.std, two.std), (one.pdf(u), two.pdf(u)), (one.count, two.count)):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    second.load_state_dict(fresh, usable)
    assert second.density is None and second.rounds is None


def test_a_density_of_the_users_own_starts_anew_after_a_restore() -> None:
    class Mine(Gaussian):
        pass

    running = RunningDensity(lambda samples: Mine(samples.mean(-1), samples.std(-1)), 0.5)
    running.follow(rounds_of_samples()[0], torch.ones(3, dtype=torch.bool))
    state = running.state_dict()
    assert state["density"] is None
    running.load_state_dict(state, torch.ones(3))
    assert running.density is None and running.rounds is None


# ------------------------------------------------------------------ the loss


def watch(losses: Sequence[Sequence[float]], factor: float | None = 1.5) -> list[bool]:
    """Answers after each stretch of losses."""
    watched = LossWatch(factor)
    answers: list[bool] = []
    for stretch in losses:
        for loss in stretch:
            watched.observe(torch.tensor(loss, requires_grad=True))
        losses = watched.drain()
        if distributed.is_initialized():
            distributed.all_reduce(losses)  # a round's one collective carries them
        answers.append(watched.jumped(losses))
    return answers


@pytest.mark.parametrize(
    "losses, expected",
    [
        ([[1.0, 1.0], [1.4], [1.4, 1.6]], [False, False, False]),
        ([[1.0], [1.51], [1.0]], [False, True, False]),
        ([[1.0], [0.1], [0.16]], [False, False, True]),
        ([[1.0], [math.nan], [1.2], [1.9]], [False, True, False, True]),
        ([[1.0], [math.inf], [math.nan]], [False, True, True]),
        ([[math.nan], [1.0], [1.2]], [True, False, False]),
        ([[-2.0], [-1.5], [-1.0]], [False, False, False]),
        ([[-2.0], [-0.9]], [False, True]),
        ([[-100.0], [120.0]], [False, True]),
        ([[-1.0], [-1.3], [-2.0]], [False, False, False]),
        ([[1.0], [], [1.6]], [False, False, True]),
        ([[], []], [False, False]),
    ],
)
def test_a_jump_of_the_loss(losses: Sequence[Sequence[float]], expected: list[bool]) -> None:
    assert watch(losses) == expected


def test_a_jump_that_undoing_does_not_mend_is_the_new_level() -> None:
    assert watch([[1.0], [3.0], [3.0], [3.1], [3.2], [9.0]]) == [False, True, False, False, False, True]


def test_without_a_factor_nothing_is_watched() -> None:
    assert watch([[1.0], [1e9], [math.nan]], None) == [False, False, False]


def test_half_precision_losses_add_up() -> None:
    watched = LossWatch(1.5)
    for _ in range(2000):
        watched.observe(torch.tensor(1.0, dtype=torch.bfloat16))
    assert not watched.jumped()
    for _ in range(2000):
        watched.observe(torch.tensor(1.4, dtype=torch.bfloat16))
    assert not watched.jumped()
    for _ in range(300):
        watched.observe(torch.tensor(60000.0, dtype=torch.float16))
    assert watched.jumped()


def _rank_watches(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    stretches: list[list[float]] = [[1.0, 1.0], [1.0] if rank else [9.0, 9.0], [] if rank else [1.0]]
    torch.save(watch(stretches), Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_come_to_one_decision_even_if_one_has_seen_no_loss(tmp_path: Path) -> None:
    multiprocessing.spawn(_rank_watches, (str(tmp_path),), nprocs=2)
    answers = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert answers == [[False, True, False]] * 2


# ------------------------------------------------------------------ refreshing


def samples_of(shapes: Sequence[Sequence[float]], n: int = 4000) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    unit = torch.randn(len(shapes), n, generator=generator, dtype=torch.float64)
    unit[-1] = torch.sign(unit[-1]) * 1.5 + 0.3 * unit[-1]  # two modes
    return torch.tensor(shapes, dtype=torch.float64)[:, :1] + torch.tensor(shapes, dtype=torch.float64)[:, 1:] * unit


@pytest.mark.parametrize("estimator", [gaussian, histogram])
def test_refreshed_fits_each_usable_site_as_if_alone(estimator: Any) -> None:
    old = make_functions(CURVED if estimator is gaussian else range(5))
    samples = samples_of([[1.0, 2.0], [0.0, 1.0], [5.0, 0.3], [-1.0, 1.0], [0.0, 4.0]])
    usable = torch.tensor([True, True, False, False, True])
    density = estimator(samples)
    new = refreshed(old, density, usable, 0.1)
    assert torch.equal(new.amplitudes, old.amplitudes) and new.bases == old.bases
    assert_no_site_is_new(new, old, [2, 3])
    rows = old.tabulated.tolist()
    for row in (0, 1, 4):
        values = samples[row].numpy()
        np.testing.assert_allclose(new.shape[row], [values.mean(), values.std()], rtol=1e-6, atol=1e-6)
        if row in rows:
            alone = tabulate(correction_shape(old.bases[row], estimator(samples[row : row + 1]), resolution=0.1))[0]
            torch.testing.assert_close(new.tables[rows.index(row)], alone, rtol=1e-5, atol=1e-7)


def test_refreshing_changes_nothing_in_place() -> None:
    old = make_functions()
    kept = copy.deepcopy((old.amplitudes, old.shape, old.tables))
    refreshed(old, gaussian(samples_of(SHAPES)), torch.ones(5, dtype=torch.bool), 0.1)
    for one, two in zip(kept, (old.amplitudes, old.shape, old.tables), strict=True):
        assert torch.equal(one, two)


def test_a_vanishing_spread_keeps_a_scale_that_half_precision_can_divide_by() -> None:
    old = make_functions()
    density = Gaussian(torch.zeros(5), torch.full((5,), 1e-12))
    new = refreshed(old, density, torch.ones(5, dtype=torch.bool), 0.1)
    assert (new.shape[:, 1].half() > 0).all()
    half = correction(torch.zeros(3, dtype=torch.float16), torch.tensor([0.5]), new.shape[0].float())
    assert half.isfinite().all()


# ------------------------------------------------------------------ the bounded move


def largest_jump(old: Functions, new: Functions) -> Tensor:
    """max |c_new - c_old| / larger sigma over a grid 20 times finer than the knots, of both tables' ranges."""
    u = torch.linspace(-HALF_WIDTH, HALF_WIDTH, 20 * KNOTS, dtype=torch.float64)
    z = torch.cat([old.shape[:, :1] + old.sigma * u, new.shape[:, :1] + new.sigma * u], -1)
    return (new.correction(z) - old.correction(z)).abs().amax(-1) / torch.maximum(old.sigma, new.sigma)[:, 0]


def assert_bounded(old: Functions, wanted: Functions, max_delta: float) -> Tensor:
    taken, fraction = bounded_move(old, wanted, TrustRegion(1.0, max_delta))
    assert taken.amplitudes.isfinite().all() and taken.shape.isfinite().all() and taken.tables.isfinite().all()
    assert (taken.shape[:, 1] > 0).all()
    assert (largest_jump(old, taken) <= max_delta * 1.001).all()
    held = [row for row in range(5) if fraction[row] == 0]
    assert_no_site_is_new(taken, old, held)
    return fraction


FACTORS = [0.0, 1e-3, 0.3, 0.9, 1.0, 1.1, 3.0, 1e3, math.nan, math.inf, -1.0]
SHIFTS = [0.0, 0.1, -1.0, 5.0, 20.0, -1e3, math.nan, math.inf]


@given(
    st.lists(st.sampled_from(FACTORS), min_size=5, max_size=5),
    st.lists(st.sampled_from(SHIFTS), min_size=5, max_size=5),
    st.lists(st.sampled_from([0.0, 0.01, -0.5, 0.5, 50.0, math.nan]), min_size=5, max_size=5),
    st.sampled_from([0.001, 0.02, 0.1]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_hostile_moves_stay_within_the_bound(
    factors: list[float], shifts: list[float], eps: list[float], max_delta: float, all_tabulated: bool
) -> None:
    old = make_functions(range(5) if all_tabulated else CURVED)
    mu, sigma = old.shape.unbind(-1)
    moved = torch.stack([mu + torch.tensor(shifts) * sigma, sigma * torch.tensor(factors)], -1)
    assert_bounded(old, replace(old, shape=moved, amplitudes=torch.tensor([eps], dtype=torch.float64)), max_delta)


def test_another_table_counts_too() -> None:
    old = make_tabulated()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(5, 1, 1, generator=generator, dtype=torch.float64) * 4
    wanted = replace(old, tables=old.tables.flip(0) * noise)
    fraction = assert_bounded(old, wanted, 0.05)
    assert (fraction < 1).any() and (fraction > 0).any()


@pytest.mark.parametrize("part", ["eps", "mu", "sigma", "table"])
def test_what_is_no_number_is_never_taken(part: str) -> None:
    old = make_functions(range(5))
    amplitudes, shape, tables = old.amplitudes.clone(), old.shape.clone(), old.tables.clone()
    target = {"eps": amplitudes[0], "mu": shape[:, 0], "sigma": shape[:, 1], "table": tables[:, :, 97]}[part]
    target[...] = math.nan
    fraction = assert_bounded(old, replace(old, amplitudes=amplitudes, shape=shape, tables=tables), 0.1)
    assert (fraction == 0).all()


def test_a_small_move_is_taken_whole_and_a_larger_one_as_far_as_allowed() -> None:
    old = make_functions(())
    peak = math.exp(-0.5)  # of u exp(-u^2 / 2)
    steps = torch.tensor([0.0, 0.09, 0.17, 0.33, 2.9], dtype=torch.float64) / peak
    taken, fraction = bounded_move(old, replace(old, amplitudes=old.amplitudes + steps), TrustRegion(1.0, 0.1))
    assert fraction.tolist() == [1.0, 1.0, 0.5, 0.25, 0.0]
    torch.testing.assert_close((taken.amplitudes - old.amplitudes)[0], steps * fraction)


def test_a_scale_that_grows_is_followed_since_the_bound_grows_with_it() -> None:
    old = replace(make_functions(()), amplitudes=torch.full((1, 5), 0.15, dtype=torch.float64))
    grown = old.shape.clone()
    grown[:, 1] *= 50
    assert (assert_bounded(old, replace(old, shape=grown), 0.1) == 1).all()


def test_a_bump_that_would_appear_between_two_places_is_seen() -> None:
    """Half-way of a long shift the function stands where neither grid of the two ends lies."""
    old = replace(make_functions(()), amplitudes=torch.full((1, 5), 0.3, dtype=torch.float64))
    shift = torch.zeros_like(old.shape)
    shift[:, 0] = 100 * old.shape[:, 1]
    assert (assert_bounded(old, replace(old, shape=old.shape + shift), 0.1) == 0).all()
