"""The compiled kernel on half precision and with one amplitude a channel, against the formula in double precision."""

from __future__ import annotations

import pytest
import torch
from test_kernels import HALF_WIDTH, assert_same_bits, smooth_table
from torch import Tensor, nn

from eafo_dynamic.apply.standalone import CorrectedActivation
from eafo_dynamic.correction.kernels import Terms, corrected, corrected_, fused, known_module, native
from eafo_dynamic.correction.kernels.formula import correction

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASES = [nn.ReLU(), nn.LeakyReLU(0.2), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish()]
TABLES = {"closed form": None, "table": smooth_table().float()}
LAYOUTS = {
    "[N, C]": ((37, 13), None),
    "[N, T, C]": ((3, 11, 13), None),
    "[C]": ((13,), None),
    "[N, C, H, W]": ((3, 13, 5, 7), None),
    "channels last": ((3, 13, 5, 7), torch.channels_last),
    "[N, C, 1, 1]": ((40, 13, 1, 1), None),
    "channels last 3d": ((2, 13, 3, 2, 2), torch.channels_last_3d),
}


@pytest.fixture(autouse=True)
def compiler() -> None:
    if native.native_kernel() is None:
        pytest.skip("no C compiler here")


def points(size: tuple[int, ...], dtype: torch.dtype, memory: torch.memory_format | None = None) -> Tensor:
    z = (4.0 * torch.randn(size, generator=torch.Generator().manual_seed(0))).to(dtype)
    return (z if memory is None else z.to(memory_format=memory)).requires_grad_()


def one_a_channel(z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    eps = torch.linspace(-0.5, 0.4, 13).to(dtype)
    eps = eps.view(-1, *[1] * (z.dim() - 2)) if z.dim() >= 4 else eps
    return eps.unsqueeze(0).requires_grad_()


def assert_meets_formula(z: Tensor, base: nn.Module, given: Terms) -> None:
    """Value and gradients are those of the formula in double, rounded once (the gradients: at most three times)."""
    assert isinstance(fused._kernel_for(z, given, "native"), native.NativeKernel)
    out = corrected(z, base, given, known_module(base), "native")
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(3)).to(z.dtype)
    weight = torch.empty_like(out).copy_(weight)
    by_z, by_eps = torch.autograd.grad(out, (z, given.amplitudes), weight)
    wide, amplitude = (each.detach().double().requires_grad_() for each in (z, given.amplitudes))
    table = None if given.table is None else given.table.double()
    exact = base(wide) + correction(wide, amplitude, given.shape.double(), table, given.half_width)
    exact_z, exact_eps = torch.autograd.grad(exact, (wide, amplitude), weight.double())
    rounding = torch.finfo(z.dtype).eps
    assert out.dtype == by_z.dtype == z.dtype and out.stride() == z.stride() and by_eps.dtype == given.amplitudes.dtype
    torch.testing.assert_close(out.double(), exact, rtol=2 * rounding, atol=max(rounding / 8, 2e-6))
    torch.testing.assert_close(by_z.double(), exact_z, rtol=4 * rounding, atol=max(rounding / 4, 1e-5))
    # summed from unrounded terms: half precision comes in with its last rounding only
    last = torch.finfo(given.amplitudes.dtype).eps
    torch.testing.assert_close(by_eps.double(), exact_eps, rtol=max(last, 1e-5), atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_amplitude_a_channel_in_every_layout(layout: str, table: Tensor | None, dtype: torch.dtype) -> None:
    z = points(LAYOUTS[layout][0], dtype, LAYOUTS[layout][1])
    assert_meets_formula(z, nn.ReLU(), Terms(one_a_channel(z), torch.tensor([0.2, 1.4]), table, HALF_WIDTH))


@pytest.mark.parametrize("channels", [False, True], ids=["one eps", "eps a channel"])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_base_and_type(dtype: torch.dtype, base: nn.Module, table: Tensor | None, channels: bool) -> None:
    z = points((91, 13), dtype)
    eps = one_a_channel(z) if channels else torch.tensor([0.3], requires_grad=True)
    assert_meets_formula(z, base, Terms(eps, torch.tensor([0.2, 1.4]), table, HALF_WIDTH))


@pytest.mark.parametrize("n", [0, 1, 7, 255, 256, 257, 4097, 300_001])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_length_is_covered(n: int, dtype: torch.dtype) -> None:
    given = Terms(torch.tensor([-0.4], requires_grad=True), torch.tensor([0.2, 1.4]), TABLES["table"], HALF_WIDTH)
    z = points((n,), dtype)
    (out := corrected(z, nn.ReLU(), given, known_module(nn.ReLU()), "native")).float().sum().backward()
    exact = torch.relu(z.double()) + correction(z.double(), *(t.double() for t in given[:3]), HALF_WIDTH)  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    slope = torch.autograd.grad(exact.sum(), given.amplitudes, allow_unused=True)[0]
    assert slope is not None and given.amplitudes.grad is not None
    torch.testing.assert_close(given.amplitudes.grad, slope, rtol=1e-5, atol=2e-3)


def test_a_model_in_half_precision_keeps_its_amplitudes_dtype() -> None:
    z = points((64, 13), torch.bfloat16)
    table = smooth_table().to(torch.bfloat16)
    shape = torch.tensor([0.2, 1.4], dtype=torch.bfloat16)
    assert_meets_formula(z, nn.GELU(), Terms(one_a_channel(z, torch.bfloat16), shape, table, HALF_WIDTH))


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_with_eps_zero_are_the_base_bit_for_bit(
    dtype: torch.dtype, base: nn.Module, table: Tensor | None
) -> None:
    z = points((20, 13), dtype)
    with torch.no_grad():
        z[0] = torch.inf
        z[1] = -torch.inf
        z[2] = torch.nan
        z[3] = -0.0
    eps = one_a_channel(z).detach().clone()
    eps[:, ::2] = 0.0
    given = Terms(eps.requires_grad_(), torch.tensor([0.2, 1.4]), table, HALF_WIDTH)
    out = corrected(z, base, given, known_module(base), "native")
    weight = torch.linspace(-2, 2, z.numel()).view_as(z).to(dtype)
    (by_z,) = torch.autograd.grad(out, z, weight)
    plain = z.detach().clone().requires_grad_()
    expected = base(plain)
    (by_plain,) = torch.autograd.grad(expected, plain, weight)
    assert_same_bits(out[:, ::2], expected[:, ::2])
    assert_same_bits(by_z[:, ::2], by_plain[:, ::2])
    assert not torch.equal(out[4:, 1::2], expected[4:, 1::2]), "the other channels are corrected"


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_number_of_16_bits_is_read_and_written_as_it_is(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    out, z = every.clone(), torch.zeros_like(every)
    given = Terms(torch.tensor([0.0]), torch.tensor([0.0, 1.0]), None, 0.0)
    kernel = native.native_kernel()
    assert kernel is not None
    kernel.add(out, z, given)
    assert_same_bits(out, every)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_results_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    wide = torch.cat([torch.logspace(-9, 6, 20_000), -torch.logspace(-9, 6, 20_000), torch.tensor([65519.0, 65520.0])])
    z, line = wide.to(dtype).view(-1, 2), nn.LeakyReLU(1.0)
    # a bell that is flat over all of z: f(z) = z + 2^-12 z exactly, most often between two numbers of 16 bits
    given = Terms(torch.full((1, 2), 2.0**-12), torch.tensor([0.0, 2.0**60]), None, 0.0)
    out = corrected(z, line, given, known_module(line), "native")
    assert_same_bits(out, (z.double() * (1 + 2.0**-12)).to(torch.float32).to(dtype))
    # one amplitude for all: the kernel of float32 at work on parts
    given = Terms(torch.tensor([0.3]), torch.tensor([0.2, 1.4]), None, 0.0)
    expected = corrected(z.float(), line, given, known_module(line), "native")
    assert_same_bits(corrected(z, line, given, known_module(line), "native"), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    z, before = points((23_000, 13), dtype), torch.get_num_threads()
    given = Terms(one_a_channel(z), torch.tensor([0.2, 1.4]), TABLES["table"], HALF_WIDTH)
    results: list[tuple[Tensor, ...]] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = corrected(z, nn.ReLU(), given, known_module(nn.ReLU()), "native")
            results.append((out, *torch.autograd.grad(out, (z, given.amplitudes), torch.ones_like(out))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same_bits(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_the_same_function_written_over_its_input(dtype: torch.dtype) -> None:
    z = points((3, 13, 5, 7), dtype, torch.channels_last).detach()
    given = Terms(one_a_channel(z).detach(), torch.tensor([0.2, 1.4]), None, HALF_WIDTH)
    expected = corrected(z, nn.ReLU(), given, known_module(nn.ReLU()), "native")
    written = z.clone(memory_format=torch.preserve_format)
    assert corrected_(written, nn.ReLU(), given, known_module(nn.ReLU()), "native") is written
    assert_same_bits(written, expected)


def test_amplitudes_of_another_shape_go_by_the_formula() -> None:
    z = points((4, 13), torch.float32)
    eps = torch.linspace(-0.5, 0.5, 4).view(1, 4, 1)
    assert fused._kernel_for(z, Terms(eps, torch.tensor([0.0, 1.0]), None, 0.0), "native") is not None
    eps = torch.linspace(-0.5, 0.5, 52).view(1, 4, 13)
    given = Terms(eps, torch.tensor([0.0, 1.0]), None, 0.0)
    assert fused._kernel_for(z, given, "native") is None
    out = corrected(z, nn.ReLU(), given, known_module(nn.ReLU()), "native")
    torch.testing.assert_close(out, torch.relu(z) + eps[0] * z * torch.exp(-z * z / 2))


def test_autocast_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    add = native.NativeKernel.add

    def spy(self: native.NativeKernel, out: Tensor, z: Tensor, *rest: object) -> None:
        seen.append(z.dtype)
        add(self, out, z, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(native.NativeKernel, "add", spy)
    model = nn.Sequential(nn.Linear(8, 8), CorrectedActivation(nn.GELU(), eps=0.3), nn.Linear(8, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(16, 8)).float().sum().backward()
    assert seen == [torch.bfloat16]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
