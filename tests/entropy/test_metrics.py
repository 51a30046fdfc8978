"""``ActivationEntropy``: merging equals one pass, and one pass equals the entropy of the samples themselves."""

from __future__ import annotations

import copy
import doctest
import math
import pickle
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed
from torch import multiprocessing as mp
from torchmetrics import MetricCollection

from eafo_dynamic.correction.bases import as_base
from eafo_dynamic.entropy import metric as metrics
from eafo_dynamic.entropy import resolution_entropy
from eafo_dynamic.entropy.metric import ActivationEntropy
from eafo_dynamic.errors import ConfigError

ACTIVATIONS = ("identity", "relu", "gelu", "tanh", "sigmoid", "hardtanh", "softshrink", "elu", "logsigmoid")
FLOOR = 0.5 * math.log(2 * math.pi * math.e * 0.01)


def outputs(name: str, shape: tuple[int, ...] = (20000,), seed: int = 0) -> Tensor:
    z = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()
    return as_base(name)(1.3 * z - 0.2)


def fed(*parts: Tensor, **options: object) -> ActivationEntropy:
    metric = ActivationEntropy(**options)
    for part in parts:
        metric.update(part)
    return metric


def assert_same_state(one: ActivationEntropy, other: ActivationEntropy) -> None:
    """Counts to the last one; positions inside the bins to the rounding of their float32 sums."""
    assert torch.equal(one.counts, other.counts)
    torch.testing.assert_close(one.offsets, other.offsets, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(one.compute(), other.compute(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_metric_is_the_entropy_of_everything_seen(name: str) -> None:
    a = outputs(name)
    metric = fed(*a.split(3000))
    assert metric.compute().dtype == torch.float32
    assert float(metric.compute()) == pytest.approx(float(resolution_entropy(a)), abs=1e-3)


@pytest.mark.parametrize("resolution", [0.05, 0.3])
def test_resolution_is_an_option(resolution: float) -> None:
    a = outputs("gelu")
    expected = float(resolution_entropy(a, resolution))
    assert float(fed(a, resolution=resolution).compute()) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_offsets_within_reach_do_not_matter(scale: float) -> None:
    a = outputs("relu")
    for shift in (0.0, 3.0, -8.0):
        found = float(fed(scale * (a + shift)).compute())
        assert found == pytest.approx(float(resolution_entropy(a)), abs=5e-3)


@pytest.mark.parametrize("scale", [1e-33, 1e-20, 1e-8, 1e8, 1e20, 1e37])
@pytest.mark.parametrize("name", ["identity", "relu", "gelu"])
def test_scale_does_not_matter_in_the_range_of_float32(name: str, scale: float) -> None:
    a = outputs(name)
    assert float(fed(scale * a).compute()) == pytest.approx(float(resolution_entropy(a)), abs=1e-3)


def test_channels_of_far_scales_have_their_own_entropies() -> None:
    a = outputs("gelu", (1000, 1))
    metric = fed(a * torch.tensor([1e-30, 1.0, 1e30]), num_channels=3)
    torch.testing.assert_close(metric.compute(), fed(a).compute().expand(3), rtol=0, atol=1e-3)


def test_smallest_and_largest_normal_numbers_are_told_apart() -> None:
    limits = torch.finfo(torch.float32)
    for magnitude in (limits.tiny, limits.max):
        pair = torch.tensor([magnitude, -magnitude])
        assert float(fed(pair).compute()) == pytest.approx(float(resolution_entropy(torch.tensor([1.0, -1.0]))))
    assert float(fed(torch.tensor([limits.tiny / 2, 0.0])).compute()) == pytest.approx(FLOOR, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=6), st.sampled_from(ACTIVATIONS))
def test_chunks_of_any_size_equal_one_pass(sizes: list[int], name: str) -> None:
    a = outputs(name, (sum(sizes) + 100,))
    assert_same_state(fed(*a.split([*sizes, 100])), fed(a))


def test_merged_metrics_equal_one_pass() -> None:
    a = outputs("gelu")
    parts = [fed(part) for part in a.split([12000, 7999, 1])]
    whole = parts[0]
    for part in parts[1:]:
        whole.merge_state(part)
    assert_same_state(whole, fed(a))


def _rank(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    metric = fed(outputs("relu").split([5000, 15000])[rank])
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_equal_one_pass(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    expected = fed(outputs("relu")).compute()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=0, atol=1e-6)


def test_channels_have_an_entropy_each() -> None:
    a = torch.stack([outputs(name, (40, 25), seed=1) for name in ("relu", "gelu", "tanh")], dim=1)
    metric = fed(a[:15], a[15:], num_channels=3)
    expected = torch.stack([fed(a[:, channel]).compute() for channel in range(3)])
    torch.testing.assert_close(metric.compute(), expected)
    last = fed(a.movedim(1, -1), num_channels=3, channel_dim=-1)
    torch.testing.assert_close(last.compute(), expected)


def test_degenerate_inputs_have_a_defined_entropy() -> None:
    assert float(fed(torch.zeros(50)).compute()) == pytest.approx(FLOOR, abs=1e-5)
    assert float(fed(torch.full((50,), 0.3)).compute()) == pytest.approx(FLOOR, abs=1e-5)
    assert float(fed(torch.tensor(7.0)).compute()) == pytest.approx(FLOOR, abs=1e-5)
    assert math.isnan(float(fed(torch.tensor([math.nan, math.inf])).compute()))
    assert math.isnan(float(fed(torch.empty(0, 3)).compute()))
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(float(ActivationEntropy().compute()))
    extreme = torch.tensor([3e38, -3e38, 1e-38, 0.0, -1e-30])
    assert fed(extreme).compute().isfinite()


def test_missing_values_do_not_count() -> None:
    a = outputs("gelu", (500,))
    holes = torch.cat([torch.tensor([math.nan, math.inf]), a, torch.tensor([-math.inf])])
    assert_same_state(fed(holes), fed(a))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_taken(dtype: torch.dtype) -> None:
    a = outputs("gelu").to(dtype)
    assert float(fed(a).compute()) == pytest.approx(float(resolution_entropy(a)), abs=2e-3)


def test_metric_behaves_as_one_of_torchmetrics() -> None:
    a = outputs("relu", (4, 500))
    metric = ActivationEntropy()
    batch = metric(a[0])
    assert float(batch) == pytest.approx(float(resolution_entropy(a[0])), abs=1e-3)
    metric(a[1])
    assert_same_state(metric, fed(a[:2]))
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()):
        twin.update(a[2])
        assert_same_state(twin, fed(a[:3]))
    metric.persistent(True)
    loaded = ActivationEntropy()
    loaded.load_state_dict(metric.state_dict())
    assert torch.equal(loaded.counts, metric.counts)
    assert torch.equal(loaded.offsets, metric.offsets)
    metric.reset()
    assert metric.counts.sum() == 0
    collection = MetricCollection({"entropy": ActivationEntropy(), "fine": ActivationEntropy(0.05)})
    collection.update(a)
    assert set(collection.compute()) == {"entropy", "fine"}


def test_update_leaves_no_graph_and_no_trace_in_the_input() -> None:
    a = outputs("gelu", (300,)).requires_grad_()
    given = a.detach().clone()
    metric = fed(a)
    assert torch.equal(a, given)
    assert not metric.compute().requires_grad


def test_example_of_the_docstring_runs() -> None:
    failed, tried = doctest.testmod(metrics)
    assert tried > 0
    assert failed == 0


def test_plot_draws_one_value_and_a_series() -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric = fed(outputs("relu"))
    for values in (None, [metric.compute(), metric.compute() + 0.1]):
        figure, axes = metric.plot(values)
        drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()])
        assert np.isclose(drawn, float(metric.compute())).any()
        pyplot.close(figure)


@pytest.mark.parametrize(
    ("options", "option"),
    [({"resolution": 0.0}, "resolution"), ({"resolution": 3.0}, "resolution"), ({"num_channels": 0}, "num_channels")],
)
def test_bad_options_are_refused(options: dict[str, object], option: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option}="):
        ActivationEntropy(**options)


def test_wrong_number_of_channels_is_refused() -> None:
    for shape in ((2, 4, 5), (6,)):
        with pytest.raises(ConfigError, match=r"^num_channels=3"):
            fed(torch.zeros(shape), num_channels=3)


@pytest.mark.parametrize("resolution", [0.1, 0.03, 0.01, 0.003])
@pytest.mark.parametrize("shift", [0.0, 1.0, 10.0])
def test_every_resolution_has_bins_that_are_fine_enough(resolution: float, shift: float) -> None:
    """Against the entropy of the samples themselves, also with a mean of ten standard deviations."""
    a = torch.from_numpy(np.random.default_rng(0).standard_normal(20000)).float() + shift
    expected = float(resolution_entropy(a, resolution))
    assert float(fed(a, resolution=resolution).compute()) == pytest.approx(expected, abs=5e-3)


def test_a_mean_too_many_standard_deviations_away_is_no_silent_error() -> None:
    a = outputs("gelu")
    with pytest.warns(UserWarning, match=r"ActivationEntropy: 100% of the outputs .* Subtract a constant"):
        fed(a + 1000).compute()
    fed(a + 1000 - 1000).compute()
    fed(torch.full((100,), 1000.0)).compute()  # a constant has no bin that is too wide


def test_positions_in_bins_keep_their_mean_beyond_two_to_the_24_samples() -> None:
    """float32 sums stop growing there, and the mean position would fall by a fifth here."""
    value = torch.full((1 << 20,), 1 + 0.999 / 64)
    metric = fed(value)
    before = float(metric.offsets.max()) / float(metric.counts.max())
    for _ in range(4):
        metric.merge_state(copy.deepcopy(metric))
    for _ in range(4):
        metric.update(value)
    assert int(metric.counts.max()) == 20 << 20
    after = float(metric.offsets.max()) / float(metric.counts.max())
    assert after == pytest.approx(before, rel=1e-6)


def test_chunks_and_merges_are_equal_to_the_last_bit() -> None:
    a = outputs("gelu")
    whole, parts = fed(a), fed(*a.split(37))
    assert torch.equal(whole.offsets, parts.offsets)
    assert torch.equal(whole.compute(), parts.compute())


def test_a_persistent_state_of_version_010_is_read() -> None:
    metric = fed(outputs("gelu"))
    metric.persistent(True)
    state = metric.state_dict()
    state["offsets"] = (state["offsets"].double() / 2**20).float()
    loaded = ActivationEntropy()
    loaded.load_state_dict(state)
    assert loaded.offsets.dtype == torch.int64
    loaded.update(torch.empty(0))
    assert float(loaded.compute()) == pytest.approx(float(metric.compute()), abs=1e-6)
    with pytest.raises(ConfigError, match=r"^resolution=0\.01: the saved state has"):
        ActivationEntropy(0.01).load_state_dict(state)
