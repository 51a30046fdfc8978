"""What version 0.1.0 wrote still loads: checkpoints, logs, pickles and merged models; see tests/data/v0.1.0/make.py."""

from __future__ import annotations

import copy
import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from earlier_networks import Body, Classifier, Examples, Net, Tower, inputs, labels, loader
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from eafo_dynamic import (
    CorrectionLog,
    EAFOCallback,
    EAFOController,
    apply_from_checkpoint,
    disabled,
    load_merged,
    unwrap,
)
from eafo_dynamic.cli import main

# pickles name modules of 0.1.0 that may have moved since
pytestmark = pytest.mark.filterwarnings(
    "ignore:eafo_dynamic[.]:DeprecationWarning",
    "ignore:EAFO. the (pickled|merged) model is of version 0.1.0, which told the calls:UserWarning",
    "ignore:EAFO. the checkpoint is of version 0.1.0, which told the calls:UserWarning",
)

DATA = Path(__file__).parent / "data" / "v0.1.0"
EXPECTED = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "per_channel": {
        "density": "histogram",
        "per_channel": True,
        "policy": "hybrid",
        "target_modules": ["quick_gelu"],
        "update_every_n_steps": 3,
        "collect_every_n_steps": 1,
        "rollback_factor": 1.01,
    },
}
RUNS = pytest.mark.parametrize("run", list(OPTIONS))
# of machines that add up in another order, after some steps
AFTER_STEPS = {"rtol": 1e-3, "atol": 1e-5}


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files of 0.1.0; paths in the checkpoints are relative to it."""
    with zipfile.ZipFile(DATA / "files.zip") as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(inputs())


def assert_computes_as_then(model: nn.Module, then: dict[str, Any], exact: bool = True) -> None:
    """The outputs that 0.1.0 computed: bit for bit where this machine's plain outputs are so, else to rounding."""
    now = result(model)
    with disabled(model):
        plain = result(model)
    expected, expected_plain = torch.tensor(then["outputs"]), torch.tensor(then["plain"])
    assert not torch.allclose(expected, expected_plain, atol=1e-3)  # else this would say nothing about corrections
    if exact and torch.equal(plain, expected_plain):
        assert torch.equal(now, expected)
    torch.testing.assert_close(plain, expected_plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(now, expected, rtol=1e-5, atol=1e-5)


def assert_equal(now: Any, then: Any, at: str = "") -> None:
    """The same tensors bit for bit, the same numbers and texts, under the same keys in the same order."""
    if isinstance(then, Tensor):
        assert now.dtype == then.dtype and torch.equal(now, then), at
    elif isinstance(then, dict):
        assert list(now) == list(then), at
        for key in then:
            assert_equal(now[key], then[key], f"{at}.{key}")
    elif isinstance(then, (list, tuple)):
        assert len(now) == len(then), at
        for place, (one, two) in enumerate(zip(now, then, strict=True)):
            assert_equal(one, two, f"{at}[{place}]")
    else:
        assert now == then, at


def assert_same_events(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> None:
    names = ("step", "epoch", "site", "policy", "event", "n")
    assert [[row[name] for name in names] for row in now] == [[row[name] for name in names] for row in then]


def assert_rows_as_then(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> None:
    assert [(row["step"], row["site"]) for row in now] == [(row["step"], row["site"]) for row in then]
    for row, earlier in zip(now, then, strict=True):
        at = f"{row['site']} at step {row['step']}"
        assert set(row) >= set(earlier), at
        for column, value in earlier.items():
            if isinstance(value, float):
                assert row[column] == pytest.approx(value, rel=1e-3, abs=1e-4), f"{column} of {at}"
            else:
                assert row[column] == value, f"{column} of {at}"


def assert_weights_as_then(model: nn.Module, then: dict[str, Any]) -> None:
    now = {name: value for name, value in model.state_dict().items() if not name.endswith("_table")}
    assert list(now) == list(then)
    for name, value in now.items():
        torch.testing.assert_close(
            value, torch.tensor(then[name]), msg=lambda text, n=name: f"{n}: {text}", **AFTER_STEPS
        )


def rows_of(log: Path) -> list[dict[str, Any]]:
    """The rows of a log as they stand there, read without this package."""
    return [json.loads(line) for line in (log / "corrections.jsonl").read_text(encoding="utf-8").splitlines()]


class Restored(Callback):
    """What a Trainer has restored when the training goes on."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.optimizer: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = copy.deepcopy(dict(pl_module.state_dict()))
        self.optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())


def resume(run: str, path: Path) -> tuple[Net, EAFOCallback, Restored]:
    callback = EAFOCallback(backend="eager", dirpath="resumed/eafo", verbose=False, **OPTIONS[run])
    restored = Restored()
    trainer = Trainer(
        callbacks=[callback, restored],
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(7)
    net = Net()
    trainer.fit(net, loader(), ckpt_path=str(path))
    return net, callback, restored


class TestLightningCheckpoint:
    @RUNS
    def test_restores_weights_corrections_and_optimiser_bit_for_bit(self, saved: Path, run: str) -> None:
        checkpoint = torch.load(saved / f"{run}.ckpt", weights_only=True)
        _, _, restored = resume(run, saved / f"{run}.ckpt")
        assert {name.rpartition("_")[2] for name in checkpoint["state_dict"] if "eafo" in name} >= {"eps", "shape"}
        assert_equal(restored.weights, dict(checkpoint["state_dict"]))
        assert_equal(restored.optimizer, checkpoint["optimizer_states"][0])

    @RUNS
    def test_training_goes_on_as_it_did(self, saved: Path, run: str) -> None:
        net, callback, _ = resume(run, saved / f"{run}.ckpt")
        then = rows_of(saved / run / "eafo")
        assert callback.controller is not None
        assert callback.controller.rounds == len({row["step"] for row in then})
        later = [row for row in then if row["step"] > 5]
        assert later
        if run == "per_channel":  # its policy is hybrid, which gave every channel the whole gradient in 0.1.0
            assert_same_events(list(callback.controller.records), later)
        else:
            assert_weights_as_then(net, EXPECTED[f"{run}.ckpt"]["weights_at_the_end"])
            assert_rows_as_then(list(callback.controller.records), later)
        # which shows that the losses and the functions before the last round are restored too
        assert any(row["event"] for row in later) == (run == "per_channel")

    @RUNS
    def test_resumed_run_continues_the_log(self, saved: Path, run: str) -> None:
        resume(run, saved / f"{run}.ckpt")
        then = rows_of(saved / run / "eafo")
        now = [row for row in rows_of(saved / "resumed" / "eafo") if "fit_end" not in row]  # 0.1.0 had no such rows
        before = [row for row in then if row["step"] <= 5]
        assert now[: len(before)] == before
        if run == "per_channel":  # its policy is hybrid, which gave every channel the whole gradient in 0.1.0
            assert_same_events(now, then)
        else:
            assert_rows_as_then(now, then)

    @RUNS
    def test_applies_to_a_plain_model(self, saved: Path, run: str) -> None:
        checkpoint = torch.load(saved / f"{run}.ckpt", weights_only=True)
        model = apply_from_checkpoint(Net(), saved / f"{run}.ckpt")
        assert_equal(dict(model.state_dict()), dict(checkpoint["state_dict"]))
        # not exact: it computes with backend="auto", which may be code compiled from C
        assert_computes_as_then(model, EXPECTED[f"{run}.ckpt"], exact=False)
        unwrap(model)
        expected = torch.tensor(EXPECTED[f"{run}.ckpt"]["plain"])
        torch.testing.assert_close(result(model), expected, rtol=1e-5, atol=1e-5)

    @RUNS
    def test_resumed_model_computes_what_it_computed(self, saved: Path, run: str) -> None:
        net, _, restored = resume(run, saved / f"{run}.ckpt")
        net.load_state_dict(restored.weights)
        assert_computes_as_then(net, EXPECTED[f"{run}.ckpt"])


class TestPickles:
    def test_module_that_lightning_trained(self, saved: Path) -> None:
        net = torch.load(saved / "net.pt", weights_only=False)
        assert type(net).__name__ == "Net" and isinstance(net, Net)
        assert_computes_as_then(net, EXPECTED["net.pt"])
        checkpoint: dict[str, Any] = {}
        net.on_save_checkpoint(checkpoint)  # the list of sites goes into checkpoints to come
        then = torch.load(saved / "default.ckpt", weights_only=True)["eafo"]
        assert_equal(checkpoint["eafo"], then)

    def test_plain_module(self, saved: Path) -> None:
        body = torch.load(saved / "body.pt", weights_only=False)
        assert isinstance(body, Body)
        assert_computes_as_then(body, EXPECTED["body.pt"])
        corrections = {name: value.clone() for name, value in body.state_dict().items() if "eafo" in name}
        controller = EAFOController.attach(body, inputs(), backend="eager")
        assert_equal({name: value for name, value in body.state_dict().items() if "eafo" in name}, corrections)
        assert_computes_as_then(body, EXPECTED["body.pt"])
        body.train()(inputs(40)).sum().backward()
        assert all(amplitude.grad is not None for amplitude in controller.amplitudes.values())
        unwrap(body)
        assert set(body.state_dict()) == set(Body().state_dict())
        assert {type(module) for module in body.modules()} == {type(module) for module in Body().modules()}

    def test_merged_model(self, saved: Path) -> None:
        tower = torch.load(saved / "tower.pt", weights_only=False)
        assert isinstance(tower, Tower)
        torch.testing.assert_close(result(tower), torch.tensor(EXPECTED["merged.pt"]["outputs"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["merged.pt", "merged.safetensors"])
def test_merged_models(saved: Path, name: str) -> None:
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    model = load_merged(Tower(), saved / name)
    torch.testing.assert_close(result(model), torch.tensor(EXPECTED[name]["outputs"]), rtol=1e-5, atol=1e-5)


class TestLog:
    @RUNS
    def test_rows_are_read_as_they_stand(self, saved: Path, run: str) -> None:
        log = CorrectionLog.load(saved / run)
        then = rows_of(saved / run / "eafo")
        assert [{key: value for key, value in row.items() if key in then[0]} for row in log.rows] == then
        assert log.notes == []
        manifest = json.loads((saved / run / "eafo" / "manifest.json").read_text(encoding="utf-8"))
        assert log.manifest == manifest
        assert log.sites == [site["name"] for site in manifest["sites"]]
        assert log.steps == sorted({row["step"] for row in then})

    def test_shapes(self, saved: Path) -> None:
        lines = (saved / "per_channel/eafo/shapes.jsonl").read_text(encoding="utf-8").splitlines()
        assert list(CorrectionLog.load(saved / "per_channel").shapes()) == [json.loads(line) for line in lines]

    def test_command_line_shows_every_layer(self, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["log", "layers", str(saved / "default"), "--format", "csv"]) == 0
        now = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        then = list(csv.DictReader(io.StringIO((saved / "layers.csv").read_text(encoding="utf-8"))))
        assert len(then) == 8
        assert [{column: row.get(column) for column in then[0]} for row in now] == then

    @pytest.mark.parametrize("command", ["summary", "layers", "events", "show"])
    @RUNS
    def test_every_view_opens(self, saved: Path, capsys: pytest.CaptureFixture[str], command: str, run: str) -> None:
        rest = ["body:quick_gelu"] if command == "show" else []
        assert main(["log", command, str(saved / run), *rest]) == 0
        assert capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_hugging_face_checkpoint(saved: Path) -> None:
    """Weights, optimiser and running estimates of 0.1.0 inside a checkpoint of the transformers that is installed."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from eafo_dynamic.trainers.huggingface import EAFOTrainerCallback

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step >= 4
            return control

    def trainer(*others: Any) -> tuple[Any, EAFOTrainerCallback]:
        torch.manual_seed(2)
        args = transformers.TrainingArguments(
            output_dir="huggingface",
            max_steps=8,
            save_strategy="steps",
            save_steps=4,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to="none",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        example = {"x": inputs(), "labels": labels()}
        callback = EAFOTrainerCallback(
            example=example, backend="eager", update_every_n_steps=3, collect_every_n_steps=1
        )
        made = transformers.Trainer(Classifier(), args, train_dataset=Examples(), callbacks=[callback, *others])
        return made, callback

    log = saved / "huggingface" / "eafo"
    log.rename(saved / "then")
    host, _ = trainer(Stop())
    host.train()
    for name in ("model.safetensors", "optimizer.pt", "eafo_state.pt"):
        (saved / "huggingface" / name).replace(saved / "huggingface" / "checkpoint-4" / name)
    host, callback = trainer()
    host.train(resume_from_checkpoint=True)
    assert_weights_as_then(host.model, EXPECTED["huggingface"]["weights_at_the_end"])
    later = [row for row in rows_of(saved / "then") if row["step"] > 4]
    assert later
    assert callback.controller is not None
    assert_rows_as_then(list(callback.controller.records), later)
