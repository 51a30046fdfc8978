"""Every example is run in a small setting; the gallery shows every one of them."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eafo_dynamic import CorrectionLog
from eafo_dynamic.errors import LogError

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "gallery")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*bottleneck"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CorrectionLog]:
    folder = tmp_path_factory.mktemp("example")
    return folder, example("lightning_trainer")["main"](folder, epochs=2)


def test_lightning_trainer(run: tuple[Path, CorrectionLog]) -> None:
    _, log = run
    assert log.update_steps == [1, 2, 4, 8, 16, 20, 40]
    assert log.steps[-1] == 44, "the log ends with the model"
    assert log.sites == ["net.1", "net.3", "net.6"]
    assert all(row["eps"] != 0.01 for row in log.last()), "the optimiser has moved every eps"


def test_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    controller = example("plain_pytorch")["main"](steps=60)
    assert len(controller.records) == 2 * 7  # sites, and rounds 1, 2, 4, 8, 16, 32, 50
    assert "entropy" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_huggingface_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    log = example("huggingface_trainer")["main"](tmp_path, steps=20)
    assert log.steps == [1, 2, 4, 8, 16, 20]
    assert all(row["eps"] != pytest.approx(0.01, abs=1e-4) for row in log.select(steps=(20, 20)).rows)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_models(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    controllers = example("transformers_models")["main"](steps=20)
    assert {name: len(each.report.wrapped) for name, each in controllers.items()} == {"gpt2": 3, "vit": 3}
    for each in controllers.values():
        assert each.rounds == 6  # after steps 1, 2, 4, 8, 16, 20
        assert all(abs(eps.item() - 0.01) > 1e-4 for eps in each.bank.eps)
    assert "gpt2: 3 sites" in capsys.readouterr().out


def test_shared_relu_cnn(capsys: pytest.CaptureFixture[str]) -> None:
    controller = example("shared_relu_cnn")["main"](steps=20)
    names = [site.name for site in controller.bank.sites]
    assert names == ["stem.2", "blocks.0.relu#0", "blocks.0.relu#1", "blocks.1.relu#0", "blocks.1.relu#1"]
    assert all(eps.shape == (16,) for eps in controller.bank.eps), "one amplitude a channel"
    shared = controller.model.blocks[0].relu
    assert isinstance(shared, torch.nn.ReLU) and shared.inplace
    shown = capsys.readouterr().out
    assert "blocks.0.relu#1: relu" in shown and "stem.2.eafo_0_lift: 16 channels, from " in shown


def test_custom_activation_policy(capsys: pytest.CaptureFixture[str]) -> None:
    controller = example("custom_activation_policy")["main"](steps=100)
    assert "step 100  1  sign step" in capsys.readouterr().out
    assert [policy.name for policy in controller.policies] == ["sign step", "learned"]
    first = [row["eps"] for row in controller.records if row["policy"] == "sign step"]
    steps = [round(b - a, 6) for a, b in zip([0.01, *first], first, strict=False)]
    assert {abs(step) for step in steps} == {0.005}, "the policy's own step, at every update"


def test_read_a_log(
    run: tuple[Path, CorrectionLog], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pandas")
    monkeypatch.setattr(sys, "argv", ["read_a_log.py", str(run[0])])
    names = example("read_a_log")
    drawn = sorted(path.name for path in names["out"].glob("*.png"))
    assert drawn == ["functions.png", "gradients.png", "prediction.png", "trajectories.png"]
    assert len(names["frame"]) == len(run[1])
    shown = capsys.readouterr().out
    assert "net.6" in shown and "correlation of predicted and measured" in shown


def test_read_a_log_trains_nothing_where_a_run_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["read_a_log.py", str(tmp_path / "mistyped")])
    with pytest.raises(LogError, match="mistyped"):
        example("read_a_log")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_merge_and_export(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = example("merge_and_export")["main"](tmp_path, steps=60)
    assert found["merged"] == 0.0, "the same kernel, the last bit"
    assert found["onnx"] < 1e-4
    assert found["accuracy"] > 0.9
    assert (tmp_path / "classifier.onnx").stat().st_size > 1000


@pytest.mark.slow
def test_ddp_launch(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "ddp_launch.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    ends = dict(re.findall(r"rank (\d) of 2: (\{[^}]*\})", result.stdout))  # both may print on one line
    assert set(ends) == {"0", "1"}
    assert ends["0"] == ends["1"], "every rank has the same corrections"
    log = CorrectionLog.load(tmp_path)
    assert log.last()[-1]["n"] == 4096 and log.update_steps[-1] == 90


def test_the_gallery_draws(tmp_path: Path) -> None:
    (file,) = example("gallery")["main"](tmp_path, "plain_pytorch")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_the_gallery_shows_every_example() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(example("gallery")["FIGURES"]) == SCRIPTS
    for name in SCRIPTS:
        assert f"]({name}.py)" in page, name
        assert f"(figures/{name}.png)" in page, name
        assert 5_000 < (EXAMPLES / "figures" / f"{name}.png").stat().st_size < 100_000, name
