"""The sample against brute force: fair, deterministic, cheap, mergeable; its moments against scipy."""

from __future__ import annotations

import copy
import datetime
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eafo_dynamic.density.collector import Collector
from eafo_dynamic.density.ranks import gather_ranks, stack_samples
from eafo_dynamic.density.sample_moments import SampleMoments, dead_fraction, dead_fractions, sample_moments


def sample(z: Tensor, quota: int = 1024) -> tuple[Tensor, Tensor]:
    collector = Collector(quota)
    collector.observe(z)
    return collector.drain()


def channel_of(z: Tensor) -> Tensor:
    """Brute force: for every element the index of its channel, by the rule of the documentation."""
    dim = 1 if z.dim() >= 4 else z.dim() - 1
    size = [1] * z.dim()
    size[dim] = z.shape[dim]
    return torch.arange(z.shape[dim]).view(size).expand(z.shape)


def assert_fair(z: Tensor, quota: int = 1024) -> None:
    """All channels and all positions alike, and the sample's distribution is that of the tensor."""
    values, units = sample(z, quota)
    assert values.numel() == min(quota, z.numel())
    channels = z.shape[1 if z.dim() >= 4 else -1]
    assert_even(units, channels)
    full = z.double().flatten()
    spread = float(full.std())
    noise = 4.0 / math.sqrt(values.numel())
    assert abs(float(values.double().mean() - full.mean())) < noise * spread
    assert abs(float(values.double().std()) / spread - 1) < noise
    assert float(scipy_stats.ks_2samp(values.numpy(), full.numpy()).pvalue) > 1e-3


def assert_even(where: Tensor, classes: int) -> None:
    """No class has many more or fewer entries than a random draw would give it."""
    counts = torch.bincount(where, minlength=classes).double()
    expected = where.numel() / classes
    chi_square = float((counts - expected).square().sum() / expected)
    assert chi_square < scipy_stats.chi2.isf(1e-4, classes - 1), counts


class ElementsTouched(TorchDispatchMode):
    """Counts the elements that operations write, and remembers which operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append(str(func))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor) and not func.is_view:
                self.written += each.numel()
        return out


# ------------------------------------------------------------------ taking a sample


def layouts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 16, 24, 24, generator=generator) + 3 * torch.arange(16.0).view(16, 1, 1) / 16
    tokens = torch.randn(16, 60, 48, generator=generator) + 3 * torch.arange(48.0) / 48
    return {
        "contiguous images": images,
        "channels_last": images.to(memory_format=torch.channels_last),
        "transposed tokens": tokens.transpose(0, 1),
        "positions last": tokens.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": images[:, :, 3:21, ::2],
        "expanded": images[:1].expand(32, -1, -1, -1),
        "permuted images": images.permute(3, 1, 0, 2),
        "flat": tokens.reshape(-1, 48),
        "volumes": images.reshape(32, 16, 4, 6, 24).to(memory_format=torch.channels_last_3d),
    }


@pytest.mark.parametrize("name", layouts())
def test_the_sample_is_fair_in_every_layout(name: str) -> None:
    assert_fair(layouts()[name])


@pytest.mark.parametrize("shape", [(64, 64, 16, 16), (256, 64, 8, 8), (512, 256), (128, 96, 16), (233, 4, 768)])
@pytest.mark.parametrize("quota", [64, 820, 1024])
def test_no_period_of_the_tensor_beats_with_the_sample(shape: tuple[int, ...], quota: int) -> None:
    """Quotas that divide the number of elements into strides of whole images, rows or channels."""
    z = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    values, units = sample(z, quota)
    channels = shape[1] if len(shape) >= 4 else shape[-1]
    assert_even(units * 16 // channels, 16)
    place = values.long()
    period = 1
    for size in reversed(shape):
        period *= size
        assert_even((place % period) * 8 // period, 8)
    assert torch.equal(place, place.unique()), "no element twice"


@pytest.mark.parametrize("name", layouts())
def test_the_unit_of_a_sample_is_its_channel(name: str) -> None:
    z = layouts()[name]
    encoded = torch.empty_strided(z.shape, z.stride()) if 0 not in z.stride() else torch.empty(z.shape)
    encoded.copy_(channel_of(z))
    values, units = sample(encoded)
    assert torch.equal(values.long(), units)


@given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=5).map(tuple),
    order=st.randoms(use_true_random=False),
    quota=st.integers(1, 300),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_order_of_dimensions(shape: tuple[int, ...], order: Any, quota: int) -> None:
    place = list(range(len(shape)))
    order.shuffle(place)
    stored = torch.arange(math.prod(shape), dtype=torch.float32).view([shape[d] for d in place])
    z = stored.permute([place.index(d) for d in range(len(shape))])
    assert tuple(z.shape) == shape
    values, units = sample(z, quota)
    assert values.numel() == min(quota, z.numel()) == values.unique().numel()
    if shape:
        channels = dict(zip(z.flatten().tolist(), channel_of(z).flatten().tolist(), strict=True))
        assert units.tolist() == [channels[value] for value in values.tolist()]
    if z.numel() <= quota:
        assert torch.equal(values.sort().values, z.flatten().sort().values)


def test_the_sample_draws_no_random_number_and_repeats() -> None:
    z = torch.randn(64, 300)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = sample(z), sample(z)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", layouts())
def test_the_cost_does_not_grow_with_the_tensor(name: str) -> None:
    z = layouts()[name]
    costs: list[int] = []
    for batch in (z, torch.cat([z, z, z, z])):
        batch = batch if z.is_contiguous() else torch.empty_strided(batch.shape, z.stride())
        collector = Collector(256)
        collector.observe(batch)  # index tensors are made once a shape
        with ElementsTouched() as touched:
            collector.observe(batch)
        costs.append(touched.written)
    assert costs[0] == costs[1] <= 256 * 40


def test_nothing_is_read_back_to_the_host() -> None:
    with ElementsTouched() as touched:
        sample_only = Collector(256)
        sample_only.observe(torch.ones(64, 64))
    assert not [op for op in touched.operations if "local_scalar" in op or "item" in op or "nonzero" in op]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_values_keep_their_precision(dtype: torch.dtype) -> None:
    z = torch.randn(8, 8, dtype=torch.float64).to(dtype)
    values, _ = sample(z)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(values, z.flatten().to(values.dtype))


def test_a_scalar_and_an_empty_tensor() -> None:
    assert sample(torch.tensor(3.0))[0].tolist() == [3.0]
    collector = Collector()
    collector.observe(torch.empty(0, 5))
    values, units = collector.drain()
    assert values.numel() == units.numel() == 0 and units.dtype == torch.long


def test_a_later_change_in_place_leaves_the_sample_alone() -> None:
    z = torch.randn(10, 10)
    kept = z.clone()
    collector = Collector()
    collector.observe(z)
    z.mul_(0)
    assert torch.equal(collector.drain()[0], kept.flatten())


def test_the_sample_has_no_graph() -> None:
    collector = Collector()
    collector.observe(torch.randn(4, 4, requires_grad=True) * 2)
    assert not collector.drain()[0].requires_grad


def test_a_transform_of_functions_leaves_no_dead_tensor_behind() -> None:
    collector = Collector()

    def f(x: Tensor) -> Tensor:
        collector.observe(x)
        return x.sum()

    torch.func.vmap(torch.func.grad(f))(torch.randn(5, 6))
    assert collector.drain()[0].numel() == 0


def test_copies_start_without_a_sample_and_leave_the_original_its_own() -> None:
    collector = Collector(64)
    collector.observe(torch.randn(8, 8))
    for twin in (copy.deepcopy(collector), pickle.loads(pickle.dumps(collector))):
        assert twin.quota == 64
        assert twin.drain()[0].numel() == 0
        twin.observe(torch.zeros(2))
    assert collector.drain()[0].numel() == 64
    assert collector.drain()[0].numel() == 0, "drained is empty"


def test_a_very_long_chain_of_forwards_is_let_go() -> None:
    collector = Collector(1)
    for _ in range(20_000):
        collector.observe(torch.zeros(1))
    assert collector.drain()[0].numel() == 20_000
    for _ in range(20_000):
        collector.observe(torch.zeros(1))
    del collector  # not a stack overflow


# ------------------------------------------------------------------ merging


def test_accumulated_halves_equal_the_whole_where_all_is_taken() -> None:
    z = torch.randn(64, 16)
    halves = Collector(1024)
    halves.observe(z[:32])
    halves.observe(z[32:])
    one, two = halves.drain(), sample(z)
    assert torch.equal(one[0].sort().values, two[0].sort().values)
    assert torch.equal(one[1].bincount(), two[1].bincount())


def test_accumulated_halves_equal_the_whole_in_distribution() -> None:
    z = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 3, 64)
    halves = Collector(2048)
    halves.observe(z[:1024])
    halves.observe(z[1024:])
    thinned = stack_samples([halves.drain()[0]], 2048)[0]
    assert thinned.numel() == 2048
    for other in (sample(z, 2048)[0], z.flatten()):
        assert float(scipy_stats.ks_2samp(thinned.numpy(), other.numpy()).pvalue) > 1e-3


def test_samples_of_unequal_length_are_stacked_and_filled() -> None:
    stacked = stack_samples([torch.arange(5.0), torch.empty(0), torch.arange(3, dtype=torch.float64)], 4)
    assert stacked.shape == (3, 4) and stacked.dtype == torch.float64
    assert stacked[0].isfinite().all() and set(stacked[0].tolist()) < set(range(5))
    assert stacked[1].isnan().all()
    assert stacked[2, :3].tolist() == [0, 1, 2] and stacked[2, 3].isnan()


def test_thinning_meets_all_columns_and_all_batches_alike() -> None:
    """Of whole batches [64, 32] in a row, an even thinning by two would keep the even columns only."""
    place = torch.arange(4 * 64 * 32, dtype=torch.float32)
    thinned = stack_samples([place], place.numel() // 2)[0].long()
    assert_even(thinned % 32, 32)
    assert_even(thinned // (64 * 32), 4)
    assert thinned.unique().numel() == thinned.numel()


def test_stacking_nothing_at_all() -> None:
    assert stack_samples([torch.empty(0), torch.empty(0)], 8).shape == (2, 0)


def _rank_gathers(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    calls: list[int] = []
    original = distributed.all_gather

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    distributed.all_gather = counted
    mine = torch.full((3, 2 - rank), float(rank))  # ranks have found unequal numbers of samples
    together = gather_ranks(mine, 4)
    torch.save((together, len(calls)), Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_gather_the_same_tensor_in_one_collective(tmp_path: Path) -> None:
    multiprocessing.spawn(_rank_gathers, (str(tmp_path),), nprocs=2)
    (first, calls), (second, _) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert torch.equal(first.nan_to_num(-9), second.nan_to_num(-9))
    assert first.shape == (3, 8) and calls == 1
    expected = [0, 0, math.nan, math.nan, 1, math.nan, math.nan, math.nan]
    np.testing.assert_array_equal(first[2].numpy(), expected)


def test_one_process_keeps_its_own() -> None:
    mine = torch.randn(2, 3)
    assert gather_ranks(mine, 5) is mine


# ------------------------------------------------------------------ under torch.compile


def test_compiled_whole_without_compiling_anew_every_step() -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    collector, eager = Collector(64), Collector(64)

    @torch.compile(fullgraph=True, backend=backend)
    def f(z: Tensor) -> Tensor:
        collector.observe(z)
        return z * 2

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = [torch.randn(9, 20) for _ in range(12)]
        for z in batches:
            f(z)
            eager.observe(z)
        assert len(graphs) <= 2, "one for the first sample, one for those after it"
        for ours, theirs in zip(collector.drain(), eager.drain(), strict=True):
            assert torch.equal(ours, theirs)
        f(batches[0])
        assert len(graphs) <= 2
        lengths = list(range(21, 33))
        for length in lengths:
            f(torch.randn(9, length))
    assert len(graphs) <= 4, "lengths become symbols"
    assert collector.drain()[0].numel() == 64 * (1 + len(lengths))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["contiguous images", "channels_last", "transposed tokens", "sliced"])
def test_compiled_sample_is_the_eager_one(name: str) -> None:
    torch._dynamo.reset()
    z = layouts()[name]
    collector = Collector(300)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(z: Tensor) -> Tensor:
        collector.observe(z)
        return z + 1

    f(z)
    for ours, theirs in zip(collector.drain(), sample(z, 300), strict=True):
        assert torch.equal(ours, theirs)
    torch._dynamo.reset()


# ------------------------------------------------------------------ dead units


def test_dead_fraction_against_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    dead = torch.rand(12, generator=generator) < 0.4
    images = torch.rand(8, 12, 6, 6, generator=generator) - torch.where(dead, 1.0, 0.3).view(12, 1, 1)
    tokens = images.movedim(1, -1).reshape(8, 36, 12)
    expected = float((images.amax((0, 2, 3)) <= 0).double().mean())
    assert expected == float(dead.double().mean()) and 0 < expected < 1
    for z in (images, images.to(memory_format=torch.channels_last), tokens, tokens.transpose(0, 1)):
        assert dead_fraction(*sample(z, 10_000)) == pytest.approx(expected)


def test_dead_fraction_needs_enough_samples_a_unit() -> None:
    units = torch.arange(10).repeat(7)
    assert math.isnan(dead_fraction(torch.ones(70), units))
    assert dead_fraction(torch.ones(80), torch.arange(10).repeat(8)) == 0.0
    assert dead_fraction(torch.zeros(80), torch.arange(10).repeat(8)) == 1.0
    assert math.isnan(dead_fraction(torch.empty(0), torch.empty(0, dtype=torch.long)))


@pytest.mark.parametrize("far", [1, 1 << 22], ids=["few units", "units with large numbers"])
def test_dead_fractions_of_all_sites_are_those_of_each(far: int) -> None:
    generator = torch.Generator().manual_seed(0)
    units = torch.randint(0, 12, (5, 400), generator=generator)
    values = torch.randn(5, 400, generator=generator) - units.float() / 3
    values[0, ::3] = math.nan
    values[1] = math.nan
    values[2, 20:] = math.nan  # fewer than 8 a unit
    values[3] = -values[3].abs()
    found = dead_fractions(values, units * far)
    for row in range(5):
        known = ~values[row].isnan()
        fired = {int(u) for u, v in zip(units[row][known], values[row][known], strict=True) if v > 0}
        present = {int(u) for u in units[row][known]}
        if known.sum() < 8 * len(present) or not present:
            assert found[row].isnan()
        else:
            assert found[row] == pytest.approx(1 - len(fired) / len(present))
    assert found[3] == 1.0 and found[1].isnan() and found[2].isnan() and 0 < found[4] < 1
    assert dead_fractions(torch.empty(3, 0), torch.empty(3, 0, dtype=torch.long)).isnan().all()


def test_dead_fraction_does_not_count_what_is_no_number() -> None:
    values = torch.full((32,), -1.0)
    values[::3] = math.nan
    assert dead_fraction(values, torch.arange(2).repeat(16)) == 1.0
    assert math.isnan(dead_fraction(torch.full((32,), math.nan), torch.arange(2).repeat(16)))
    values[1] = math.inf
    assert dead_fraction(values, torch.arange(2).repeat(16)) == 0.5


# ------------------------------------------------------------------ moments


def assert_moments(found: SampleMoments, row: int, clean: np.ndarray[Any, Any], rtol: float = 1e-9) -> None:
    assert int(found.n[row]) == clean.size
    expected = [clean.mean(), clean.std(), scipy_stats.skew(clean), scipy_stats.kurtosis(clean)]
    actual = [float(column[row]) for column in found[1:]]
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_against_scipy(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(
        np.stack([rng.normal(2, 3, 500), rng.exponential(1, 500), rng.standard_t(5, 500), rng.uniform(-1, 1, 500)])
    ).to(dtype)
    found = sample_moments(rows)
    for row, values in enumerate(rows.double().numpy()):
        assert_moments(found, row, values)


def test_moments_leave_out_what_is_not_finite() -> None:
    rows = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[0, ::3] = math.nan
    rows[1, 5], rows[1, 6] = math.inf, -math.inf
    rows[2] = math.nan
    found = sample_moments(rows)
    for row in (0, 1):
        assert_moments(found, row, rows[row][rows[row].isfinite()].numpy())
    assert found.n[2] == 0 and all(column[2].isnan() for column in found[1:])


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30, 1e6 + 0.1])
def test_a_constant_has_no_spread_at_all(value: float) -> None:
    for n in (1, 2, 3, 1000):
        found = sample_moments(torch.full((1, n), value, dtype=torch.float64))
        assert found.mean.item() == value
        assert (found.std.item(), found.skew.item(), found.kurtosis.item()) == (0.0, 0.0, 0.0)


def test_a_small_spread_beside_a_huge_offset() -> None:
    rng = np.random.default_rng(0)
    values = 1e6 + 1e-3 * rng.gamma(2.0, size=2000)
    assert_moments(sample_moments(torch.from_numpy(values)[None]), 0, values, rtol=1e-6)


def test_huge_values_do_not_overflow_and_no_samples_are_no_error() -> None:
    found = sample_moments(torch.tensor([[3e38, -3e38, 0.0, 1e38]], dtype=torch.float32))
    assert all(column.isfinite().all() for column in found)
    empty = sample_moments(torch.empty(2, 0))
    assert empty.n.tolist() == [0, 0] and all(column.isnan().all() for column in empty[1:])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.integers(1, 29))
@settings(max_examples=50, deadline=None)
def test_moments_do_not_depend_on_how_the_samples_came(values: list[float], cut: int) -> None:
    whole = torch.tensor(values, dtype=torch.float64)
    parts = [whole[:cut], whole[cut:]]
    merged = stack_samples([torch.cat(parts[::-1])], len(values))
    np.testing.assert_allclose(
        np.array(sample_moments(merged)[:3])[:, 0],
        np.array(sample_moments(whole[None])[:3])[:, 0],
        rtol=1e-9,
        atol=1e-9,
    )
