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
NAMES = {
    "closed form": ("eps",),
    "free terms": ("eps", "lift"),
    "table": ("eps",),
    "every term": ("eps", "lift", "gain", "slope"),
    "tails": ("gain", "slope"),
    "table and tails": ("eps", "gain", "slope"),
    "lift and gain": ("lift", "gain"),
}
FORMS = list(NAMES)
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
    table = smooth_table(intervals).to(device, torch.float32) if "table" in form else None
    eps, lift = (torch.as_tensor(each) for each in (eps, lift))
    every = {"eps": eps, "lift": lift, "gain": 0.5 * eps, "slope": 0.7 * lift}
    rows = torch.stack([every[name] for name in NAMES[form]])
    amplitudes = rows.to(device).clone().requires_grad_()
    return Terms(amplitudes, torch.tensor([0.2, 1.4], device=device), table, HALF_WIDTH, NAMES[form])


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
    amplitudes, shape, table, half_width, names = terms
    amplitudes, shape = amplitudes.detach().double().requires_grad_(), shape.double()
    return Terms(amplitudes, shape, None if table is None else table.double(), half_width, names)


def assert_meets_formula(z: Tensor, base: nn.Module, terms: Terms, sums: float = 2e-4) -> None:
    """Value and gradients are those of the formula, rounded once; given bases and their gradients once more."""
    z = z.detach().requires_grad_()
    out = corrected(z, base, terms, known_module(base))
    assert out.dtype == z.dtype and out.stride() == z.stride()
    wide, double = z.detach().double().requires_grad_(), in_double(terms)
    plain = base(wide)
    exact = plain + correction_of(wide, double, plain)
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(3)).to(z)
    weight = torch.empty_like(out).copy_(weight)
    found = torch.autograd.grad(out, [z, terms.amplitudes], weight)
    by_z, exact_sums = torch.autograd.grad(exact, [wide, double.amplitudes], weight.double())
    rounding = torch.finfo(z.dtype).eps
    parts = 4 if known_module(base) is None and "gain" in terms.names else 1  # each rounded, before they are added
    torch.testing.assert_close(out.double(), exact, rtol=2 * rounding, atol=max(parts * rounding / 4, 2e-6))
    assert found[0].dtype == z.dtype and found[0].stride() == z.stride()
    torch.testing.assert_close(found[0].double(), by_z, rtol=4 * rounding, atol=max(2 * rounding, 1e-5))
    assert found[1].dtype == terms.amplitudes.dtype
    last = torch.finfo(terms.amplitudes.dtype).eps  # summed from unrounded terms
    allowed = torch.full_like(exact_sums, sums)
    if "gain" in terms.names and rounding > 1e-6:  # but for a base that is given, in half precision
        by_gain = allowed[terms.names.index("gain")]
        by_gain += rounding * (weight.double() * plain.detach()).abs().sum_to_size(by_gain.shape)
    assert ((found[1].double() - exact_sums).abs() <= allowed + max(last, 1e-5) * exact_sums.abs()).all()
