"""``eafo-dynamic merge``: from the checkpoint of a run to a file that computes what the trained model computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from eafo_dynamic import apply_from_checkpoint, load_merged
from eafo_dynamic.apply.manifest import manifest
from eafo_dynamic.apply.surgery import hosted_sites, wrap
from eafo_dynamic.cli import main
from eafo_dynamic.experiments import MLP, Classifier
from eafo_dynamic.find.sites import find_sites
from tests.zoo.awkward import OneReluForAll, TiedFunctionalBlocks

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches", "ignore:Checkpoint directory", "ignore:.*val_dataloader.*bottleneck"
)


def run(*arguments: object) -> int:
    try:
        return main([str(each) for each in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a short run on the wine table."""
    folder = tmp_path_factory.mktemp("run")
    options = {"max_epochs": 2, "enable_progress_bar": "false", "enable_model_summary": "false"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = ["fit", f"--config={ROOT / 'configs/wine_mlp.yaml'}"]
        patch.setattr(sys, "argv", ["eafo-dynamic", *command, *(f"--trainer.{k}={v}" for k, v in options.items())])
        assert main() == 0
    (file,) = folder.rglob("*.ckpt")
    return file


def trained(checkpoint: Path) -> nn.Module:
    return apply_from_checkpoint(network(), checkpoint).eval()


def network() -> Classifier:
    return Classifier(model=MLP(13, 3, [64, 64, 64], activation="relu"), num_classes=3)


def saved(model: nn.Module, x: Tensor, file: Path) -> Tensor:
    """Writes a checkpoint of a model with a function for each site, and returns what it computes."""
    report = find_sites(model, x)
    wrap(model, report)
    with torch.no_grad():
        for k, (host, site) in enumerate(hosted_sites(model)):
            getattr(host, site.keys[0]).fill_(0.1 * (k + 1))
    torch.save({"state_dict": model.state_dict(), "eafo": manifest(report)}, file)
    return model.eval()(x).detach()


X = torch.linspace(-2.0, 2.0, 65).reshape(5, 13)


@pytest.mark.parametrize("ending", ["ckpt", "pt", "safetensors"])
def test_weights_of_a_run(ending: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    file = tmp_path / f"merged model.{ending}"
    assert run("merge", checkpoint, "--output", file) == 0
    printed = capsys.readouterr().out
    assert "3 sites of" in printed
    assert printed.count("CorrectedActivation") == 3
    assert torch.equal(load_merged(network().eval(), file)(X), trained(checkpoint)(X))


def test_the_table_says_what_became_of_each_site(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("merge", checkpoint, "--output", tmp_path / "model.pt", "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    hosted = hosted_sites(trained(checkpoint))
    assert [row["site"] for row in rows] == [site.name for _, site in hosted]
    assert [row["eps"] for row in rows] == [float(getattr(host, site.keys[0]).detach()) for host, site in hosted]
    assert {(row["base"], row["shape"], row["becomes"]) for row in rows} == {
        ("relu", "closed form", "CorrectedActivation")
    }


def test_a_program_takes_its_example_from_the_data_of_the_run(checkpoint: Path, tmp_path: Path) -> None:
    assert run("merge", checkpoint, "--output", tmp_path / "model.pt2") == 0
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(X), trained(checkpoint)(X), rtol=1e-5, atol=1e-6)


def test_onnx(checkpoint: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert run("merge", checkpoint, "--output", tmp_path / "model.onnx", "--shape", "5,13") == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), trained(checkpoint)(X).detach(), rtol=1e-5, atol=1e-5)


def test_a_factory_instead_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(4, 8)
    expected = saved(OneReluForAll(), x, tmp_path / "own.ckpt")
    options = ("--model", "tests.zoo.awkward:OneReluForAll", "--output", tmp_path / "model.pt")
    assert run("merge", tmp_path / "own.ckpt", *options) == 0
    assert capsys.readouterr().out.count("CorrectedCalls") == 3
    assert torch.equal(load_merged(OneReluForAll(), tmp_path / "model.pt")(x), expected)


def test_functional_calls_go_into_a_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(4, 8)
    expected = saved(TiedFunctionalBlocks(), x, tmp_path / "own.ckpt")
    options = ("--model", "tests.zoo.awkward:TiedFunctionalBlocks", "--shape", "4,8")
    assert run("merge", tmp_path / "own.ckpt", *options, "--output", tmp_path / "model.pt2") == 0
    assert capsys.readouterr().out.count("in the graph") == 3
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-6)
    for more, said in ((options, "end the name in .pt2 or .onnx"), (options[:2], "Give its shape")):
        assert run("merge", tmp_path / "own.ckpt", *more, "--output", tmp_path / "model.pt") == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--output": "model.h5"}, "output='model.h5': is no format for models. End it in .pt, .ckpt, .safetensors"),
        ({"--output": "absent/model.pt"}, "lies in a folder that does not exist"),
        ({"checkpoint": "absent.ckpt"}, "checkpoint='absent.ckpt': does not exist"),
        ({"checkpoint": "text.ckpt"}, "checkpoint='text.ckpt': cannot be read"),
        ({"checkpoint": "plain.ckpt"}, "checkpoint='plain.ckpt': holds no corrections"),
        ({"checkpoint": "moved.ckpt"}, "has no config.yaml in its folder"),
        ({"--config": "absent.yaml"}, "--config='absent.yaml': cannot be read"),
        ({"--config": "empty.yaml"}, "--config='empty.yaml': has no model"),
        ({"--config": "other.yaml"}, "is of another model than this Classifier"),
        ({"--config": "unknown.yaml"}, "unknown option 'hiden'"),
        ({"--model": "tests.zoo.awkward:Absent"}, "model='tests.zoo.awkward:Absent': cannot be made"),
        ({"--model": "tests.zoo.awkward:OneReluForAll"}, "is of another model than this OneReluForAll"),
    ],
)
def test_mistakes_are_one_line(
    change: dict[str, str],
    said: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((ROOT / "configs/wine_mlp.yaml").read_text())
    Path("text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, "plain.ckpt")
    Path("moved.ckpt").write_bytes(checkpoint.read_bytes())
    Path("empty.yaml").write_text("trainer: {}\n")
    network = config["model"]["init_args"]["model"]["init_args"]
    network["hidden"] = [8, 8, 8]
    Path("other.yaml").write_text(yaml.safe_dump(config))
    network["hiden"] = network.pop("hidden")
    Path("unknown.yaml").write_text(yaml.safe_dump(config))
    options = {"checkpoint": str(checkpoint), "--output": "model.pt", **change}
    words = [options.pop("checkpoint"), *(word for pair in options.items() for word in pair)]
    assert run("merge", *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not Path("model.pt").exists()
