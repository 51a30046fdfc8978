"""Trainings that do not step once a batch, unfreeze layers on their way, copy the model or start over."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import EAFOCallback, EAFOController, merge, unwrap
from eafo_dynamic.apply.surgery import hosted_sites
from eafo_dynamic.errors import SiteError
from eafo_dynamic.policy.options import Options
from eafo_dynamic.policy.schedule import Pace, Schedule


class Critics(LightningModule):
    """A generator, and a critic that steps several times a batch, as in WGAN."""

    def __init__(self, critics: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critics = critics
        self.make = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
        self.judge = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        maker, judge = self.optimizers()  # pyright: ignore[reportGeneralTypeIssues]
        (x,) = batch
        for _ in range(self.critics):
            judge.zero_grad()
            made = self.make(torch.randn_like(x)).detach()
            self.manual_backward(self.judge(made).mean() - self.judge(x).mean())
            judge.step()
        maker.zero_grad()
        self.manual_backward(-self.judge(self.make(torch.randn_like(x))).mean())
        maker.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.make, self.judge)]


class Thawed(LightningModule):
    """A backbone that is frozen for the first epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.head(self.backbone(batch[0])) - batch[0][:, :1].square()).square().mean()

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            self.backbone.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        self.backbone.requires_grad_(False)
        return torch.optim.AdamW(self.parameters(), 1e-2)


def loader(batches: int, size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(batches * size, 3)), size)


def fit(
    model: LightningModule, callback: EAFOCallback, batches: int, folder: Path, ckpt_path: Any = None, **options: Any
) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(callbacks=[callback], default_root_dir=folder, enable_model_summary=False, **quiet, **options)
    trainer.fit(model, loader(batches), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("critics", [1, 2, 5])
def test_every_round_has_samples_where_a_batch_takes_several_steps(critics: int, tmp_path: Path) -> None:
    callback = EAFOCallback(verbose=False, save_log=False)
    trainer = fit(Critics(critics), callback, 60, tmp_path, max_epochs=1)
    stride = critics + 1
    assert trainer.global_step == 60 * stride
    rounds = sorted({row["step"] for row in callback.history})
    due = [step for step in range(1, 60 * stride + 1) if Options().schedule.updates(step)]
    assert rounds == sorted({-(-step // stride) * stride for step in due})
    assert all(row["n"] > 0 and row["event"] is None for row in callback.history)


def test_an_epoch_is_an_epoch_with_two_optimisers(tmp_path: Path) -> None:
    callback = EAFOCallback(verbose=False, save_log=False, update_every_n_epochs=1, collect_every_n_steps=4)
    fit(Critics(1), callback, 16, tmp_path, max_epochs=3)
    rounds = sorted({row["step"] for row in callback.history})
    assert [step for step in rounds if step > 16] == [32, 64, 96]
    assert callback.controller is not None and callback.controller.schedule.collect_every_n_steps == 4


class Alternating(Critics):
    """The generator steps every second batch only."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        maker, judge = self.optimizers()  # pyright: ignore[reportGeneralTypeIssues]
        (x,) = batch
        judge.zero_grad()
        self.manual_backward(self.judge(self.make(x).detach()).mean() - self.judge(x).mean())
        judge.step()
        if batch_idx % 2:
            maker.zero_grad()
            self.manual_backward(-self.judge(self.make(x)).mean())
            maker.step()


class Accumulating(Critics):
    """Steps every third batch, and not after an epoch's last one."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        maker, _ = self.optimizers()  # pyright: ignore[reportGeneralTypeIssues]
        self.manual_backward(-self.judge(self.make(batch[0])).mean() / 3)
        if batch_idx % 3 == 2:
            maker.step()
            maker.zero_grad()


@pytest.mark.parametrize(("model", "steps"), [(Alternating(1), 30), (Accumulating(1), 6)], ids=["uneven", "fewer"])
@pytest.mark.parametrize("stops_after", [None, 2])
def test_an_epoch_is_an_epoch_whatever_its_batches_take(
    model: LightningModule, steps: int, stops_after: int | None, tmp_path: Path
) -> None:
    """Also in a run that is resumed."""
    options: dict[str, Any] = {"verbose": False, "save_log": False, "update_every_n_epochs": 1}
    model = copy.deepcopy(model)
    callback = EAFOCallback(**options)
    fit(model, callback, 20, tmp_path, max_epochs=stops_after or 5)
    if stops_after is not None:
        earlier = list(callback.history)
        model.trainer.save_checkpoint(tmp_path / "half.ckpt")
        callback = EAFOCallback(**options)
        fit(copy.deepcopy(model), callback, 20, tmp_path, max_epochs=5, ckpt_path=tmp_path / "half.ckpt")
        rows = [*earlier, *callback.history]
    else:
        rows = list(callback.history)
    late = [row for row in rows if row["step"] >= steps]
    assert sorted({(row["step"], row["epoch"]) for row in late}) == [(steps * (n + 1), n) for n in range(5)]
    maker = [row for row in late if row["site"].startswith("make")]
    assert len(maker) == 5 and all(row["n"] > 0 for row in maker)


def test_what_is_collected_fits_into_an_epoch(tmp_path: Path) -> None:
    callback = EAFOCallback(verbose=False, save_log=False, update_every_n_epochs=1, collect_every_n_steps=60)
    fit(Thawed(), callback, 4, tmp_path, max_epochs=3)
    assert [(row["step"], row["n"] > 0) for row in callback.history if row["site"] == "head.0"] == [
        (step, True) for step in (1, 2, 4, 8, 12)
    ]


def test_what_falls_due_between_two_looks_is_made_up_for() -> None:
    schedule = Schedule(10, update_starting_at_step=3, freeze_at_step=60, collect_every_n_steps=None)
    looks = range(0, 90, 7)
    made_up = [step for step in looks if schedule.updates(step, step - 7)]
    due = [step for step in range(90) if schedule.updates(step)]
    assert made_up == sorted({-(-step // 7) * 7 for step in due} - set(range(60, 100)))
    pace, since = Pace(), []
    for step in (1, 2, 4, 4 + 5, 10, 11, 3):
        since.append((pace.advance(step), pace.stride))
    assert since == [(0, 1), (1, 1), (2, 2), (4, 5), (9, 4), (10, 3), (2, 2)]


def test_amplitudes_of_a_layer_that_is_unfrozen_later_learn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = EAFOCallback(verbose=False, save_log=False, lr_multiple=2.0)
    model = Thawed()
    trainer = fit(model, callback, 10, tmp_path, max_epochs=5)
    groups = {id(p): group for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert callback.controller is not None
    for amplitude in callback.controller.amplitudes.values():
        assert groups[id(amplitude)]["lr"] == pytest.approx(2e-2)
        assert groups[id(amplitude)]["weight_decay"] == 0.0
    eps = {row["step"]: row["eps"] for row in callback.history if row["site"] == "backbone.1"}
    assert eps[16] == pytest.approx(0.01) and eps[50] != pytest.approx(0.01, abs=1e-3)


class Adding(Thawed):
    """Gives the optimiser the backbone when it is unfrozen, not before."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            self.backbone.requires_grad_(True)
            optimizer = self.trainer.optimizers[0]
            optimizer.add_param_group({"params": list(self.backbone.parameters()), "lr": 1e-4})

    def configure_optimizers(self) -> Any:
        self.backbone.requires_grad_(False)
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)


@pytest.mark.parametrize("policy", ["learned", "hybrid"])
def test_amplitudes_join_with_their_layer(policy: str, tmp_path: Path) -> None:
    callback = EAFOCallback(verbose=False, save_log=False, policy=policy)
    trainer = fit(Adding(), callback, 10, tmp_path, max_epochs=5)
    assert callback.controller is not None
    rates = {id(p): group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    amplitudes = callback.controller.amplitudes.items()
    assert {rates[id(each)] for name, each in amplitudes if name.startswith("backbone")} == {1e-4}
    eps = {row["step"]: row["eps"] for row in callback.history if row["site"] == "backbone.1"}
    assert all(eps[step] == pytest.approx(0.01) for step in (1, 2, 4, 8, 16))
    assert eps[50] != pytest.approx(0.01, abs=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: torch.load(saved(net), weights_only=False)])
def test_a_copy_collects_nothing(copied: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    controller = EAFOController.attach(net, torch.randn(2, 3))
    assert controller.collecting
    other = copied(net)
    for each in (net, other):
        each(torch.randn(8, 3))
    sampled = [sum(len(sample) for sample, _ in drained(model)) for model in (net, other)]
    assert sampled == [64, 0]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: torch.load(saved(each), weights_only=False)])
def test_a_copy_of_a_controller_goes_on(way: Any) -> None:
    controller = EAFOController.attach(nn.Sequential(nn.Linear(3, 8), nn.ReLU()), torch.randn(2, 3))
    other = way(controller)
    other.model(torch.randn(8, 3))
    assert [(row["step"], row["n"]) for row in other.step(1)] == [(1, 64)]


def test_a_loop_that_begins_again_says_so_or_counts_anew() -> None:
    controller = EAFOController.attach(nn.Sequential(nn.Linear(3, 8), nn.ReLU()), torch.randn(2, 3))

    def train(steps: int) -> list[tuple[int, int]]:
        rows: list[Any] = []
        for step in range(1, steps + 1):
            controller.model(torch.randn(8, 3))
            rows += controller.step(step)
        return [(row["step"], row["n"]) for row in rows]

    first = train(10)
    assert first == [(1, 64), (2, 64), (4, 64), (8, 64)]
    assert [step for step, _ in train(10)] == [1, 2, 4, 8]
    controller.begin()
    assert train(10) == first


def drained(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [site.collector.drain() for _, site in hosted_sites(model)]


def saved(net: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return buffer


def test_a_fit_after_another_starts_anew(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = EAFOCallback(verbose=False, save_log=False, rollback_factor=1.01)
    model = Thawed()
    fit(model, callback, 49, tmp_path, max_epochs=1)
    assert callback.controller is not None
    learned = [float(each.detach()) for each in callback.controller.bank.eps]
    callback.controller.records.clear()
    rounds = callback.controller.rounds
    with torch.no_grad():
        model.head[1].bias.add_(100.0)  # no round of the first fit is to blame for this loss
    fit(model, callback, 4, tmp_path, max_epochs=1)
    assert callback.controller.rounds == rounds + 3
    first = [row for row in callback.history if row["step"] == 1]
    assert [row["n"] for row in first] == [64, 64] and [row["event"] for row in first] == [None, None]
    assert [row["eps"] for row in first] == pytest.approx(learned, abs=0.1)


def test_a_fit_after_the_corrections_were_taken_out(tmp_path: Path) -> None:
    callback = EAFOCallback(verbose=False, save_log=False)
    model = Thawed()
    fit(model, callback, 2, tmp_path, max_epochs=1)
    unwrap(model)
    fit(model, callback, 2, tmp_path, max_epochs=1)
    assert callback.controller is not None and callback.controller.attached
    merge(model)
    assert not callback.controller.attached
    with pytest.raises(SiteError, match="corrected already"):
        fit(model, callback, 2, tmp_path, max_epochs=1)
