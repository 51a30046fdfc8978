"""The second term, lift * exp(-u^2 / 2), in every back end, against the written-out formula in double precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from test_kernels import assert_same_bits
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eafo_dynamic.apply.standalone import CorrectedActivation
from eafo_dynamic.correction.kernels import (
    MAX_U,
    Backend,
    Terms,
    bell,
    corrected,
    corrected_,
    correction_of,
    fused,
    ghat_closed_form,
    known_module,
    native,
)

BASES = [nn.ReLU(), nn.LeakyReLU(0.2), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardtanh()]
SHAPE = (0.2, 1.4)


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "native" and native.native_kernel() is None:
        pytest.skip("no C compiler here")
    return request.param


def free_terms(eps: Tensor | float, lift: Tensor | float, dtype: torch.dtype = torch.float32) -> Terms:
    amplitudes = torch.stack([torch.as_tensor(each, dtype=dtype) for each in (eps, lift)]).requires_grad_()
    return Terms(amplitudes, torch.tensor(SHAPE, dtype=dtype), None, 8.0, ("eps", "lift"))


def points(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3.0 * torch.randn(size, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()


def written_out(z: Tensor, base: nn.Module, given: Terms) -> Tensor:
    mu, sigma = SHAPE
    u = (z - mu) / sigma
    eps, lift = given.amplitudes.double()
    return base(z) + sigma * (eps * u + lift) * torch.exp(-0.5 * u * u)


def assert_is_the_formula(z: Tensor, base: nn.Module, given: Terms, backend: Backend, tolerance: float) -> None:
    known = known_module(base)
    out = corrected(z, base, given, known, backend)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.autograd.grad(out, (z, given.amplitudes), weight.to(out.dtype))
    wide = z.detach().double().requires_grad_()
    amplitudes = given.amplitudes.detach().double().requires_grad_()
    exact = written_out(wide, base, given._replace(amplitudes=amplitudes))
    expected = torch.autograd.grad(exact, (wide, amplitudes), weight)
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=tolerance, atol=10 * tolerance * z.numel() ** 0.5)


@pytest.mark.parametrize("n", [1, 7, 256, 257, 4097, 40_003])
@pytest.mark.parametrize("base", BASES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(base: nn.Module, n: int, backend: Backend) -> None:
    given = free_terms(0.3, -0.2)
    assert isinstance(fused._kernel_for(points(n), given, backend), native.NativeKernel) is (backend == "native")
    assert_is_the_formula(points(n), base, given, backend, 1e-5)


@pytest.mark.parametrize("sigma", [1e-36, 1e-20, 1e-16, 1e16, 1e22, 1e37])
def test_any_spread_that_float32_holds_is_computed(sigma: float, backend: Backend) -> None:
    """Squares of z leave the range of float32 long before z does."""
    u = points(64)
    given = free_terms(0.3, -0.2)._replace(shape=torch.tensor([0.0, sigma]))
    z = (u.detach() * sigma).requires_grad_()
    base = nn.ReLU()
    out = corrected(z, base, given, known_module(base), backend)
    exact = torch.relu(u) + (0.3 * u - 0.2) * torch.exp(-0.5 * u * u)
    torch.testing.assert_close(out / sigma, exact, rtol=1e-4, atol=1e-5)
    (slope,) = torch.autograd.grad(out.sum(), z)
    (expected,) = torch.autograd.grad(exact.sum(), u)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("amplitudes", [(0.0, 0.4), (0.4, 0.0), (-0.5, 0.5)], ids=str)
def test_either_amplitude_may_be_zero(amplitudes: tuple[float, float], backend: Backend) -> None:
    assert_is_the_formula(points(999), nn.GELU(), free_terms(*amplitudes), backend, 1e-5)


@pytest.mark.parametrize("u", [torch.inf, -torch.inf, torch.nan, 1e30])
def test_what_is_far_away_lies_where_the_compiled_kernel_cuts(u: float) -> None:
    """The formula has MAX_U as a literal, the kernel gets it as a number."""
    expected = torch.exp(torch.tensor(-0.5 * MAX_U * MAX_U))
    assert bell(torch.tensor(u))[0] == expected
    if u == u:
        assert ghat_closed_form(torch.tensor(u))[0].abs() == MAX_U * expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    z = points(37, 13, dtype=dtype)
    out = corrected(z, nn.GELU(), free_terms(0.3, -0.2), known_module(nn.GELU()), "native")
    exact = written_out(z.detach().double(), nn.GELU(), free_terms(0.3, -0.2)).detach()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("size", [(40, 13), (5, 13, 4, 3)], ids=str)
def test_one_amplitude_a_channel(size: tuple[int, ...], backend: Backend) -> None:
    shape = (13, *[1] * (len(size) - 2))
    given = free_terms(torch.linspace(-0.5, 0.4, 13).view(shape), torch.linspace(0.3, -0.3, 13).view(shape))
    assert_is_the_formula(points(*size), nn.SiLU(), given, backend, 2e-5)


@pytest.mark.parametrize("base", BASES, ids=str)
def test_both_zero_is_the_base_bit_for_bit(base: nn.Module, backend: Backend) -> None:
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-30, -1e-30])
    z = torch.cat([special, points(300).detach()]).requires_grad_()
    twin = z.detach().clone().requires_grad_()
    out, plain = corrected(z, base, free_terms(0.0, 0.0), known_module(base), backend), base(twin)
    assert_same_bits(out.detach(), plain.detach())
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    assert_same_bits(*(torch.autograd.grad(f, x, weight)[0] for f, x in ((out, z), (plain, twin))))


def test_infinite_and_missing_inputs_give_what_the_base_gives(backend: Backend) -> None:
    z = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0], requires_grad=True)
    given = free_terms(0.3, 0.4)
    out = corrected(z, nn.ReLU(), given, known_module(nn.ReLU()), backend)
    assert out[0] == float("inf") and out[1].abs() < 1e-30 and out[2].isnan()
    (by_amplitudes,) = torch.autograd.grad(out[[0, 1, 3]].sum(), given.amplitudes)
    expected = SHAPE[1] * bell(torch.tensor((1.0 - SHAPE[0]) / SHAPE[1]))[0]
    torch.testing.assert_close(by_amplitudes[1], expected)


@pytest.mark.parametrize("base", [nn.ReLU(inplace=True), nn.SiLU(inplace=True)], ids=str)
def test_in_place_is_the_same_function_written_over_its_input(base: nn.Module, backend: Backend) -> None:
    given, z = free_terms(0.2, -0.3), points(500)
    out = corrected(z, known_module(base).value, given, known_module(base), backend)  # pyright: ignore[reportOptionalMemberAccess]
    over = z * 1.0
    result = corrected_(over, base, given, known_module(base), backend)
    assert result is over or result.data_ptr() == over.data_ptr()
    assert_same_bits(result.detach(), out.detach())
    wanted = (z, given.amplitudes)
    for one, other in zip(*(torch.autograd.grad(f.sum(), wanted) for f in (result, out)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_large_tensors_are_copied_and_overwritten_in_one_pass(form: torch.memory_format) -> None:
    kernel, known = native.native_kernel(), known_module(nn.ReLU())
    if kernel is None or known is None:
        pytest.skip("no C compiler here")
    leaf = torch.randn(3, 7, 61, 67, dtype=torch.float64).requires_grad_()  # not a whole number of blocks
    z, given = leaf.float().to(memory_format=form), free_terms(0.2, -0.3)
    assert kernel.overwrites(z, given, known) and not kernel.overwrites(z[:1], given, known)
    wanted, packed = (leaf, given.amplitudes), []
    out = corrected(z, F.relu, given, known, "native")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.clone()) or x, lambda x: x):
        over = z * 1.0
        result = corrected_(over, F.relu, given, known, "native")
    assert result is over and any(torch.equal(z, x) for x in packed)
    assert_same_bits(result.detach(), out.detach())
    actual, expected = (torch.autograd.grad(f.square().sum(), wanted, create_graph=True) for f in (result, out))
    torch.testing.assert_close(actual, expected)
    twice = [
        torch.autograd.grad(by_z.square().sum() + by_amplitudes.sum(), wanted, retain_graph=True)
        for by_z, by_amplitudes in (actual, expected)
    ]
    torch.testing.assert_close(*twice)
    again = checkpoint(lambda x: corrected_(x * 1.0, F.relu, given, known, "native"), z, use_reentrant=False)
    for one, other in zip(*(torch.autograd.grad(f.sum(), wanted) for f in (again, out)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")  # torch's own, of forward mode
def test_derivatives_of_every_kind_in_double() -> None:
    z = torch.linspace(-4, 4, 9, dtype=torch.float64).requires_grad_()
    given = free_terms(0.3, -0.2, torch.float64)

    def function(z: Tensor, amplitudes: Tensor) -> Tensor:
        return correction_of(z, given._replace(amplitudes=amplitudes))

    inputs = (z, given.amplitudes)
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs)
    rows = torch.stack([z.detach(), -z.detach()])
    mapped = torch.func.vmap(lambda row: function(row, given.amplitudes))(rows)
    torch.testing.assert_close(mapped, function(rows, given.amplitudes))


def test_gradients_are_computed_for_those_who_want_them(backend: Backend) -> None:
    given = free_terms(0.3, -0.2)
    out = corrected(points(50).detach(), nn.GELU(), given, None, backend)
    (by_amplitudes,) = torch.autograd.grad(out.sum(), given.amplitudes)
    again = corrected(points(50), nn.GELU(), given, known_module(nn.GELU()), backend)
    torch.testing.assert_close(by_amplitudes, torch.autograd.grad(again.sum(), given.amplitudes)[0])
    fixed = given._replace(amplitudes=given.amplitudes.detach())
    z = points(50)
    (by_z,) = torch.autograd.grad(corrected(z, nn.GELU(), fixed, None, backend).sum(), z)
    torch.testing.assert_close(by_z, torch.autograd.grad(corrected(z, nn.GELU(), given, None, backend).sum(), z)[0])


def test_the_whole_compiles_without_a_break() -> None:
    module = CorrectedActivation(nn.GELU(), eps=0.1, lift=-0.2)
    assert repr(module).splitlines()[1].strip().startswith("eps=+0.1000, lift=-0.2000, mu=+0.000, sigma=1.000")
    z = points(64)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(z), module(z))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch, when inductor is imported
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_what_is_compiled_leaves_infinities_and_nan_to_the_base(compiler: str) -> None:
    if compiler == "inductor" and not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("inductor needs a C++ compiler")
    given = free_terms(0.1, -0.2)
    z = torch.cat([points(61).detach(), torch.tensor([torch.nan, torch.inf, -torch.inf])]).requires_grad_()
    grad = torch.linspace(-1.0, 1.0, 64)

    def run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        c = function(z)
        return c, *torch.autograd.grad(c, (z, given.amplitudes), grad)

    expected = run(lambda z: correction_of(z, given))
    torch.compiler.reset()
    found = run(torch.compile(lambda z: correction_of(z, given), fullgraph=True, backend=compiler))
    assert expected[0].isfinite().all() and expected[2].isfinite().all()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    if compiler == "aot_eager":
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("base", [nn.ReLU(), nn.GELU()], ids=str)
def test_slopes_stay_within_the_trust_region(base: nn.Module) -> None:
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64).requires_grad_()
    for eps, lift in ((0.5, 0.5), (-0.5, 0.5), (0.5, -0.5), (-0.5, -0.5)):
        (slope,) = torch.autograd.grad(correction_of(z, free_terms(eps, lift, torch.float64)).sum(), z)
        assert slope.abs().max() <= 1.16 * 0.5


@pytest.mark.skipif(native.native_kernel() is None, reason="no C compiler here")
@pytest.mark.parametrize("base", [nn.SiLU(), nn.GELU(), nn.GELU("tanh")], ids=str)
def test_bases_computed_inside_are_as_good_as_those_of_torch(base: nn.Module) -> None:
    """Against float64, under a correction too small to count: polynomials stand for erf, Newton for division."""
    z = torch.linspace(-30.0, 30.0, 400_001)
    exact, single = z.double().requires_grad_(), z.clone().requires_grad_()
    mine = z.clone().requires_grad_()
    out = corrected(mine, base, free_terms(1e-30, 1e-30), known_module(base), "native")
    for each in (reference := base(exact), torchs := base(single), out):
        each.sum().backward()
    assert exact.grad is not None and single.grad is not None and mine.grad is not None

    def off(found: Tensor, true: Tensor) -> float:
        return float((found.detach().double() - true.detach()).abs().max())

    assert 0.0 < off(out, reference) <= 2 * off(torchs, reference) < 4e-6
    assert 0.0 < off(mine.grad, exact.grad) <= 2 * off(single.grad, exact.grad) < 4e-6
