"""Bases: names, modules and callables that are one function are one base; traits are what the function does."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eafo_dynamic.correction.bases import (
    Base,
    Traits,
    activation_names,
    activation_types,
    as_base,
    derivatives,
    register_activation,
)
from eafo_dynamic.errors import ConfigError

POINTS = torch.linspace(-9.3, 9.1, 401, dtype=torch.float64)

# every pointwise activation of torch.nn, with hyper-parameters other than the default where it has any
MODULES: list[nn.Module] = [
    nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(0.7), nn.SELU(), nn.CELU(1.3), nn.GELU(),
    nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Hardtanh(-2.0, 0.5), nn.Hardsigmoid(),
    nn.Softplus(2.0, 5.0), nn.Softsign(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Softshrink(0.3),
    nn.Hardshrink(0.3), nn.Tanhshrink(), nn.Threshold(0.3, -1.0),
]  # fmt: skip

# affine, monotone, piecewise linear, gate, flat, from the functions' definitions
TRAITS = {
    "identity": "affine monotone piecewise_linear",
    "relu": "monotone piecewise_linear flat",
    "relu6": "monotone piecewise_linear flat",
    "leaky_relu": "monotone piecewise_linear",
    "prelu": "monotone piecewise_linear",
    "rrelu": "monotone piecewise_linear",
    "hardtanh": "monotone piecewise_linear flat",
    "hardsigmoid": "monotone piecewise_linear gate flat",
    "softshrink": "monotone piecewise_linear flat",
    "hardshrink": "monotone flat",
    "threshold": "monotone flat",
    "elu": "monotone",
    "celu": "monotone",
    "selu": "monotone",
    "softplus": "monotone",
    "softsign": "monotone",
    "tanh": "monotone",
    "tanhshrink": "monotone",
    "logsigmoid": "monotone",
    "sigmoid": "monotone gate",
    "normal_cdf": "monotone gate",
    "squared_relu": "monotone flat",
    "squared_leaky_relu": "",
    "swish_beta": "",
    "xielu": "",
    "hardswish": "flat",
    "gelu": "",
    "gelu_tanh": "",
    "quick_gelu": "",
    "silu": "",
    "mish": "",
}


def true_traits(traits: Traits) -> str:
    return " ".join(name for name, value in traits._asdict().items() if value)


def assert_same_function(base: Base, function: Callable[[Tensor], Tensor]) -> None:
    given = POINTS.clone()
    assert torch.equal(base(given), function(POINTS.clone()))
    assert torch.equal(given, POINTS), "the base wrote into its input"
    assert base(given).data_ptr() != given.data_ptr()


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_base_of_a_module_is_its_function(module: nn.Module) -> None:
    assert_same_function(as_base(module), module)


@pytest.mark.parametrize("module", [m for m in MODULES if hasattr(m, "inplace")], ids=repr)
def test_in_place_module_becomes_out_of_place(module: nn.Module) -> None:
    in_place = copy.deepcopy(module)
    in_place.inplace = True
    assert as_base(in_place) == as_base(module)
    assert_same_function(as_base(in_place), module)


def test_traits_are_what_the_functions_do() -> None:
    assert {name: true_traits(as_base(name).traits) for name in activation_names()} == TRAITS


def test_name_module_function_and_method_are_one_base() -> None:
    forms = [
        "leaky_relu", "LeakyReLU", "Leaky-ReLU", nn.LeakyReLU(), nn.LeakyReLU(0.01, inplace=True), F.leaky_relu,
        F.leaky_relu_, functools.partial(F.leaky_relu, negative_slope=0.01, inplace=True),
    ]  # fmt: skip
    assert len({as_base(form) for form in forms}) == 1
    relus = [nn.ReLU(), "relu", F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_]
    assert len({as_base(form) for form in relus}) == 1
    assert as_base("relu") != as_base("leaky_relu")
    assert as_base(as_base("gelu")) == as_base(nn.GELU())
    assert as_base("swish") == as_base(nn.SiLU()) == as_base(nn.SiLU)


def test_hyper_parameters_belong_to_the_identity() -> None:
    assert as_base(nn.LeakyReLU(0.01)) != as_base(nn.LeakyReLU(0.2))
    assert as_base(nn.LeakyReLU(0.2)) == as_base(functools.partial(F.leaky_relu, negative_slope=0.2))
    assert as_base(nn.GELU()) != as_base(nn.GELU("tanh"))
    assert str(as_base(nn.LeakyReLU())) == "leaky_relu"
    assert str(as_base(nn.LeakyReLU(0.2))) == "leaky_relu(negative_slope=0.2)"
    assert str(as_base(nn.GELU("tanh"))) == "gelu(approximate=tanh)"


def test_parametric_and_random_slopes_become_their_mean() -> None:
    prelu = nn.PReLU(3)
    with torch.no_grad():
        prelu.weight.copy_(torch.tensor([0.1, 0.2, 0.6]))
    mean = float(prelu.weight.detach().double().mean())
    assert_same_function(as_base(prelu), functools.partial(F.leaky_relu, negative_slope=mean))
    rrelu = nn.RReLU(0.1, 0.3)
    assert_same_function(as_base(rrelu), rrelu.eval())
    assert as_base(rrelu.train()) == as_base(rrelu.eval())


def test_bases_survive_pickling() -> None:
    base = as_base(nn.ELU(0.7))
    again = pickle.loads(pickle.dumps(base))
    assert again == base
    assert_same_function(again, base)


class Swallow(nn.Module):
    """A pointwise module that nobody registered."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(beta, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(self.beta * z)


class OwnReLU(nn.ReLU):
    """A subclass that computes something else than its parent."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class InPlace:
    """An in-place callable."""

    def __call__(self, z: Tensor) -> Tensor:
        return z.mul_(2).sin_()


def test_unregistered_functions_and_modules_are_bases() -> None:
    module = Swallow(1.7)
    assert_same_function(as_base(module), module)
    assert as_base(module) == as_base(Swallow(1.7))
    assert as_base(module) != as_base(Swallow(1.8))
    assert as_base(module).name == "Swallow"
    assert_same_function(as_base(OwnReLU()), OwnReLU())
    assert_same_function(as_base(InPlace()), lambda z: (2 * z).sin())
    assert as_base(torch.sin) == as_base(torch.sin)
    assert not as_base(torch.sin).traits.monotone


def test_a_base_keeps_the_hyper_parameters_of_its_moment() -> None:
    module = Swallow(1.0)
    base = as_base(module)
    with torch.no_grad():
        module.beta.fill_(5.0)
    assert_same_function(base, Swallow(1.0))
    assert_same_function(as_base(module), Swallow(5.0))


def test_registration_gives_a_name_and_a_type() -> None:
    @register_activation
    class Plover(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.tanh() + 0.1 * z

    assert Plover in activation_types()
    assert_same_function(as_base("plover"), Plover())

    def snipe(z: Tensor) -> Tensor:
        return z.atan()

    assert register_activation(snipe, name="snipe-bird") is snipe
    assert as_base("snipe_bird") == as_base(snipe)
    assert as_base("snipe_bird").traits.monotone


@pytest.mark.parametrize(
    "given", ["gleu", nn.Softmax(-1), nn.Softmax(0), nn.Softmax, nn.Threshold, nn.Linear(3, 3), 3, torch.sum]
)
def test_what_is_not_pointwise_is_refused(given: object) -> None:
    with pytest.raises(ConfigError) as caught:
        as_base(given)
    assert "\n" not in str(caught.value).strip()
    if given == "gleu":
        assert "gelu" in str(caught.value)


def test_registering_what_is_not_pointwise_is_refused() -> None:
    with pytest.raises(ConfigError, match="pointwise"):
        register_activation(functools.partial(torch.softmax, dim=-1), name="softmax")
    with pytest.raises(ConfigError, match="module class"):
        register_activation(3)


@pytest.mark.parametrize("name", activation_names())
def test_derivatives_agree_with_differences(name: str) -> None:
    base = as_base(name)
    z = POINTS + 0.00317  # beside every kink
    value, first, second = derivatives(base, z)
    step = 1e-4
    away = torch.ones_like(z, dtype=torch.bool)
    for kink in (-6, -3, -1, -0.5, 0, 0.1, 0.5, 1, 3, 6):
        away &= (z - kink).abs() > 2 * step
    difference = (base(z + step) - base(z - step)) / (2 * step)
    curvature = (base(z + step) - 2 * base(z) + base(z - step)) / step**2
    assert torch.equal(value, base(z))
    torch.testing.assert_close(first[away], difference[away], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second[away], curvature[away], rtol=1e-4, atol=2e-6)


def test_derivatives_work_without_gradients_and_leave_no_graph() -> None:
    with torch.no_grad():
        assert float(derivatives(as_base("relu"), torch.tensor([0.0])).first) == 0.0  # one-sided at the kink
    with torch.inference_mode():
        result = derivatives(as_base("gelu"), torch.linspace(-1, 1, 5))
    assert not any(part.requires_grad for part in result)
    assert float(derivatives(as_base("tanh"), torch.tensor([0.5]), order=1).second) == 0.0


def test_every_pointwise_activation_of_transformers_is_a_base() -> None:
    activations = pytest.importorskip("transformers.activations")
    for name in activations.ACT2FN:
        module = activations.ACT2FN[name]
        base = as_base(name)
        if name == "xielu":  # the module rounds its numbers to bfloat16
            rounded = F.softplus(module.alpha_p), module.beta + F.softplus(module.alpha_n)
            base = as_base("xielu(alpha_p={}, alpha_n={})".format(*(each.item() for each in rounded)))
        if not isinstance(module, nn.PReLU):
            z = POINTS.float()
            torch.testing.assert_close(base(z), module(z).detach(), rtol=1e-5, atol=1e-6)
        assert isinstance(base.traits, Traits)
    assert activations.ReLUSquaredActivation in activation_types()
    assert as_base("gelu_python") == as_base("gelu_python")
    assert as_base("gelu_10").traits.flat


def _numpy_xielu(z: np.ndarray) -> np.ndarray:
    below = 0.8 * (np.expm1(np.minimum(z, -1e-6)) - z) + 0.5 * z
    return np.where(z > 0, 0.8 * z * z + 0.5 * z, below)


FURTHER = {
    "squared_relu": lambda z: np.maximum(z, 0) ** 2,
    "squared_leaky_relu": lambda z: np.where(z > 0, z, 0.5 * z) ** 2,
    "squared_leaky_relu(negative_slope=0.1)": lambda z: np.where(z > 0, z, 0.1 * z) ** 2,
    "xielu": _numpy_xielu,
    "swish_beta": lambda z: z / (1 + np.exp(-z)),
    "swish_beta(beta=1.5)": lambda z: z / (1 + np.exp(-1.5 * z)),
}


@pytest.mark.parametrize("name", FURTHER)
def test_bases_that_torch_does_not_have(name: str) -> None:
    z = torch.linspace(-6, 6, 501, dtype=torch.float64)
    base = as_base(name)
    np.testing.assert_allclose(base(z).numpy(), FURTHER[name](z.numpy()), rtol=1e-12, atol=1e-12)
    value, first, second = derivatives(base, z)
    step = 1e-5
    away = z.abs() > 1e-3  # from the kink, where the slopes of the two sides differ
    np.testing.assert_allclose(first[away], ((base(z + step) - base(z - step)) / (2 * step))[away], atol=1e-6)
    assert torch.equal(value, base(z)) and second.isfinite().all()


def test_a_name_with_numbers_is_the_base_with_these_numbers() -> None:
    assert as_base("leaky_relu(negative_slope=0.2)") == as_base(nn.LeakyReLU(0.2))
    assert as_base("LeakyReLU(negative_slope=0.2)") == as_base("leaky_relu( negative_slope = 0.2 )")
    assert as_base("gelu(approximate='tanh')") == as_base(nn.GELU("tanh"))
    assert str(as_base("swish_beta(beta=1.5)")) == "swish_beta(beta=1.5)"
    assert as_base(str(as_base(nn.ELU(0.7)))) == as_base(nn.ELU(0.7))


@pytest.mark.parametrize(
    "name",
    [
        "leaky_relu(0.2)",
        "leaky_relu(slope=0.2)",
        "relu(alpha=1)",
        "leaky_relu(negative_slope='a')",
        "elu(alpha=)",
        "no(a=1)",
    ],
)
def test_a_name_with_numbers_that_it_does_not_have_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        as_base(name)
    assert "\n" not in str(error.value) and str(error.value).startswith("activation=")
