"""All four terms from wrapping to the log: their entropy gradients, their bounds, and every policy and density."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eafo_dynamic import EAFOController, apply_from_checkpoint, merge, unwrap
from eafo_dynamic.apply.kept import CHECKPOINT_KEY
from eafo_dynamic.apply.manifest import manifest
from eafo_dynamic.correction.bases import as_base
from eafo_dynamic.correction.kernels import TERMS, round_kernel
from eafo_dynamic.correction.stacked import Functions
from eafo_dynamic.policy import Entropy, Hybrid
from eafo_dynamic.policy.estimates import OutputEntropy
from eafo_dynamic.policy.trust_region import TrustRegion, bounded_move, range_of

EVERY = tuple(TERMS)
MU, SIGMA = -0.3, 1.4
AT = {"all zero": (0.0, 0.0, 0.0, 0.0), "inside": (0.2, -0.1, 0.15, -0.2), "large": (-0.4, 0.3, -0.5, 0.5)}
BASES = ["gelu", "silu", "tanh", "leaky_relu", "softplus", "elu", "xielu"]


def normal(n: int = 20_001) -> Tensor:
    """Quantiles of z ~ N(-0.3, 1.4^2), float64, shape [1, n]."""
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return (MU + SIGMA * torch.special.ndtri(p)).unsqueeze(0)


def functions(base: str, amplitudes: tuple[float, ...], dtype: torch.dtype = torch.float64) -> Functions:
    return Functions(
        bases=[as_base(base)],
        amplitudes=torch.tensor(amplitudes, dtype=dtype).unsqueeze(1),
        shape=torch.tensor([[MU, SIGMA]], dtype=dtype),
        tables=torch.empty(0, 4, 1, dtype=dtype),
        tabulated=torch.empty(0, dtype=torch.long),
        names=EVERY,
    )


def written_out(base: str, amplitudes: np.ndarray, z: np.ndarray) -> np.ndarray:
    """f(z) in numpy, as the theory has it."""
    eps, lift, gain, slope = amplitudes
    u = (z - MU) / SIGMA
    plain = as_base(base)(torch.from_numpy(z)).numpy()
    return (1 + gain) * plain + slope * z + SIGMA * (eps * u + lift) * np.exp(-0.5 * u * u)


def entropy_of(base: str, amplitudes: np.ndarray, z: np.ndarray) -> float:
    return float(reference.plug_in_entropy(written_out(base, amplitudes, z)))


@pytest.mark.parametrize("at", AT.values(), ids=AT)
@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_a_twin_in_numpy(base: str, at: tuple[float, ...]) -> None:
    """dH_r/d amplitude by (1'), against central differences of another estimator of H_r, in float64."""
    z = normal(4001)
    given = functions(base, at)
    entropy = OutputEntropy(given.outputs(z), 0.1)
    for place, (name, direction) in enumerate(zip(EVERY, given.directions(z), strict=True)):
        step = np.zeros(4)
        step[place] = 2e-3
        above, below = (entropy_of(base, np.array(at) + sign * step, z[0].numpy()) for sign in (1, -1))
        expected = (above - below) / 4e-3
        found = float(entropy.gradient(direction))
        assert found == pytest.approx(expected, rel=0.02, abs=4e-3), name


@pytest.mark.parametrize("base", [*BASES, "relu", "squared_relu"])
@pytest.mark.parametrize("gain", [0.0, -0.5, 1.0])
def test_the_entropy_knows_no_scale(base: str, gain: float) -> None:
    """dH_r/d gain = 0 where the other three are 0, whatever the gain."""
    given, z = functions(base, (0.0, 0.0, gain, 0.0)), normal()
    assert abs(float(OutputEntropy(given.outputs(z), 0.1).gradient(given.direction("gain", z)))) < 2e-3
    compiled = replace(functions(base, (0.0, 0.0, gain, 0.0), torch.float32), kernel=round_kernel("auto"))
    outputs, directions = compiled.outputs_and_directions(z.float())
    entropy = OutputEntropy(outputs, 0.1, compiled.kernel)
    assert abs(float(entropy.gradient(directions[2]))) < 2e-3


@pytest.mark.parametrize("slope", [0.0, 0.7, -0.5])
def test_a_straight_line_stays_one(slope: float) -> None:
    """dH_r/d slope = 0 and dH_r/d gain = 0 for the identity."""
    given, z = functions("identity", (0.0, 0.0, 0.0, slope)), normal()
    entropy = OutputEntropy(given.outputs(z), 0.1)
    for name in ("gain", "slope"):
        assert abs(float(entropy.gradient(given.direction(name, z)))) < 1e-3


@pytest.mark.parametrize("names", [EVERY, ("gain", "slope"), ("eps", "gain"), ("lift", "slope")], ids="-".join)
@pytest.mark.parametrize("base", ["relu", "gelu", "tanh"])
def test_slopes_stay_within_the_bound(base: str, names: tuple[str, ...]) -> None:
    region = TrustRegion(max_eps=0.5, max_delta=1.0)
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    of_base = torch.func.vmap(torch.func.grad(as_base(base).fn))(z)
    bound = region.slope_bound(names, float(of_base.abs().max()))
    largest = 0.0
    for signs in torch.cartesian_prod(*[torch.tensor([-0.5, 0.5], dtype=torch.float64)] * len(names)):
        given = replace(functions(base, (0.0,) * 4), names=names, amplitudes=signs.view(-1, 1))
        change = (given.correction((z + 1e-6)[None]) - given.correction((z - 1e-6)[None]))[0] / 2e-6
        largest = max(largest, float(change.abs().max()))
    assert 0.6 * bound < largest <= bound * 1.001


def test_the_trust_region_measures_over_the_range_of_the_data() -> None:
    old = functions("relu", (0.0,) * 4)
    samples = torch.tensor([[-2.0, math.nan, 5.0, math.inf]], dtype=torch.float64)
    low, high = range_of(samples, old)
    assert low.item() == -2.0 and high.item() == 5.0
    new = replace(old, amplitudes=torch.tensor([[0.0], [0.0], [0.1], [0.0]], dtype=torch.float64))
    for bound, part in ((0.36, 1.0), (0.35, 0.5), (0.17, 0.25)):  # gain 0.1 of relu(5), in units of sigma = 1.4: 0.357
        taken, fraction = bounded_move(old, new, TrustRegion(1.0, bound), None, (low, high))
        assert fraction.item() == part
        assert taken.amplitude("gain").item() == pytest.approx(0.1 * part)
    nothing = range_of(torch.full((1, 3), math.nan, dtype=torch.float64), old)
    assert [each.item() for each in nothing] == pytest.approx([MU - 4 * SIGMA, MU + 4 * SIGMA])


def network(activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), activation or nn.GELU(), nn.Linear(32, 1))


def attach(model: nn.Module | None = None, **options: Any) -> EAFOController:
    given: dict[str, Any] = {"terms": "full", **options}
    return EAFOController.attach(network() if model is None else model, torch.zeros(2, 6), **given)


def values(controller: EAFOController) -> dict[str, float]:
    return {name: float(controller.bank.of_term(name)[0].detach().mean()) for name in controller.bank.terms}


def train(controller: EAFOController, steps: int, first: int = 1, lr: float = 3e-3) -> list[dict[str, Any]]:
    optimizer = torch.optim.Adam([p for p in controller.model.parameters() if p.requires_grad], lr=lr)
    rows: list[dict[str, Any]] = []
    for step in range(first, first + steps):
        x = torch.randn(128, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.mse_loss(controller.model(x), x.prod(1, keepdim=True)).backward()
        controller.before_optimizer_step(step - 1)
        optimizer.step()
        rows += controller.step(step)
    return rows


@pytest.mark.parametrize("terms", ["full", "tails", ["tied", "slope"], ["lift"]], ids=str)
@pytest.mark.parametrize("base", [nn.GELU(), nn.ReLU(), nn.PReLU()], ids=str)
def test_a_site_starts_as_the_base_with_eps_alone(base: nn.Module, terms: Any) -> None:
    model, x = network(copy.deepcopy(base)), torch.randn(50, 6)
    plain = model(x)
    controller = attach(model, eps_init=0.0, terms=terms)
    assert torch.equal(model(x), plain), "zero amplitudes are the base, bit for bit"
    unwrap(model)
    assert torch.equal(model(x), plain) and not [key for key in model.state_dict() if "eafo" in key]
    assert len(controller.bank.terms) == len(controller.options.resolved_terms)


def test_learned_recovers_all_amplitudes_of_a_teacher() -> None:
    torch.manual_seed(1)
    model = network().requires_grad_(False)
    teacher = copy.deepcopy(model)
    controller = attach(model, eps_init=0.0, update_every_n_steps=20, policy="static")
    optimizer = torch.optim.Adam(controller.amplitudes.values(), lr=1e-2)
    true = {"eps": -0.12, "lift": 0.2, "gain": 0.25, "slope": -0.1}
    for step in range(1, 601):
        if step == 400:
            optimizer.param_groups[0]["lr"] = 2e-3
        z = teacher[0](torch.randn(256, 6, generator=torch.Generator().manual_seed(step)))
        bump = (true["eps"] * z + true["lift"]) * torch.exp(-z * z / 2)
        target = (1 + true["gain"]) * F.gelu(z) + true["slope"] * z + bump
        optimizer.zero_grad()
        F.mse_loss(model[1](z), target).backward()
        optimizer.step()
        controller.step(step)
    assert values(controller) == pytest.approx(true, abs=0.01)


@pytest.mark.parametrize("policy", ["static", "learned", "entropy", "hybrid", "frozen"])
@pytest.mark.parametrize(
    ("terms", "density"),
    [("full", "gaussian"), ("tails", "gaussian"), ("tails", "histogram"), (["tied", "gain", "slope"], "histogram")],
    ids=str,
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_every_policy_and_density_logs_every_term(
    policy: str, terms: Any, density: str, per_channel: bool, tmp_path: Path
) -> None:
    controller = attach(
        terms=terms, density=density, policy=policy, update_every_n_steps=4, per_channel=per_channel, eps_init=0.02
    )
    before = values(controller)
    rows = train(controller, 9)
    names = controller.bank.terms
    columns = {f"{stem}{name}" for name in EVERY for stem in ("", "delta_", "d_entropy_d_")}
    for row in rows:
        assert {name for name in columns if name in row} == {
            f"{stem}{name}" for name in names for stem in ("", "delta_", "d_entropy_d_")
        }
        assert all(math.isfinite(row[name]) for name in columns if name in row)
        assert abs(row["entropy_predicted"] - row["entropy_after"]) < 0.05
    after = values(controller)
    moved = {name for name in names if after[name] != before[name]}
    assert moved == (set() if policy == "frozen" else set(names))
    assert list(controller.end_rows(10)[0]) == [
        "step", "epoch", "site",
        *(each for name in names for each in (name, f"delta_{name}")), "mu", "sigma", "policy",
    ]  # fmt: skip
    (shot,) = controller.snapshot()
    assert {name for name in EVERY if name in shot} == set(names)
    json.dumps(controller.about())


def test_entropy_policy_moves_all_downhill() -> None:
    controller = attach(policy=Entropy(0.02), update_every_n_steps=5, update_starting_at_step=5)
    before = values(controller)
    (row,) = train(controller, 5)
    for name, old in before.items():
        gradient = row[f"d_entropy_d_{name}"]
        assert row[name] - old == pytest.approx(-0.02 * gradient / (1 + abs(gradient)), abs=1e-5)
        assert row[f"delta_{name}"] == pytest.approx(row[name] - old, abs=1e-6)


def test_hybrid_adds_the_entropy_gradients_to_all() -> None:
    controller = attach(policy=Hybrid(0.3), update_every_n_steps=1)
    controller.model(torch.randn(128, 6))
    ((samples, *_),) = controller.bank.pending()["samples"][0]
    controller.step(1)
    controller.before_optimizer_step(1)
    given = controller.bank.functions()
    entropy = OutputEntropy(given.outputs(samples[None]), 0.1)
    for name, direction in zip(given.names, given.directions(samples[None]), strict=True):
        (amplitude,) = controller.bank.of_term(name)
        assert amplitude.grad is not None
        expected = torch.full_like(amplitude, 0.3 * float(entropy.gradient(direction)))
        torch.testing.assert_close(amplitude.grad, expected, rtol=1e-3, atol=1e-5)


def test_all_stay_in_the_trust_region_and_survive_a_broken_gradient() -> None:
    controller = attach(update_every_n_steps=2, max_eps=0.05)
    rows = train(controller, 20, lr=1.0)
    assert max(abs(row[name]) for row in rows for name in EVERY) <= 0.05 + 1e-7
    before = values(controller)
    with torch.no_grad():
        controller.bank.of_term("gain")[0].fill_(float("nan"))
    (row,) = controller.update(21)
    assert values(controller) == pytest.approx(before, abs=1e-6)
    assert "not finite" in str(row["event"])


@pytest.mark.parametrize("terms", ["full", "tails", ["tied", "gain"]], ids=str)
def test_everything_comes_back_from_a_checkpoint_and_merges(terms: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"update_every_n_steps": 5, "per_channel": True, "terms": terms}
    controller = attach(**options)
    train(controller, 12)
    saved = {
        "state_dict": controller.model.state_dict(),
        CHECKPOINT_KEY: manifest(controller.report, **controller.options.form),
    }
    torch.save(saved, tmp_path / "last.ckpt")
    state = copy.deepcopy(controller.state_dict())
    x = torch.randn(9, 6)
    fresh = apply_from_checkpoint(network(), tmp_path / "last.ckpt")
    assert torch.equal(fresh(x), controller.model.eval()(x))
    controller.model.train()
    resumed = attach(**options)
    resumed.model.load_state_dict(saved["state_dict"])
    resumed.load_state_dict(state)
    straight = train(controller, 10, first=13)
    assert train(resumed, 10, first=13) == straight
    expected = controller.model.eval()(x)
    merged = merge(controller.model)
    assert torch.equal(merged(x), expected)
    torch.testing.assert_close(torch.export.export(merged, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.script(merged)(x), expected)


def test_a_state_of_other_terms_is_refused() -> None:
    from eafo_dynamic.errors import SiteError

    state = attach(terms="tails").state_dict()
    with pytest.raises(SiteError, match="the terms gain, slope in place of eps, lift, gain, slope"):
        attach().load_state_dict(state)
