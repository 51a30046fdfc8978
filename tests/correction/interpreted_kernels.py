"""The Triton kernels on the CPU, by Triton's interpreter, against the formula in double precision.

Run by ``test_kernels_triton.py`` in a process of its own: TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from test_kernels import assert_same_bits, smooth_table
from torch import Tensor, nn
from triton_cases import (
    BASES,
    DTYPES,
    FORMS,
    LAYOUTS,
    assert_meets_formula,
    make_terms,
    of_layout,
    one_a_channel,
    points,
)

from eafo_dynamic.correction.kernels import (
    Terms,
    corrected,
    corrected_,
    correction_of,
    fused,
    gpu,
    gpu_check,
    known_module,
)
from eafo_dynamic.correction.kernels.gpu import EVERY_BASE, TritonKernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities

assert os.environ.get("TRITON_INTERPRET") == "1", (
    "python -m pytest tests/correction/test_kernels_triton.py runs this file"
)


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> TritonKernel:
    """What every tensor is computed with that it takes."""
    made = TritonKernel(dict.fromkeys(DTYPES, EVERY_BASE))

    def chosen(z: Tensor, terms: Terms, backend: str) -> TritonKernel | None:
        return made if made.takes(z, terms) else None

    monkeypatch.setattr(fused, "_kernel_for", chosen)
    return made


def gradients(out: Tensor, z: Tensor, terms: Terms) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(z.dtype if z.itemsize < 4 else out)
    return list(torch.autograd.grad(out, [z, terms.amplitudes], weight.to(out.dtype)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_base_form_and_type(dtype: torch.dtype, base: nn.Module, form: str) -> None:
    assert_meets_formula(points(7, 61, dtype=dtype), base, make_terms(form))


@pytest.mark.parametrize("n", [0, 1, 127, 1024, 1025, 9001])
@pytest.mark.parametrize("form", FORMS)
def test_every_length_is_covered(n: int, form: str) -> None:
    assert_meets_formula(points(n), nn.SiLU(), make_terms(form, -0.4, 0.3))


@pytest.mark.parametrize("n", [1, 4096, 9001])
@pytest.mark.parametrize("form", FORMS)
def test_programs_of_several_tiles(n: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_LARGE", 0)
    assert_meets_formula(points(n), nn.GELU(), make_terms(form))
    assert_meets_formula(points(n // 9 + 1, 100), nn.GELU(), make_terms(form, *one_a_channel(100)))
    images = points(2, 3, n // 9 + 1)
    channels = (each.view(3, 1) for each in one_a_channel(3))
    assert_meets_formula(images, nn.GELU(), make_terms(form, *channels))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_amplitude_a_channel_in_every_layout(dtype: torch.dtype, form: str, layout: str) -> None:
    z, amplitudes = of_layout(layout, dtype)
    assert_meets_formula(z, nn.SiLU(), make_terms(form, *amplitudes))


def test_a_model_in_half_precision_keeps_its_amplitudes_dtype() -> None:
    terms = make_terms("table", *one_a_channel(13, torch.bfloat16))
    assert terms.table is not None
    half = terms._replace(shape=terms.shape.bfloat16(), table=terms.table.bfloat16())
    assert_meets_formula(points(64, 13, dtype=torch.bfloat16), nn.GELU(), half)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "from the middle"])
def test_other_layouts_give_the_same_function(layout: str) -> None:
    z = points(2, 6, 4, 4)
    cuts: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda z: z.transpose(1, 3),
        "strided": lambda z: z[..., ::2],
        "expanded": lambda z: z[:, :1].expand(2, 6, 4, 4),
        "from the middle": lambda z: z.view(-1)[3:40],
    }
    laid = cuts[layout](z).requires_grad_()
    terms = make_terms("free terms")
    found = gradients(corrected(laid, nn.SiLU(), terms, known_module(nn.SiLU())), laid, terms)
    wanted = gradients(nn.SiLU()(laid) + correction_of(laid, terms), laid, terms)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", [*BASES, nn.Tanh(), nn.PReLU()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # bfloat16 the interpreter cuts off
def test_eps_zero_is_the_base_bit_for_bit(dtype: torch.dtype, base: nn.Module, form: str, kernel: TritonKernel) -> None:
    # which bases have torch's bits on a device its check finds out; numpy's exp, and the sign of relu(-0.0), differ
    kernel._inside.update({each: frozenset((5, 6)) for each in DTYPES})
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e30, -1e30, 1e-30, -1e-30, 1e-40])
    z = torch.cat([special, points(500)]).to(dtype).requires_grad_()
    twin = z.detach().clone().requires_grad_()
    base = base.to(dtype)
    terms = make_terms(form, 0.0, 0.0)
    out, plain = corrected(z, base, terms, known_module(base)), base(twin)
    assert_same_bits(out, plain)
    weight = torch.linspace(-1, 1, z.numel()).to(dtype)
    weight[20:40] = -0.0
    by_z, by_amplitudes = torch.autograd.grad(out, (z, terms.amplitudes), weight)
    assert_same_bits(by_z, torch.autograd.grad(plain, twin, weight)[0])
    assert not by_amplitudes.isnan().any(), "a NaN input has no correction, and no say in amplitudes"


def test_channels_with_eps_zero_are_the_base_bit_for_bit(kernel: TritonKernel) -> None:
    z = points(20, 13).requires_grad_()
    eps = one_a_channel(13)[0]
    eps[::2] = 0.0
    out = corrected(z, nn.ReLU(), make_terms("closed form", eps, eps), known_module(nn.ReLU()))
    assert_same_bits(out[:, ::2], torch.relu(z)[:, ::2])
    assert not torch.equal(out[:, 1::2], torch.relu(z)[:, 1::2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_and_missing_inputs_give_what_the_base_gives(dtype: torch.dtype, form: str) -> None:
    z = torch.tensor([math.inf, -math.inf, 6e4, -6e4, math.nan] + [0.5] * 11, dtype=dtype, requires_grad=True)
    terms = make_terms(form, 0.5, 0.4)
    out = corrected(z, torch.relu, terms, known_module(nn.ReLU()))
    far = [0, 1, 4] if {"gain", "slope"} & set(terms.names) else [0, 1, 2, 3, 4]
    torch.testing.assert_close(out[far], torch.relu(z[far]), equal_nan=True, rtol=0.0, atol=1e-30)
    assert out[5] != 0.5
    by_z, by_amplitudes = torch.autograd.grad(out, (z, terms.amplitudes), torch.ones_like(z))
    slopes = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=dtype)
    torch.testing.assert_close(by_z[far[:-1]], slopes[far[:-1]])
    assert by_amplitudes.isfinite().all()


@pytest.mark.parametrize("sigma", [1e-36, 1e-20, 1e16, 1e37])
def test_any_spread_that_float32_holds_is_computed(sigma: float) -> None:
    u = points(64).requires_grad_()
    z = (u.detach() * sigma).requires_grad_()
    terms = make_terms("free terms")._replace(shape=torch.tensor([0.0, sigma]))
    out = corrected(z, nn.ReLU(), terms, known_module(nn.ReLU()))
    exact = torch.relu(u) + (0.3 * u - 0.2) * torch.exp(-0.5 * u * u)
    torch.testing.assert_close(out / sigma, exact, rtol=1e-4, atol=1e-5)
    slopes = [torch.autograd.grad(each.sum(), x)[0] for each, x in ((out, z), (exact, u))]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)


def test_every_number_of_float16_is_read_and_written_as_it_is(kernel: TritonKernel) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    out = every.clone()
    kernel.add(out, torch.zeros_like(every), Terms(torch.tensor([0.0]), torch.tensor([0.0, 1.0]), None, 0.0))
    assert_same_bits(out, every)


@pytest.mark.parametrize("base", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Mish(inplace=True)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_in_place_is_the_same_function_written_over_its_input(form: str, base: nn.Module) -> None:
    z, terms, known = points(500).requires_grad_(), make_terms(form), known_module(base)
    assert known is not None
    out = corrected(z, known.value, terms, known)
    over = z * 1.0
    result = corrected_(over, base, terms, known)
    assert result.data_ptr() == over.data_ptr()
    assert_same_bits(result.detach(), out.detach())
    for one, other in zip(gradients(result, z, terms), gradients(out, z, terms), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_what_it_takes(kernel: TritonKernel) -> None:
    z, terms = points(4, 13), make_terms("free terms")
    assert kernel.takes(z, terms)
    assert not kernel.takes(z.double(), terms)
    assert not kernel.takes(z, make_terms("free terms", torch.zeros(4, 13), torch.zeros(4, 13)))
    assert not kernel.takes(z, terms._replace(table=smooth_table().float()))
    only_single = TritonKernel({torch.float32: EVERY_BASE})
    assert only_single.takes(z, terms) and not only_single.takes(z.bfloat16(), terms)


def test_second_derivatives_are_those_of_the_formula() -> None:
    z, terms = points(50).requires_grad_(), make_terms("free terms")

    def twice(out: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(out.square().sum(), (z, terms.amplitudes), create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1].sum(), (z, terms.amplitudes))

    actual = twice(corrected(z, nn.SiLU(), terms, known_module(nn.SiLU())))
    torch.testing.assert_close(actual, twice(nn.SiLU()(z) + correction_of(z, terms)), rtol=1e-4, atol=1e-3)


class TestCheck:
    """What decides on a device whether the kernel is used."""

    @pytest.fixture(autouse=True)
    def fewer_points(self, monkeypatch: pytest.MonkeyPatch) -> None:
        every = gpu_check._special_points
        monkeypatch.setattr(gpu_check, "_special_points", lambda *given: every(*given)[::97].contiguous())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_passes(self, dtype: torch.dtype) -> None:
        assert gpu_check.exact_bases(torch.device("cpu"), dtype) >= ({5} if dtype == torch.bfloat16 else {5, 6})

    @pytest.mark.parametrize("wrong", ["value", "slope", "sum"])
    def test_fails_where_results_are_wrong(self, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
        add, add_gradient = TritonKernel.add, TritonKernel.add_gradient

        def broken_add(self: TritonKernel, out: Tensor, *given: object) -> None:
            add(self, out, *given)  # pyright: ignore[reportArgumentType]
            if wrong == "value":
                out.view(-1)[-1] += 1e-3

        def broken_gradient(self: TritonKernel, out: Tensor, *given: object) -> Tensor:
            by_amplitudes = add_gradient(self, out, *given)  # pyright: ignore[reportArgumentType]
            if wrong == "slope":
                out.view(-1)[-1] += 1e-3
            return by_amplitudes + 0.1 * (wrong == "sum")

        monkeypatch.setattr(TritonKernel, "add", broken_add)
        monkeypatch.setattr(TritonKernel, "add_gradient", broken_gradient)
        with pytest.raises(ArithmeticError, match="differ from the formula's"):
            gpu_check.exact_bases(torch.device("cpu"), torch.float32)

    def test_bases_with_other_bits_are_left_to_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_check, "_is_exact", lambda kernel, z, known: known.code == 1)
        inside = gpu_check.exact_bases(torch.device("cpu"), torch.float32)
        kernel, z = TritonKernel({torch.float32: inside}), points(9)
        relu, silu = known_module(nn.ReLU()), known_module(nn.SiLU())
        assert relu is not None and silu is not None
        terms = make_terms("closed form")
        assert kernel.inside(z, terms, relu) is relu and kernel.inside(z, terms, silu) is None
