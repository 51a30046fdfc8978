"""The log of a trainer's run: it ends with the model however the fit ends, and every run has a folder of its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import EAFOCallback
from eafo_dynamic.records import CorrectionLog
from eafo_dynamic.records.summary import compare_runs, compare_sites, layer_rows

# what Lightning says of a checkpoint's callbacks, and of a folder that exists
pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using", "ignore:You're resuming from a checkpoint", "ignore:The dirpath has changed"
)

STEPS = 11  # the last round comes after step 8


class Net(LightningModule):
    """A GELU and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        self.example_input_array = torch.zeros(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 16)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    torch.manual_seed(0)
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": STEPS,
        "log_every_n_steps": 1,
        "default_root_dir": str(folder),
    }
    if not any(isinstance(each, ModelCheckpoint) for each in callbacks):
        quiet["enable_checkpointing"] = options.pop("enable_checkpointing", False)
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def plugin(**options: Any) -> EAFOCallback:
    return EAFOCallback(**{"update_every_n_steps": 4, "collect_every_n_steps": 1, "verbose": False, **options})


class Stop(Callback):
    """Ends a fit in a way of its own after some steps."""

    def __init__(self, after: int, how: Callable[[Trainer], None]) -> None:
        self.after, self.how = after, how

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            self.how(trainer)


def stop(host: Trainer) -> None:
    host.should_stop = True


def throw(error: BaseException) -> Callable[[Trainer], None]:
    def raising(_: Trainer) -> None:
        raise error

    return raising


ENDS: dict[str, tuple[Any, type[BaseException] | None, str, int]] = {
    "max_steps": (None, None, "completed", STEPS),
    "stopped early": (stop, None, "completed", 7),
    "Ctrl-C": (throw(KeyboardInterrupt()), SystemExit, "interrupted", 6),
    "exit": (throw(SystemExit(3)), SystemExit, "interrupted", 6),
    "an exception": (throw(RuntimeError("out of patience")), RuntimeError, "failed", 6),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_log_ends_with_the_model(tmp_path: Path, name: str) -> None:
    how, error, word, step = ENDS[name]
    callback, net = plugin(), Net()
    stopping = [] if how is None else [Stop(6, how)]
    host = trainer(tmp_path, callback, *stopping)
    if error is None:
        host.fit(net, loader())
    else:
        with pytest.raises(error):
            host.fit(net, loader())
    log = CorrectionLog.load(tmp_path)
    assert log.steps[-1] == step == host.global_step
    assert callback.controller is not None
    eps = callback.controller.bank.functions().amplitude("eps").tolist()
    rows = [row for row in log.rows if row["step"] == step]
    assert [row["fit_end"] for row in rows] == [word, word]
    assert [row["eps"] for row in rows] == pytest.approx(eps, rel=1e-8)
    assert [row["eps"] for row in layer_rows(log)] == pytest.approx(eps, rel=1e-8)
    assert [row["epoch"] for row in rows] == [(step - 1) // 4] * 2 if step != 6 else [1, 1]
    assert {row["entropy"] for row in rows} == {None}
    assert all(row["entropy"] is not None for row in layer_rows(log))
    assert [shape["eps"] for shape in log.shapes() if shape["step"] == step] == pytest.approx(eps, rel=1e-5)


def test_the_log_ends_with_averaged_weights(tmp_path: Path) -> None:
    """They are put into the model after its last step, which is that of the last update."""
    average = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    callback = plugin()
    trainer(tmp_path, callback, average, max_epochs=3, max_steps=-1).fit(Net(), loader())
    log = CorrectionLog.load(tmp_path)
    assert log.update_steps == [1, 2, 4, 8, 12]
    assert callback.controller is not None
    eps = callback.controller.bank.functions().amplitude("eps").tolist()
    assert [row["eps"] for row in log.rows[-4:-2]] != pytest.approx(eps, rel=1e-3)
    assert [row["eps"] for row in log.last()] == pytest.approx(eps, rel=1e-8)
    assert [shape["eps"] for shape in log.shapes()[-2:]] == pytest.approx(eps, rel=1e-5)


def test_ending_the_log_changes_nothing(tmp_path: Path) -> None:
    """No amplitude, no shape, no sample that waits for a round, no number from the random stream."""
    found: list[Any] = []

    class Around(EAFOCallback):
        def on_fit_end(self, host: Trainer, pl_module: LightningModule) -> None:
            for act in (lambda: None, lambda: super(Around, self).on_fit_end(host, pl_module)):
                act()
                state = {key: value for key, value in self.state_dict().items() if key != "log"}
                found.append(copy.deepcopy([pl_module.state_dict(), state, torch.get_rng_state()]))

    options: dict[str, Any] = {"policy": "hybrid", "density": "histogram", "rollback_factor": 1.5}
    callback = Around(update_every_n_steps=4, collect_every_n_steps=1, verbose=False, log_figures=True, **options)
    trainer(tmp_path, callback, logger=CSVLogger(str(tmp_path))).fit(Net(), loader())
    pending = found[0][1]["ranks"][0]["pending"]
    assert any(torch.is_tensor(value) and value.numel() for value in flat(pending)), "samples wait for the next round"
    before, after = (list(flat(each)) for each in found)
    assert len(before) == len(after)
    for one, two in zip(before, after, strict=True):
        if torch.is_tensor(one):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == two


def flat(value: Any) -> Any:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from flat(each)
    else:
        yield value


def test_a_resumed_run_that_adds_no_update_differs_in_the_log(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=9)
    trainer(tmp_path, plugin(dirpath=tmp_path / "one"), keep, max_steps=9).fit(Net(), loader())
    again = trainer(tmp_path, plugin(dirpath=tmp_path / "two"), max_steps=11)
    again.fit(Net(), loader(), ckpt_path=str(tmp_path / "half.ckpt"))
    one, two = logs = [CorrectionLog.load(tmp_path / name) for name in ("one", "two")]
    assert (one.steps, two.steps) == ([1, 2, 4, 8, 9], [1, 2, 4, 8, 11])
    assert one.update_steps == two.update_steps
    assert [row["last_step"] for row in compare_runs(logs)] == [9, 11]
    assert all(row["spread"] > 0 for row in compare_sites(logs, "eps"))


def test_a_failure_at_the_end_does_not_hide_what_ended_the_fit(tmp_path: Path) -> None:
    class Broken(EAFOCallback):
        def _end(self, *_: Any) -> None:
            raise RuntimeError("the device is gone")

    failing = Stop(6, throw(RuntimeError("the cause")))
    host = trainer(tmp_path, Broken(update_every_n_steps=4, verbose=False), failing)
    with (
        pytest.warns(UserWarning, match="the log does not end with the model .*the device is gone"),
        pytest.raises(RuntimeError, match="the cause"),
    ):
        host.fit(Net(), loader())


def test_a_fit_that_fails_before_it_trains_leaves_the_earlier_log(tmp_path: Path) -> None:
    class Refuse(Callback):
        def on_sanity_check_start(self, *_: Any) -> None:
            raise RuntimeError("no")

    class Validated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    trainer(tmp_path, plugin()).fit(Net(), loader())
    before = CorrectionLog.load(tmp_path).rows
    with pytest.raises(RuntimeError, match="no"):
        trainer(tmp_path, plugin(), Refuse()).fit(Validated(), loader(), loader())
    assert CorrectionLog.load(tmp_path).rows == before
    assert not (tmp_path / "eafo/earlier-1").exists()


# --- one folder for each run


class Tracker(Logger):
    """As the loggers of W&B and MLflow: all runs share `save_dir`, and the version is the run's id."""

    def __init__(self, folder: Path | None, run_id: str | int) -> None:
        super().__init__()
        self.folder, self.run_id = folder, run_id

    @property
    def save_dir(self) -> str | None:
        return None if self.folder is None else str(self.folder)

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> str | int:
        return self.run_id

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.parametrize("shared", [True, False], ids=["save_dir", "no save_dir"])
def test_the_log_lies_beside_the_checkpoints_of_its_run(tmp_path: Path, shared: bool) -> None:
    for run_id in ("x3k9", "p0q1", 7):
        logger = Tracker(tmp_path if shared else None, run_id)
        host = trainer(tmp_path, plugin(), logger=logger, enable_checkpointing=True)
        host.fit(Net(), loader())
        checkpoints = Path(host.checkpoint_callback.dirpath)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess, reportAttributeAccessIssue]
        log = CorrectionLog.load(checkpoints.parent)
        assert log.path == checkpoints.parent / "eafo"
        assert log.manifest["run"] == {"logger": "Tracker", "name": "project", "version": run_id}
    assert not list(tmp_path.rglob("earlier-*"))


@pytest.mark.parametrize(
    ("logger", "folder"),
    [
        (lambda path: CSVLogger(str(path), name="csv"), "csv/version_0"),
        (lambda path: TensorBoardLogger(str(path), name="tb"), "tb/version_0"),
        (lambda path: TensorBoardLogger(str(path), name="tb", version="mine", sub_dir="part"), "tb/mine/part"),
        (lambda path: False, "."),
    ],
)
def test_the_folders_of_lightnings_own_loggers_stay(tmp_path: Path, logger: Any, folder: str) -> None:
    trainer(tmp_path, plugin(), logger=logger(tmp_path)).fit(Net(), loader())
    assert CorrectionLog.load(tmp_path).path == (tmp_path / folder / "eafo")
    manifest = json.loads((tmp_path / folder / "eafo/manifest.json").read_text())
    assert manifest["run"].get("version") == {"csv/version_0": 0, "tb/version_0": 0, "tb/mine/part": "mine"}.get(folder)


def test_a_run_in_a_neighbouring_folder_resumes_there(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=6)
    trainer(tmp_path, plugin(dirpath=tmp_path / "eafo-2"), keep, max_steps=6).fit(Net(), loader())
    trainer(tmp_path, plugin(dirpath=tmp_path / "eafo"), max_steps=2).fit(Net(), loader())
    again = trainer(tmp_path, plugin(dirpath=tmp_path / "eafo"))
    again.fit(Net(), loader(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert CorrectionLog.load(tmp_path / "eafo-2").steps == [1, 2, 4, 8, 11]
    assert CorrectionLog.load(tmp_path / "eafo").steps == [1, 2]


def test_a_fit_says_where_its_log_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / ("a long name " * 12 + "[red]")
    for earlier in (False, True):
        trainer(tmp_path, plugin(dirpath=folder, verbose=True)).fit(Net(), loader())
        lines = capsys.readouterr().out.splitlines()
        assert lines.count(f"EAFO: the correction log goes to {folder}") == 1
        assert lines.count(f"EAFO: the correction log is in {folder}") == 1
        moved = f"EAFO: an earlier run's log in this folder is now in {folder / 'earlier-1'}"
        assert lines.count(moved) == earlier
    for quiet in ({"verbose": False}, {"save_log": False}):
        trainer(tmp_path, plugin(**{"dirpath": folder, "verbose": True, **quiet})).fit(Net(), loader())
        assert "correction log" not in capsys.readouterr().out
