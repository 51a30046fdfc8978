"""The correction term against its formula written out, finite differences and the bits of the base."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from eafo_dynamic.kernels import correction, ghat_closed_form, ghat_table

HALF_WIDTH = 4.0


def reference(z: Tensor, eps: Tensor, shape: Tensor) -> Tensor:
    """The formula as the paper writes it, every step left to autograd."""
    u = (z - shape[0]) / shape[1]
    return eps * shape[1] * u * torch.exp(-(u**2) / 2)


def smooth_table(intervals: int = 16) -> Tensor:
    """Cubic Hermite coefficients of sin(pi u / L)^2, zero with its slope at both ends."""
    knots = torch.linspace(-HALF_WIDTH, HALF_WIDTH, intervals + 1, dtype=torch.float64)
    h = 2 * HALF_WIDTH / intervals
    value = torch.sin(math.pi * knots / HALF_WIDTH) ** 2
    slope = math.pi / HALF_WIDTH * torch.sin(2 * math.pi * knots / HALF_WIDTH) * h
    v0, v1, s0, s1 = value[:-1], value[1:], slope[:-1], slope[1:]
    return torch.stack([v0, s0, 3 * (v1 - v0) - 2 * s0 - s1, 2 * (v0 - v1) + s0 + s1])


def inputs(*size: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    z = torch.randn(*size, dtype=torch.float64, requires_grad=True)
    eps = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
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
def test_first_and_second_derivatives(table: Tensor | None) -> None:
    z, eps, shape = inputs(24)

    def term(z: Tensor, eps: Tensor) -> Tensor:
        return correction(z, eps, shape, table, HALF_WIDTH)

    assert gradcheck(term, (z, eps))
    assert gradgradcheck(term, (z, eps))


@pytest.mark.parametrize("table", [None, smooth_table()], ids=["closed form", "table"])
@pytest.mark.parametrize("channels", [False, True], ids=["one eps", "eps a channel"])
def test_derivatives_with_an_offset(table: Tensor | None, channels: bool) -> None:
    z, eps, shape = inputs(2, 3, 2, 2)
    if channels:
        eps = torch.tensor([0.1, 0.0, -0.4], dtype=torch.float64).view(3, 1, 1).requires_grad_()
    offset = 0.3 * smooth_table(24).flip(0)
    offset[0] -= offset[0].mean()

    def term(z: Tensor, eps: Tensor) -> Tensor:
        return correction(z, eps, shape, table, HALF_WIDTH, offset)

    assert gradcheck(term, (z, eps))
    assert gradgradcheck(term, (z, eps))


@pytest.mark.parametrize("table", [None, smooth_table()], ids=["closed form", "table"])
def test_an_offset_is_added_as_if_it_were_a_second_correction(table: Tensor | None) -> None:
    z, eps, shape = inputs(4, 3, 5, 5)
    eps = torch.tensor([0.1, 0.0, -0.4], dtype=torch.float64).view(3, 1, 1)
    offset, one = 0.3 * smooth_table(24), torch.ones((), dtype=torch.float64)
    both = correction(z, eps, shape, table, HALF_WIDTH, offset)
    parts = [correction(z, eps, shape, table, HALF_WIDTH), correction(z, one, shape, offset, HALF_WIDTH)]
    torch.testing.assert_close(both, parts[0] + parts[1], rtol=1e-12, atol=1e-14)
    weights = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slopes = [torch.autograd.grad((c * weights).sum(), z)[0] for c in (both, *parts)]
    torch.testing.assert_close(slopes[0], slopes[1] + slopes[2], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_offset_of_zeros_beside_eps_zero_keeps_the_bits_of_the_base(dtype: torch.dtype) -> None:
    z = torch.tensor([0.0, -0.0, 1e-30, -1e-30, math.inf, -math.inf, 2.5, -2.5]).to(dtype)
    table = smooth_table().float()
    for eps in (torch.tensor(0.0), torch.zeros(1, requires_grad=True)):
        c = correction(z, eps, torch.tensor([0.1, 0.7]), table, HALF_WIDTH, torch.zeros_like(table))
        assert_same_bits(torch.relu(z) + c, torch.relu(z))


def test_an_offset_compiles_and_maps() -> None:
    z, eps, shape = inputs(6, 5)
    table, offset = smooth_table(), 0.2 * smooth_table(24)
    expected = correction(z, eps, shape, table, HALF_WIDTH, offset)
    compiled = torch.compile(correction, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, eps, shape, table, HALF_WIDTH, offset), expected)
    mapped = torch.func.vmap(lambda row: correction(row, eps, shape, table, HALF_WIDTH, offset))(z)
    torch.testing.assert_close(mapped, expected)


def test_one_amplitude_a_channel_gets_one_gradient_each() -> None:
    z, _, shape = inputs(2, 3, 4, 4)
    eps = torch.full((3, 1, 1), 0.1, dtype=torch.float64, requires_grad=True)
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
    eps = torch.tensor(0.0, requires_grad=True)
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
    eps = torch.tensor(0.5, requires_grad=True)
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
    eps = torch.tensor(0.1, requires_grad=True)

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
