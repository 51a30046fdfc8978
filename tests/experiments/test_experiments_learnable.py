"""Learnable activations that corrections are compared with: formulas, gradients, their group in the optimiser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from small_experiments import gpt
from torch import nn

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments import MLP, Classifier, TabularData, make_activation
from eafo_dynamic.experiments.compare.witness import weights_hash
from eafo_dynamic.experiments.learnable import own_parameters

LEARNABLE = ["gain_slope_gelu", "gain_slope_relu", "pade", "swish_beta", "xielu"]
Z = torch.linspace(-4, 4, 801, dtype=torch.float64)

# Lightning 2.6 with torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")


@pytest.mark.parametrize(
    "name, plain",
    [("gain_slope_gelu", nn.GELU()), ("gain_slope_relu", nn.ReLU()), ("swish_beta", nn.SiLU())],
)
def test_starts_as_the_plain_activation(name: str, plain: nn.Module) -> None:
    assert torch.allclose(make_activation(name)(Z.float()), plain(Z.float()), rtol=1e-6, atol=1e-7)


def test_pade_starts_near_a_leaky_relu() -> None:
    inside = Z[Z.abs() <= 3].float()
    distance = make_activation("pade")(inside) - nn.LeakyReLU(0.01)(inside)
    assert distance.abs().max() < 0.04


def test_pade_equals_its_formula() -> None:
    pade = make_activation("pade").double()
    a, b = pade.numerator, pade.denominator
    above = sum(a[power] * Z**power for power in range(6))
    below = 1 + sum((b[power - 1] * Z**power).abs() for power in range(1, 5))
    assert torch.allclose(pade(Z), above / below, rtol=1e-12, atol=1e-12)


def test_xielu_equals_its_formula() -> None:
    xielu = make_activation("xielu").double()
    up, down = Z.clamp(min=0), Z.clamp(max=0)
    expected = 0.8 * up.square() + 0.8 * (down.exp() - 1 - down) + 0.5 * Z
    assert torch.allclose(xielu(Z), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LEARNABLE)
def test_gradients_and_far_inputs(name: str) -> None:
    module = make_activation(name).double()
    z = torch.tensor([-2.3, -0.4, 0.7, 1.9], dtype=torch.float64, requires_grad=True)
    parameters = tuple(module.parameters())
    assert torch.autograd.gradcheck(lambda z, *_: module(z), (z, *parameters))
    far = torch.tensor([-300.0, 300.0], requires_grad=True)
    single = make_activation(name)
    single(far).sum().backward()
    assert far.grad is not None
    assert torch.isfinite(far.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in single.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", ["prelu", *LEARNABLE])
def test_learnable_arms_start_from_the_weights_of_the_plain_one(name: str) -> None:
    def network(activation: str) -> MLP:
        torch.manual_seed(3)
        return MLP(6, 2, hidden=[8, 8], activation=activation)

    assert weights_hash(network(name)) == weights_hash(network("relu"))
    torch.manual_seed(4)
    assert weights_hash(MLP(6, 2, hidden=[8, 8])) != weights_hash(network("relu"))


def test_swiglu_has_as_many_parameters() -> None:
    plain, gated = gpt("gelu", dim=96, heads=3), gpt("swiglu", dim=96, heads=3)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (plain, gated)]
    assert counts[1] == pytest.approx(counts[0], rel=0.005)
    assert gated(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 16, 256)


def test_own_parameters_get_a_group_of_their_own(tmp_path: Path) -> None:
    model = Classifier(
        MLP(13, 3, hidden=[8, 8], activation="prelu"), 3, lr=0.01, weight_decay=0.1, activation_lr_multiple=3.0
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, TabularData("wine"))
    others, own = trainer.optimizers[0].param_groups
    assert [len(others["params"]), len(own["params"])] == [6, 2]
    assert own["initial_lr"] == pytest.approx(0.03)
    assert [others["weight_decay"], own["weight_decay"]] == [0.1, 0.0]
    assert {id(each) for each in own["params"]} == {id(each) for _, each in own_parameters(model)}


def test_a_rate_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"activation_lr_multiple=0.*must be positive"):
        Classifier(MLP(4, 2), 2, activation_lr_multiple=0)


def test_gain_and_slope_of_an_unknown_base_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"activation='rleu'.*gelu.*relu"):
        make_activation("gain_slope_rleu")
