"""Random models: each call of an activation has its own correction, or none, whatever part of the model runs.

The source of a model is drawn from branches, loops whose layers are dropped, methods that also run alone, shared
activations and checkpointed parts. It is written down twice: with activations, which are then wrapped, and with the
corrected function of each call written out. Both must compute the same.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eafo_dynamic.apply.surgery import hosted_sites, wrap
from eafo_dynamic.find.sites import find_sites

WIDTH = 4
X = torch.linspace(-2, 2, 3 * WIDTH).view(3, WIDTH)


class Source:
    """Draws the source of a model.

    Args:
        seed: of the draw.
        checkpoints: whether parts may be checkpointed.
    """

    def __init__(self, seed: int, checkpoints: bool) -> None:
        self.draw = random.Random(seed)
        self.checkpoints = checkpoints
        self.calls = 0
        self.layers = 0
        self.loops = 0
        self.parts: list[list[str]] = []
        self.forward = self.block(depth=0, statements=4)

    def layer(self) -> str:
        self.layers += 1
        return f"self.layer{self.layers - 1}"

    def call(self, z: str, turn: str = "0") -> str:
        """An activation of an expression: of a function, of the shared module, or of one of its own."""
        self.calls += 1
        kind = self.draw.choice(["F.relu", "self.shared", f"self.own{self.calls - 1}"])
        return f"@{kind}@{self.calls - 1}, {turn}@{z}@"

    def block(self, depth: int, statements: int) -> list[str]:
        lines: list[str] = []
        for _ in range(statements):
            lines += getattr(self, self.draw.choice(["line", "line", "branch", "loop", "head", "part", "norm"]))(depth)
        return lines

    def line(self, depth: int) -> list[str]:
        return [f"x = {self.call(f'{self.layer()}(x)')}"]

    def norm(self, depth: int) -> list[str]:
        return [f"x = {self.call(f'self.norm({self.layer()}(x))')} + x"]

    def branch(self, depth: int) -> list[str]:
        if depth == 2:
            return self.line(depth)
        one, two = self.block(depth + 1, 1), self.block(depth + 1, 1)
        test = self.draw.choice(["self.training", "self.task", "not self.task"])
        return [f"if {test}:", *(f"    {each}" for each in one), "else:", *(f"    {each}" for each in two)]

    def head(self, depth: int) -> list[str]:
        return ["if self.training:", f"    self.seen = self.seen + self.out({self.call(f'{self.layer()}(x)')}).sum()"]

    def loop(self, depth: int) -> list[str]:
        name = f"self.loop{self.loops}"
        self.loops += 1
        kind = self.draw.choice(["layer(x)", "self.norm(layer(x))"])
        return [
            f"for turn, layer in enumerate({name}):",
            f"    if turn in self.dropped.get('{name}', ()):",
            "        continue",
            f"    x = x + {self.call(kind, 'turn')}",
        ]

    def part(self, depth: int) -> list[str]:
        if depth == 2:
            return self.line(depth)
        number = len(self.parts)
        self.parts.append([])
        self.parts[number] = self.block(depth + 1, 2)
        if self.checkpoints and self.draw.random() < 0.7:
            return [f"x = checkpoint(self.part{number}, x, use_reentrant={self.draw.choice([True, False])})"]
        return [f"x = self.part{number}(x)"]

    def text(self, by_hand: bool) -> str:
        methods = {"forward": self.forward} | {f"part{number}": part for number, part in enumerate(self.parts)}
        lines = ["class Model(Base):"]
        for name, body in methods.items():
            end = "        return self.out(x)"
            lines += [f"    def {name}(self, x):", *(f"        {each}" for each in body), end, ""]
        return _filled("\n".join(lines), by_hand)


def _filled(text: str, by_hand: bool) -> str:
    """Writes each call as ``activation(z)``, or as ``self.at(call, turn, z)``."""
    while "@" in text:
        before, kind, numbers, z, after = text.split("@", 4)
        text = before + (f"self.at({numbers}, {z})" if by_hand else f"{kind}({z})") + after
    return text


class Base(nn.Module):
    def __init__(self, source: Source) -> None:
        super().__init__()
        torch.manual_seed(0)
        for number in range(source.layers):
            self.add_module(f"layer{number}", nn.Linear(WIDTH, WIDTH))
        for number in range(source.loops):
            self.add_module(f"loop{number}", nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
        for number in range(source.calls):
            self.add_module(f"own{number}", nn.ReLU())
        self.norm, self.shared = nn.LayerNorm(WIDTH), nn.ReLU()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.task = False
        self.dropped: dict[str, tuple[int, ...]] = {}
        self.seen: Any = 0.0
        self.amplitudes: dict[tuple[int, int], float] = {}
        self.order: list[tuple[int, int]] = []

    def at(self, call: int, turn: int, z: Tensor) -> Tensor:
        self.order.append((call, turn))
        eps = self.amplitudes.get((call, turn), 0.0)
        return z.relu() + eps * z * torch.exp(-z * z / 2)


def made(source: Source, by_hand: bool) -> Any:
    home: dict[str, Any] = {"Base": Base, "F": F, "checkpoint": checkpoint}
    exec(source.text(by_hand), home)
    return home["Model"](source)


def conditions(source: Source, draw: random.Random) -> dict[str, Any]:
    loops = [f"self.loop{number}" for number in range(source.loops)]
    dropped = {loop: tuple(turn for turn in range(3) if draw.random() < 0.3) for loop in loops}
    return {"task": draw.random() < 0.5, "training": draw.random() < 0.5, "dropped": dropped, "seen": 0.0}


def set_to(model: nn.Module, condition: dict[str, Any]) -> None:
    vars(model).update(condition)
    model.train(condition["training"])


@pytest.mark.parametrize("way", ["eager", "checkpointed", "compiled"])
@pytest.mark.parametrize("seed", range(12))
def test_a_random_model_computes_what_is_written_out(seed: int, way: str) -> None:
    draw = random.Random(1000 + seed)
    source = Source(seed, checkpoints=way == "checkpointed")
    model, written = made(source, by_hand=False), made(source, by_hand=True)
    example = conditions(source, draw)
    set_to(model, example)
    set_to(written, example)
    report = find_sites(model, X)
    written(X)
    calls = list(dict.fromkeys(written.order))
    wrap(model, report)
    acting = [site for site in report.wrapped if "not reached" not in site.reason]
    assert len(acting) == len(calls), (source.text(by_hand=False), calls)
    for host, site in hosted_sites(model):
        nn.init.zeros_(getattr(host, site.keys[0]))
    hosts = {site.name: (host, site) for host, site in hosted_sites(model)}
    for number, (found, call) in enumerate(zip(acting, calls, strict=True)):
        host, site = hosts[found.name]
        written.amplitudes[call] = 0.1 * (number + 1) * (-1) ** number
        nn.init.constant_(getattr(host, site.keys[0]), written.amplitudes[call])
    run: Callable[..., Any] = torch.compile(model, backend="aot_eager") if way == "compiled" else model
    if way == "compiled":
        torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="EAFO: a call of .* left plain")
        warnings.filterwarnings("ignore", message="EAFO: .* no example has reached")
        warnings.filterwarnings("default", module=r"torch\..*")
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        for _ in range(3 if way == "compiled" else 8):
            condition = conditions(source, draw)
            compare(model, run, written, condition, way == "checkpointed")
        for number in range(len(source.parts)):
            condition = conditions(source, draw)
            part = f"part{number}"
            compare(model, getattr(model, part), written, condition, False, getattr(written, part))


def compare(
    model: Any, run: Callable[..., Any], written: Any, condition: dict[str, Any], backward: bool, by_hand: Any = None
) -> None:
    results: list[list[Tensor]] = []
    for each, call in ((model, run), (written, by_hand or written)):
        set_to(each, condition)
        each.zero_grad()
        x = X.clone().requires_grad_()
        out = call(x)
        results.append([out.detach()])
        if backward:
            (out.square().sum() + each.seen).backward()
            results[-1] += [x.grad, *(layer.weight.grad for layer in each.children() if isinstance(layer, nn.Linear))]
    for one, two in zip(*results, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two)
