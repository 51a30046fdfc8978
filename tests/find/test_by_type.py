"""Code that asks for the exact type of a module is named in the report, since wrapping changes the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules

from eafo_dynamic.find.sites import find_sites
from eafo_dynamic.find.wrapped import plain_view

GAINS: dict[type, float] = {nn.ReLU: 2.0, nn.Linear: 1.0}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * self.gain(layer)
        return x

    def gain(self, layer: nn.Module) -> float:
        return 1.0


class ByIdentity(Base):
    def gain(self, layer: nn.Module) -> float:
        return 2.0 if type(layer) is nn.ReLU else 1.0


class ByClass(Base):
    def gain(self, layer: nn.Module) -> float:
        return 2.0 if layer.__class__ == torch.nn.ReLU else 1.0


class Among(Base):
    def gain(self, layer: nn.Module) -> float:
        kind = type(layer)
        return 2.0 if kind in (nn.GELU, nn.ReLU) else 1.0


class InATable(Base):
    def gain(self, layer: nn.Module) -> float:
        return GAINS[type(layer)]


class InATableOfItsOwn(Base):
    gains: dict[type, float] = {nn.ReLU: 2.0}  # noqa: RUF012

    def gain(self, layer: nn.Module) -> float:
        return self.gains.get(type(layer), 1.0)


class Fusing(Base):
    def fuse(self) -> Any:
        return fuse_modules(self.eval(), [["layers.0", "layers.1"]])


@pytest.mark.parametrize("kind", [ByIdentity, ByClass, Among, InATable, InATableOfItsOwn, Fusing])
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_method_is_named(kind: type[Base], dynamic: bool) -> None:
    report = find_sites(kind(), *[torch.randn(2, 8)] * dynamic)
    method = "fuse" if kind is Fusing else "gain"
    assert f"{kind.__name__}.{method} asks for the exact type of a module" in report.note
    assert report.note in " ".join(str(report).split()) or "isinstance(m, nn.ReLU)" in report.note


class ByInstance(Base):
    def gain(self, layer: nn.Module) -> float:
        return 2.0 if isinstance(layer, nn.ReLU) else 1.0


class OfSomethingElse(Base):
    def gain(self, layer: nn.Module) -> float:
        name = type(self).__name__
        return 2.0 if type(layer) is nn.Tanh or type(name) is int else 1.0


class Making(Base):
    def gain(self, layer: nn.Module) -> float:
        self.made = {"relu": nn.ReLU}["relu"]()
        return float(len(type(self).__name__) > 0)


@pytest.mark.parametrize("kind", [Base, ByInstance, OfSomethingElse, Making])
def test_other_questions_are_not(kind: type[Base]) -> None:
    model = kind()
    assert find_sites(model, torch.randn(2, 8)).note == ""
    assert plain_view(model) is model
