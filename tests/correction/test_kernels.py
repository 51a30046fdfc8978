"""The correction term against its formula written out, finite differences and the bits of the base."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from eafo_dynamic import CorrectedActivation, EAFOController
from eafo_dynamic.correction.kernels import correction, ghat_closed_form, ghat_table

HALF_WIDTH = 4.0


def reference(z: Tensor, eps: Tensor, shape: Tensor) -> Tensor:
    """The formula as the paper writes it, every step left to autograd."""
    u = (z - shape[0]) / shape[1]
    return eps * shape[1] * u * torch.exp(-(u**2) / 2)


def reference_with_lift(z: Tensor, eps: Tensor, lift: Tensor, shape: Tensor) -> Tensor:
    u = (z - shape[0]) / shape[1]
    return reference(z, eps, shape) + lift * shape[1] * torch.exp(-(u**2) / 2)


def smooth_table(intervals: int = 16) -> Tensor:
    """Cubic Hermite coefficients of sin(pi u / L)^2, zero with its slope at both ends."""
    knots = torch.linspace(-HALF_WIDTH, HALF_WIDTH, intervals + 1, dtype=torch.float64)
    h = 2 * HALF_WIDTH / intervals
    value = torch.sin(math.pi * knots / HALF_WIDTH) ** 2
    slope = math.pi / HALF_WIDTH * torch.sin(2 * math.pi * knots / HALF_WIDTH) * h
    v0, v1, s0, s1 = value[:-1], value[1:], slope[:-1], slope[1:]
    return torch.stack([v0, s0, 3 * (v1 - v0) - 2 * s0 - s1, 2 * (v0 - v1) + s0 + s1])


LOCAL = ("eps", "lift")


def inputs(*size: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    z = torch.randn(*size, dtype=torch.float64, requires_grad=True)
    eps = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    return z, eps, torch.tensor([0.2, 1.4], dtype=torch.float64)


def assert_same_bits(one: Tensor, two: Tensor) -> None:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    assert one.dtype == two.dtype
    number = ~two.isnan()  # the payload of a NaN is nobody's promise
    assert torch.equal(one.isnan(), two.isnan())
    assert torch.equal(one[number].view(kind), two[number].view(kind))


def test_value_and_gradients_are_those_of_the_formula() -> None:
    z, eps, shape = inputs(100)
    weights = torch.randn(100, dtype=torch.float64)
    expected = torch.autograd.grad((reference(z, eps, shape) * weights).sum(), (z, eps))
    actual = torch.autograd.grad((correction(z, eps, shape) * weights).sum(), (z, eps))
    torch.testing.assert_close(correction(z, eps, shape), reference(z, eps, shape), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("table", [None, smooth_table()], ids=["closed form", "table"])
@pytest.mark.parametrize("channels", [False, True], ids=["one eps", "eps a channel"])
def test_first_and_second_derivatives(table: Tensor | None, channels: bool) -> None:
    z, eps, shape = inputs(2, 3, 2, 2)
    if channels:
        eps = torch.tensor([0.1, 0.0, -0.4], dtype=torch.float64).view(1, 3, 1, 1).requires_grad_()

    def term(z: Tensor, eps: Tensor) -> Tensor:
        return correction(z, eps, shape, table, HALF_WIDTH)

    assert gradcheck(term, (z, eps))
    assert gradgradcheck(term, (z, eps))


def test_a_table_compiles_and_maps() -> None:
    z, eps, shape = inputs(6, 5)
    table = smooth_table()
    expected = correction(z, eps, shape, table, HALF_WIDTH)
    compiled = torch.compile(correction, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, eps, shape, table, HALF_WIDTH), expected)
    mapped = torch.func.vmap(lambda row: correction(row, eps, shape, table, HALF_WIDTH))(z)
    torch.testing.assert_close(mapped, expected)


def test_one_amplitude_a_channel_gets_one_gradient_each() -> None:
    z, _, shape = inputs(2, 3, 4, 4)
    eps = torch.full((1, 3, 1, 1), 0.1, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda e: correction(z, e, shape), (eps,))


def test_table_meets_the_function_it_was_made_from() -> None:
    u = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    value, slope = ghat_table(u, smooth_table(256), HALF_WIDTH)
    inside = u.abs() <= HALF_WIDTH
    true_value = torch.where(inside, torch.sin(math.pi * u / HALF_WIDTH) ** 2, 0.0)
    true_slope = torch.where(inside, math.pi / HALF_WIDTH * torch.sin(2 * math.pi * u / HALF_WIDTH), 0.0)
    torch.testing.assert_close(value, true_value, atol=1e-7, rtol=0)
    torch.testing.assert_close(slope, true_slope, atol=1e-5, rtol=0)


@pytest.mark.parametrize("base", [nn.ReLU(), nn.GELU(), nn.Tanh(), nn.LeakyReLU(), nn.Softplus()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table", [None, smooth_table().float()], ids=["closed form", "table"])
def test_eps_zero_is_the_base_bit_for_bit(base: nn.Module, dtype: torch.dtype, table: Tensor | None) -> None:
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e30, -1e30, 1e-30, -1e-30])
    z = torch.cat([special, torch.randn(500, generator=torch.Generator().manual_seed(0)) * 5]).to(dtype)
    plain, corrected = z.clone().requires_grad_(), z.clone().requires_grad_()
    eps = torch.tensor([0.0], requires_grad=True)
    expected = base(plain)
    actual = base(corrected) + correction(corrected, eps, torch.tensor([0.1, 0.7]), table, HALF_WIDTH)
    assert_same_bits(actual, expected)
    weight = torch.linspace(-1, 1, z.numel()).to(dtype)
    (expected * weight).nansum().backward()
    (actual * weight).nansum().backward()
    assert plain.grad is not None and corrected.grad is not None and eps.grad is not None
    assert_same_bits(corrected.grad, plain.grad)
    assert eps.grad.isfinite() and eps.grad != 0, "eps = 0 must still be able to learn"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table", [None, smooth_table().float()], ids=["closed form", "table"])
def test_infinite_and_huge_inputs_give_finite_corrections(dtype: torch.dtype, table: Tensor | None) -> None:
    z = torch.tensor([math.inf, -math.inf, 60000.0, -60000.0], dtype=dtype, requires_grad=True)
    eps = torch.tensor([0.5], requires_grad=True)
    c = correction(z, eps, torch.tensor([0.0, 1.0]), table, HALF_WIDTH)
    c.sum().backward()
    assert c.dtype == dtype
    assert z.grad is not None and eps.grad is not None
    torch.testing.assert_close(c, torch.zeros_like(c))
    torch.testing.assert_close(z.grad, torch.zeros_like(z))
    assert eps.grad.isfinite()


def test_slope_never_exceeds_one_and_reaches_it_at_zero() -> None:
    u = torch.linspace(-20, 20, 100001, dtype=torch.float64)
    _, slope = ghat_closed_form(u)
    assert slope.abs().max() <= 1.0
    assert ghat_closed_form(torch.zeros(1))[1].item() == 1.0


def test_only_the_input_is_kept_for_the_backward() -> None:
    kept: list[Tensor] = []
    z = torch.randn(1000, requires_grad=True)
    eps = torch.tensor([0.1], requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        correction(z, eps, torch.tensor([0.0, 1.0]))
    assert [tensor.numel() for tensor in kept if tensor.numel() > 2] == [1000]
    assert kept[0].data_ptr() == z.data_ptr()


def test_compiles_whole_and_maps() -> None:
    z, eps, shape = inputs(6, 5)
    expected = correction(z, eps, shape)
    compiled = torch.compile(correction, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, eps, shape), expected)
    mapped = torch.func.vmap(lambda row: correction(row, eps, shape))(z)
    torch.testing.assert_close(mapped, expected)
    slopes = torch.func.vmap(torch.func.vmap(torch.func.grad(lambda x: correction(x, eps, shape))))(z)
    torch.testing.assert_close(slopes, torch.autograd.grad(expected.sum(), z)[0])


def second_derivatives(term: Callable[..., Tensor], *at: Tensor) -> list[Tensor]:
    """All second derivatives of sum c^2 by z, eps and lift, by every order of forward and reverse mode."""

    def total(*at: Tensor) -> Tensor:
        return term(*at).square().sum()

    def flat(found: tuple[tuple[Tensor, ...], ...]) -> Tensor:
        return torch.cat([each.flatten() for row in found for each in row])

    by = tuple(range(len(at)))
    modes = torch.func.jacfwd, torch.func.jacrev
    return [flat(outer(inner(total, by), by)(*at)) for outer in modes for inner in modes]


@pytest.mark.parametrize("amplitudes", [(0.0, 0.0), (0.3, 0.0), (0.0, -0.2), (0.3, -0.2)], ids=str)
@pytest.mark.parametrize("channels", [False, True], ids=["one eps", "eps a channel"])
def test_second_derivatives_are_right_at_zeros_under_transforms(
    amplitudes: tuple[float, float], channels: bool
) -> None:
    z, _, shape = inputs(3, 4)
    z = z.detach().clone()
    z[0], z[1, 2] = shape[0], shape[0] + shape[1]  # where the correction or its slope is zero
    eps, lift = (torch.full((3, 1) if channels else (), each, dtype=torch.float64) for each in amplitudes)
    expected = second_derivatives(lambda z, e, b: reference_with_lift(z, e, b, shape), z, eps, lift)[0]
    for actual in second_derivatives(
        lambda z, e, b: correction(z, torch.stack([e, b]), shape, names=LOCAL), z, eps, lift
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channels", [False, True], ids=["one eps", "eps a channel"])
@pytest.mark.parametrize("lifted", [False, True], ids=["eps", "eps and lift"])
def test_a_gradient_by_z_is_differentiable_by_amplitudes_of_zero(channels: bool, lifted: bool) -> None:
    z, _, shape = inputs(3, 4)
    size = (3, 1) if channels else ()
    eps, lift = (torch.zeros(size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    wanted = (eps, lift) if lifted else (eps,)
    found = []
    names = LOCAL if lifted else LOCAL[:1]
    for c in (correction(z, torch.stack(wanted), shape, names=names), reference_with_lift(z, eps, lift, shape)):
        (slope,) = torch.autograd.grad(c.sum(), z, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum() + slope.sum(), wanted))
    torch.testing.assert_close(*found)
    assert all((each != 0).all() for each in found[0])


def test_a_cotangent_of_zero_leaves_the_way_to_the_next_derivative_open() -> None:
    z, _, shape = inputs(2, 3)
    eps = torch.tensor([[0.3, 0.0, -0.2]], dtype=torch.float64)
    along = torch.randn(2, 3, dtype=torch.float64)
    cotangent = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (pulled,) = torch.autograd.grad(correction(z, eps, shape), z, cotangent, create_graph=True)
    (pushed,) = torch.autograd.grad(pulled, cotangent, along)
    torch.testing.assert_close(
        pushed, torch.func.jvp(lambda z: reference(z, eps[0], shape), (z.detach(),), (along,))[1]
    )


def test_curvature_of_a_loss_at_its_minimum_is_that_of_gauss_and_newton() -> None:
    torch.manual_seed(0)
    activation = CorrectedActivation(nn.ReLU(), eps=0.3).double()
    weight, points = torch.randn(3, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def outputs(x: Tensor) -> Tensor:
        return activation(x @ weight)

    def curvature(x: Tensor, target: Tensor) -> Tensor:
        return torch.func.hessian(lambda x: 0.5 * (outputs(x) - target).square().sum())(x)

    slopes = torch.func.vmap(torch.func.jacrev(outputs))(points)
    found = torch.func.vmap(curvature)(points, outputs(points).detach())
    torch.testing.assert_close(found, slopes.mT @ slopes)


def test_a_compiled_gradient_by_z_is_differentiable_by_an_amplitude_of_zero() -> None:
    z, _, shape = inputs(6)

    def mixed(term: Callable[..., Tensor], z: Tensor, eps: Tensor) -> Tensor:
        def slopes(eps: Tensor) -> Tensor:
            return torch.func.grad(lambda z: term(z, eps, shape).sum())(z)

        return torch.func.grad(lambda eps: slopes(eps).sum())(eps)

    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    at = z.detach(), torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(compiled(correction, *at), mixed(reference, *at))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [False, True], ids=["one eps", "eps a channel"])
def test_gradients_by_amplitudes_are_summed_in_single_precision(dtype: torch.dtype, channels: bool) -> None:
    z = torch.ones(2048, 4, 8, 8, dtype=dtype)
    eps, lift = (torch.zeros((4, 1, 1) if channels else (), requires_grad=True) for _ in range(2))
    correction(z, torch.stack([eps, lift]), torch.tensor([0.0, 1.0]), names=LOCAL).sum().backward()
    each = math.exp(-0.5) * z.numel() / eps.numel()
    for amplitude in (eps, lift):
        torch.testing.assert_close(amplitude.grad, torch.full_like(amplitude, each), rtol=3e-3, atol=0)


def test_a_compiled_network_in_half_precision_has_finite_gradients_by_channel() -> None:
    net = nn.Sequential(nn.Identity(), nn.ReLU())
    controller = EAFOController.attach(net, torch.randn(2, 4, 8, 8), per_channel=True)
    controller.collecting = False
    z = torch.ones(4096, 4, 8, 8, dtype=torch.float16)
    torch.compile(net, backend="aot_eager")(z).sum().backward()
    for amplitude in net.parameters():
        torch.testing.assert_close(amplitude.grad, torch.full((4,), 4096 * 64 * math.exp(-0.5)), rtol=1e-3, atol=0)
