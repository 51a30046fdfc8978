"""The loggers of W&B and MLflow themselves, without a server: skipped where they are not installed.

pip install wandb mlflow-skinny
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training_process import Net

from eafo_dynamic import EAFOCallback
from eafo_dynamic.records import CorrectionLog

pytestmark = pytest.mark.filterwarnings("ignore")  # of theirs


def data() -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)


def train(folder: Path, logger: Any) -> EAFOCallback:
    torch.manual_seed(0)
    callback = EAFOCallback(verbose=False, update_every_n_steps=2, log_every_n_steps=1, log_figures=True)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        max_steps=5, logger=logger, callbacks=[callback], default_root_dir=folder, log_every_n_steps=1, **quiet
    )
    trainer.fit(Net(), data())
    assert isinstance(trainer.model, nn.Module)
    return callback


def logs_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("corrections.jsonl"))


def assert_a_log_each(folder: Path, runs: list[str]) -> None:
    """Each beside its run's checkpoints, whole, and with the run's name in its manifest."""
    logs = logs_of(folder)
    assert len(logs) == len(runs) == 2
    for run in runs:
        (path,) = [path for path in logs if run in path.parts]
        assert list(path.parents[1].rglob("*.ckpt"))
        assert run in json.dumps(json.loads((path.parent / "manifest.json").read_text())["run"])
        assert CorrectionLog.load(path.parent).steps == [1, 2, 4, 5]
    assert not list(folder.rglob("earlier*"))


def test_mlflow_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    runs: list[str] = []
    for _ in range(2):
        logger = MLFlowLogger(save_dir=str(tmp_path / "mlruns"))
        train(tmp_path, logger)
        run = logger.experiment.get_run(logger.run_id)
        assert "eafo/mean_eps" in run.data.metrics
        assert run.info.status == "FINISHED"
        assert list((tmp_path / "mlruns").rglob(f"{logger.run_id}/artifacts/**/*.png"))
        runs.append(str(logger.run_id))
    assert_a_log_each(tmp_path, runs)


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    runs: list[str] = []
    for _ in range(2):
        logger = WandbLogger(project="eafo", save_dir=str(tmp_path), offline=True)
        train(tmp_path, logger)
        assert "eafo/mean_eps" in dict(logger.experiment.summary)
        runs.append(str(logger.experiment.id))
        wandb.finish()
    assert_a_log_each(tmp_path, runs)
    assert len(list(tmp_path.rglob("media/images/eafo/functions*.png"))) >= 2
