"""Baking: the same function from plain modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from eafo_dynamic import merge
from eafo_dynamic.activation import CorrectedActivation
from eafo_dynamic.sites import find_sites
from eafo_dynamic.surgery import hosted_sites, is_wrapped, unwrap, wrap
from tests.zoo.awkward import make_awkward


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.relu, self.two = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)
        self.gelu, self.prelu, self.tanh = nn.GELU(), nn.PReLU(6), nn.Tanh()
        self.alias = self.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.tanh(self.prelu(self.two(self.gelu(self.relu(self.one(x))))))


def wrapped_plain(per_channel: bool = False) -> tuple[Plain, Tensor]:
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(5, 6)
    wrap(model, find_sites(model, x), per_channel=per_channel)
    for k, (host, site) in enumerate(hosted_sites(model)):
        nn.init.constant_(getattr(host, site.keys[0]), round(0.3 - 0.1 * k, 1))  # one of them zero
        getattr(host, site.keys[1]).copy_(torch.tensor([0.2 * k, 1.0 + k]))
    return model, x


@pytest.mark.parametrize("per_channel", [False, True])
def test_merged_model_is_plain_and_computes_the_same(per_channel: bool) -> None:
    model, x = wrapped_plain(per_channel)
    expected = model(x)
    assert merge(model) == []
    torch.testing.assert_close(model(x), expected)
    assert not is_wrapped(model)
    assert not any("eafo" in key for key in model.state_dict())
    assert {type(m).__name__ for m in model.children()} == {"Linear", "CorrectedActivation", "Tanh"}
    assert [type(m) for m in (model.relu.base, model.prelu.base)] == [nn.ReLU, nn.PReLU]
    assert model.alias is model.gelu
    assert not any("eps" in name for name, _ in model.named_parameters())


def test_merged_model_copies_saves_and_exports_without_the_plugin() -> None:
    model, x = wrapped_plain()
    merge(model)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    program = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert [site.name for site in find_sites(model, x).wrapped] == ["tanh"]  # its eps was zero


def test_merging_a_plain_model_does_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before = list(model.modules())
    assert merge(model) == []
    assert list(model.modules()) == before


def test_shared_module_with_one_correction_for_all_calls_is_baked() -> None:
    model, run = make_awkward("OneReluForAll")
    wrap(model, find_sites(model, run=run), 0.2)
    expected = run(model)
    assert merge(model) == []
    torch.testing.assert_close(run(model), expected)
    assert isinstance(model.relu, CorrectedActivation)
    assert list(model.state_dict()) == [*make_awkward("OneReluForAll")[0].state_dict(), "relu.eps", "relu.shape"]


def test_what_no_module_can_express_stays_and_is_named() -> None:
    model, run = make_awkward("MixedCalls")
    wrap(model, find_sites(model, run=run))
    for k, (host, site) in enumerate(hosted_sites(model)):
        nn.init.constant_(getattr(host, site.keys[0]), 0.1 + 0.02 * k)
    expected = run(model).detach()
    remaining = merge(model)
    assert [name for name in remaining if "act#" in name] == ["act#0", "act#1"]
    assert len(remaining) == 8
    torch.testing.assert_close(run(model).detach(), expected)
    assert isinstance(model.get_submodule("sequence.1"), CorrectedActivation)
    assert not any("eps" in name for name, _ in model.named_parameters())
    unwrap(model)
    assert not is_wrapped(model)


def test_zero_corrections_leave_nothing_behind() -> None:
    model, run = make_awkward("MixedCalls")
    plain, _ = make_awkward("MixedCalls")
    wrap(model, find_sites(model, run=run), 0.0)
    assert merge(model) == []
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(run(model), run(plain))
