"""Everything a Trainer can do to a run: with corrections that stay zero it does the same, to the bit, as without."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from features import AVERAGES, FEATURES, Feature, MidEpoch, Net
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as those
from lightning.pytorch.tuner import Tuner
from tally import Tally
from torch import Tensor

from eafo_dynamic import EAFOCallback, apply_from_checkpoint
from eafo_dynamic.records import CorrectionLog

EVERY = 2


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 2,
        "accelerator": "cpu",
    }
    chosen = {key: value for key, value in {**quiet, **options}.items() if value is not None}
    if options.get("barebones"):
        chosen.pop("enable_checkpointing")
    return Trainer(default_root_dir=str(folder), callbacks=list(callbacks), **chosen)


def fit(folder: Path, feature: Feature, plugin: EAFOCallback | None, **options: Any) -> tuple[Trainer, set[str]]:
    """Trains with one of the features.

    Returns:
        The trainer, and what was warned of.
    """
    torch.manual_seed(0)
    callbacks = [make() for make in feature.before]
    callbacks += [] if plugin is None else [plugin]
    callbacks += [make() for make in feature.after]
    torch.manual_seed(0)
    net = feature.net()
    host = trainer(folder, *callbacks, **{**feature.options, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        host.fit(net)
    return host, {str(each.message).replace(str(folder), "") for each in caught}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Some of Lightning's callbacks write to the working directory; and all of Lightning talks."""
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    yield
    torch.use_deterministic_algorithms(False)


def plain_state(host: Trainer) -> dict[str, Tensor]:
    return {key: value for key, value in host.lightning_module.state_dict().items() if "eafo_" not in key}


@pytest.mark.parametrize("name", FEATURES)
def test_with_eps_zero_a_run_is_the_plain_run(tmp_path: Path, name: str) -> None:
    """Same weights to the bit, same steps, same metrics, and not one warning more."""
    zero = EAFOCallback(policy="frozen", eps_init=0.0, update_every_n_steps=EVERY, save_log=False, verbose=False)
    one, warned = fit(tmp_path / "plain", FEATURES[name], None)
    two, warned_too = fit(tmp_path / "zero", FEATURES[name], zero)
    assert (two.global_step, two.current_epoch) == (one.global_step, one.current_epoch)
    after = plain_state(two)
    for key, value in plain_state(one).items():
        assert torch.equal(value, after[key]), key
    metrics = {key: value for key, value in two.callback_metrics.items() if not key.startswith("eafo/")}
    assert metrics == one.callback_metrics
    assert warned_too <= warned


@pytest.mark.parametrize("name", FEATURES)
def test_corrections_learn_and_the_log_is_whole(tmp_path: Path, name: str, tally: Tally) -> None:
    feature = FEATURES[name]
    _, expected = fit(tmp_path / "plain", feature, None)
    plugin = EAFOCallback(dirpath=tmp_path / "eafo", update_every_n_steps=EVERY, verbose=False)
    host, warned = fit(tmp_path, feature, plugin)
    assert warned <= expected
    assert plugin.controller is not None
    steps = sorted({1, *range(EVERY, host.global_step + 1, EVERY)}) if host.global_step else []
    assert sorted({row["step"] for row in plugin.controller.records}) == steps
    if not host.fast_dev_run and steps:
        log = CorrectionLog.load(tmp_path / "eafo")
        assert log.update_steps == steps
        assert log.steps == sorted({*steps, host.global_step}), "the log ends with the model"
        updates = [row for row in log.rows if row.get("fit_end") is None]
        assert len(updates) == len(steps) * len(log.sites)
        assert plugin.controller.bank.functions().amplitude("eps").tolist() == pytest.approx(
            [row["eps"] for row in log.last()]
        )
    for row in plugin.controller.records:
        assert all(math.isfinite(row[column]) for column in ("eps", "entropy", "entropy_after", "mu", "sigma"))
    assert not plugin.controller.collecting
    assert "on_load_checkpoint" not in vars(host.lightning_module)
    plugin.controller.detach()
    assert "on_save_checkpoint" not in vars(host.lightning_module)
    tally("trainer features tried")


@pytest.mark.parametrize(
    "kind", [those.StochasticWeightAveraging, *([those.WeightAveraging, those.EMAWeightAveraging] if AVERAGES else [])]
)
def test_averages_know_the_corrections_in_either_order(tmp_path: Path, kind: Any) -> None:
    given = {"swa_lrs": 0.01, "swa_epoch_start": 1} if kind is those.StochasticWeightAveraging else {}
    states = []
    for order in ("before", "after"):
        feature = Feature({"max_epochs": 3}, **{order: [partial(kind, **given)]})
        plugin = EAFOCallback(eps_init=0.2, lr_multiple=5.0, update_every_n_steps=EVERY, save_log=False, verbose=False)
        host, _ = fit(tmp_path / order, feature, plugin)
        (average,) = [each for each in host.callbacks if type(each) is kind]
        states.append(average._average_model.state_dict())
    assert states[0].keys() == states[1].keys()
    own = [key for key in states[0] if key.endswith("_eps")]
    assert len(own) == 3
    for key in own:  # the two orders differ by one step of the trust region, never by the average itself
        torch.testing.assert_close(states[0][key], states[1][key], atol=0.05, rtol=0)
        assert states[0][key].item() != pytest.approx(0.2, abs=1e-6)


class Stop(those.EarlyStopping):
    """Counts what it has been shown."""

    def _run_early_stopping_check(self, host: Trainer) -> None:
        self.seen = [*getattr(self, "seen", []), float(host.callback_metrics["eafo/mean_entropy"])]
        super()._run_early_stopping_check(host)


def test_early_stopping_and_checkpoints_watch_the_entropy(tmp_path: Path, tally: Tally) -> None:
    stop = Stop("eafo/mean_entropy", patience=1, min_delta=100.0, check_on_train_epoch_end=True)
    best = those.ModelCheckpoint(tmp_path, monitor="eafo/mean_entropy", save_on_train_epoch_end=True)
    plugin = EAFOCallback(dirpath=tmp_path / "eafo", update_every_n_steps=EVERY, verbose=False)
    host = trainer(tmp_path, plugin, stop, best, max_epochs=9, enable_checkpointing=True)
    host.fit(Net())
    assert host.current_epoch == 2, "an entropy does not fall by 100 nats"
    last = {row["step"]: [] for row in plugin.controller.records}  # pyright: ignore[reportOptionalMemberAccess]
    for row in plugin.controller.records:  # pyright: ignore[reportOptionalMemberAccess]
        last[row["step"]].append(row["entropy"])
    shown = [sum(last[step]) / len(last[step]) for step in (8, 16)]
    assert stop.seen == pytest.approx(shown, rel=1e-5)
    assert best.best_model_score == pytest.approx(min(shown), rel=1e-5)
    tally("trainer features tried", 2)


@pytest.mark.parametrize("kind", [Net, MidEpoch])
def test_tuners_leave_no_trace_in_the_corrections(tmp_path: Path, kind: Callable[[], Net], tally: Tally) -> None:
    """lr_find trains and takes it back: the fit after it is the fit without it, log included."""
    logs, states = [], []
    for tuned in (False, True):
        torch.manual_seed(0)
        net = kind()
        plugin = EAFOCallback(dirpath=tmp_path / str(tuned), update_every_n_steps=EVERY, verbose=False)
        host = trainer(tmp_path, plugin)
        if tuned:
            found = Tuner(host).lr_find(net, num_training=8, update_attr=False)
            assert found is not None
            assert len(found.results["loss"]) >= 7
            assert plugin.controller is None or not plugin.controller.records
            net.lr = 0.05
        torch.manual_seed(1)
        host.fit(net)
        logs.append(CorrectionLog.load(tmp_path / str(tuned)).rows)
        states.append(net.state_dict())
    assert logs[0] == logs[1]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    tally("trainer features tried")


def test_a_checkpoint_of_weights_only_knows_its_sites(tmp_path: Path, tally: Tally) -> None:
    keep = those.ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    plugin = EAFOCallback(eps_init=0.3, update_every_n_steps=EVERY, save_log=False, verbose=False)
    host = trainer(tmp_path, plugin, keep, enable_checkpointing=True)
    host.fit(net := Net())
    path = str(tmp_path / "weights.ckpt")
    assert "callbacks" not in torch.load(path, weights_only=True)
    x = torch.randn(5, 8)
    model = apply_from_checkpoint(Net(), path).eval()
    assert torch.equal(model(x), net.eval()(x))
    (one,) = trainer(tmp_path, EAFOCallback(verbose=False)).test(Net(), net.val_dataloader(), path, verbose=False)
    (two,) = host.test(net, net.val_dataloader(), verbose=False)
    assert one == two
    tally("trainer features tried")


def test_a_dry_run_takes_nothing_from_the_run_after_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plugin = EAFOCallback(dirpath=tmp_path, update_every_n_steps=EVERY, verbose=False)
    trainer(tmp_path, plugin, fast_dev_run=1).fit(net := Net())
    trainer(tmp_path, plugin, max_steps=4).fit(net)
    assert CorrectionLog.load(tmp_path).steps == [1, 2, 4]


@pytest.mark.parametrize("place", [0, 1], ids=["finder first", "plugin first"])
def test_the_rate_of_eps_stays_its_multiple_of_the_one_that_is_found(tmp_path: Path, place: int) -> None:
    plugin = EAFOCallback(lr_multiple=5.0, update_every_n_steps=EVERY, save_log=False, verbose=False)
    callbacks: list[Callback] = [those.LearningRateFinder(num_training_steps=16)]
    callbacks.insert(1 - place, plugin)
    host = trainer(tmp_path, *callbacks, max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        host.fit(Net())
    model, eps = host.optimizers[0].param_groups
    assert eps["lr"] == pytest.approx(5 * model["lr"])


class Later(those.LearningRateFinder):
    """Tries rates not before the fit starts, but after."""

    def on_fit_start(self, *_: Any) -> None:
        pass


class AtStart(Later):
    """As training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.lr_find(trainer, pl_module)


class Between(Later):
    """At the start of the second epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("finder", [AtStart, Between])
def test_a_finder_within_a_fit_takes_back_what_it_has_tried(tmp_path: Path, finder: type[Later], tally: Tally) -> None:
    """The run goes on from there, and what it saves later is the state of later; an earlier fit makes no difference."""
    plugin = EAFOCallback(dirpath=tmp_path / "eafo", update_every_n_steps=EVERY, verbose=False)
    trainer(tmp_path, plugin, max_steps=1, fast_dev_run=1).fit(net := Net())
    assert plugin.controller is not None
    before = plugin.controller.rounds
    host = trainer(tmp_path, plugin, finder(num_training_steps=8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        host.fit(net)
    log = CorrectionLog.load(tmp_path / "eafo")
    assert log.steps == [1, *range(EVERY, 17, EVERY)]
    state = plugin.state_dict()
    assert (state["rounds"], state["last_step"]) == (before + len(log.steps), 16)
    tally("trainer features tried")


def test_a_state_that_is_not_taken_up_yet_is_saved_as_it_is(tmp_path: Path) -> None:
    """What a tuner saves before a fit of several ranks has begun holds what every rank had seen."""
    plugin = EAFOCallback(update_every_n_steps=EVERY, save_log=False, verbose=False)
    trainer(tmp_path, plugin).fit(net := Net())
    state = {**plugin.state_dict(), "ranks": ["what one has seen", "what the other has"]}
    plugin.load_state_dict(dict(state))
    saved = {"callbacks": {plugin.state_key: plugin.state_dict()}}
    several: Any = SimpleNamespace(world_size=2)
    plugin.on_save_checkpoint(several, net, saved)
    assert saved["callbacks"][plugin.state_key]["ranks"] == state["ranks"]


@pytest.mark.parametrize("corrected", [False, True])
def test_a_finder_in_a_resumed_run_begins_anew_with_the_weights(tmp_path: Path, corrected: bool) -> None:
    """As the troubleshooting page says, with and without the plugin."""

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            self.step, self.states = trainer.global_step, len(trainer.optimizers[0].state)
            self.weights = {key: value.clone() for key, value in trainer.lightning_module.state_dict().items()}

    def plugin() -> list[EAFOCallback]:
        return [EAFOCallback(update_every_n_steps=EVERY, save_log=False, verbose=False)] if corrected else []

    first, start = trainer(tmp_path, *plugin()), Start()
    first.fit(Net())
    first.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    finder = those.LearningRateFinder(num_training_steps=8)
    again = trainer(tmp_path, *plugin(), finder, start, max_epochs=3)
    again.fit(Net(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert (start.step, start.states) == (0, 0)
    assert all(torch.equal(start.weights[key], value) for key, value in saved.items())
    assert again.global_step == 3 * first.global_step // 2
