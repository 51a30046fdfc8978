"""One amplitude per channel: shares of the entropy gradient, and bounds that hold for every channel."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import reference
import torch
from torch import Tensor, nn

from eafo_dynamic.correction.bases import as_base
from eafo_dynamic.correction.kernels import TERMS
from eafo_dynamic.correction.stacked import Functions
from eafo_dynamic.policy import Entropy, Hybrid, Policy
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.policy.trust_region import TrustRegion, bounded_move

CHANNELS = 8


def attach(policy: str | Policy, channels: int = CHANNELS, **options: object) -> EAFOController:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, channels), nn.GELU(), nn.Linear(channels, 1))
    return EAFOController.attach(
        model, torch.randn(2, 4), policy=policy, update_every_n_steps=1, per_channel=True, **options
    )


def round_of(controller: EAFOController, scale: float = 2.0, shift: float = 0.5) -> Tensor:
    """One round without an optimiser's step.

    Returns:
        The pre-activations of its batch, shape [batch, channels].
    """
    x = scale * torch.randn(1024, 4) + shift
    controller.model(x)
    controller.step(max(1, controller.pace.last + 1))
    return controller.model[0](x).detach()


def corrected(z: Tensor, mu: float, sigma: float, eps: float, lift: float) -> Tensor:
    """GELU with free terms, as the guide writes it, in float64."""
    u = (z.double() - mu) / sigma
    return torch.nn.functional.gelu(z.double()) + sigma * (eps * u + lift) * torch.exp(-0.5 * u.square())


def entropy_of(z: Tensor, mu: float, sigma: float, eps: float, lift: float) -> float:
    return reference.plug_in_entropy(corrected(z, mu, sigma, eps, lift).flatten().numpy())


@pytest.mark.parametrize("term", [0, 1])
def test_hybrid_gives_each_channel_its_share_of_the_gradient_for_the_function_in_use(term: int) -> None:
    """All shares together are dH_r/d(common amplitude), by central differences of a float64 twin after the move."""
    controller = attach(Hybrid(1.0), samples_per_site=1024 * CHANNELS)
    z = round_of(controller)
    controller.before_optimizer_step(1)
    gradient = list(controller.amplitudes.values())[term].grad
    assert gradient is not None and gradient.shape == (CHANNELS,)
    assert torch.equal(gradient, gradient[:1].expand(CHANNELS))
    mu, sigma = controller.bank.functions().shape[0].tolist()
    amplitudes = torch.stack([amplitude.detach().mean() for amplitude in controller.amplitudes.values()])
    step = torch.zeros(2)
    step[term] = 5e-3
    above = entropy_of(z, mu, sigma, *(amplitudes + step).tolist())
    below = entropy_of(z, mu, sigma, *(amplitudes - step).tolist())
    assert float(gradient.sum()) == pytest.approx((above - below) / 1e-2, rel=0.02, abs=0.005)


def opposed(channels: int, size: float) -> Tensor:
    """Amplitudes whose mean is 0."""
    return size * torch.tensor([1.0, -1.0]).repeat(channels // 2)


@pytest.mark.parametrize("policy", ["learned", "entropy"])
def test_no_channel_jumps_further_than_max_delta(policy: str) -> None:
    """The mean amplitude is 0, so that the mean function never moves while those of the channels do."""
    controller = attach(policy, max_delta=0.1, max_eps=2.0, momentum=1.0)
    eps, lift = controller.amplitudes.values()
    round_of(controller)
    with torch.no_grad():
        eps.copy_(opposed(CHANNELS, 1.5))
        lift.copy_(opposed(CHANNELS, 1.5))
    activation = controller.model[1]
    mu, sigma = controller.bank.functions().shape[0].tolist()
    z = torch.linspace(mu - 9 * sigma, mu + 30 * sigma, 4001).unsqueeze(-1).expand(-1, CHANNELS)
    controller.model.eval()
    with torch.no_grad():
        old = activation(z)
        controller.model.train()
        round_of(controller, scale=2.0, shift=4.0)
        controller.model.eval()
        new = activation(z)
    larger = max(sigma, controller.bank.functions().shape[0, 1].item())
    assert float((new - old).abs().max()) / larger <= 0.1 * 1.001
    assert controller.records[-1]["event"] in ("bounded", "held")


def functions(amplitudes: list[float], names: tuple[str, ...], mu: float, sigma: float) -> Functions:
    return Functions(
        bases=[as_base("relu")],
        amplitudes=torch.tensor(amplitudes, dtype=torch.float64).unsqueeze(1),
        shape=torch.tensor([[mu, sigma]], dtype=torch.float64),
        tables=torch.empty(0, 4, 1, dtype=torch.float64),
        tabulated=torch.empty(0, dtype=torch.long),
        names=names,
    )


@pytest.mark.parametrize("names", [("eps",), ("eps", "lift"), ("gain", "slope"), tuple(TERMS)], ids="-".join)
@pytest.mark.parametrize("bound", [0.02, 0.1, 0.5])
def test_the_bound_of_channels_against_brute_force(names: tuple[str, ...], bound: float) -> None:
    """The part that is taken is the largest tried one with which no channel moves too far."""
    generator = torch.Generator().manual_seed(1)
    count, tails = len(names), "slope" in names
    of_channels = 2 * torch.rand(count, 1, 5, generator=generator, dtype=torch.float64) - 1
    means = of_channels.mean(-1)[:, 0].tolist()
    moves = [0.3, -0.2, 0.1, -0.05][:count]
    old = functions(means, names, 0.0, 1.0)
    new = functions([mean + move for mean, move in zip(means, moves, strict=True)], names, 0.4, 1.3)
    span = torch.tensor([[-2.5]], dtype=torch.float64), torch.tensor([[3.0]], dtype=torch.float64)
    _, taken = bounded_move(old, new, TrustRegion(1.0, bound), of_channels, span if tails else None)
    z = torch.linspace(-2.5 if tails else -20, 3.0 if tails else 20, 20001, dtype=torch.float64)

    def furthest(part: float) -> float:
        between = old.towards(new, torch.full((1,), part, dtype=torch.float64))
        found = 0.0
        for channel in range(5):
            own = of_channels[:, :, channel]
            moved = replace(between, amplitudes=(own + between.amplitudes - old.amplitudes).clamp(-1, 1))
            change = moved.correction(z[None]) - replace(old, amplitudes=own).correction(z[None])
            found = max(found, float(change.abs().max()) / max(between.sigma.item(), old.sigma.item()))
        return found

    expected = next((part for part in (1.0, 0.5, 0.25, 0.125, 0.0625) if furthest(part) <= bound), 0.0)
    assert taken.tolist() == [expected]


@pytest.mark.parametrize("ascent", [False, True])
def test_entropy_keeps_every_channel_within_max_eps_at_once(ascent: bool) -> None:
    controller = attach(Entropy(0.2, ascent=ascent), max_eps=0.3, max_delta=math.inf)
    eps, lift = controller.amplitudes.values()
    spread = torch.linspace(-0.3, 0.3, CHANNELS)
    with torch.no_grad():
        eps.copy_(spread)
        lift.copy_(spread)
    round_of(controller)
    assert float(eps.abs().max()) <= 0.3 + 1e-6
    assert float(lift.abs().max()) <= 0.3 + 1e-6
    assert not torch.equal(eps, spread)
    row = controller.records[-1]
    assert row["eps"] == pytest.approx(float(eps.mean()), abs=1e-7), "the log has what the model has"
    assert row["lift"] == pytest.approx(float(lift.mean()), abs=1e-7)


def test_a_channel_that_is_not_finite_becomes_the_mean_before_and_the_others_stay() -> None:
    controller = attach("learned", max_delta=math.inf)
    round_of(controller)
    eps, _ = controller.amplitudes.values()
    mean = float(eps.detach().mean())
    with torch.no_grad():
        eps[3] = math.nan
    round_of(controller)
    assert eps.isfinite().all()
    assert float(eps.detach()[3]) == pytest.approx(mean)
