"""The callback on real Lightning trainers: attach, log, resume, evaluate, and get along with others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as those
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from eafo_dynamic import EAFOCallback, apply_from_checkpoint
from eafo_dynamic.errors import ConfigError, EAFOError, PatternError, SiteError
from eafo_dynamic.records import CorrectionLog


class Block(nn.Module):
    """One in-place ReLU, called twice, as in torchvision's BasicBlock."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.one(x)))
        return self.relu(self.two(y) + x)


class Net(LightningModule):
    """A plain module that knows nothing of this package."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), Block(16), nn.Linear(16, 3))
        self.steps: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.steps.append(batch_idx)
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)]


pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # ModelCheckpoint, of a resumed run

SITES = ["body.1", "body.2.relu#0", "body.2.relu#1"]


def loader(n: int = 96, batch: int = 16) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "logger": CSVLogger(str(folder), name="run"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
    }
    return Trainer(default_root_dir=str(folder), callbacks=list(callbacks), **{**quiet, **options})


def fit(folder: Path, callback: EAFOCallback, module: LightningModule | None = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    host = trainer(folder, callback, **options)
    host.fit(module or Net(), loader())
    return host


def test_log_has_one_row_per_site_per_update_and_things_move(tmp_path: Path) -> None:
    fit(tmp_path, EAFOCallback(update_every_n_steps=4, verbose=False))
    log = CorrectionLog.load(tmp_path)
    assert [(row["step"], row["site"]) for row in log.rows] == [(s, site) for s in (1, 2, 4, 8, 12) for site in SITES]
    for site in SITES:
        rows = [row for row in log.rows if row["site"] == site]
        assert len({row["eps"] for row in rows}) == len(rows)
        assert len({row["entropy"] for row in rows}) == len(rows)
        assert all(math.isfinite(row["entropy"]) and row["n"] > 0 for row in rows)
    manifest = json.loads((tmp_path / "run/version_0/eafo/manifest.json").read_text())
    assert [site["name"] for site in manifest["sites"]] == SITES
    assert manifest["options"]["policy"] == "learned"
    # wheels on PyPI leave out in their name what build they are: 2.14.1, and not 2.14.1+cu130
    assert manifest["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


def test_pandas_in_one_line(tmp_path: Path) -> None:
    fit(tmp_path, EAFOCallback(update_every_n_steps=4, verbose=False))
    frame = CorrectionLog.load(tmp_path).to_pandas()
    assert len(frame) == 15  # rounds at steps 1, 2, 4, 8, 12
    assert set(frame["site"]) == set(SITES)


def test_aggregates_reach_loggers_and_other_callbacks_and_no_progress_bar(tmp_path: Path) -> None:
    stop = EarlyStopping("eafo/mean_entropy", patience=100, check_on_train_epoch_end=True)
    loggers = [CSVLogger(str(tmp_path), name="csv"), TensorBoardLogger(str(tmp_path), name="tb")]
    host = trainer(tmp_path, EAFOCallback(update_every_n_steps=3, verbose=False), stop, logger=loggers)
    host.fit(Net(), loader())
    assert not [name for name in host.progress_bar_metrics if name.startswith("eafo")], "nothing unasked"
    assert math.isfinite(host.callback_metrics["eafo/mean_entropy"])
    header = (tmp_path / "csv/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    means = {"entropy", "eps", "abs_eps", "abs_lift", "atom_mass"}
    assert {f"eafo/mean_{name}" for name in means} <= set(header)
    for logger in ("csv", "tb"):
        hparams = yaml.safe_load((tmp_path / logger / "version_0/hparams.yaml").read_text())
        assert hparams["eafo"]["update_every_n_steps"] == 3


def test_no_logger_is_no_problem(tmp_path: Path) -> None:
    fit(tmp_path, EAFOCallback(update_every_n_steps=3, verbose=False), logger=False)
    assert CorrectionLog.load(tmp_path / "eafo").rows


def test_eps_has_a_group_of_its_own_without_weight_decay(tmp_path: Path) -> None:
    callback = EAFOCallback(update_every_n_steps=3, lr_multiple=5.0, verbose=False)
    host = fit(tmp_path, callback, max_steps=4)
    plain, eps = host.optimizers[0].param_groups
    assert eps["weight_decay"] == 0.0
    assert plain["weight_decay"] == 0.1
    assert eps["lr"] == pytest.approx(5 * plain["lr"])
    assert callback.controller is not None
    assert {id(p) for p in eps["params"]} == {id(p) for p in callback.controller.amplitudes.values()}
    assert not {id(p) for p in plain["params"]} & {id(p) for p in eps["params"]}


def test_wrapping_changes_no_random_state_no_buffer_and_no_counter(tmp_path: Path) -> None:
    class Watch(Callback):
        seen: tuple[Tensor, int, list[int]] | None = None

        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            net = pl_module
            assert isinstance(net, Net)
            block = net.body[2]
            self.seen = (torch.get_rng_state(), int(block.norm.num_batches_tracked), list(net.steps))

    states = []
    for callbacks in ([], [EAFOCallback(verbose=False)]):
        torch.manual_seed(3)
        watch = Watch()
        trainer(tmp_path, *callbacks, watch, max_steps=1).fit(Net(), loader())
        assert watch.seen is not None
        states.append(watch.seen)
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1:] == states[1][1:] == (0, [])


@pytest.mark.parametrize("policy", ["frozen", "learned"])
def test_eps_zero_frozen_trains_exactly_as_without(tmp_path: Path, policy: str) -> None:
    """Same weights to the bit after training with corrections that stay zero."""
    results = []
    for callbacks in ([], [EAFOCallback(policy=policy, eps_init=0.0, freeze_at_step=0, verbose=False)]):
        torch.manual_seed(3)
        net = Net()
        trainer(tmp_path, *callbacks).fit(net, loader())
        results.append({k: v for k, v in net.state_dict().items() if "eafo" not in k})
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


class _Interrupt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True


@pytest.mark.parametrize(
    "options",
    [
        {"update_every_n_steps": 4},
        {"update_every_n_steps": 4, "density": "histogram", "policy": "hybrid"},
        {"update_every_n_steps": 7, "collect_every_n_steps": 2},  # the checkpoint lies between two rounds
        {"update_every_n_steps": 5, "rollback_factor": 1.01, "policy": "entropy", "collect_every_n_steps": 1},
    ],
    ids=["default", "histogram", "between rounds", "rollback"],
)
def test_resume_equals_an_uninterrupted_run(tmp_path: Path, options: dict[str, Any]) -> None:
    def run(folder: Path, ckpt: str | None, epochs: int) -> tuple[Net, EAFOCallback]:
        torch.manual_seed(5)
        net = Net()
        callback = EAFOCallback(verbose=False, dirpath=folder / "eafo", **options)
        host = trainer(
            folder,
            callback,
            ModelCheckpoint(folder / f"until-{epochs}", filename="{step}", save_top_k=-1),
            max_epochs=epochs,
        )
        host.fit(net, loader(), ckpt_path=ckpt)
        return net, callback

    whole, _ = run(tmp_path / "whole", None, 4)
    run(tmp_path / "parts", None, 2)
    (ckpt,) = (tmp_path / "parts").glob("until-2/step=12.ckpt")
    resumed, _ = run(tmp_path / "parts", str(ckpt), 4)
    for (key, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), key
    rows = [CorrectionLog.load(tmp_path / part).rows for part in ("whole", "parts")]
    assert rows[0] == rows[1]


def test_a_resumed_run_in_a_new_folder_has_the_whole_log(tmp_path: Path) -> None:
    host = fit(tmp_path, EAFOCallback(update_every_n_steps=4, verbose=False))
    path = host.checkpoint_callback.best_model_path  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    fit_again = trainer(tmp_path, EAFOCallback(update_every_n_steps=4, verbose=False), max_epochs=3)
    fit_again.fit(Net(), loader(), ckpt_path=path)
    assert CorrectionLog.load(tmp_path / "run/version_0").steps == [1, 2, 4, 8, 12]
    assert CorrectionLog.load(tmp_path / "run/version_1").steps == [1, 2, 4, 8, 12, 16, 18]


def test_evaluation_from_a_checkpoint_uses_the_corrections(tmp_path: Path) -> None:
    host = fit(tmp_path, EAFOCallback(update_every_n_steps=3, eps_init=0.3, lr=0.0, verbose=False))
    assert host.checkpoint_callback is not None
    path = host.checkpoint_callback.best_model_path  # pyright: ignore[reportAttributeAccessIssue]
    (during,) = host.test(host.lightning_module, loader(), verbose=False)
    fresh = trainer(tmp_path, EAFOCallback(verbose=False))
    (after,) = fresh.test(Net(), loader(), ckpt_path=path, verbose=False)
    assert after["test_loss"] == pytest.approx(during["test_loss"], abs=1e-6)
    model = apply_from_checkpoint(Net(), path)
    x = next(iter(loader()))[0]
    host.lightning_module.eval()
    assert torch.equal(model.eval()(x), host.lightning_module(x))


def test_a_plain_checkpoint_loads_into_a_wrapped_model_and_back(tmp_path: Path) -> None:
    callback = EAFOCallback(verbose=False)
    host = fit(tmp_path, callback, max_steps=3)
    wrapped, plain = host.lightning_module, Net()
    wrapped.load_state_dict(plain.state_dict())
    kept = {key: value for key, value in wrapped.state_dict().items() if "eafo_" not in key}
    plain.load_state_dict(kept)
    assert all(torch.equal(value, wrapped.state_dict()[key]) for key, value in plain.state_dict().items())
    assert len(wrapped.state_dict()) > len(kept)


def test_another_models_checkpoint_is_refused_with_a_readable_difference(tmp_path: Path) -> None:
    host = fit(tmp_path, EAFOCallback(verbose=False), max_steps=2)
    path = host.checkpoint_callback.best_model_path  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    other = Net()
    other.body[1] = nn.ReLU()
    with pytest.raises(SiteError, match=r"body\.1: ReLU in the model, GELU in the checkpoint"):
        trainer(tmp_path, EAFOCallback(verbose=False)).fit(other, loader(), ckpt_path=path)


def test_accumulation_counts_optimiser_steps(tmp_path: Path) -> None:
    fit(tmp_path, EAFOCallback(update_every_n_steps=2, verbose=False), accumulate_grad_batches=2)
    log = CorrectionLog.load(tmp_path)
    assert log.steps == [1, 2, 4, 6]
    first = [row for row in log.rows if row["site"] == "body.1" and row["step"] == 1]
    assert first[0]["n"] == 2 * 16 * 16


def test_epochs_as_period(tmp_path: Path) -> None:
    fit(tmp_path, EAFOCallback(update_every_n_epochs=1, verbose=False), max_epochs=3)
    assert CorrectionLog.load(tmp_path).steps == [1, 2, 4, 6, 12, 18]


class Manual(Net):
    """Manual optimisation with two optimisers and two forwards a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.example_input_array = torch.zeros(2, 8)
        self.critic = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.critic(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for optimizer, sign in zip(self.optimizers(), (1.0, -1.0), strict=True):  # pyright: ignore
            optimizer.zero_grad()
            self.manual_backward(sign * self(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.body.parameters(), 0.01), torch.optim.Adam(self.critic.parameters(), 0.01)]


def test_manual_optimisation_with_two_optimisers(tmp_path: Path) -> None:
    callback = EAFOCallback(update_every_n_steps=4, verbose=False)
    host = fit(tmp_path, callback, Manual(), max_epochs=1)
    counts = [len(optimizer.param_groups[-1]["params"]) for optimizer in host.optimizers]
    assert counts == [6, 2], "both amplitudes train in the optimiser of their own layers"
    assert {row["site"] for row in CorrectionLog.load(tmp_path).rows} == {*SITES, "critic.1"}


def test_averaging_copies_the_wrapped_model(tmp_path: Path) -> None:
    if not hasattr(those, "WeightAveraging"):
        pytest.skip("lightning has it since 2.6")
    average = those.WeightAveraging()
    trainer(tmp_path, EAFOCallback(verbose=False), average, max_steps=3).fit(Net(), loader())
    assert average._average_model is not None
    assert any("eafo_" in name for name in average._average_model.state_dict())


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True, "logger": None}], ids=str)
def test_dry_and_bare_runs(tmp_path: Path, options: dict[str, Any]) -> None:
    if options.get("barebones"):
        bare = Trainer(barebones=True, max_epochs=1, accelerator="cpu", default_root_dir=str(tmp_path), callbacks=[])
        bare.callbacks.insert(0, EAFOCallback(update_every_n_steps=2, verbose=False))  # pyright: ignore
        with pytest.warns(UserWarning):
            bare.fit(Net(), loader())
    else:
        fit(tmp_path, EAFOCallback(verbose=False), **options)


class Stream(IterableDataset[Any]):
    """A stream that would notice being read ahead."""

    def __init__(self) -> None:
        self.served = 0

    def __iter__(self) -> Any:
        for _ in range(64):
            self.served += 1
            yield torch.randn(8), torch.tensor(0)


def test_a_stream_is_not_consumed(tmp_path: Path) -> None:
    stream = Stream()
    callback = EAFOCallback(update_every_n_steps=2, verbose=False)
    trainer(tmp_path, callback, max_epochs=1).fit(Net(), DataLoader(stream, 16))
    assert stream.served == 64
    assert callback.controller is not None
    assert [site.name for site in callback.controller.report.wrapped] == SITES


def test_the_users_generator_is_not_advanced(tmp_path: Path) -> None:
    orders = []
    for callbacks in ([], [EAFOCallback(verbose=False)]):
        data = loader().dataset
        shuffled = DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(7))
        torch.manual_seed(0)
        net = Net()
        trainer(tmp_path, *callbacks, max_epochs=1).fit(net, shuffled)
        orders.append(shuffled.generator.get_state())
    assert torch.equal(orders[0], orders[1])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target_modules": "Nope"}, PatternError, "target_modules='Nope'"),
        ({"log_every_n_steps": 0}, ConfigError, "log_every_n_steps=0"),
        ({"update_every_n_epochs": 0}, ConfigError, "update_every_n_epochs=0"),
        ({"lr": -1.0}, ConfigError, "lr=-1.0"),
        ({"lr": 1.0, "lr_multiple": 2.0}, ConfigError, "lr_multiple=2.0"),
        ({"weight_decay": -1.0}, ConfigError, "weight_decay=-1.0"),
        ({"log_sites": ["epsilon"]}, ConfigError, "log_sites='epsilon'.*eps"),
        ({"log_figures": True, "save_log": False}, ConfigError, "log_figures=True"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], error: type[EAFOError], words: str) -> None:
    with pytest.raises(error, match=words):
        fit(tmp_path, EAFOCallback(verbose=False, **options))


def test_table_of_sites_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, EAFOCallback(), max_steps=1)
    out = capsys.readouterr().out
    assert out.count("activation sites wrapped") == 1
    for site in SITES:
        assert site in out


def test_snapshots_of_the_functions_are_kept(tmp_path: Path) -> None:
    callback = EAFOCallback(update_every_n_steps=2, verbose=False)
    fit(tmp_path, callback)
    log = CorrectionLog.load(tmp_path)
    shapes = log.shapes("body.1")
    assert [shape["step"] for shape in shapes] == [1, 2, 6, 12]  # rounds 1, 2, 4 and the last one, 7
    counts = dict(zip(log.series("body.1", "step"), log.series("body.1", "n"), strict=True))
    for shape in shapes:
        assert sum(shape["counts"]) == counts[shape["step"]]
        assert len(shape["edges"]) == len(shape["counts"]) + 1
    last = shapes[-1]
    z = torch.tensor(last["z"])
    torch.testing.assert_close(torch.tensor(last["base"]), F.gelu(z), atol=1e-5, rtol=0)
    assert callback.controller is not None
    (site, *_) = callback.controller.sites
    corrected = F.gelu(z) + site.correction(callback.controller.model.get_submodule("body.1"), z)
    torch.testing.assert_close(torch.tensor(last["function"]), corrected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("again", ["same callback", "new callback"])
def test_a_second_fit_goes_on_with_the_same_sites(tmp_path: Path, again: str) -> None:
    net = Net()
    options: dict[str, Any] = {"update_every_n_steps": 3, "lr_multiple": 1.0, "verbose": False}  # no bound is reached
    first = EAFOCallback(**options)
    trainer(tmp_path, first).fit(net, loader())
    eps = {name: p.item() for name, p in net.named_parameters() if "eafo_" in name}
    second = first if again == "same callback" else EAFOCallback(**options)
    trainer(tmp_path, second).fit(net, loader())
    now = {name: p.item() for name, p in net.named_parameters() if "eafo_" in name}
    assert now.keys() == eps.keys()
    assert [name for name in eps if now[name] == eps[name]] == []
    for version in ("version_0", "version_1"):
        assert CorrectionLog.load(tmp_path / "run" / version).steps == [1, 2, 3, 6, 9, 12]


def test_an_interrupted_run_leaves_a_clean_model(tmp_path: Path) -> None:
    class Break(Callback):
        def on_before_backward(self, *args: Any) -> None:
            raise RuntimeError("out of patience")

    net = Net()
    callback = EAFOCallback(verbose=False)
    with pytest.raises(RuntimeError, match="patience"):
        trainer(tmp_path, callback, Break()).fit(net, loader())
    assert callback.controller is not None
    assert not callback.controller.collecting
    assert "on_load_checkpoint" not in vars(net)


def test_sites_and_figures_reach_the_loggers_on_request(tmp_path: Path) -> None:
    tensorboard = TensorBoardLogger(str(tmp_path), name="tb")
    table = CSVLogger(str(tmp_path), name="csv")
    callback = EAFOCallback(update_every_n_steps=2, log_sites=["eps", "entropy"], log_figures=True, verbose=False)
    trainer(tmp_path, callback, logger=[tensorboard, table]).fit(Net(), loader())
    header = (tmp_path / "csv/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    names = [site.replace("#", "-") for site in SITES]  # which MLflow would leave out
    assert {f"eafo/{column}/{name}" for column in ("eps", "entropy") for name in names} <= set(header)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb/version_0"))
    events.Reload()
    assert [image.step for image in events.Images("eafo/functions")] == [1, 2, 6, 12]
    assert "eafo/eps/body.1" in events.Tags()["scalars"]


class _Images:
    """The part of WandbLogger's interface that takes figures."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        assert images[0].get_size_inches().prod() > 0
        self.sent.append((key, step))


class _Runs:
    """The part of MLFlowLogger's interface that takes figures."""

    run_id = "a-run"

    def __init__(self) -> None:
        self.experiment = self
        self.sent: list[tuple[str, str]] = []

    def log_figure(self, run_id: str, figure: Any, artifact_file: str) -> None:
        assert figure.get_size_inches().prod() > 0
        self.sent.append((run_id, artifact_file))


def test_figures_go_through_each_loggers_own_interface(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from eafo_dynamic.trainers.lightning.reporter import log_figure

    images, runs = _Images(), _Runs()
    assert log_figure(images, "eafo/functions", Figure(), 7)
    assert images.sent == [("eafo/functions", 7)]
    assert log_figure(runs, "eafo/functions", Figure(), 7)
    assert runs.sent == [("a-run", "eafo/functions-7.png")]
    assert not log_figure(CSVLogger(str(tmp_path)), "eafo/functions", Figure(), 7)


def test_callback_plots_its_own_log(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    callback = EAFOCallback(update_every_n_steps=2, verbose=False)
    with pytest.raises(EAFOError, match="no correction log yet"):
        callback.plot()
    fit(tmp_path, callback)
    assert callback.controller is not None
    for drawn, kinds in (
        (callback, ("heatmap", "functions", "ranking")),
        (callback.controller, ("heatmap", "functions", "densities")),
        (callback.history, ("heatmap", "ranking")),
    ):
        for what in kinds:
            figure = drawn.plot(what)
            assert figure.axes or figure.subfigs
            matplotlib.pyplot.close(figure)


def test_history_and_sites_show_as_tables(tmp_path: Path) -> None:
    callback = EAFOCallback(update_every_n_steps=6, verbose=False)
    fit(tmp_path, callback)
    html = callback.history._repr_html_()
    assert html.count("<tr>") == 1 + 15  # rounds at steps 1, 2, 4, 6, 12
    assert "body.2.relu#1" in html
    assert callback.controller is not None
    assert "eps=" in callback.controller.sites._repr_html_()
    from rich.console import Console

    console = Console(width=200, file=__import__("io").StringIO())
    console.print(callback.history, callback.controller.sites)
    assert "body.2.relu#0" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_history_before_and_after(tmp_path: Path) -> None:
    callback = EAFOCallback(update_every_n_steps=6, verbose=False)
    assert callback.history == []
    fit(tmp_path, callback)
    assert len(callback.history) == 15
