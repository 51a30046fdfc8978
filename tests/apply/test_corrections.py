"""Corrections in a file of their own: into plain models, parts and wholes, and never half."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from eafo_dynamic import EAFOController, find_sites, load_corrections, merge, save_corrections, unwrap, wrap
from eafo_dynamic.apply.naming import Renaming
from eafo_dynamic.apply.sitelist import site_tensors
from eafo_dynamic.apply.surgery import hosted_sites, is_wrapped
from eafo_dynamic.errors import SiteError
from tests.zoo.awkward import MODELS, make_awkward

X = torch.linspace(-2.0, 2.0, 32).reshape(8, 4)


class Block(nn.Module):
    """A shared module, a functional call and a written-out one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(self.relu(self.two(x))))
        x = self.two(x * torch.sigmoid(1.702 * x))
        return self.one(F.gelu(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.act, self.head = Block(), nn.Tanh(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.block(x)))


def unequal(model: nn.Module) -> nn.Module:
    """Gives every site a function of its own."""
    with torch.no_grad():
        for k, tensor in enumerate(site_tensors(model).values()):
            tensor.add_(0.03 * (k % 5 + 1))
    return model


def make(form: str = "free") -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    wrap(net, find_sites(net, X), 0.2, **{form: True})
    return unequal(net)


def plain_twin(model: nn.Module) -> nn.Module:
    """The plain model with the same weights."""
    return unwrap(copy.deepcopy(model))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("form", ["free", "tabulated", "per_channel"])
def test_a_plain_model_gets_all_of_them_to_the_bit(form: str, tmp_path: Path) -> None:
    net = make(form)
    file = save_corrections(net, tmp_path / "net.safetensors")
    fresh = plain_twin(net)
    assert not is_wrapped(fresh)
    assert load_corrections(fresh, file) is fresh
    assert torch.equal(fresh(X), net(X))
    assert {key: load_file(file)[key].shape for key in load_file(file)} == {
        key: value.shape for key, value in site_tensors(net).items()
    }, "exactly the names and sizes that they have in the state_dict"
    assert torch.equal(unwrap(fresh)(X), plain_twin(net)(X))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_hand_made_model(name: str, tmp_path: Path) -> None:
    model, run = make_awkward(name)
    wrap(model, find_sites(model, run=run), 0.2)
    unequal(model)
    fresh = plain_twin(model)
    load_corrections(fresh, save_corrections(model, tmp_path))
    torch.manual_seed(0)
    expected = run(model)
    torch.manual_seed(0)
    assert torch.equal(run(fresh), expected)


def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    net = make()
    save_corrections(net, tmp_path)
    torch.save({"weights": plain_twin(net).state_dict(), "y": net(X).detach()}, tmp_path / "rest.pt")
    code = f"""
import sys, torch
from eafo_dynamic import load_corrections
from tests.apply.test_corrections import Net, X
rest = torch.load({str(tmp_path / "rest.pt")!r})
net = Net()
net.load_state_dict(rest["weights"])
load_corrections(net, {str(tmp_path)!r})
assert torch.equal(net(X), rest["y"])
assert "lightning" not in sys.modules and "huggingface_hub" not in sys.modules
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_file_says_what_the_training_was(tmp_path: Path) -> None:
    net = Net()
    EAFOController.attach(net, X, max_eps=0.7)
    with safe_open(save_corrections(net, tmp_path), "pt") as file:
        header = json.loads(file.metadata()["eafo_dynamic"])
    assert header["about"]["options"]["max_eps"] == 0.7
    assert header["about"]["model"] == "Net"
    card = (tmp_path / "eafo_dynamic.md").read_text()
    names = [site.name for _, site in hosted_sites(net)]
    assert [line.split("|")[1].strip() for line in card.splitlines() if line.startswith("| `")] == [
        f"`{name}`" for name in names
    ]
    assert "load_corrections(model, 'eafo_dynamic.safetensors')" in card


def test_the_card_says_the_largest_change(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    wrap(net, eps_init=0.3)
    save_corrections(net, tmp_path / "own.safetensors")
    row = next(line for line in (tmp_path / "own.md").read_text().splitlines() if line.startswith("| `"))
    peak = 0.3 * torch.exp(torch.tensor(-0.5))  # eps u exp(-u^2 / 2) at u = 1
    assert float(row.split("|")[-2]) == pytest.approx(float(peak), abs=1e-4)


class Around(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TestParts:
    def test_of_the_whole_into_a_part_and_back(self, tmp_path: Path) -> None:
        net = make()
        whole = save_corrections(net, tmp_path / "net.safetensors")
        larger = Around(plain_twin(net))
        load_corrections(larger, whole)
        assert torch.equal(larger(X), net(X))
        file = save_corrections(larger, tmp_path / "larger.safetensors")
        assert all(key.startswith("net.") for key in load_file(file))
        smaller = plain_twin(net)
        load_corrections(smaller, file)
        assert torch.equal(smaller(X), net(X))
        another = Around(Around(plain_twin(net)))
        load_corrections(another.net, file)
        assert torch.equal(another(X), net(X))

    def test_a_part_of_what_was_wrapped(self, tmp_path: Path) -> None:
        net = make()
        file = save_corrections(net.block, tmp_path)
        block = plain_twin(net.block)
        load_corrections(block, file)
        assert torch.equal(block(X), net.block(X))

    def test_a_model_that_was_compiled_since(self, tmp_path: Path) -> None:
        net = make()
        larger = Around(plain_twin(net))
        larger.net = torch.compile(larger.net)
        load_corrections(larger, save_corrections(net, tmp_path))
        assert torch.equal(larger.net._orig_mod(X), net(X))
        again = Around(plain_twin(net))
        load_corrections(again, save_corrections(larger, tmp_path / "compiled"))
        assert torch.equal(again(X), net(X))

    def test_several_parts_that_fit_are_named(self, tmp_path: Path) -> None:
        net = make()
        file = save_corrections(net, tmp_path)
        both = nn.ModuleDict({"student": plain_twin(net), "teacher": plain_twin(net)})
        before = state(both)
        with pytest.raises(SiteError, match="fit 2 parts of this ModuleDict: 'student', 'teacher'"):
            load_corrections(both, file)
        assert_unchanged(both, before)
        load_corrections(both["student"], file)
        assert torch.equal(both["student"](X), net(X))

    def test_one_part_under_two_names_is_one(self, tmp_path: Path) -> None:
        net = make()
        part = plain_twin(net)
        both = nn.ModuleDict({"a": part, "b": part})
        load_corrections(both, save_corrections(net, tmp_path))
        assert torch.equal(both["b"](X), net(X))

    def test_parts_of_several_options_go_into_several_files(self, tmp_path: Path) -> None:
        parts = nn.ModuleList([plain_twin(make()), plain_twin(make())])
        for part, form in zip(parts, ("free", "tabulated"), strict=True):
            wrap(part, find_sites(part, X), **{form: True})
        with pytest.raises(SiteError, match=r"wrapped with different options .* each part in a file of its own"):
            save_corrections(parts, tmp_path)
        assert not list(tmp_path.iterdir())
        save_corrections(parts[0], tmp_path)


class TestOntoCorrections:
    def test_the_same_sites_get_other_numbers(self, tmp_path: Path) -> None:
        net = make()
        file = save_corrections(net, tmp_path)
        other = make()
        for tensor in site_tensors(other).values():
            tensor.data.mul_(0.5)
        amplitude = next(iter(site_tensors(other).values()))
        load_corrections(other, file)
        assert torch.equal(other(X), net(X))
        assert next(iter(site_tensors(other).values())) is amplitude, "an optimiser that holds it goes on"

    def test_other_sites_are_refused(self, tmp_path: Path) -> None:
        file = save_corrections(make(), tmp_path)
        other = Net()
        wrap(other, eps_init=0.1, free=True)
        before = state(other)
        with pytest.raises(SiteError, match=r"has other corrections already .* unwrap\(model\) first"):
            load_corrections(other, file)
        assert_unchanged(other, before)

    def test_copies_and_pickles_can_be_saved(self, tmp_path: Path) -> None:
        net = make()
        for k, copied in enumerate((copy.deepcopy(net), pickle.loads(pickle.dumps(net)))):
            fresh = plain_twin(net)
            load_corrections(fresh, save_corrections(copied, tmp_path / str(k)))
            assert torch.equal(fresh(X), net(X))


def rewritten(file: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["eafo_dynamic"])
    tensors = load_file(file)
    change(header, tensors)
    save_file(tensors, file, metadata={"eafo_dynamic": json.dumps(header)})


DAMAGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "a missing tensor": (lambda header, tensors: tensors.pop("act.eafo_0_eps"), "act.eafo_0_eps is missing"),
    "a tensor too many": (
        lambda header, tensors: tensors.update({"act.eafo_7_eps": torch.zeros(())}),
        "act.eafo_7_eps is not known",
    ),
    "of no module": (
        lambda header, tensors: tensors.update({"gone.eafo_0_eps": torch.zeros(())}),
        "'gone', of which its list of sites says nothing",
    ),
    "another size": (
        lambda header, tensors: tensors.update({"act.eafo_0_shape": torch.ones(3)}),
        r"act.eafo_0_shape: \[3\] in the checkpoint, \[2\] in the model",
    ),
    "no number": (
        lambda header, tensors: tensors["act.eafo_0_shape"].fill_(float("nan")),
        "holds numbers that no correction can have",
    ),
    "a newer version": (lambda header, tensors: header.update(version=99), "version 99, .* reads up to 1. Upgrade"),
    "newer sites": (
        lambda header, tensors: header["corrections"].update(manifest_version=99),
        "manifest_version=99",
    ),
    "no version": (lambda header, tensors: header.pop("version"), "its header cannot be read"),
    "no sites": (lambda header, tensors: header.pop("corrections"), "no list of sites"),
    "a site without a name": (lambda header, tensors: header["corrections"]["sites"][0].pop("name"), "lacks 'name'"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_damaged_file_is_one_line_and_nothing_of_it_is_applied(name: str, wrapped: bool, tmp_path: Path) -> None:
    change, words = DAMAGES[name]
    net = make()
    file = save_corrections(net, tmp_path)
    model = make() if wrapped else plain_twin(net)
    before = state(model)
    rewritten(file, change)
    with pytest.raises(SiteError, match=words) as caught:
        load_corrections(model, file)
    assert "\n" not in str(caught.value)
    assert "eafo_dynamic.safetensors" in str(caught.value)
    assert_unchanged(model, before)
    assert is_wrapped(model) == wrapped


def test_a_file_that_is_cut_anywhere(tmp_path: Path) -> None:
    net = make()
    whole = save_corrections(net, tmp_path).read_bytes()
    model, before = plain_twin(net), state(plain_twin(net))
    torn = tmp_path / "torn.safetensors"
    for size in (*range(0, len(whole) - 1, 97), len(whole) - 1):
        torn.write_bytes(whole[:size])
        with pytest.raises(SiteError, match="is damaged or cut short") as caught:
            load_corrections(model, torn)
        assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


def test_a_file_of_another_model_names_what_differs(tmp_path: Path) -> None:
    file = save_corrections(make(), tmp_path)
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    before = state(other)
    with pytest.raises(SiteError, match=r"not the one .*: block.relu#0: the model has no module 'block.relu'"):
        load_corrections(other, file)
    assert_unchanged(other, before)
    changed = Net()
    changed.act = nn.Sigmoid()
    with pytest.raises(SiteError, match="act: Sigmoid in the model, Tanh in the checkpoint"):
        load_corrections(changed, file)
    assert not is_wrapped(changed)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("absent.safetensors", "does not exist"),
        ("folder", "holds no eafo_dynamic.safetensors. Write it with save_corrections"),
        ("weights.safetensors", "was not written by save_corrections"),
    ],
)
def test_what_is_no_such_file(path: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(SiteError, match=words):
        load_corrections(Net(), tmp_path / path)


def test_a_model_without_corrections_has_none_to_save(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"Net has no corrections: wrap\(model\) first"):
        save_corrections(Net(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make()
    file = save_corrections(net, tmp_path)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_corrections(net, tmp_path)
    assert file.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["eafo_dynamic.md", "eafo_dynamic.safetensors"]


class TestWrap:
    def test_wrap_and_unwrap_give_the_model(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        plain = net(X)
        assert wrap(net, eps_init=0.3) is net
        assert unwrap(net) is net
        assert torch.equal(net(X), plain)
        assert merge(wrap(net, eps_init=0.3)) is net
        assert not torch.equal(net(X), plain)

    def test_weights_with_other_corrections_are_not_left_out_in_silence(self) -> None:
        net, one = make(), Net()
        wrap(one, find_sites(one))
        with pytest.warns(UserWarning, match=r"left out \d+ tensors of corrections, first of them block.eafo_0_"):
            one.load_state_dict(net.state_dict(), strict=False)
        unwrap(one)
        assert "load_state_dict" not in vars(one)


@pytest.mark.parametrize(
    ("then", "now", "name", "expected"),
    [
        ("net.0", "0", "net.1", "1"),
        ("0", "net.0", "1", "net.1"),
        ("a.b.act", "c.act", "a.b.other", "c.other"),
        ("a.act", "act", "b.act", None),
        ("", "net", "act", "net.act"),
        ("net", "", "net", ""),
    ],
)
def test_names_are_matched_by_their_common_ends(then: str, now: str, name: str, expected: str | None) -> None:
    assert Renaming.between(then, now)(name) == expected
