"""Free terms: eps and lift, an amplitude for each term of the correction, from wrapping to a merged model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eafo_dynamic import EAFOController, apply_from_checkpoint, merge, unwrap
from eafo_dynamic.apply.kept import CHECKPOINT_KEY
from eafo_dynamic.apply.manifest import manifest
from eafo_dynamic.policy import Entropy, Hybrid
from eafo_dynamic.policy.estimates import OutputEntropy


def network(activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), activation or nn.GELU(), nn.Linear(32, 1))


def attach(model: nn.Module, **options: Any) -> EAFOController:
    return EAFOController.attach(model, torch.zeros(2, 6), terms="free", **options)


def amplitudes(controller: EAFOController) -> tuple[float, float]:
    (eps,), (lift,) = controller.bank.of_term("eps"), controller.bank.of_term("lift")
    return float(eps.detach().mean()), float(lift.detach().mean())


def train(controller: EAFOController, steps: int, first: int = 1, lr: float = 3e-3) -> list[dict[str, Any]]:
    optimizer = torch.optim.Adam(controller.model.parameters(), lr=lr)
    rows: list[dict[str, Any]] = []
    for step in range(first, first + steps):
        x = torch.randn(128, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.mse_loss(controller.model(x), x.prod(1, keepdim=True)).backward()
        controller.before_optimizer_step(step - 1)
        optimizer.step()
        rows += controller.step(step)
    return rows


@pytest.mark.parametrize("base", [nn.GELU(), nn.ReLU(), nn.Tanh()], ids=str)
def test_a_free_site_starts_as_the_base_with_eps_alone(base: nn.Module) -> None:
    model = network(copy.deepcopy(base))
    x = torch.randn(50, 6)
    z = model[0](x)
    plain = model(x)
    controller = attach(model, eps_init=0.1)
    assert list(controller.amplitudes) == ["1.eafo_0_eps", "1.eafo_0_lift"]
    torch.testing.assert_close(model(x), model[2](base(z) + 0.1 * z * torch.exp(-0.5 * z * z)))
    for amplitude in controller.amplitudes.values():
        nn.init.zeros_(amplitude)
    assert torch.equal(model(x), plain), "zero amplitudes are the base, bit for bit"
    unwrap(model)
    assert torch.equal(model(x), plain) and not [key for key in model.state_dict() if "eafo" in key]


def test_learned_recovers_both_amplitudes_of_a_teacher() -> None:
    torch.manual_seed(1)
    model = network().requires_grad_(False)
    teacher = copy.deepcopy(model)
    controller = attach(model, eps_init=0.0, update_every_n_steps=20)
    optimizer = torch.optim.Adam(controller.amplitudes.values(), lr=3e-3)
    for step in range(1, 401):
        x = torch.randn(256, 6)
        z = teacher[0](x)
        mu, sigma = model[1].eafo_0_shape
        u = (z - mu) / sigma
        target = teacher[2](F.gelu(z) + sigma * (-0.12 * u + 0.2) * torch.exp(-u * u / 2))
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        controller.step(step)
    assert amplitudes(controller) == pytest.approx((-0.12, 0.2), abs=3e-3)


@pytest.mark.parametrize("name", ["eps", "lift"])
def test_logged_gradients_are_the_slopes_of_the_entropy(name: str) -> None:
    controller = attach(network(), policy="frozen", eps_init=0.1)
    functions = controller.bank.functions()
    samples = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0))

    def entropy(shift: float) -> float:
        moved = functions.amplitudes.clone()
        moved[functions.names.index(name)] += shift
        return float(OutputEntropy(replace(functions, amplitudes=moved).outputs(samples), 0.1).entropy)

    direction = functions.direction(name, samples)
    predicted = float(OutputEntropy(functions.outputs(samples), 0.1).gradient(direction))
    assert predicted == pytest.approx((entropy(1e-3) - entropy(-1e-3)) / 2e-3, rel=0.05)


def test_entropy_policy_moves_both_downhill() -> None:
    controller = attach(network(), policy=Entropy(0.02), update_every_n_steps=5, update_starting_at_step=5)
    before = amplitudes(controller)
    (row,) = train(controller, 5)
    for name, old in zip(("eps", "lift"), before, strict=True):
        gradient = row[f"d_entropy_d_{name}"]
        assert row[name] - old == pytest.approx(-0.02 * gradient / (1 + abs(gradient)), abs=1e-5)
        assert row[f"delta_{name}"] == pytest.approx(row[name] - old, abs=1e-6)
    assert all(not amplitude.requires_grad for amplitude in controller.amplitudes.values())


@pytest.mark.parametrize("per_channel", [False, True])
def test_hybrid_adds_the_entropy_gradients_to_both(per_channel: bool) -> None:
    """dH_r/d amplitude of the functions that the round has left, one share a channel."""
    controller = attach(network(), policy=Hybrid(0.3), update_every_n_steps=1, per_channel=per_channel)
    controller.model(torch.randn(128, 6))
    ((samples, *_),) = controller.bank.pending()["samples"][0]
    controller.step(1)
    controller.before_optimizer_step(1)
    functions = controller.bank.functions()
    entropy = OutputEntropy(functions.outputs(samples[None]), 0.1)
    gradients = [float(entropy.gradient(direction)) for direction in functions.directions(samples[None])]
    for gradient, amplitude in zip(gradients, controller.amplitudes.values(), strict=True):
        assert amplitude.grad is not None
        expected = torch.full_like(amplitude, 0.3 * gradient / amplitude.numel())
        torch.testing.assert_close(amplitude.grad, expected, rtol=1e-3, atol=1e-5)


def test_both_stay_in_the_trust_region_and_survive_a_broken_gradient() -> None:
    controller = attach(network(), update_every_n_steps=2, max_eps=0.05)
    rows = train(controller, 20, lr=1.0)
    assert max(abs(row[name]) for row in rows for name in ("eps", "lift")) <= 0.05 + 1e-7
    before = amplitudes(controller)
    with torch.no_grad():
        controller.bank.of_term("lift")[0].fill_(float("nan"))
    (row,) = controller.update(21)
    assert amplitudes(controller) == pytest.approx(before, abs=1e-6)
    assert "not finite" in str(row["event"])


def test_everything_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    controller = attach(network(), update_every_n_steps=5, per_channel=True)
    train(controller, 12)
    saved = {
        "state_dict": controller.model.state_dict(),
        CHECKPOINT_KEY: manifest(controller.report, **controller.options.form),
    }
    torch.save(saved, tmp_path / "last.ckpt")
    state = controller.state_dict()
    fresh = apply_from_checkpoint(network(), tmp_path / "last.ckpt")
    x = torch.randn(9, 6)
    assert torch.equal(fresh(x), controller.model.eval()(x))  # no sample is left in evaluation
    controller.model.train()
    assert list(state["terms"]) == ["eps", "lift"]
    resumed = attach(network(), update_every_n_steps=5, per_channel=True)
    resumed.model.load_state_dict(saved["state_dict"])
    resumed.load_state_dict(state)
    straight = train(controller, 10, first=13)
    again = train(resumed, 10, first=13)
    assert again == straight


@pytest.mark.parametrize("per_channel", [False, True])
def test_merged_models_carry_both(per_channel: bool) -> None:
    controller = attach(network(), update_every_n_steps=5, per_channel=per_channel)
    train(controller, 12)
    x = torch.randn(9, 6)
    expected: Tensor = controller.model(x)
    merged = merge(controller.model)
    assert torch.equal(merged(x), expected)
    assert {name for name, _ in merged.named_buffers()} == {"1.eps", "1.shape", "1.lift"}
    exported = torch.export.export(merged, (x,)).module()
    torch.testing.assert_close(exported(x), expected)


def test_a_lift_that_trains_alone_gets_its_gradient() -> None:
    model = attach(network(), eps_init=0.0).model
    model.requires_grad_(False)[1].eafo_0_lift.requires_grad_(True)
    model(torch.randn(9, 6)).sum().backward()
    assert model[1].eafo_0_lift.grad.abs() > 0


def test_a_lift_alone_is_no_zero_correction() -> None:
    controller = attach(network(), policy="frozen", eps_init=0.0)
    with torch.no_grad():
        controller.bank.of_term("lift")[0].fill_(0.25)
    x = torch.randn(9, 6)
    expected = controller.model(x)
    assert not torch.equal(expected, network()(x))
    assert torch.equal(merge(controller.model)(x), expected)
