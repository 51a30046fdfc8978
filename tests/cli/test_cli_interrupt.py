"""Ctrl-C: whatever runs, the exit code is 130, and nothing goes on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback

from eafo_dynamic.cli import main
from eafo_dynamic.errors import interruptible

ROOT = Path(__file__).parents[2]
WINE = ROOT / "configs" / "wine_mlp.yaml"


class Impatient(Callback):
    """Presses Ctrl-C in the first step."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def handler() -> Generator[None]:
    """Lightning ignores SIGINT once it has seen one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def impatient(folder: Path) -> Path:
    config = yaml.safe_load(WINE.read_text())
    config["trainer"]["callbacks"].append({"class_path": f"{__name__}.Impatient"})
    path = folder / "impatient.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_an_interrupted_training_is_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_epochs=1"]
    monkeypatch.setattr(sys, "argv", ["eafo-dynamic", "fit", f"--config={impatient(tmp_path)}", *quiet])
    assert main() == 130


@pytest.mark.parametrize("pretrain", [False, True], ids=["arm", "pretraining"])
def test_an_interrupted_comparison_is_130(pretrain: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan: dict[str, Any] = {
        "task": str(impatient(tmp_path)),
        "seeds": 2,
        "metric": "test_loss",
        "arms": {"relu": {}, "gelu": {"activation": "gelu"}},
    }
    if pretrain:
        plan |= {"task": str(WINE), "pretrain": plan["task"]}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    assert main(["compare", "--config", str(path), "--out", str(tmp_path / "out")]) == 130
    assert "failed" not in capsys.readouterr().err
    assert not [*tmp_path.rglob("result.json"), *tmp_path.rglob("weights.pt")]


def test_an_exit_of_another_kind_stays_one() -> None:
    with pytest.raises(SystemExit) as stop, interruptible():
        sys.exit(3)
    assert stop.value.code == 3
