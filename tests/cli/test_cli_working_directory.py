"""Commands find the user's own modules in the working directory, as ``python -m`` does."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import fresh
import pytest
import yaml

ROOT = Path(__file__).parents[2]

NET = """
import torch
from torch import nn
from eafo_dynamic.experiments import Classifier

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)

class Lit(Classifier):
    def __init__(self):
        super().__init__(model=Net(), num_classes=3)
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the command as an installed script does: the first place of imports is the folder of the script."""
    scripts = folder / "scripts"
    scripts.mkdir(exist_ok=True)
    script = scripts / "command.py"
    script.write_text("from eafo_dynamic.cli import main\n\nif __name__ == '__main__':\n    raise SystemExit(main())\n")
    return fresh.script(script, *words, folder=folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    config: Any = yaml.safe_load((ROOT / "configs/wine_mlp.yaml").read_text())
    config["model"] = {"class_path": "net.Lit"}
    config["trainer"]["max_epochs"] = 1
    config["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    (tmp_path / "wine.yaml").write_text(yaml.safe_dump(config))
    plan = yaml.safe_load((ROOT / "configs/compare_wine_mlp.yaml").read_text())
    plan |= {"task": "wine.yaml", "seeds": 1, "arms": {"plain": {}, "learned": {"eafo": {"policy": "learned"}}}}
    plan["reference"] = "plain"
    plan["settings"] = {"trainer.max_epochs": 1}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    return tmp_path


def test_fit_and_merge(folder: Path) -> None:
    done = run(folder, "fit", "--config", "wine.yaml")
    assert done.returncode == 0, done.stderr
    (checkpoint,) = folder.rglob("*.ckpt")
    for model in ((), ("--model", "net:Lit"), ("--model", "net:Net")):
        done = run(folder, "merge", str(checkpoint), "--output", "merged.pt", *model)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_compare(jobs: str, folder: Path) -> None:
    done = run(folder, "compare", "--config", "plan.yaml", "--check")
    assert done.returncode == 0, done.stderr
    done = run(folder, "compare", "--config", "plan.yaml", "--arms", "plain", "--jobs", jobs, "--seeds", "0", "1")
    assert "No module named" not in done.stderr
    assert done.returncode == 0, done.stderr
