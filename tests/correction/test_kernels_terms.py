"""All terms in every back end, against the formula written out in double precision."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_kernels import HALF_WIDTH, assert_same_bits, smooth_table
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from eafo_dynamic.apply.standalone import CorrectedActivation
from eafo_dynamic.correction.kernels import (
    TERMS,
    Backend,
    Terms,
    corrected,
    corrected_,
    correction,
    fused,
    known_module,
    native,
)

EVERY = tuple(TERMS)
SETS = [names for count in (1, 2, 3, 4) for names in itertools.combinations(EVERY, count)]
VALUES = {"eps": 0.3, "lift": -0.2, "gain": 0.15, "slope": -0.1}
SHAPE = (0.2, 1.4)
BASES = [nn.ReLU(), nn.LeakyReLU(0.2), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.PReLU(), nn.Hardtanh()]
GIVEN_BASES = [*BASES, nn.Tanh(), nn.ELU(0.7), nn.SELU(), nn.Sigmoid(), nn.Softplus(2.0, 5.0), nn.Hardswish()]


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "native" and native.native_kernel() is None:
        pytest.skip("no C compiler here")
    return request.param


def points(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3.0 * torch.randn(size, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()


def make_terms(names: tuple[str, ...], size: float = 1.0, channels: int = 0, table: Tensor | None = None) -> Terms:
    amplitudes = size * torch.tensor([VALUES[name] for name in names])
    if channels:
        amplitudes = amplitudes.unsqueeze(1) * torch.linspace(-1.0, 1.3, channels)
    return Terms(amplitudes.requires_grad_(), torch.tensor(SHAPE), table, HALF_WIDTH, names)


def written_out(z: Tensor, base: nn.Module, amplitudes: Tensor, names: tuple[str, ...]) -> Tensor:
    """f(z) as the theory has it, without a table."""
    mu, sigma = SHAPE
    u = (z - mu) / sigma
    each = dict.fromkeys(EVERY, torch.zeros((), dtype=z.dtype)) | dict(zip(names, amplitudes, strict=True))
    bump = sigma * (each["eps"] * u + each["lift"]) * torch.exp(-0.5 * u * u)
    return (1 + each["gain"]) * base(z) + each["slope"] * z + bump


def assert_is_the_formula(
    z: Tensor, base: nn.Module, given: Terms, backend: Backend, tolerance: float, known: bool = True
) -> None:
    out = corrected(z, base, given, known_module(base) if known else None, backend)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.autograd.grad(out, (z, given.amplitudes), weight.to(out.dtype))
    wide = z.detach().double().requires_grad_()
    amplitudes = given.amplitudes.detach().double().requires_grad_()
    base.double()
    exact = written_out(wide, base, amplitudes, given.names)
    expected = torch.autograd.grad(exact, (wide, amplitudes), weight)
    base.float()
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=tolerance, atol=2 * tolerance)
    near = 30 * tolerance * z.numel() ** 0.5
    torch.testing.assert_close(found[1].double(), expected[1], rtol=tolerance, atol=near)


@pytest.mark.parametrize("names", SETS, ids="-".join)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_every_set_of_terms_on_every_base(base: nn.Module, names: tuple[str, ...], backend: Backend) -> None:
    assert_is_the_formula(points(3, 91), base, make_terms(names), backend, 1e-5)


@pytest.mark.parametrize("n", [1, 7, 255, 257, 4097, 270_001])
@pytest.mark.parametrize("names", [EVERY, ("gain", "slope"), ("lift", "gain")], ids="-".join)
@pytest.mark.parametrize("base", [nn.SiLU(), nn.Mish()], ids=str)
def test_every_length(base: nn.Module, names: tuple[str, ...], n: int, backend: Backend) -> None:
    kernel = fused._kernel_for(points(n), make_terms(names), backend)
    assert isinstance(kernel, native.NativeKernel) is (backend == "native")
    assert_is_the_formula(points(n), base, make_terms(names), backend, 1e-5)


@pytest.mark.parametrize("size", [(40, 13), (5, 13, 4, 3)], ids=str)
@pytest.mark.parametrize("names", [EVERY, ("gain", "slope"), ("slope",), ("lift", "gain")], ids="-".join)
@pytest.mark.parametrize("base", [nn.SiLU(), nn.Mish(), nn.Hardtanh()], ids=str)
def test_one_amplitude_a_channel(
    base: nn.Module, names: tuple[str, ...], size: tuple[int, ...], backend: Backend
) -> None:
    given = make_terms(names, channels=13)
    if len(size) > 2:
        given = given._replace(amplitudes=given.amplitudes.detach().view(-1, 13, 1, 1).clone().requires_grad_())
    assert_is_the_formula(points(*size), base, given, backend, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [0, 13])
def test_half_precision_is_rounded_once(dtype: torch.dtype, channels: int) -> None:
    z, given = points(37, 13, dtype=dtype), make_terms(EVERY, channels=channels)
    out = corrected(z, nn.GELU(), given, known_module(nn.GELU()), "native")
    exact = written_out(z.detach().double(), nn.GELU(), given.amplitudes.detach().double(), EVERY)
    assert out.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=2 * rounding, atol=2 * rounding)
    (by_amplitudes,) = torch.autograd.grad(out.sum(), given.amplitudes)
    assert by_amplitudes.dtype == torch.float32 and by_amplitudes.isfinite().all()


def test_a_table_beside_the_tails(backend: Backend) -> None:
    names, table = ("eps", "gain", "slope"), smooth_table().float()
    for base in (nn.ReLU(), nn.SiLU(), nn.Mish(), nn.Hardtanh()):
        z, given = points(7, 61), make_terms(names, table=table)
        out = corrected(z, base, given, known_module(base), backend)
        wide, amplitudes = (each.detach().double().requires_grad_() for each in (z, given.amplitudes))
        plain = base(wide)
        exact = plain + correction(wide, amplitudes, given.shape.double(), table.double(), HALF_WIDTH, names, plain)
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(out.sum(), (z, given.amplitudes))
        for ours, theirs in zip(found, torch.autograd.grad(exact.sum(), (wide, amplitudes)), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("names", SETS, ids="-".join)
@pytest.mark.parametrize("base", GIVEN_BASES, ids=str)
def test_all_zero_is_the_base_bit_for_bit(base: nn.Module, names: tuple[str, ...], backend: Backend) -> None:
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e30, -1e30, 1e-30, -1e-30, 1e-40])
    z = torch.cat([special, points(200).detach()]).requires_grad_()
    twin = z.detach().clone().requires_grad_()
    given = make_terms(names, size=0.0)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    plain = base(twin)
    (by_plain,) = torch.autograd.grad(plain, twin, weight)
    for known in (known_module(base), None):
        out = corrected(z, base, given, known, backend)
        assert_same_bits(out.detach(), plain.detach())
        by_z, by_amplitudes = torch.autograd.grad(out, (z, given.amplitudes), weight)
        assert_same_bits(by_z, by_plain)
        assert by_amplitudes.isfinite().all() and (by_amplitudes != 0).all(), "and they can still learn"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", [nn.ReLU(), nn.GELU(), nn.Tanh(), nn.Hardtanh()], ids=str)
def test_all_zero_is_the_base_bit_for_bit_in_every_type(base: nn.Module, dtype: torch.dtype, backend: Backend) -> None:
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-30, -1e-30])
    z = torch.cat([special, points(200).detach()]).to(dtype).requires_grad_()
    twin = z.detach().clone().requires_grad_()
    out = corrected(z, base, make_terms(EVERY, size=0.0), known_module(base), backend)
    assert_same_bits(out.detach(), base(twin).detach())
    found = [torch.autograd.grad(f, x, torch.ones_like(z))[0] for f, x in ((out, z), (base(twin), twin))]
    assert_same_bits(*found)


def test_tails_leave_what_is_infinite_or_missing_to_the_base(backend: Backend) -> None:
    z = torch.tensor([math.inf, -math.inf, math.nan, 1.0], requires_grad=True)
    given = make_terms(("gain", "slope"))
    for known in (known_module(nn.ReLU()), None):
        out = corrected(z, nn.ReLU(), given, known, backend)
        torch.testing.assert_close(out, torch.tensor([math.inf, 0.0, math.nan, 1.05]), equal_nan=True)
        by_z, by_amplitudes = torch.autograd.grad(out[[0, 1, 3]].sum(), (z, given.amplitudes))
        torch.testing.assert_close(by_amplitudes, torch.ones(2))
        torch.testing.assert_close(by_z, torch.tensor([1.0, 0.0, 0.0, 1.05]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")  # torch's own, of forward mode
@pytest.mark.parametrize("names", SETS, ids="-".join)
def test_derivatives_of_every_kind_in_double(names: tuple[str, ...]) -> None:
    z = torch.linspace(-4, 4, 7, dtype=torch.float64).requires_grad_()
    given = make_terms(names)
    amplitudes = given.amplitudes.detach().double().requires_grad_()
    shape = given.shape.double()

    def function(z: Tensor, amplitudes: Tensor) -> Tensor:
        base = nn.functional.silu(z)
        return base + correction(z, amplitudes, shape, None, 0.0, names, base)

    assert gradcheck(function, (z, amplitudes), check_forward_ad=True)
    assert gradgradcheck(function, (z, amplitudes))
    at_zero = torch.zeros_like(amplitudes).requires_grad_()
    assert gradcheck(function, (z, at_zero)) and gradgradcheck(function, (z, at_zero))
    rows = torch.stack([z.detach(), -z.detach()])
    mapped = torch.func.vmap(lambda row: function(row, amplitudes))(rows)
    torch.testing.assert_close(mapped, function(rows, amplitudes))
    torch.compiler.reset()  # the same code with other names counts as a recompilation
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, amplitudes), function(z, amplitudes))


@pytest.mark.parametrize("base", [nn.SiLU(), nn.Mish(), nn.PReLU()], ids=str)
def test_second_derivatives_through_the_kernels(base: nn.Module, backend: Backend) -> None:
    z, given = points(60), make_terms(EVERY)

    def twice(out: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(out.square().sum(), (z, given.amplitudes), create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1].sum(), (z, given.amplitudes))

    actual = twice(corrected(z, base, given, known_module(base), backend))
    torch.testing.assert_close(actual, twice(written_out(z, base, given.amplitudes, EVERY)), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("names", [EVERY, ("gain",), ("gain", "slope")], ids="-".join)
@pytest.mark.parametrize("base", [nn.ReLU(inplace=True), nn.Mish(inplace=True), nn.ELU(inplace=True)], ids=str)
def test_in_place_is_the_same_function_written_over_its_input(
    base: nn.Module, names: tuple[str, ...], backend: Backend
) -> None:
    given, z, known = make_terms(names), points(500), known_module(base)
    assert known is not None
    out = corrected(z, known.value, given, known, backend)
    over = z * 1.0
    result = corrected_(over, base, given, known, backend)
    assert result.data_ptr() == over.data_ptr()
    assert_same_bits(result.detach(), out.detach())
    wanted = (z, given.amplitudes)
    for one, other in zip(*(torch.autograd.grad(f.sum(), wanted) for f in (result, out)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("base", [nn.ReLU(), nn.GELU(), nn.Hardtanh()], ids=str)
def test_a_module_of_its_own(base: nn.Module) -> None:
    module = CorrectedActivation(base, 0.3, lift=-0.2, gain=0.15, slope=-0.1)
    state = "eps=+0.3000, lift=-0.2000, gain=+0.1500, slope=-0.1000, mu=+0.000, sigma=1.000"
    assert repr(module).splitlines()[1].strip().startswith(state)
    z = points(64)
    bump = (0.3 * z - 0.2) * torch.exp(-0.5 * z * z)
    expected = 1.15 * base(z) - 0.1 * z + bump
    torch.testing.assert_close(module(z), expected)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(z), expected)
    tails = CorrectedActivation(base, None, gain=0.15, slope=-0.1)
    assert tails.names == ["gain", "slope"] and tails.eps is None and tails.table is None
    torch.testing.assert_close(tails(z), 1.15 * base(z) - 0.1 * z)


def test_a_module_of_its_own_needs_a_term() -> None:
    from eafo_dynamic.errors import ConfigError

    with pytest.raises(ConfigError, match=r"^eps=None: a correction needs a term. Give eps, lift, gain or slope.$"):
        CorrectedActivation(nn.ReLU(), None)


def test_objects_and_formula_agree() -> None:
    """What a Term says of itself is what the formula computes, term by term."""
    z = points(200).detach().double()
    mu, sigma = torch.tensor(SHAPE, dtype=torch.float64)
    base, one = torch.nn.functional.silu(z), torch.ones(1, dtype=torch.float64)
    for name, term in TERMS.items():
        at, held = z.clone().requires_grad_(), base.clone().requires_grad_()
        c = correction(at, one, torch.tensor(SHAPE, dtype=torch.float64), names=(name,), base=held)
        u = (z - mu) / sigma
        torch.testing.assert_close(c, term.scale(sigma) * term.value(u, z, base))
        by_z, by_base = torch.autograd.grad(c.sum(), (at, held), allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(by_z, term.derivative(u, z))
        torch.testing.assert_close(by_base, torch.full_like(z, term.by_base))
