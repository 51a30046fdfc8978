"""The compiled functions for update rounds against torch's operations, scipy and closed forms."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor, nn

from eafo_dynamic.correction import correction_shape, tabulate
from eafo_dynamic.correction.bases import as_base
from eafo_dynamic.correction.kernels import (
    TERMS,
    RoundKernel,
    Workspace,
    compiled,
    known_pointwise,
    native,
    round_kernel,
    rounds,
)
from eafo_dynamic.correction.stacked import Functions
from eafo_dynamic.density import Gaussian
from eafo_dynamic.density.ranks import stack_samples
from eafo_dynamic.density.sample_moments import sample_moments
from eafo_dynamic.entropy import SmoothedOutput, mixed_entropy
from eafo_dynamic.policy import estimates
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.policy.estimates import OutputEntropy

BASES = ["relu", "gelu", "identity", "tanh", "hardtanh"]


@pytest.fixture(scope="module")
def kernel() -> RoundKernel:
    if native.native_kernel() is None:
        pytest.skip("no C compiler here")
    found = round_kernel("native")
    assert found is not None
    return found


def hostile(n: int = 1000) -> Tensor:
    """Sites of all scales; heavy tails, a constant, missing and infinite samples, one sample, none."""
    generator = torch.Generator().manual_seed(n)
    z = (
        torch.randn(12, n, generator=generator) * torch.logspace(-3, 3, 12)[:, None]
        + torch.linspace(-5, 9, 12)[:, None]
    )
    z[2] = torch.randn(n, generator=generator).exp() * 50
    z[3] = 2.5
    z[4] = math.nan
    z[5, : n // 3], z[5, n // 3], z[5, n // 3 + 1] = math.nan, math.inf, -math.inf
    z[6, 1:] = math.nan
    z[7] = z[7].round()
    return z


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("n", [2, 17, 1000, 4096])
@pytest.mark.parametrize("resolution", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("base", BASES)
def test_entropies_are_those_of_the_reference(kernel: RoundKernel, base: str, resolution: float, n: int) -> None:
    z = hostile(n)
    outputs, direction = as_base(base)(z), z.nan_to_num(0.0, 0.0, 0.0).clamp(-3, 3)
    found, wanted = OutputEntropy(outputs, resolution, kernel), SmoothedOutput(outputs.double(), resolution)
    assert_close(found.entropy, wanted.entropy, 1e-5)
    spread = wanted.std.nan_to_num()  # gradients are per unit of the output
    assert_close(found.gradient(direction) * spread, wanted.gradient(direction.double()) * spread, 3e-5)
    for mine, theirs in zip(found.mixed, mixed_entropy(outputs, resolution), strict=True):
        assert_close(mine, theirs, 1e-5)


def test_scores_and_information_are_those_of_the_reference(kernel: RoundKernel) -> None:
    outputs = as_base("gelu")(hostile())
    found, wanted = kernel.smooth(outputs, 0.1, score=True), SmoothedOutput(outputs, 0.1)
    assert found is not None and found.score is not None
    assert_close(found.column("fisher"), wanted.fisher)
    assert_close(found.score, (wanted.score * wanted.std.nan_to_num()[:, None]), 1e-4)
    known = outputs.isfinite()
    assert found.column("count").tolist() == known.sum(1).tolist()
    assert (found.score[~known] == 0).all()


def test_weighted_points_are_those_of_the_reference(kernel: RoundKernel) -> None:
    outputs = hostile(400)
    weight = torch.rand(outputs.shape, generator=torch.Generator().manual_seed(1)) * (outputs > 0)
    found = kernel.smooth(outputs, 0.1, weight, sampled=False, score=True)
    wanted = SmoothedOutput(outputs, 0.1, weight)
    assert found is not None and found.score is not None
    assert_close(found.column("entropy"), wanted.entropy)
    assert_close(found.column("std"), wanted.std)
    assert_close(found.score, wanted.score * wanted.std.nan_to_num()[:, None], 1e-4)


def test_a_gaussian_has_the_entropy_that_theory_says(kernel: RoundKernel) -> None:
    z = torch.special.ndtri((torch.arange(4096.0) + 0.5) / 4096)[None]
    found = kernel.smooth(z, 0.1, sampled=False, score=True)
    assert found is not None and found.score is not None
    assert float(found.column("entropy")) == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 1.01), abs=1e-3)
    middle = z.abs() < 2
    torch.testing.assert_close(found.score[middle], (-z / 1.01)[middle], rtol=0.0, atol=0.02)


def test_the_gradient_is_that_of_the_entropy(kernel: RoundKernel) -> None:
    z = torch.randn(3, 2048, generator=torch.Generator().manual_seed(5))
    outputs, direction, step = torch.tanh(z), z * torch.exp(-z * z), 2e-3
    up, down = (OutputEntropy(outputs + s * step * direction, 0.1, kernel).entropy.double() for s in (1, -1))
    found = OutputEntropy(outputs, 0.1, kernel).gradient(direction)
    torch.testing.assert_close(found.double(), (up - down) / (2 * step), rtol=0.0, atol=2e-3)


def test_numbers_too_far_apart_are_left_to_the_reference(kernel: RoundKernel) -> None:
    outputs = torch.tensor([[3e38, -3e38, 0.0, 1e38], [0.0, 3e-44, 1e-44, 0.0]])
    assert kernel.smooth(outputs, 0.1) is None
    assert_close(OutputEntropy(outputs, 0.1, kernel).entropy, SmoothedOutput(outputs, 0.1).entropy, 0.0)
    assert_close(OutputEntropy(outputs, 0.1, kernel).mixed.atom_mass, mixed_entropy(outputs).atom_mass, 0.0)
    wide = outputs.double()
    assert OutputEntropy(wide, 0.1, kernel).entropy.dtype == torch.float64


@pytest.mark.parametrize("n", [1, 2, 15, 1000])
def test_moments_are_scipys(kernel: RoundKernel, n: int) -> None:
    z = hostile(max(n, 3))[:, :n].contiguous()
    found = estimates.moments_of_sites(z, kernel)
    for mine, theirs in zip(found, sample_moments(z), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)
    row = z[0].double().numpy()
    assert found.mean[0].item() == pytest.approx(row.mean(), abs=1e-12)
    assert found.std[0].item() == pytest.approx(row.std(), abs=1e-12)
    if n > 2:
        assert found.skew[0].item() == pytest.approx(scipy_stats.skew(row), abs=1e-6)
        assert found.kurtosis[0].item() == pytest.approx(scipy_stats.kurtosis(row), abs=1e-6)


def test_dead_units_are_counted(kernel: RoundKernel) -> None:
    z = torch.tensor([[-1.0, -2.0, 0.5, 0.0, math.nan, -0.1], [math.nan] * 6, [-1.0, 3.0, -1.0, 3.0, 3.0, -1.0]])
    units = torch.tensor([[0.0, 0, 1, 2, math.nan, 2], [math.nan] * 6, [900.0, 7, 900, 7, 7, 7]])
    found = estimates.dead_fractions_of_sites(z, units, kernel, per_unit=1)
    assert_close(found, torch.tensor([2 / 3, math.nan, 1 / 2]), 1e-7)
    assert estimates.dead_fractions_of_sites(z, units, kernel, per_unit=2).isnan().tolist() == [True, True, False]
    far = units * 100_000  # too many to mark them one by one
    assert kernel.dead_fractions(z, far, 1) is None
    assert_close(estimates.dead_fractions_of_sites(z, far, kernel, per_unit=1), found, 1e-7)


def test_units_that_sites_share_are_read_where_they_are(kernel: RoundKernel) -> None:
    torch.manual_seed(0)
    z, row = torch.randn(3, 40) - 1.5, torch.arange(40.0) % 20
    shared = stack_samples([row, row, row], 40)
    assert shared.untyped_storage().data_ptr() == row.untyped_storage().data_ptr()
    found = estimates.dead_fractions_of_sites(z, shared, kernel, per_unit=1)
    fired = torch.stack([z[:, row == unit].gt(0).any(1) for unit in range(20)]).float().mean(0)
    assert fired.min() > 0 and fired.max() < 1
    assert_close(found, 1 - fired, 1e-6)
    assert_close(estimates.dead_fractions_of_sites(z, shared, None, per_unit=1), found, 1e-6)


def functions_of(kernel: RoundKernel | None, all_tabulated: bool = False) -> Functions:
    bases = [as_base(name) for name in ("relu", "gelu", "tanh", "relu")]
    tables = [tabulate(correction_shape(base, Gaussian(torch.zeros(1), torch.ones(1)), "score"))[0] for base in bases]
    tabulated = [0, 1, 2, 3] if all_tabulated else [1, 2]
    return Functions(
        bases=bases,
        amplitudes=torch.tensor([[0.1, -0.2, 0.3, 0.0]]),
        shape=torch.tensor([[0.0, 1.0], [-0.5, 2.0], [3.0, 0.1], [0.2, 0.7]]),
        tables=torch.stack([tables[row] for row in tabulated]).float(),
        tabulated=torch.tensor(tabulated),
        kernel=kernel,
    )


@pytest.mark.parametrize("all_tabulated", [False, True])
def test_functions_are_those_of_the_reference(kernel: RoundKernel, all_tabulated: bool) -> None:
    u = torch.linspace(-15, 15, 1001)
    mine, theirs = functions_of(kernel, all_tabulated), functions_of(None, all_tabulated)
    z = mine.shape[:, :1] + mine.shape[:, 1:] * u
    z[0, 3], z[1, 4], z[2, 5] = math.inf, -math.inf, 1e30
    assert_close(mine.direction("eps", z), theirs.direction("eps", z))
    assert_close(mine.correction(z), theirs.correction(z))
    assert_close(mine.outputs(z), theirs.outputs(z))
    assert torch.equal(mine.outputs(z)[3], torch.relu(z[3])), "eps = 0 is the base bit for bit"


INSIDE = ["relu", nn.LeakyReLU(0.3), nn.PReLU(init=-0.2), "gelu", nn.GELU("tanh"), "silu"]


@pytest.mark.parametrize(
    "names", [("eps",), ("eps", "lift"), ("gain", "slope"), tuple(TERMS), ("lift", "gain")], ids=str
)
def test_bases_that_are_compiled_with_it_are_those_of_torch(kernel: RoundKernel, names: tuple[str, ...]) -> None:
    bases = [as_base(each) for each in [*INSIDE, "softplus", "elu"]]
    count, generator = len(bases), torch.Generator().manual_seed(0)
    theirs = Functions(
        bases=bases,
        amplitudes=torch.stack([torch.linspace(-0.5, 0.5, count).roll(k) for k in range(len(names))]),
        names=names,
        shape=torch.stack([torch.linspace(-1, 1, count), torch.linspace(0.5, 2, count)], dim=1),
        tables=torch.empty(0, 4, 1),
        tabulated=torch.empty(0, dtype=torch.long),
    )
    z = 3 * torch.randn(count, 777, generator=generator)
    z[:, 0], z[:, 1] = math.nan, 0.0
    mine = replace(theirs, kernel=kernel)
    outputs, directions = mine.outputs_and_directions(z)
    assert_close(outputs, theirs.outputs(z))
    assert torch.equal(outputs.nan_to_num(), mine.outputs(z).nan_to_num())
    assert len(directions) == len(names)
    for found, wanted in zip(directions, theirs.directions(z), strict=True):
        assert_close(found[:, 1:], wanted[:, 1:])  # no direction is asked for where there is no sample
    for row in range(count):  # alone, as together
        at = slice(row, row + 1)
        one = {"bases": bases[at], "amplitudes": mine.amplitudes[:, at], "shape": mine.shape[at]}
        alone = replace(mine, **one).outputs(z[row : row + 1])
        torch.testing.assert_close(alone[0], outputs[row], rtol=1e-6, atol=1e-7, equal_nan=True)


def test_a_base_is_known_by_what_it_calls_not_by_its_name() -> None:
    codes = [known_pointwise(as_base(each).fn) for each in INSIDE]
    assert [each and each.code for each in codes] == [1, 1, 1, 3, 4, 2]
    assert [each and round(each.below, 6) for each in codes[:3]] == [0.0, 0.3, -0.2]

    def relu(z: Tensor) -> Tensor:
        return z.clamp(min=-1)

    class Unhashable:
        __hash__ = None  # pyright: ignore[reportAssignmentType]

        def __call__(self, z: Tensor) -> Tensor:
            return z.relu()

    assert known_pointwise(relu) is None and known_pointwise(Unhashable()) is None
    assert known_pointwise(functools.partial(torch.nn.functional.leaky_relu, negative_slope=0.5)) is not None
    assert known_pointwise(functools.partial(torch.clamp, min=0.0)) is None


@pytest.mark.parametrize("names", [["relu", "gelu"], ["softplus", "softplus"], ["relu", "softplus"]], ids="-".join)
def test_room_of_an_earlier_round_changes_nothing(kernel: RoundKernel, names: list[str]) -> None:
    workspace, generator = Workspace(), torch.Generator().manual_seed(1)
    functions = Functions(
        bases=[as_base(name) for name in names],
        amplitudes=torch.tensor([[0.2, -0.3], [0.1, 0.2], [0.05, -0.1], [0.2, 0.1]]),
        names=tuple(TERMS),
        shape=torch.tensor([[0.1, 1.2], [-0.4, 0.8]]),
        tables=torch.empty(0, 4, 1),
        tabulated=torch.empty(0, dtype=torch.long),
        kernel=kernel,
    )
    for inference in (True, False, False):  # what is kept from inference mode can be written outside of it
        z = torch.randn(2, 600, generator=generator)
        z[1, :7] = math.nan
        with torch.inference_mode(inference):
            mine, fresh = functions.outputs_and_directions(z, workspace), functions.outputs_and_directions(z)
            for found, wanted in zip((mine[0], *mine[1]), (fresh[0], *fresh[1]), strict=True):
                assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
            kept = OutputEntropy(mine[0], 0.1, kernel, workspace)
            new = OutputEntropy(fresh[0], 0.1, kernel)
            for a, b in zip(map(kept.gradient, mine[1]), map(new.gradient, fresh[1]), strict=True):
                assert torch.equal(a, b)
            after = functions.outputs(z * 0.5, workspace, "first")
            assert torch.equal(kept.change(after), new.change(functions.outputs(z * 0.5)))
            assert all(torch.equal(a, b) for a, b in zip(kept.mixed, new.mixed, strict=True))


def test_a_workspace_gives_the_same_room_until_the_shape_changes() -> None:
    workspace, z = Workspace(), torch.randn(3, 5)
    room = workspace.like(z, "score")
    assert room.shape == z.shape and workspace.like(z + 1, "score") is room
    assert workspace.like(z, "outputs") is not room
    assert workspace.like(z[:, :4], "score").shape == (3, 4)
    assert workspace.like(z.double(), "score").dtype == torch.float64
    assert not vars(pickle.loads(pickle.dumps(workspace)))["_kept"], "nothing of it goes into a file or a copy"


def test_lifts_are_those_of_the_reference(kernel: RoundKernel) -> None:
    theirs = functions_of(None)
    theirs = replace(theirs, tables=torch.empty(0, 4, 1), tabulated=torch.empty(0, dtype=torch.long))
    both = torch.stack([theirs.amplitudes[0], torch.tensor([0.2, -0.1, 0.0, 0.3])])
    theirs = replace(theirs, amplitudes=both, names=("eps", "lift"))
    mine, z = replace(theirs, kernel=kernel), hostile()[8:]
    for found, wanted in zip(mine.directions(z), theirs.directions(z), strict=True):
        assert_close(found, wanted)
    assert_close(mine.outputs(z), theirs.outputs(z))


def test_rounds_do_not_depend_on_threads_or_on_where_samples_lie(kernel: RoundKernel) -> None:
    z, threads = hostile(4096), torch.get_num_threads()
    room = torch.empty(z.numel() + 16)
    found: list[np.ndarray] = []
    try:
        for shift, count in ((0, 1), (1, 2), (5, 3)):
            torch.set_num_threads(count)
            moved = room[shift : shift + z.numel()].view_as(z).copy_(z)
            smoothed = kernel.smooth(moved, 0.1, score=True)
            assert smoothed is not None and smoothed.score is not None
            gradient = kernel.gradient(moved, smoothed, moved, 0.1)
            parts = (smoothed.found, smoothed.score, gradient, kernel.moments(moved))
            found.append(np.concatenate([part.double().flatten().numpy() for part in parts]))
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(found[0], each, equal_nan=True) for each in found[1:])


@pytest.mark.parametrize("options", [{}, {"terms": "free"}, {"density": "histogram"}])
def test_both_back_ends_write_the_same_log(kernel: RoundKernel, options: dict[str, object]) -> None:
    logs: list[list[dict[str, object]]] = []
    for backend in ("native", "eager"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh())
        controller = EAFOController.attach(model, backend=backend, policy="entropy", **options)
        for step in (1, 2, 3):
            for scale, site in enumerate(controller.sites, 1):
                z = scale * torch.randn(128, 8) + 0.3
                z[0, 0] = math.nan
                site.collector.observe(z)
            controller.update(step)
        logs.append(list(controller.records))
    for mine, theirs in zip(*logs, strict=True):
        assert mine.keys() == theirs.keys()
        for column, wanted in theirs.items():
            found = mine[column]
            if isinstance(wanted, float):
                assert isinstance(found, float) and found == pytest.approx(wanted, rel=1e-4, abs=1e-4, nan_ok=True)
            else:
                assert found == wanted, column


def test_a_copy_of_a_kernel_is_the_kernel_of_the_process_that_has_it(kernel: RoundKernel) -> None:
    assert copy.deepcopy(kernel) is kernel and pickle.loads(pickle.dumps(kernel)) is kernel


@pytest.mark.parametrize(
    "harm", [("* 0.693147180559945309", "* 0.7"), ("0.75 * m[0]", "0.7 * m[0]"), ("|= x[i] > 0.0f", "|= x[i] > 2.0f")]
)
def test_rounds_with_wrong_results_are_not_used(
    harm: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if (compiler := compiled.find_compiler()) is None:
        pytest.skip("no C compiler here")
    for path in compiled._SOURCES.glob("*.[ch]"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8").replace(*harm), encoding="utf-8")
    monkeypatch.setattr(compiled, "_SOURCES", tmp_path)
    library = compiled.load_library(compiler, tmp_path)
    assert not RoundKernel(library).is_sound()
    monkeypatch.setattr(compiled, "shared_library", lambda: library)
    with pytest.warns(UserWarning, match="update rounds on the CPU.* gives wrong results"):
        assert rounds.compiled_rounds.__wrapped__() is None


@pytest.mark.parametrize("name", ["gelu", "silu", "tanh", "relu"])
def test_shapes_by_the_score_route_are_those_of_the_reference(kernel: RoundKernel, name: str) -> None:
    density = Gaussian(torch.tensor([0.3, -2.0, math.nan, 0.0]), torch.tensor([1.0, 3.0, math.nan, 0.0]))
    mine = correction_shape(name, density, "score", kernel=kernel)
    theirs = correction_shape(name, density, "score")
    assert_close(mine.gain, theirs.gain, 1e-5)
    assert_close(tabulate(mine), tabulate(theirs), 1e-5)


def test_the_change_of_outputs_is_the_gradient_along_it(kernel: RoundKernel) -> None:
    outputs = torch.tanh(hostile()[5:])
    others = outputs + 0.01 * outputs.square()
    found = OutputEntropy(outputs, 0.1, kernel)
    assert_close(found.change(others), found.gradient(others - outputs), 1e-5)
    assert_close(found.change(others), OutputEntropy(outputs, 0.1).change(others), 1e-4)
