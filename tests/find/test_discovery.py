"""Sites that only the first training batch shows: streams, manual optimisation, data that is not ready in setup."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as those
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from eafo_dynamic import EAFOCallback
from eafo_dynamic.apply.surgery import is_wrapped
from eafo_dynamic.errors import PatternError, SiteError
from eafo_dynamic.records import CorrectionLog

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Checkpoint directory", "ignore:The 'train_dataloader' does not have"
)  # ModelCheckpoint, of a resumed run

SITES = ["act#0", ":relu#0", "act#1", ":relu#1"]
EPS = ["eafo_0_eps", "eafo_1_eps", "eafo_2_eps", "eafo_3_eps"]
CRITIC = ["critic.eafo_0_eps"]


class Net(LightningModule):
    """One GELU called twice and two functional ReLUs: nothing of it shows in the module tree."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.act, self.norm, self.drop = nn.GELU(), nn.BatchNorm1d(16), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.act(self.one(x))))
        return self.head(self.drop(F.relu(self.act(self.two(h)))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0].clone()), batch[1])
        self.log("train_loss", loss)
        batch[0].zero_()  # whoever runs this twice on one batch is found out
        return loss

    def configure_optimizers(self) -> Any:
        groups = [[p for p in self.parameters() if (p.dim() < 2) == small] for small in (False, True)]
        optimizer = torch.optim.AdamW(
            [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0, "lr": 3e-3}]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Critic(nn.Module):
    """One functional call, in a forward that runs twice a step."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.leaky_relu(self.one(x), 0.2))


class Manual(Net):
    """A generator and a critic, each with an optimiser of its own, in one training_step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = Critic()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        generator, critic = self.optimizers()  # pyright: ignore
        for optimizer, sign in ((generator, 1.0), (critic, -1.0)):
            self.toggle_optimizer(optimizer)
            loss = sign * self.critic(self(batch[0])).square().mean()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
            self.log("critic", loss)
        self.lr_schedulers().step()  # pyright: ignore

    def configure_optimizers(self) -> Any:
        critic = [p for name, p in self.named_parameters() if name.startswith("critic")]
        own = [p for name, p in self.named_parameters() if not name.startswith("critic")]
        optimizers = [torch.optim.SGD(own, 0.01), torch.optim.Adam(critic, 0.01)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[1], 5, 0.5)]


class Once(IterableDataset[Any]):
    """A stream that says how often it was begun, and how much of it was read."""

    def __init__(self, n: int = 96) -> None:
        self.n, self.begun, self.served = n, 0, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.begun += 1
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.n):
            self.served += 1
            x = torch.randn(8, generator=generator)
            yield x, x[:3].argmax()


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "logger": CSVLogger(str(folder), name="run"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
    }
    return Trainer(default_root_dir=str(folder), callbacks=list(callbacks), **{**quiet, **options})


def eafo(**options: Any) -> EAFOCallback:
    return EAFOCallback(**{"verbose": False, "update_every_n_steps": 3, **options})


def sites_of(callback: EAFOCallback) -> list[str]:
    assert callback.controller is not None
    return [site.name for site in callback.controller.report.wrapped]


def test_a_stream_read_once_shows_every_call_and_eps_trains(tmp_path: Path) -> None:
    stream, callback, net = Once(), eafo(), Net()
    host = trainer(tmp_path, callback)
    host.fit(net, DataLoader(stream, 16))
    assert (stream.begun, stream.served) == (1, 96)
    assert sites_of(callback) == SITES
    amplitudes = dict(net.named_parameters())
    assert all(amplitudes[name].item() != pytest.approx(0.01, abs=1e-6) for name in EPS)
    log = CorrectionLog.load(tmp_path)
    assert [(row["step"], row["site"]) for row in log.rows] == [(step, site) for step in (1, 2, 3, 6) for site in SITES]
    assert all(row["n"] > 0 for row in log.rows)


def test_eps_has_its_own_group_that_follows_the_schedule(tmp_path: Path) -> None:
    callback = eafo(lr_multiple=5.0)
    host = trainer(tmp_path, callback)
    host.fit(Net(), DataLoader(Once(), 16))
    weights, _, eps = host.optimizers[0].param_groups
    assert callback.controller is not None
    assert {id(p) for p in eps["params"]} == {id(p) for p in callback.controller.amplitudes.values()}
    assert eps["weight_decay"] == 0.0
    (config,) = host.lr_scheduler_configs
    assert weights["lr"] < 1e-3
    assert eps["lr"] == pytest.approx(5 * weights["lr"])
    assert config.scheduler.get_last_lr()[2] == pytest.approx(eps["lr"])


class _Batches(Callback):
    """Writes down what a training step starts from."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        norm = pl_module.get_submodule("norm")
        self.seen.append((batch[0].clone(), torch.get_rng_state(), norm.num_batches_tracked.clone()))  # pyright: ignore


@pytest.mark.parametrize("kind", [Net, Manual])
def test_a_run_at_eps_zero_is_the_plain_run_bit_for_bit(tmp_path: Path, kind: type[Net]) -> None:
    """Weights, optimiser states, batches, random states, counters and the user's log: the search has left no trace."""
    runs: list[Any] = []
    for callbacks in ([], [eafo(eps_init=0.0, policy="frozen")]):
        torch.manual_seed(3)
        net, batches = kind(), _Batches()
        host = trainer(tmp_path / str(len(callbacks)), *callbacks, batches)
        host.fit(net, DataLoader(Once(), 16))
        states = [optimizer.state_dict()["state"] for optimizer in host.optimizers]
        weights = {key: value for key, value in net.state_dict().items() if "eafo_" not in key}
        table = (tmp_path / str(len(callbacks)) / "run/version_0/metrics.csv").read_text().splitlines()
        own = [key for key in ("train_loss", "critic") if key in table[0]]
        columns = [table[0].split(",").index(key) for key in own]
        losses = [float(line.split(",")[column] or "nan") for line in table[1:] for column in columns]
        runs.append((weights, states, batches.seen, losses))
        assert is_wrapped(net) == bool(callbacks)
    torch.testing.assert_close(runs[0], runs[1], rtol=0.0, atol=0.0, equal_nan=True)


def test_manual_optimisation_is_followed_without_its_optimisers(tmp_path: Path) -> None:
    callback, net = eafo(), Manual()
    host = trainer(tmp_path, callback)
    host.fit(net, DataLoader(Once(), 16))
    assert host.global_step == 12, "two optimisers, six batches, and none for the search"
    assert sites_of(callback) == [*SITES, "critic:leaky_relu"]
    assert callback.controller is not None
    names = {id(p): name for name, p in callback.controller.amplitudes.items()}
    held = [{id(p) for group in each.param_groups for p in group["params"]} for each in host.optimizers]
    found = [{name for key, name in names.items() if key in each} for each in held]
    wanted = [{name.replace("_eps", part) for name in names for part in ("_eps", "_lift")} for names in (EPS, CRITIC)]
    assert found == wanted, "every amplitude trains in the optimiser of its own layers"
    for name, p in callback.controller.amplitudes.items():
        assert p.item() != pytest.approx(0.01 if name.endswith("_eps") else 0.0, abs=1e-7), name


class _OwnGradients(Manual):
    """Its training_step needs gradients, which the search has not: forward alone can be followed."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer, _ = self.optimizers()  # pyright: ignore
        loss = self(batch[0]).square().mean()
        for p, gradient in zip(self.head.parameters(), torch.autograd.grad(loss, self.head.parameters()), strict=True):
            p.grad = gradient
        optimizer.step()


def test_forward_is_followed_where_the_step_cannot_be(tmp_path: Path) -> None:
    callback = eafo()
    trainer(tmp_path, callback, max_steps=2).fit(_OwnGradients(), DataLoader(Once(), 16))
    assert sites_of(callback) == SITES


@pytest.mark.parametrize("kind", [Net, Manual])
@pytest.mark.parametrize(
    "options",
    [{}, {"policy": "hybrid", "density": "histogram", "update_every_n_steps": 4}],
    ids=["default", "hybrid histogram"],
)
def test_resume_equals_an_uninterrupted_run(tmp_path: Path, kind: type[Net], options: dict[str, Any]) -> None:
    def run(folder: Path, ckpt: Path | None, epochs: int) -> tuple[Net, EAFOCallback, Trainer]:
        torch.manual_seed(5)
        net, callback = kind(), eafo(dirpath=folder / "eafo", **options)
        net.drop.p = 0.0  # its random stream is the user's to restore
        keep = ModelCheckpoint(folder / f"until-{epochs}", filename="kept", save_top_k=-1)
        host = trainer(folder, callback, keep, max_epochs=epochs)
        host.fit(net, DataLoader(Once(), 16), ckpt_path=ckpt)
        return net, callback, host

    whole, first, one = run(tmp_path / "whole", None, 2)
    run(tmp_path / "parts", None, 1)
    resumed, second, two = run(tmp_path / "parts", next((tmp_path / "parts/until-1").glob("kept*.ckpt")), 2)
    assert sites_of(first) == sites_of(second)
    torch.testing.assert_close(dict(whole.state_dict()), dict(resumed.state_dict()), rtol=0.0, atol=0.0)
    for a, b in zip(one.optimizers, two.optimizers, strict=True):
        torch.testing.assert_close(a.state_dict()["state"], b.state_dict()["state"], rtol=0.0, atol=0.0)
        assert [len(group["params"]) for group in a.param_groups] == [len(group["params"]) for group in b.param_groups]
    assert CorrectionLog.load(tmp_path / "whole").rows == CorrectionLog.load(tmp_path / "parts").rows


def test_a_plain_checkpoint_goes_on_and_gets_its_sites_at_the_first_batch(tmp_path: Path) -> None:
    plain = trainer(tmp_path)
    plain.fit(Net(), DataLoader(Once(), 16))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    callback = eafo()
    host = trainer(tmp_path, callback, max_epochs=2)
    host.fit(Net(), DataLoader(Once(), 16), ckpt_path=tmp_path / "plain.ckpt")
    assert sites_of(callback) == SITES
    weights, _, eps = host.optimizers[0].param_groups
    assert eps["lr"] == pytest.approx(3.0 * weights["lr"])


class _LateData(TensorDataset):
    """Cannot be read before the trainer has finished its setup."""

    ready = False

    def __getitem__(self, index: int) -> Any:
        if not self.ready:
            raise RuntimeError("the store is not open")
        return super().__getitem__(index)


class _Opens(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.fit_loop._data_source.dataloader().dataset.ready = True


def test_data_that_cannot_be_read_ahead(tmp_path: Path) -> None:
    data = DataLoader(_LateData(torch.randn(32, 8), torch.zeros(32, dtype=torch.long)), 16)
    callback = eafo()
    trainer(tmp_path, callback, _Opens()).fit(Net(), data)
    assert sites_of(callback) == SITES


def test_a_second_fit_keeps_the_corrections(tmp_path: Path) -> None:
    net = Net()
    trainer(tmp_path, eafo()).fit(net, DataLoader(Once(), 16))
    before = {name: p.item() for name, p in net.named_parameters() if "eafo_" in name}
    trainer(tmp_path, eafo(policy="frozen"), limit_val_batches=0).fit(net, DataLoader(Once(), 16))
    assert {name: p.item() for name, p in net.named_parameters() if "eafo_" in name} == before


def test_sites_and_why_they_wait_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, eafo(verbose=True), max_steps=1).fit(Net(), DataLoader(Once(), 16))
    out = capsys.readouterr().out
    assert "first training batch: the training data is a stream" in " ".join(out.split())
    assert "4 of 4 activation sites wrapped" in out


def test_patterns_are_checked_when_the_sites_are_known(tmp_path: Path) -> None:
    with pytest.raises(PatternError, match="target_modules='Nope'"):
        trainer(tmp_path, eafo(target_modules="Nope")).fit(Net(), DataLoader(Once(), 16))


class _Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.two = torch.compile(self.two, backend="eager")  # pyright: ignore


@pytest.mark.parametrize(
    ("kind", "callbacks", "options", "why"),
    [
        (_Compiled, [], {}, "two is compiled"),
        pytest.param(
            *(Net, [getattr(those, "WeightAveraging", None)], {}, "WeightAveraging copies the model"),
            marks=pytest.mark.skipif(not hasattr(those, "WeightAveraging"), reason="lightning has it since 2.6"),
        ),
        (Net, [], {"strategy": "ddp", "devices": 1}, "DDPStrategy knows only parameters"),
    ],
    ids=["compiled", "averaging", "ddp"],
)
def test_where_sites_cannot_wait_the_tree_alone_is_searched_and_a_warning_says_so(
    tmp_path: Path, kind: type[Net], callbacks: list[Any], options: dict[str, Any], why: str
) -> None:
    callback = eafo()
    with pytest.warns(UserWarning, match=f"module tree only.*a stream; {why}.*example_input_array"):
        trainer(tmp_path, callback, *(make() for make in callbacks), max_steps=1, **options).fit(
            kind(), DataLoader(Once(), 16)
        )
    assert sites_of(callback) == ["act"]


def test_a_batch_that_cannot_be_followed_leaves_the_tree_and_a_warning(tmp_path: Path) -> None:
    class Stubborn(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not torch.is_grad_enabled():
                raise KeyError("no gradient")
            return super().training_step(batch, batch_idx)

        def forward(self, x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise KeyError("no gradient")
            return super().forward(x)

    callback = eafo()
    with pytest.warns(UserWarning, match="module tree only.*KeyError: 'no gradient'"):
        trainer(tmp_path, callback, max_steps=1).fit(Stubborn(), DataLoader(Once(), 16))
    assert sites_of(callback) == ["act"]


def test_nothing_to_wrap_is_an_error_at_the_first_batch(tmp_path: Path) -> None:
    class Linear(Net):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Identity()  # pyright: ignore

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(self.one(x)))

    with pytest.raises(SiteError, match="no activation"):
        trainer(tmp_path, eafo()).fit(Linear(), DataLoader(Once(), 16))
