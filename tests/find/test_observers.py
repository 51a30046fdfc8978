"""Hooks that only look on do not fire in a dry run; those that change something do."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import weight_norm

from eafo_dynamic.errors import SiteError
from eafo_dynamic.find.sites import find_sites

SEEN: list[object] = []


def keeps(module: nn.Module, args: Any, out: Tensor) -> None:
    """Keeps what it sees."""
    if out.requires_grad:
        return
    SEEN.append(out.mean())


def named(name: str, module: nn.Module, args: Any, out: Tensor) -> None:
    SEEN.append(name)


class Counter:
    """A hook with a state."""

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        SEEN.append(type(module).__name__)

    def count(self, module: nn.Module, args: Any, out: Tensor) -> None:
        SEEN.append(1)


OBSERVERS: dict[str, Callable[..., Any]] = {
    "a function": keeps,
    "a partial": functools.partial(named, "one"),
    "an object": Counter(),
    "a method": Counter().count,
    "a lambda": lambda module, args, out: SEEN.append(out),
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_hooks_that_only_look_on_do_not_fire(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[0].register_forward_hook(OBSERVERS[name])
    SEEN.clear()
    assert [site.name for site in find_sites(model, torch.randn(2, 4)).wrapped] == ["1"]
    assert SEEN == []
    model(torch.randn(2, 4).requires_grad_(name != "a function"))
    assert len(model[0]._forward_hooks) == 1


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_hooks_that_change_something_fire() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Identity(), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, out: F.relu(out))
    model[1].register_forward_pre_hook(lambda module, args: (args[0].repeat(1, 2)[:, :4],))
    assert [site.name for site in find_sites(model, torch.randn(2, 4)).wrapped] == [":relu"]


@pytest.mark.parametrize("name", OBSERVERS)
def test_hooks_of_all_modules_that_only_look_on_do_not_fire(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    before = register_module_forward_pre_hook(lambda module, args: SEEN.append("before"))
    behind = register_module_forward_hook(OBSERVERS[name])
    try:
        SEEN.clear()
        assert [site.name for site in find_sites(model, torch.randn(2, 4)).wrapped] == ["1"]
        assert SEEN == []
        with torch.no_grad():
            model(torch.randn(2, 4))
        assert SEEN.count("before") == 4, "both are back"
        assert len(SEEN) > 4
        with pytest.raises(SiteError):
            find_sites(model, torch.randn(2, 5))
        SEEN.clear()
        model(torch.randn(2, 4))
        assert SEEN.count("before") == 4, "also when the example does not run"
    finally:
        before.remove()
        behind.remove()
    SEEN.clear()
    model(torch.randn(2, 4))
    assert SEEN == []


def test_a_hook_of_all_modules_that_changes_results_is_a_part_of_the_model() -> None:
    behind = register_module_forward_hook(lambda module, args, out: out * 2 if isinstance(module, nn.ReLU) else None)
    try:
        model, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), []
        find_sites(model, run=lambda probe: seen.append(probe[:2](torch.ones(1, 4))))
        assert torch.equal(seen[0], model[:2](torch.ones(1, 4)))
        assert not torch.equal(seen[0], torch.relu(model[0](torch.ones(1, 4))))
    finally:
        behind.remove()


def test_random_states_of_python_numpy_and_torch_are_kept() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + random.random() + float(numpy.random.rand()) + torch.rand(()))

    def draws() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    expected = draws()
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    find_sites(Noisy(), torch.randn(2, 4, generator=torch.Generator()))
    assert draws() == expected
