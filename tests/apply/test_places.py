"""Calls are told apart by their place in the code, also where only some of them run."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eafo_dynamic.apply.manifest import manifest, wrap_from_manifest
from eafo_dynamic.apply.surgery import hosted_sites, unwrap, wrap
from eafo_dynamic.find.selection import SiteReport
from eafo_dynamic.find.sites import find_sites


def run(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return part(x)


def helper(x: Tensor) -> Tensor:
    return F.relu(x)


class Coder(nn.Module):
    """Encoder and decoder in one module; either may run alone in predict_step."""

    def __init__(self, kind: str = "function") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.act = nn.ReLU() if kind == "module" else F.relu
        self.parts: Callable[..., Tensor] = run

    def f(self, x: Tensor) -> Tensor:
        return {"helper": helper, "method": lambda z: z.relu()}.get(self.kind, self.act)(x)

    def encode(self, x: Tensor) -> Tensor:
        return self.f(self.layers[0](x))

    def decode(self, z: Tensor) -> Tensor:
        for layer in self.layers[1:3]:
            z = self.f(layer(z))
        return self.f(self.layers[3](z)) + self.f(self.layers[4](z))

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(self.decode, self.parts(self.encode, x))

    def predict_step(self, z: Tensor, times: int = 1) -> Tensor:
        for _ in range(times):
            z = self.parts(self.decode, z)
        return z


class Straight(Coder):
    """The same, each call under a function of its own."""

    def __init__(self, amplitudes: list[float]) -> None:
        super().__init__()
        self.amplitudes = amplitudes

    def at(self, k: int, z: Tensor) -> Tensor:
        return z.relu() + self.amplitudes[k] * z * torch.exp(-z * z / 2)

    def encode(self, x: Tensor) -> Tensor:
        return self.at(0, self.layers[0](x))

    def decode(self, z: Tensor) -> Tensor:
        z = self.at(2, self.layers[2](self.at(1, self.layers[1](z))))
        return self.at(3, self.layers[3](z)) + self.at(4, self.layers[4](z))


AMPLITUDES = [0.1, 0.2, 0.3, 0.4, -0.5]
X = torch.linspace(-2, 2, 24).view(4, 6)


def wrapped(kind: str = "function", change: Callable[[SiteReport], SiteReport] = lambda report: report) -> Coder:
    model = Coder(kind)
    wrap(model, change(find_sites(model, X)))
    assert len(hosted_sites(model)) == 5
    for (host, site), value in zip(hosted_sites(model), AMPLITUDES, strict=True):
        nn.init.constant_(getattr(host, site.keys[0]), value)
    return model.eval()


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.4 warns of itself
        yield


KINDS = ["function", "helper", "module", "method"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_runs_alone_has_its_own_corrections(kind: str) -> None:
    model, straight = wrapped(kind), Straight(AMPLITUDES)
    torch.testing.assert_close(model(X), straight(X))
    torch.testing.assert_close(model.predict_step(X), straight.decode(X))
    torch.testing.assert_close(model.predict_step(X, times=2), straight.decode(straight.decode(X)))
    torch.testing.assert_close(model(X), straight(X))


@pytest.mark.parametrize("way", ["manifest", "copy", "pickle"])
def test_places_survive(way: str) -> None:
    model = wrapped()
    if way == "manifest":
        saved = json.loads(json.dumps(manifest(find_sites(plain := Coder(), X))))
        wrap_from_manifest(plain, saved)
        plain.load_state_dict(model.state_dict())
        model = plain.eval()
    else:
        model = copy.deepcopy(model) if way == "copy" else pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(model.predict_step(X), Straight(AMPLITUDES).decode(X))


def of_version_0_1_0(saved: dict[str, Any]) -> dict[str, Any]:
    """A manifest without evidence."""
    later = ("caller", "places", "after", "turn", "through", "beside")
    sites = [{key: value for key, value in site.items() if key not in later} for site in saved["sites"]]
    return {**saved, "sites": sites, "manifest_version": 1}


def test_an_old_manifest_goes_by_the_order_and_says_so() -> None:
    model = Coder()
    with pytest.warns(UserWarning, match="of version 0.1.0, which told the calls .* by their order"):
        wrap_from_manifest(model, of_version_0_1_0(manifest(find_sites(Coder(), X))))
    model.load_state_dict(wrapped().state_dict())
    torch.testing.assert_close(model(X), Straight(AMPLITUDES)(X))
    torch.testing.assert_close(model.eval().predict_step(X), Straight([0.0, *AMPLITUDES]).decode(X))


def test_an_example_tells_the_calls_of_an_old_manifest() -> None:
    model = Coder()
    wrap_from_manifest(model, of_version_0_1_0(manifest(find_sites(Coder(), X))), find_sites(Coder(), X))
    model.load_state_dict(wrapped().state_dict())
    torch.testing.assert_close(model(X), Straight(AMPLITUDES)(X))
    torch.testing.assert_close(model.eval().predict_step(X), Straight(AMPLITUDES).decode(X))


def changed(report: SiteReport) -> SiteReport:
    """As if the code of ``f`` had been another when the sites were found."""
    moved = [replace(s, places=tuple(place.replace("#", "#0") for place in s.places)) for s in report.sites]
    return replace(report, sites=moved)


def test_code_that_has_changed_since_is_left_plain() -> None:
    model = wrapped(change=changed)
    with pytest.warns(UserWarning, match="Where the code has changed since a checkpoint, give an example"):
        torch.testing.assert_close(model(X), Straight([0.0] * 5)(X))


def test_an_example_tells_the_calls_of_code_that_has_changed_since() -> None:
    model = Coder().eval()
    wrap_from_manifest(model, manifest(changed(find_sites(Coder(), X))), find_sites(Coder(), X))
    model.load_state_dict(wrapped().state_dict())
    torch.testing.assert_close(model(X), Straight(AMPLITUDES)(X))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry", ["forward", "predict_step"])
def test_recomputation_finds_the_calls_of_the_forward(kind: str, entry: str, reentrant: bool) -> None:
    model, straight = wrapped(kind).train(), Straight(AMPLITUDES)
    model.parts = lambda part, x: checkpoint(part, x, use_reentrant=reentrant)
    results: list[Any] = []
    for each in (model, straight):
        x = X.clone().requires_grad_()
        getattr(each, entry)(x).square().sum().backward()
        results.append([x.grad, *(layer.weight.grad for layer in each.layers)])
    for one, two in zip(*results, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two)


def test_a_forward_that_raises_says_nothing_else() -> None:
    model = wrapped()
    model.layers[3] = nn.Linear(5, 5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # warnings are errors here
        model.predict_step(X)
    torch.testing.assert_close(model.encode(X), Straight(AMPLITUDES).encode(X))


def test_a_shorter_loop_has_the_first_corrections_and_says_so() -> None:
    class Loop(nn.Module):
        def turns(self, x: Tensor, times: int) -> Tensor:
            for _ in range(times):
                x = F.relu(x + 0.5)
            return x

        def forward(self, x: Tensor) -> Tensor:
            return self.turns(x, 3)

        def predict_step(self, x: Tensor, times: int) -> Tensor:
            return self.turns(x, times)

    model = Loop().eval()
    wrap(model, find_sites(model, X))
    for (host, site), value in zip(hosted_sites(model), (0.1, 0.2, 0.3), strict=True):
        nn.init.constant_(getattr(host, site.keys[0]), value)
    expected = X
    for eps in (0.1, 0.2):
        z = expected + 0.5
        expected = z.relu() + eps * z * torch.exp(-z * z / 2)
    with pytest.warns(UserWarning, match="ran 2 of the 3 turns"):
        torch.testing.assert_close(model.predict_step(X, times=2), expected)


@pytest.mark.slow
def test_a_compiled_model_equals_the_eager_one() -> None:
    model = wrapped()
    warnings.simplefilter("ignore")  # torch's own
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(X), model(X))


def test_lambdas_on_one_line_have_places_of_their_own() -> None:
    class Line(nn.Module):
        def forward(self, x: Tensor, both: bool = True) -> Tensor:
            one, two = (lambda z: F.relu(z), lambda z: F.relu(z - 1))
            return (one(x) if both else 0) + two(x)

        def predict_step(self, x: Tensor) -> Tensor:
            return Line.forward(self, x, both=False)  # in the frame of the step

    model = Line().eval()
    wrap(model, find_sites(model, X))
    for (host, site), value in zip(hosted_sites(model), (0.1, 0.7), strict=True):
        nn.init.constant_(getattr(host, site.keys[0]), value)
    z = X - 1
    torch.testing.assert_close(model.predict_step(X), z.relu() + 0.7 * z * torch.exp(-z * z / 2))


def test_unwrapping_takes_the_places_away() -> None:
    model = wrapped()
    unwrap(model)
    assert not [name for name in vars(model) if name.startswith("eafo")]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_of_a_forward_lives_on(checkpointed: bool) -> None:
    """Not even until garbage is collected: written-out activations are followed by their tensors."""
    alive: list[weakref.ref[Tensor]] = []

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def part(self, x: Tensor) -> Tensor:
            x = F.relu(self.layer(x))
            alive.append(weakref.ref(x))
            return x * torch.sigmoid(1.702 * x)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.part, x, use_reentrant=False) if checkpointed else self.part(x)

    model = Written()
    wrap(model, find_sites(model, X))
    alive.clear()
    gc.collect()
    gc.disable()
    try:
        model(X).sum().backward()
        assert len(alive) == 1 + checkpointed
        assert not [each for each in alive if each() is not None]
    finally:
        gc.enable()


def test_a_wrapper_around_a_forward_changes_nothing() -> None:
    def around(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: method(*args)

    model = wrapped()
    model.f = around(model.f)  # type: ignore[method-assign]
    torch.testing.assert_close(model(X), Straight(AMPLITUDES)(X))


class Lines(nn.Module):
    """Some turns of a loop take another line in training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for turn, layer in enumerate(self.layers):
            x = F.relu(layer(x) + 0.1) if self.training and turn % 2 else F.relu(0.1 + layer(x))
        return x


def lines_by_hand(model: Lines, eps: list[float]) -> Tensor:
    x = X
    for turn, layer in enumerate(model.layers):
        z = layer(x) + 0.1
        x = z.relu() + eps[turn] * z * torch.exp(-z * z / 2)
    return x


@pytest.mark.parametrize("example_trains", [True, False])
def test_another_line_in_training_is_another_call(example_trains: bool) -> None:
    model = Lines().train(example_trains)
    wrap(model, find_sites(model, X))
    eps = [0.1, 0.2, 0.3, 0.4]
    for value, (host, site) in zip(eps, hosted_sites(model), strict=True):
        nn.init.constant_(getattr(host, site.keys[0]), value)
    torch.testing.assert_close(model(X), lines_by_hand(model, eps))
    with pytest.warns(UserWarning, match="left plain"):
        torch.testing.assert_close(model.train(not example_trains)(X), lines_by_hand(model, [0.1, 0.0, 0.3, 0.0]))


def test_an_example_of_both_ways_shows_both_lines() -> None:
    model = Lines()

    def run(copied: nn.Module) -> None:
        copied.train()(X)
        copied.eval()(X)

    wrap(model, find_sites(model, run=run))
    for k, (host, site) in enumerate(hosted_sites(model)):
        nn.init.constant_(getattr(host, site.keys[0]), 0.1 + 0.1 * k)
    torch.testing.assert_close(model.train()(X), lines_by_hand(model, [0.1, 0.2, 0.3, 0.4]))
    torch.testing.assert_close(model.eval()(X), lines_by_hand(model, [0.1, 0.5, 0.3, 0.6]))
