"""The option ``base``: other activations in place of a model's own, from wrapping to a merged model."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eafo_dynamic import EAFOController, apply_from_checkpoint, disabled, find_sites, merge, unwrap, wrap
from eafo_dynamic.apply.kept import CHECKPOINT_KEY
from eafo_dynamic.apply.manifest import check_form, manifest
from eafo_dynamic.apply.merge import load_merged, save_merged
from eafo_dynamic.correction.bases import activation_module, as_base
from eafo_dynamic.errors import ConfigError, PatternError, SiteError
from eafo_dynamic.policy.options import Options


class Net(nn.Module):
    """A module, a function, a module in place, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three, self.gate = (nn.Linear(6, 6) for _ in range(4))
        self.act, self.inside, self.head = nn.GELU(), nn.ReLU(inplace=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.one(x))
        x = F.silu(self.two(x))
        x = self.inside(self.three(x)) * torch.sigmoid(self.gate(x))
        return self.head(x)


def by_hand(net: Net, x: Tensor, first: Any, second: Any, third: Any) -> Tensor:
    x = first(net.one(x))
    x = second(net.two(x))
    return net.head(third(net.three(x)) * torch.sigmoid(net.gate(x)))


def x_of(n: int = 7) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1))


def wrapped(base: Any, **options: Any) -> Net:
    net = Net()
    wrap(net, find_sites(net, x_of()), 0.0, terms="full", base=base, **options)
    return net


NEW = [
    "relu",
    "squared_relu",
    "squared_leaky_relu",
    "xielu",
    "swish_beta(beta=1.5)",
    "leaky_relu(negative_slope=0.2)",
    "tanh",
]


@pytest.mark.parametrize("name", NEW)
def test_every_site_computes_the_other_base_bit_for_bit(name: str) -> None:
    net, x = wrapped(name), x_of()
    other = as_base(name).fn
    expected = by_hand(net, x, other, other, other)
    assert torch.equal(net(x), expected)
    weights = [p for key, p in net.named_parameters() if "eafo" not in key]
    found = torch.autograd.grad(net(x).square().sum(), weights)
    for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), weights), strict=True):
        assert torch.equal(ours, theirs)
    twin = Net()
    unwrap(net)
    assert torch.equal(net(x), twin(x)) and type(net.act) is nn.GELU


def test_a_mapping_names_some_and_leaves_the_others() -> None:
    net, x = wrapped({"act": "relu", "inside": "squared_relu"}), x_of()
    assert torch.equal(net(x), by_hand(net, x, F.relu, F.silu, as_base("squared_relu").fn))


def test_the_first_pattern_that_matches_decides() -> None:
    net, x = wrapped({"GELU": "tanh", ".*": "relu"}), x_of()
    assert torch.equal(net(x), by_hand(net, x, torch.tanh, F.relu, F.relu))


def test_disabled_is_the_plain_model() -> None:
    net, x = wrapped("relu"), x_of()
    with disabled(net):
        assert torch.equal(net(x), Net()(x))


@pytest.mark.parametrize("name", ["relu", "xielu"])
def test_corrections_act_on_the_other_base(name: str) -> None:
    net, x = wrapped({"act": name}), x_of()
    values = {"eps": 0.3, "lift": -0.2, "gain": 0.15, "slope": -0.1}
    for key, value in values.items():
        nn.init.constant_(getattr(net.act, f"eafo_0_{key}"), value)
    z = net.one(x).detach()
    bump = (0.3 * z - 0.2) * torch.exp(-0.5 * z * z)
    expected = 1.15 * as_base(name).fn(z) - 0.1 * z + bump
    torch.testing.assert_close(net.act(z), expected)
    compiled = torch.compile(net.act, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), expected)


def test_copies_and_pickles_have_it() -> None:
    net, x = wrapped("squared_relu"), x_of()
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2))


def attached(**options: Any) -> EAFOController:
    return EAFOController.attach(sequential(), x_of(), **options)


def trained(controller: EAFOController, steps: int = 6) -> EAFOController:
    optimizer = torch.optim.Adam(controller.model.parameters(), lr=1e-2)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        controller.model(torch.randn(64, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        controller.step(step)
    return controller


@pytest.mark.parametrize("terms", ["full", "tied"])
def test_from_training_to_a_checkpoint_and_a_merged_file(terms: str, tmp_path: Path) -> None:
    controller = trained(attached(base={"1": "relu", "3": "xielu"}, terms=terms, update_every_n_steps=2))
    assert [str(base) for base in controller.bank.functions().bases] == ["relu", "xielu"]
    about = controller.about()
    assert [site["base"] for site in about["sites"]] == ["relu", "xielu"]
    assert about["options"]["base"] == {"1": "relu", "3": "xielu"}
    saved = {
        "state_dict": controller.model.state_dict(),
        CHECKPOINT_KEY: manifest(controller.report, **controller.options.form),
    }
    torch.save(saved, tmp_path / "last.ckpt")
    x = x_of()
    expected = controller.model.eval()(x)
    assert torch.equal(apply_from_checkpoint(sequential(), tmp_path / "last.ckpt")(x), expected)
    check_form(saved[CHECKPOINT_KEY], controller.options.form)
    with pytest.raises(SiteError, match=r"base=\{.*\} \(now None\)"):
        check_form(saved[CHECKPOINT_KEY], {**controller.options.form, "base": None})
    merged = merge(controller.model)
    assert torch.equal(merged(x), expected)
    for name in ("model.pt", "model.safetensors"):
        if name.endswith("safetensors"):
            pytest.importorskip("safetensors")
        save_merged(merged, tmp_path / name)
        assert torch.equal(load_merged(sequential(), tmp_path / name)(x), expected)


def test_a_base_without_corrections_stays_when_merged() -> None:
    net = sequential()
    wrap(net, find_sites(net, x_of()), 0.0, base="squared_relu")
    expected = net(x_of())
    assert torch.equal(merge(net)(x_of()), expected)
    torch.testing.assert_close(torch.export.export(net, (x_of(),)).module()(x_of()), expected)


def test_a_functional_call_is_merged_into_a_graph() -> None:
    net, x = wrapped("relu"), x_of()
    expected = net(x)
    torch.testing.assert_close(merge(net.eval(), x)(x), expected)


def gated() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 2))


WRONG: list[tuple[Any, str]] = [
    ("rellu", "base='rellu': is not a known activation. Use one of: celu,"),
    (3, "base=3: neither the name of an activation nor a mapping from patterns to names."),
    ({"1": 3}, "base=3: neither the name of an activation nor a mapping from patterns to names."),
    ({}, "base={}: an empty mapping. Name a pattern and a base, or leave it out."),
    ("swish_beta(gamma=2)", "base='swish_beta(gamma=2)': swish_beta has no hyper-parameter gamma. It has: beta."),
    ("swish_beta(2)", "base='swish_beta(2)': its hyper-parameters cannot be read. Write them as in leaky_relu("),
    ("swish_beta(beta='a')", "base=\"swish_beta(beta='a')\": beta='a' is of another kind. The default is 1.0."),
]


@pytest.mark.parametrize(("base", "message"), WRONG, ids=str)
def test_bases_that_there_are_not_are_one_line(base: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        Options(base=base)


def test_a_gate_is_refused_and_nothing_is_wrapped() -> None:
    net = gated()
    report = find_sites(net, x_of(), selection=Options(target_modules="Sigmoid").selection)
    before = list(net.state_dict())
    with pytest.raises(ConfigError, match=r"^base='relu': 1 is a gate \(sigmoid\), which no other base can replace\."):
        wrap(net, report, base="relu")
    assert list(net.state_dict()) == before and type(net[1]) is nn.Sigmoid


def test_a_pattern_that_matches_nothing_names_what_is_there() -> None:
    with pytest.raises(PatternError, match="nowhere"):
        attached(base={"nowhere": "relu"})


@pytest.mark.parametrize(
    "name", ["relu", "leaky_relu(negative_slope=0.2)", "swish_beta(beta=1.5)", "gelu(approximate='tanh')"]
)
def test_a_module_of_a_base(name: str) -> None:
    base, z = as_base(name), torch.linspace(-3, 3, 50)
    module = activation_module(base)
    assert torch.equal(module(z), base(z)) and as_base(module) == base
