"""Merged models in TorchScript: the same functions where Python is not."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from eafo_dynamic import CorrectedActivation, CRReLU, merge
from eafo_dynamic.apply.surgery import hosted_sites, wrap
from eafo_dynamic.density import histogram
from eafo_dynamic.errors import SiteError
from eafo_dynamic.find.sites import find_sites
from tests.apply.test_merge import result, wrapped_awkward

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
BASES = [nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.Tanh, nn.Softplus]
FORMS: dict[str, dict[str, Any]] = {
    "tied": {},
    "free": {"free": True},
    "tabulated": {"tabulated": True},
    "per channel": {"per_channel": True},
    "per channel, free": {"per_channel": True, "free": True},
}


def scripted(module: nn.Module) -> Any:
    """A script that has been on disk."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    return torch.jit.load(file)


def merged(base: nn.Module, images: bool, **form: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer, x = (nn.Conv2d(2, 6, 1), torch.randn(3, 2, 4, 4)) if images else (nn.Linear(5, 6), torch.randn(7, 5))
    model = nn.Sequential(layer, base, layer.__class__(6, 2, *([1] if images else [])))
    wrap(model, find_sites(model, 3 * x), **form)
    ((host, site),) = hosted_sites(model)
    with torch.no_grad():
        for key in (site.keys[0], site.keys[3]):
            if getattr(host, key) is not None:
                getattr(host, key).uniform_(-0.4, 0.4)
        getattr(host, site.keys[1]).copy_(torch.tensor([0.2, 1.3]))
    return merge(model).eval(), 3 * x


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_a_script_computes_the_same(base: type[nn.Module], form: str) -> None:
    model, x = merged(base(), images=False, **FORMS[form])
    assert isinstance(model[1], CorrectedActivation)
    script = scripted(model)
    for batch in (x, x[:2], x.unsqueeze(0)):
        torch.testing.assert_close(script(batch), model(batch), **ROUNDING)
    assert isinstance(model[1], CorrectedActivation), "the model that was scripted stays as it was"


@pytest.mark.parametrize("form", ["tied", "per channel, free"])
@pytest.mark.parametrize("base", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.GELU("tanh")], ids=str)
def test_images_and_bases_in_place(base: nn.Module, form: str) -> None:
    model, x = merged(copy.deepcopy(base), images=True, **FORMS[form])
    torch.testing.assert_close(scripted(model)(x), model(x), **ROUNDING)
    z = torch.randn(2, 6, 3, 3)
    script, expected = scripted(model[1]), model[1](z.clone())
    given = z.clone()
    out = script(given)
    torch.testing.assert_close(out, expected, **ROUNDING)
    assert torch.equal(given, out) == getattr(base, "inplace", False)


@pytest.mark.parametrize("base", [nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.ELU()], ids=str)
def test_gradients(base: nn.Module) -> None:
    activation = CorrectedActivation(base, 0.3)
    ours, theirs = (torch.linspace(-3, 3, 50, requires_grad=True) for _ in range(2))
    (2 * activation(1.0 * ours)).square().sum().backward()
    by_eps, activation.eps.grad = activation.eps.grad, None
    script = torch.jit.script(activation)
    (2 * script(1.0 * theirs)).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **ROUNDING)
    torch.testing.assert_close(by_eps, activation.eps.grad, **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_other_numbers(dtype: torch.dtype) -> None:
    for activation in (CRReLU(0.3), CorrectedActivation(nn.ReLU(), 0.3, histogram(torch.randn(1, 500)))):
        z = torch.arange(-5, 6).to(dtype)
        out = scripted(activation)(z)
        assert out.dtype == dtype
        torch.testing.assert_close(out, activation(z))


def test_eps_zero_leaves_every_bit() -> None:
    z = torch.tensor([-0.0, 0.0, -1.0, 1e-40, float("inf"), float("nan")])
    activation = CorrectedActivation(nn.LeakyReLU(), 0.0, lift=0.0)
    assert torch.equal(scripted(activation)(z).view(torch.int32), activation.base(z).view(torch.int32))


@pytest.mark.filterwarnings("ignore:.*to_torchscript")
def test_lightnings_own_way() -> None:
    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    net, x = Net(), torch.randn(3, 4)
    wrap(net, eps_init=0.3)
    script: Any = merge(net).to_torchscript()
    torch.testing.assert_close(script(x), net(x), **ROUNDING)


def test_an_activation_that_is_called_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(input=x)

    net, x = Named(), torch.randn(3, 4)
    wrap(net, eps_init=0.3)
    expected = net(x)
    merge(net)
    assert torch.equal(net(x), expected)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), expected, **ROUNDING)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "OneReluForAll",
            r"relu: torch.jit.script cannot tell calls .*torch.jit.trace\(model, x\), or torch.export",
        ),
        ("WrittenOut", r"cannot read a graph of torch.export. Take torch.jit.trace\(model, x\)"),
    ],
)
def test_what_torch_cannot_script_says_what_to_do(name: str, said: str) -> None:
    model, x = wrapped_awkward(name)
    with pytest.raises(SiteError, match=r"torch.jit.script cannot read a wrapped model. Take script\(merge\(model\)\)"):
        torch.jit.script(model)
    model = merge(model, x)
    with pytest.raises(SiteError, match=said) as caught:
        torch.jit.script(model)
    assert "\n" not in str(caught.value)
    traced = torch.jit.trace(model, (x.clone(),))
    torch.testing.assert_close(result(traced, x), result(model, x), **ROUNDING)


@pytest.mark.parametrize("form", ["tied", "per channel, free"])
def test_torch_fx_traces_the_corrections(form: str) -> None:
    model, x = merged(nn.GELU(), images=True, **FORMS[form])
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    assert not torch.allclose(traced(x), model[2](model[1].base(model[0](x))), atol=1e-3)
    calls, x = wrapped_awkward("OneReluForAll")
    with pytest.raises(SiteError, match="has a function of its own for each call"):
        torch.fx.symbolic_trace(merge(calls))
