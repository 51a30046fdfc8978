"""The included tasks and every configuration: a few steps each, equal seeds, equal batches in every arm."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from small_experiments import CONFIGS, DATA, gpt, mlp, resnet, training_configs, vit
from torch import nn

from eafo_dynamic import EAFOCallback, experiments
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments import (
    MLP,
    Autoencoder,
    Classifier,
    LanguageModel,
    Regressor,
    TabularData,
    Task,
)
from eafo_dynamic.experiments.schedule import warmup_cosine

# Lightning 2.6 with torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


class Recorder(Callback):
    """Keeps a mark of every training batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch[0].double().abs().sum().item())


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{**quiet, "enable_checkpointing": False, "max_steps": 3, **options},
    )


def wine_task(activation: str = "relu", seed: int = 0) -> Classifier:
    seed_everything(seed)
    return Classifier(MLP(13, 3, hidden=[16, 16], activation=activation, dropout=0.1), num_classes=3)


def test_public_names_are_loaded_when_they_are_used() -> None:
    for name in experiments.__all__:
        assert getattr(experiments, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = experiments.no_such_name
    code = "import sys, eafo_dynamic.experiments; print({'torch', 'lightning'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


TASKS: dict[str, tuple[Any, Any, set[str]]] = {
    "vit": (lambda: Classifier(vit(), 10), "digits", {"accuracy"}),
    "resnet": (lambda: Classifier(resnet(), 10), "digits", {"accuracy"}),
    "mlp": (lambda: Classifier(MLP(30, 2), 2), "breast_cancer", {"accuracy"}),
    "regression": (lambda: Regressor(MLP(10, 1)), "diabetes", {"r2"}),
    "autoencoder": (lambda: Autoencoder(MLP(64, 64, hidden=[16, 4, 16])), "digits", {"r2"}),
    "gpt": (lambda: LanguageModel(gpt()), "text", {"bits_per_byte"}),
}


@pytest.mark.parametrize("name", TASKS)
def test_task_trains_tests_and_predicts(name: str, tmp_path: Path) -> None:
    build, data_name, measures = TASKS[name]
    task, data = build(), DATA[data_name]()
    before = {key: value.clone() for key, value in task.state_dict().items()}
    runner = trainer(tmp_path, limit_val_batches=2, limit_test_batches=2, limit_predict_batches=2)
    runner.fit(task, data)
    assert runner.global_step == 3
    assert any(not torch.equal(value, before[key]) for key, value in task.state_dict().items())
    results = runner.test(task, data, verbose=False)[0]
    assert set(results) == {"test_loss"} | {f"test_{measure}" for measure in measures}
    assert all(math.isfinite(value) for value in results.values())
    outputs = runner.predict(task, data)
    assert len(outputs) == 2


def test_losses_fall(tmp_path: Path) -> None:
    task = wine_task()
    task.lr, task.warmup_steps = 1e-2, 0
    runner = trainer(tmp_path, max_steps=60)
    runner.fit(task, TabularData("wine"))
    assert runner.callback_metrics["val_accuracy"] > 0.85
    assert runner.callback_metrics["val_loss"] < 0.5 * math.log(3)


def test_classifier_smooths_labels_in_training_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = Classifier(MLP(13, 3), 3, label_smoothing=0.2)
    batch = (torch.randn(8, 13), torch.randint(3, (8,)))
    logged: dict[str, Any] = {}
    task.log = lambda name, value, **options: logged.update({name: value})  # a task without a trainer
    log_p = task(batch[0]).log_softmax(-1)
    plain = -log_p.gather(1, batch[1][:, None]).mean()
    torch.testing.assert_close(task.evaluate(batch, "val"), plain)
    torch.testing.assert_close(task.evaluate(batch, "train"), 0.8 * plain - 0.2 * log_p.mean())
    hits = (log_p.argmax(-1) == batch[1]).float().mean()
    torch.testing.assert_close(logged["val_accuracy"].compute(), hits)


def test_language_model_reports_nats_and_bits() -> None:
    task = LanguageModel(nn.Embedding(256, 256))
    nn.init.zeros_(task.model.weight)
    logged: dict[str, Any] = {}
    task.log = lambda name, value, **options: logged.update({name: float(value.detach())})
    task.evaluate((torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)), "val")
    assert logged == pytest.approx({"val_loss": math.log(256), "val_bits_per_byte": 8.0})


def test_autoencoder_reproduces_its_input_and_ignores_targets() -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 1, 2, 2)
    task = Autoencoder(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)))
    logged: dict[str, Any] = {}
    task.log = lambda name, value, **options: logged.update({name: value})
    loss = task.evaluate((images, torch.full((6,), torch.nan)), "test")
    residual = task(images).flatten() - images.flatten()
    torch.testing.assert_close(loss, residual.square().mean())
    expected = 1 - residual.square().sum() / (images - images.mean()).square().sum()
    torch.testing.assert_close(logged["test_r2"].compute(), expected)


def test_a_network_with_another_number_of_outputs_is_named() -> None:
    batch = (torch.zeros(3, 8), torch.zeros(3))
    with pytest.raises(ConfigError, match=r"model='MLP': gives 5 numbers per example. The task needs 8"):
        Autoencoder(MLP(8, 5)).evaluate(batch, "train")
    with pytest.raises(ConfigError, match=r"model='MLP': gives 5 numbers per example. The task needs 1"):
        Regressor(MLP(8, 5)).evaluate(batch, "train")


def test_regressor_takes_a_column_for_a_vector() -> None:
    task = Regressor(nn.Linear(1, 1, bias=False))
    nn.init.ones_(task.model.weight)
    task.log = lambda name, value, **options: None
    inputs = torch.tensor([[1.0], [2.0], [3.0]])
    assert task.evaluate((inputs, torch.tensor([1.0, 2.0, 6.0])), "val").item() == 3.0


def test_warmup_cosine() -> None:
    factors = [warmup_cosine(step, 10, 110) for step in range(121)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.5)
    assert factors[110:] == pytest.approx([0.0] * 11)
    assert all(before >= after for before, after in pairwise(factors[10:]))
    assert warmup_cosine(5, 0, math.inf) == 1.0


def test_schedule_follows_the_optimiser_steps(tmp_path: Path) -> None:
    task = wine_task()
    task.warmup_steps = 2
    runner = trainer(tmp_path, max_steps=5)
    runner.fit(task, TabularData("wine"))
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(task.lr * warmup_cosine(5, 2, 5))
    scheduler = runner.lr_scheduler_configs[0].scheduler
    assert scheduler.last_epoch == 5


def test_task_options_that_cannot_work() -> None:
    for options in ({"lr": 0.0}, {"weight_decay": -1.0}, {"warmup_steps": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Classifier(mlp(), 10, **options)


def test_equal_seeds_give_equal_runs(tmp_path: Path) -> None:
    tasks = []
    for seed in (1, 1, 2):
        task = wine_task(seed=seed)
        trainer(tmp_path, max_steps=8).fit(task, TabularData("wine", seed=seed))
        tasks.append(task)
    assert_same_state(tasks[0].model, tasks[1].model)
    assert not torch.equal(tasks[0].model[1].weight, tasks[2].model[1].weight)


def test_arms_differ_in_the_activation_only(tmp_path: Path) -> None:
    seen = []
    for name in ("relu", "gelu", "silu"):
        task = wine_task(name)
        assert_same_state(task.model, wine_task("relu").model)
        recorder = Recorder()
        trainer(tmp_path, recorder, max_steps=8).fit(task, TabularData("wine"))
        seen.append(recorder.seen)
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0])) == 8


def test_resumed_run_sees_the_batches_of_the_whole_run(tmp_path: Path) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    limits = {"max_steps": -1, "max_epochs": 2}
    trainer(tmp_path, whole, **limits).fit(wine_task(), TabularData("wine"))
    half = trainer(tmp_path, first, max_steps=-1, max_epochs=1)
    half.fit(wine_task(), TabularData("wine"))
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = trainer(tmp_path, second, **limits)
    resumed.fit(wine_task(seed=9), TabularData("wine"), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert first.seen + second.seen == whole.seen


def test_checkpoint_loads_with_a_network_of_the_same_shape(tmp_path: Path) -> None:
    task = wine_task()
    runner = trainer(tmp_path)
    runner.fit(task, TabularData("wine"))
    runner.save_checkpoint(tmp_path / "wine.ckpt")
    network = MLP(13, 3, hidden=[16, 16], dropout=0.1)
    loaded = Classifier.load_from_checkpoint(tmp_path / "wine.ckpt", model=network)
    assert isinstance(loaded, Task)
    assert_same_state(loaded, task)


WITHOUT_FILES = [path.stem for path in training_configs(files=False)]
PRETRAINING = [path.stem for path in training_configs(files=False, corrected=False)]
WITH_FILES = [path.stem for path in training_configs(files=True)]
FINETUNING = [name for name in WITH_FILES if name.endswith("_finetune") and not name.startswith("gpt2")]


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eafo-dynamic"])  # LightningCLI warns of arguments that it is not given
    return tmp_path


def configured(path: Path, *overrides: str) -> LightningCLI:
    return LightningCLI(
        args=[f"--config={path}", *overrides], run=False, subclass_mode_model=True, subclass_mode_data=True
    )


def test_every_config_is_tested() -> None:
    assert {"digits_autoencoder", "digits_resnet", "digits_vit", "stdlib_gpt", "wine_mlp"} <= set(WITHOUT_FILES)
    assert [f"{name.removesuffix('_finetune')}_pretrain" for name in FINETUNING] == PRETRAINING
    for path in CONFIGS.glob("*.yaml"):
        kinds = (*WITHOUT_FILES, *PRETRAINING, *WITH_FILES)
        assert path.stem in kinds or path.stem.startswith(("compare_", "study_", "evidence_"))


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_config_trains_with_the_callback_and_logs_in_its_folder(name: str, empty_folder: Path) -> None:
    cli = configured(
        CONFIGS / f"{name}.yaml",
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
    )
    callbacks = [callback for callback in cli.trainer.callbacks if isinstance(callback, EAFOCallback)]
    assert len(callbacks) == 1
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 2
    run = empty_folder / "runs" / name / "version_0"
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "checkpoints", "eafo", "metrics.csv"}
    assert [path.name for path in empty_folder.iterdir()] == ["runs"]


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_activation_is_one_override(empty_folder: Path) -> None:
    cli = configured(
        CONFIGS / "digits_vit.yaml",
        "--model.init_args.model.init_args.activation=silu",
        "--trainer.logger=false",
    )
    kinds = {type(module) for module in cli.model.modules()}
    assert nn.SiLU in kinds
    assert nn.GELU not in kinds


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_tasks_know_nothing_of_the_callback(empty_folder: Path) -> None:
    cli = configured(CONFIGS / "wine_mlp.yaml", "--trainer.callbacks=null", "--trainer.max_steps=2")
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 2
    assert not list(empty_folder.rglob("eafo"))
