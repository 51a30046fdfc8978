"""What the Triton kernels are tried on, and what their results are held against: by the interpreter and on a device."""

from __future__ import annotations

import torch
from test_kernels import HALF_WIDTH, smooth_table
from torch import Tensor, nn

from eafo_dynamic.correction.kernels import Terms, corrected, correction_of, known_module

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASES: list[nn.Module] = [
    nn.ReLU(),
    nn.LeakyReLU(0.2),
    nn.LeakyReLU(0.0),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Mish(),  # by torch, and the correction added to it
    nn.Hardtanh(),  # not known: it stays with autograd
]
FORMS = ["closed form", "free terms", "table"]
LAYOUTS = {
    "[N, C]": ((37, 13), None),
    "[N, T, C]": ((3, 11, 13), None),
    "[C]": ((13,), None),
    "[N, 1]": ((40, 1), None),
    "[N, C, H, W]": ((3, 13, 5, 7), None),
    "[N, C, H, W], large": ((1, 3, 33, 32), None),
    "channels last": ((3, 13, 5, 7), torch.channels_last),
    "[N, C, 1, 1]": ((40, 13, 1, 1), None),
    "channels last 3d": ((2, 13, 3, 2, 2), torch.channels_last_3d),
}


def points(*size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return (4.0 * torch.randn(size, generator=torch.Generator().manual_seed(0))).to(device, dtype)


def make_terms(
    form: str, eps: Tensor | float = 0.3, lift: Tensor | float = -0.2, intervals: int = 16, device: str = "cpu"
) -> Terms:
    table = smooth_table(intervals).to(device, torch.float32) if form == "table" else None
    amplitudes = [torch.as_tensor(each).to(device).clone().requires_grad_() for each in (eps, lift)]
    second = amplitudes[1] if form == "free terms" else None
    return Terms(amplitudes[0], torch.tensor([0.2, 1.4], device=device), table, HALF_WIDTH, second)


def one_a_channel(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.linspace(-0.5, 0.4, channels).to(dtype), torch.linspace(0.3, -0.3, channels).to(dtype)


def of_layout(layout: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Pre-activations, and amplitudes one a channel that broadcast to them."""
    size, memory = LAYOUTS[layout]
    z = points(*size, dtype=dtype, device=device)
    behind_batch = len(size) > 3
    eps, lift = one_a_channel(size[1] if behind_batch else size[-1])
    view = (-1, *[1] * (len(size) - 2)) if behind_batch else (-1,)
    return z if memory is None else z.to(memory_format=memory), (eps.view(view), lift.view(view))


def in_double(terms: Terms) -> Terms:
    *parts, half_width, lift = terms
    eps, shape, table = (None if each is None else each.detach().double() for each in parts)
    assert eps is not None and shape is not None
    wide = None if lift is None else lift.detach().double().requires_grad_()
    return Terms(eps.requires_grad_(), shape, table, half_width, wide)


def assert_meets_formula(z: Tensor, base: nn.Module, terms: Terms, sums: float = 2e-4) -> None:
    """Value and gradients are those of the formula, rounded once; given bases and their gradients once more."""
    z = z.detach().requires_grad_()
    out = corrected(z, base, terms, known_module(base))
    assert out.dtype == z.dtype and out.stride() == z.stride()
    wide, double = z.detach().double().requires_grad_(), in_double(terms)
    exact = base(wide) + correction_of(wide, double)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(3)).to(z)
    weight = torch.empty_like(out).copy_(weight)
    found = torch.autograd.grad(out, [each for each in (z, terms.eps, terms.lift) if each is not None], weight)
    inputs = [each for each in (wide, double.eps, double.lift) if each is not None]
    by_z, *exact_sums = torch.autograd.grad(exact, inputs, weight.double())
    rounding = torch.finfo(z.dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=2 * rounding, atol=max(rounding / 4, 2e-6))
    assert found[0].dtype == z.dtype and found[0].stride() == z.stride()
    torch.testing.assert_close(found[0].double(), by_z, rtol=4 * rounding, atol=max(2 * rounding, 1e-5))
    for ours, theirs, amplitude in zip(found[1:], exact_sums, (terms.eps, terms.lift), strict=False):
        assert amplitude is not None and ours.dtype == amplitude.dtype
        last = torch.finfo(amplitude.dtype).eps  # summed from unrounded terms
        torch.testing.assert_close(ours.double(), theirs, rtol=max(last, 1e-5), atol=sums)
