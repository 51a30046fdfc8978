"""What a checkpoint says of the corrections between two rounds, with any entry replaced by anything."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from features import MidEpoch
from tally import Tally
from test_trainer import trainer
from torch import nn

from eafo_dynamic import EAFOCallback, EAFOController
from eafo_dynamic.errors import SiteError
from eafo_dynamic.records import CorrectionLog

pytestmark = pytest.mark.slow
JUNK: list[Any] = [
    *(None, True, -1, 10**30, 0.5, "", "x" * 10_000, b"\0", [], [None], {}, {"a": 1}),
    *(torch.ones(()), torch.ones(2), torch.empty(0), torch.full((3,), torch.nan)),
    *(torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.int64)),
]


def advance(controller: EAFOController, first: int, last: int) -> None:
    optimizer = torch.optim.SGD(controller.model.parameters(), lr=0.01)
    for step in range(first, last):
        loss = controller.model(torch.randn(16, 4)).square().mean()
        controller.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        controller.before_optimizer_step(step)
        optimizer.step()
        controller.step(step + 1)


def places(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to every entry of a state, of lists to their first two."""
    if path:
        yield path
    keys: Any = range(len(state))[:2] if isinstance(state, (list, tuple)) else state if isinstance(state, dict) else ()
    for key in keys:
        yield from places(state[key], (*path, key))


def replaced(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copied = dict(state) if isinstance(state, dict) else list(state)
    copied[path[0]] = replaced(state[path[0]], path[1:], value)
    return copied


@pytest.mark.parametrize("where", [5, [1], {}, torch.ones(2), "no such folder", "\0"])
def test_a_place_of_the_log_that_is_none(tmp_path: Path, where: Any) -> None:
    """A run that resumes in another folder cannot take the rows along, and goes on."""
    plugin = EAFOCallback(dirpath=tmp_path / "one", update_every_n_steps=2, verbose=False)
    first = trainer(tmp_path, plugin, max_steps=4)
    first.fit(MidEpoch())
    first.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    saved["callbacks"]["EAFOCallback"]["log"] = where
    torch.save(saved, tmp_path / "half.ckpt")
    again = EAFOCallback(dirpath=tmp_path / "two", update_every_n_steps=2, verbose=False)
    trainer(tmp_path, again, max_steps=6).fit(MidEpoch(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert CorrectionLog.load(tmp_path / "two").steps == [6]


@pytest.mark.parametrize("density", ["gaussian", "histogram"])
@pytest.mark.parametrize("factor", [None, 1.01], ids=["estimates", "and undo"])
def test_any_entry_of_the_state_may_be_anything(density: str, factor: float | None, tally: Tally) -> None:
    """Refused in one line, or loaded; then the run goes on, and nothing is poisoned."""

    def attached() -> EAFOController:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2), nn.Tanh())
        options: dict[str, Any] = {"policy": "hybrid", "update_every_n_steps": 3, "collect_every_n_steps": 1}
        return EAFOController.attach(net, torch.randn(2, 4), density=density, rollback_factor=factor, **options)

    advance(whole := attached(), 0, 5)
    state, tried = whole.state_dict(), 0
    new = attached()
    for path in places(state):
        for value in JUNK:
            damaged = replaced(state, path, value)
            tried += 1
            try:
                copy.deepcopy(new).load_state_dict(damaged)  # to attach another one takes five times as long
            except SiteError as error:
                assert "\n" not in str(error)
                continue
            controller = attached()
            controller.load_state_dict(damaged)
            advance(controller, 5, 7)
            assert all(each.isfinite().all() for each in controller.model.state_dict().values()), (path, value)
    tally("hostile files tried", tried)
