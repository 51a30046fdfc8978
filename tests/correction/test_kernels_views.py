"""Activations in place on views, gaps in memory included: at eps = 0 the gradients of torch, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eafo_dynamic.apply.surgery import hosted_sites, wrap
from eafo_dynamic.correction.kernels import Backend
from eafo_dynamic.find.sites import Selection, SiteReport, find_sites

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": lambda: nn.ReLU(inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(0.1, inplace=True),
    "SiLU": lambda: nn.SiLU(inplace=True),
    "Mish": lambda: nn.Mish(inplace=True),
    "Hardswish": lambda: nn.Hardswish(inplace=True),
    "ELU": lambda: nn.ELU(inplace=True),
    "SELU": lambda: nn.SELU(inplace=True),
    "CELU": lambda: nn.CELU(1.3, inplace=True),
    "ReLU6": lambda: nn.ReLU6(inplace=True),
    "Hardtanh": lambda: nn.Hardtanh(inplace=True),
    "Threshold": lambda: nn.Threshold(0.1, 0.0, inplace=True),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda h: h,
    "every second channel": lambda h: h[:, ::2],
    "one channel": lambda h: h[:, 1],
    "a part of the batch": lambda h: h[1:3],
    "columns with gaps": lambda h: h[..., ::2],
    "a frame cut off": lambda h: h[:, :, 1:-1],
    "channels last": lambda h: h.permute(0, 2, 3, 1),
    "transposed, with gaps": lambda h: h.transpose(1, 3)[..., 1:3],
}
USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the view": lambda h, y: (y * torch.linspace(-1, 1, y.numel()).to(y).view(y.shape)).sum(),
    "all of it": lambda h, y: (h * torch.linspace(-1, 1, h.numel()).to(h).view(h.shape)).sum(),
    "both": lambda h, y: h.square().sum() + y.sin().sum(),
    "another order": lambda h, y: (
        y.transpose(1, -1).contiguous() * torch.linspace(0, 1, y.numel()).to(y).view(y.transpose(1, -1).shape)
    ).sum(),
}


class Viewing(nn.Module):
    def __init__(self, act: nn.Module, view: Callable[[Tensor], Tensor], use: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.act, self.view, self.use = act, view, use

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.3
        return self.use(h, self.act(self.view(h)))


def sites_of(model: nn.Module, x: Tensor) -> SiteReport:
    """The activations of a model, also one whose result is a loss."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="EAFO")  # no layer comes after them
        return find_sites(model, x, selection=Selection(target_modules=".*"))


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    given = x.clone().requires_grad_()
    out = model(given)
    out.backward()
    assert given.grad is not None
    return out.detach(), given.grad


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_eps_zero_is_torchs_own_gradient(name: str, backend: Backend) -> None:
    x = 2 * torch.randn(6, 4, 9, 11, generator=torch.Generator().manual_seed(1))
    for view_name, view in VIEWS.items():
        for use_name, use in USES.items():
            plain, wrapped = (Viewing(ACTIVATIONS[name](), view, use) for _ in range(2))
            wrap(wrapped, sites_of(wrapped, x), 0.0)
            hosted_sites(wrapped)[0][1].switch.backend = backend
            for one, two in zip(gradients(plain, x), gradients(wrapped, x), strict=True):
                assert torch.equal(one, two), (view_name, use_name)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_correction_of_a_view_leaves_the_rest_its_gradient(name: str) -> None:
    """With eps other than 0, against the same written out of place."""
    x = 2 * torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    act = ACTIVATIONS[name]()
    outside = ACTIVATIONS[name]()
    outside.inplace = False

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = outside

        def forward(self, x: Tensor) -> Tensor:
            h = x * 1.3
            y = self.act(h[:, ::2])
            return USES["both"](torch.stack([y, h[:, 1::2]], dim=2).flatten(1, 2), y)

    found = []
    for model in (Viewing(act, VIEWS["every second channel"], USES["both"]), Joined()):
        wrap(model, sites_of(model, x), 0.3)
        out, by_x = gradients(model, x)
        found.append((out, by_x, next(model.parameters()).grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    "call", [lambda z: F.silu(z, inplace=True), lambda z: z.relu_(), F.elu_], ids=["silu", "relu_", "elu_"]
)
def test_functions_in_place(call: Callable[[Tensor], Tensor]) -> None:
    class Calling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x * 1.3
            call(h[:, ::2])
            return h.square().sum()

    x = 2 * torch.randn(7, 9, generator=torch.Generator().manual_seed(1))
    plain, wrapped = Calling(), Calling()
    wrap(wrapped, sites_of(wrapped, x), 0.0)
    for one, two in zip(gradients(plain, x), gradients(wrapped, x), strict=True):
        assert torch.equal(one, two)
