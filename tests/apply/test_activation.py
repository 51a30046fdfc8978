"""Corrected activations as modules: the paper's function, the base's bits, what they show and keep."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from torch import Tensor, nn

from eafo_dynamic import CorrectedActivation, CRReLU
from eafo_dynamic.apply.site import describe_state
from eafo_dynamic.apply.surgery import wrap
from eafo_dynamic.correction.bases import activation_types
from eafo_dynamic.correction.kernels import resolve_backend
from eafo_dynamic.density import Gaussian

BASES = [cls for cls in activation_types() if inspect.getmodule(cls).__name__.startswith("torch.nn")]  # pyright: ignore
NEEDS: dict[type[nn.Module], tuple[float, ...]] = {nn.Threshold: (0.1, 0.0)}


def make(cls: type[nn.Module]) -> nn.Module:
    return cls(*NEEDS.get(cls, ()))


def points(requires_grad: bool = True) -> Tensor:
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4])
    z = torch.cat([special, 4 * torch.randn(994, generator=torch.Generator().manual_seed(0))])
    return z.requires_grad_(requires_grad)


def assert_same_bits(one: Tensor, two: Tensor) -> None:
    assert torch.equal(one.view(torch.int32), two.view(torch.int32))


def test_crrelu_is_the_papers_function_in_value_and_gradient() -> None:
    x, twin = points(), points()
    activation = CRReLU(0.13)
    eps = torch.tensor(0.13, requires_grad=True)
    paper = torch.relu(twin) + eps * twin * torch.exp(-(twin**2) / 2)
    ours = activation(x)
    torch.testing.assert_close(ours, paper, rtol=1e-6, atol=1e-7)
    weight = torch.linspace(-1, 2, x.numel())
    (paper * weight).sum().backward()
    (ours * weight).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(activation.eps.grad, eps.grad, rtol=1e-5, atol=1e-5)


def test_crrelu_starts_where_the_paper_starts() -> None:
    assert CRReLU().eps.item() == pytest.approx(0.01)


@pytest.mark.parametrize("cls", BASES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_eps_zero_is_every_base_bit_for_bit(cls: type[nn.Module], training: bool) -> None:
    plain, wrapped = make(cls).train(training), nn.Sequential(make(cls)).train(training)
    if wrap_is_pointless(plain):
        pytest.skip("affine: never wrapped")
    wrap(wrapped, select_all(wrapped), eps_init=0.0)
    z, twin = points(), points()
    torch.manual_seed(0)
    expected = plain(z)
    torch.manual_seed(0)
    actual = wrapped(twin)
    assert_same_bits(actual, expected)
    expected.sum().backward()
    actual.sum().backward()
    assert z.grad is not None and twin.grad is not None
    assert_same_bits(twin.grad, z.grad)


def wrap_is_pointless(module: nn.Module) -> bool:
    from eafo_dynamic.correction.bases import as_base

    return as_base(module).traits.affine


def select_all(model: nn.Module) -> object:
    from eafo_dynamic.find.sites import Selection, find_sites

    return find_sites(model, selection=Selection(target_modules=".*"))


@pytest.mark.parametrize("cls", [nn.ReLU, nn.SiLU, nn.ELU, nn.Hardswish])
def test_an_in_place_base_still_overwrites_its_input(cls: type[nn.Module]) -> None:
    model = nn.Sequential(cls(inplace=True))  # pyright: ignore[reportCallIssue]
    wrap(model, eps_init=0.2)
    z = torch.randn(100)
    kept = z.clone()
    out = model(z)
    assert out is z
    torch.testing.assert_close(out, CorrectedActivation(cls(), eps=0.2)(kept))


def test_an_in_place_base_gives_the_gradients_of_its_twin() -> None:
    one, two = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True)), nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    two.load_state_dict(one.state_dict())
    x = torch.randn(16, 4)
    for model in (one, two):
        wrap(model, eps_init=0.2)
        model(x).square().sum().backward()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_density_moves_and_scales_the_correction() -> None:
    mu, sigma, eps = 1.5, 0.4, 0.2
    density = Gaussian(torch.tensor([mu]), torch.tensor([sigma]))
    activation = CorrectedActivation(nn.ReLU(), eps, density)
    z = torch.linspace(-2, 5, 200)
    u = (z - mu) / sigma
    torch.testing.assert_close(activation(z), torch.relu(z) + eps * sigma * u * torch.exp(-u * u / 2))


def test_slope_stays_within_eps_of_the_base() -> None:
    for base in (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Mish()):
        z = torch.linspace(-8, 8, 4001, dtype=torch.float64, requires_grad=True)
        activation = CorrectedActivation(base, eps=0.5).double()
        (slope,) = torch.autograd.grad(activation(z).sum(), z)
        (plain,) = torch.autograd.grad(base(z).sum(), z)
        assert (slope - plain).abs().max() <= 0.5 + 1e-6


def test_a_buffer_eps_does_not_train() -> None:
    frozen = CorrectedActivation(nn.GELU(), eps=0.1, trainable=False)
    assert list(frozen.parameters()) == []
    assert frozen.state_dict()["eps"].item() == pytest.approx(0.1)
    twin = copy.deepcopy(frozen)
    z = torch.randn(10)
    assert torch.equal(twin(z), frozen(z))


def test_repr_shows_the_live_state() -> None:
    activation = CRReLU(0.25)
    assert activation.extra_repr() == f"eps=+0.2500, mu=+0.000, sigma=1.000, backend={resolve_backend('auto')}"
    with torch.no_grad():
        activation.eps.fill_(-0.5)
    assert "eps=-0.5000" in repr(activation)
    model = nn.Sequential(nn.ReLU(inplace=True))
    wrap(model)
    assert (
        repr(model[0]) == f"ReLU(inplace=True, eps=+0.0100, mu=+0.000, sigma=1.000, backend={resolve_backend('auto')})"
    )


def test_state_of_channels_shows_their_mean() -> None:
    text = describe_state({"eps": torch.tensor([0.1, 0.3])}, torch.tensor([1.0, 2.0]))
    assert text == f"eps=+0.2000, mu=+1.000, sigma=2.000, backend={resolve_backend('auto')}"
    assert math.isclose(float(text.split("eps=")[1].split(",")[0]), 0.2)


@pytest.mark.parametrize("amplitude", [0.0, 0.3])
def test_an_accelerators_amplitude_is_never_read_in_training_and_once_after_each_change_elsewhere(
    amplitude: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = Tensor.any
    monkeypatch.setattr("eafo_dynamic.apply.site._costs_nothing_to_read", lambda eps: False)
    monkeypatch.setattr(Tensor, "any", lambda eps: reads.append(1) or read(eps))
    model = nn.Sequential(nn.ReLU())
    ((host, site),) = wrap(model)
    eps = getattr(host, site.keys[0]).requires_grad_(False).fill_(amplitude)
    for _ in range(3):
        assert not site.idle(host)
    assert not reads, "a training step would wait for the device"
    model.eval()
    assert [site.idle(host) for _ in range(3)] == [amplitude == 0.0] * 3
    assert len(reads) == 1
    eps.fill_(0.3 - amplitude)
    assert [site.idle(host) for _ in range(3)] == [amplitude == 0.3] * 3
    assert len(reads) == 2
