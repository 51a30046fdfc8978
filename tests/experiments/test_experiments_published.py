"""Data with published baselines: IDX files that the tests write, signals that are generated, and their networks."""

from __future__ import annotations

import gzip
import json
import random
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_experiments import CONFIGS
from torch import Tensor

from eafo_dynamic.cli import main
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments import GPT, ConvNet, FashionData, Mnist1D, SignalNet
from eafo_dynamic.experiments.images.fashion import read_idx
from eafo_dynamic.experiments.signals.mnist1d import generate

# Lightning 2.6 with torch 2.13.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
    "ignore:The number of training batches",
)
FASHION = sorted(CONFIGS.glob("fashion_*.yaml"))
PLANS = sorted(CONFIGS.glob("evidence_fashion_*.yaml"))


def idx(tensor: Tensor) -> bytes:
    head = bytes([0, 0, 8, tensor.dim()])
    sizes = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return head + sizes + tensor.numpy().tobytes()


def write_fashion(folder: Path, train: int = 200, test: int = 40, packed: bool = True) -> dict[str, Tensor]:
    """Writes the four files; a pixel's value tells the image's class."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    written: dict[str, Tensor] = {}
    for name, count in (("train", train), ("t10k", test)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 200, (count, 28, 28), generator=draw).byte()
        images[:, 0, 0] = (20 * labels).byte()
        written |= {f"{name}-images-idx3-ubyte": images, f"{name}-labels-idx1-ubyte": labels.byte()}
    for name, tensor in written.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(tensor)))
        else:
            (folder / name).write_bytes(idx(tensor))
    return written


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_as_they_were_written(tmp_path: Path, packed: bool) -> None:
    written = write_fashion(tmp_path, packed=packed)
    for name, tensor in written.items():
        path = tmp_path / (f"{name}.gz" if packed else name)
        assert torch.equal(read_idx(path), tensor)


def test_images_keep_their_labels_in_every_part(tmp_path: Path) -> None:
    write_fashion(tmp_path / "FashionMNIST" / "raw")  # as torchvision leaves them
    data = FashionData(str(tmp_path), batch_size=16, val_fraction=0.2)
    data.setup("fit")
    assert [len(part) for part in (data.train_data, data.val_data, data.test_data)] == [160, 40, 40]  # type: ignore[arg-type]
    inputs = torch.cat([data.train_data[index][0] for index in range(160)])  # type: ignore[index]
    assert inputs.mean().abs() < 1e-5
    assert inputs.std() == pytest.approx(1.0, abs=1e-5)
    levels: dict[int, set[float]] = {}
    for part in (data.train_data, data.val_data, data.test_data):
        for index in range(40):
            image, label = part[index]  # type: ignore[index]
            assert image.shape == (1, 28, 28) and image.dtype == torch.float32
            levels.setdefault(int(label), set()).add(round(float(image[0, 0, 0]), 4))
    assert sorted(levels) == list(range(10))
    assert all(len(values) == 1 for values in levels.values()), "the first pixel tells the class"


def test_a_subset_has_every_class_and_changes_with_the_split_seed(tmp_path: Path) -> None:
    write_fashion(tmp_path)

    def train(split_seed: int) -> Tensor:
        data = FashionData(str(tmp_path), subset=100, split_seed=split_seed, val_fraction=0.2)
        data.setup("fit")
        assert len(data.val_data) == 20  # type: ignore[arg-type]
        images, labels = data.train_data.tensors  # type: ignore[attr-defined]
        assert labels.bincount().tolist() == [8] * 10
        return images

    assert torch.equal(train(0), train(0))
    assert not torch.equal(train(0), train(1))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"root=.*no train-images-idx3-ubyte here.*dataset-fashion-mnist"):
        FashionData(str(tmp_path))
    write_fashion(tmp_path, packed=False)
    images = tmp_path / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=r"has 156799 entries, its head says 200 x 28 x 28"):
        FashionData(str(tmp_path)).setup("fit")
    images.write_bytes(b"\x89PNG" + whole)
    with pytest.raises(ConfigError, match="is no IDX file of bytes"):
        FashionData(str(tmp_path)).setup("fit")
    images.write_bytes(idx(torch.zeros(10, 28, 28, dtype=torch.uint8)))
    with pytest.raises(ConfigError, match=r"has shape \[10, 28, 28\], its labels \[200\]"):
        FashionData(str(tmp_path)).setup("fit")
    images.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(ConfigError, match=r"cannot be read"):
        FashionData(str(tmp_path)).setup("fit")


def test_a_subset_that_is_too_large_is_refused(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    with pytest.raises(ConfigError, match=r"subset=300: the training files have 200 images"):
        FashionData(str(tmp_path), subset=300).setup("fit")


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("path", FASHION, ids=lambda path: path.stem)
def test_fashion_configuration_trains(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    short = [
        "--trainer.max_steps=2",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.accelerator=cpu",
        f"--data.init_args.root={tmp_path / 'data'}",
        "--data.init_args.batch_size=8",
    ]
    if "subset" in path.read_text():
        short.append("--data.init_args.subset=100")
    monkeypatch.setattr("sys.argv", ["eafo-dynamic", "fit", f"--config={path}", *short])
    assert main() == 0
    assert list((tmp_path / "runs" / path.stem).rglob("corrections.jsonl"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_fashion_plan_can_be_built(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fashion(tmp_path / "data")
    shutil.copytree(CONFIGS, tmp_path / "configs")
    for config in (tmp_path / "configs").glob("*fashion*.yaml"):
        text = config.read_text().replace("/usr/share/datasets/fashion-mnist", str(tmp_path / "data"))
        config.write_text(text.replace("subset: 10000", "subset: 100"))
    for choices in (tmp_path / "configs" / "tuned").glob("*fashion*.yaml"):
        choices.unlink()  # they were made with the real images, and are refused with others
    out = str(tmp_path / "out")
    assert main(["compare", "--config", str(tmp_path / "configs" / path.name), "--out", out, "--check"]) == 0
    assert "the reference" in capsys.readouterr().out


def test_convnet_is_that_of_the_benchmark() -> None:
    network = ConvNet()
    shapes = [tuple(parameter.shape) for name, parameter in network.named_parameters() if name.endswith("weight")]
    assert shapes == [(32, 1, 5, 5), (64, 32, 5, 5), (1024, 7 * 7 * 64), (10, 1024)]
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ConfigError, match=r"image_size=30"):
        ConvNet(image_size=30)


def test_signals_are_generated_alike_and_leave_random_states_alone() -> None:
    numpy_state, python_state = np.random.get_state()[1].copy(), random.getstate()
    generate.cache_clear()
    signals, digits = generate(200, 3)
    assert (np.random.get_state()[1] == numpy_state).all() and random.getstate() == python_state
    assert signals.shape == (200, 40) and digits.bincount().tolist() == [20] * 10
    assert signals.mean().abs() < 1e-6 and signals.std() == pytest.approx(1.0, abs=1e-2)
    generate.cache_clear()
    assert torch.equal(generate(200, 3)[0], signals)
    assert not torch.equal(generate(200, 4)[0], signals)


def test_signals_of_seed_42_are_the_published_ones() -> None:
    package = pytest.importorskip("mnist1d.data")
    options = package.get_dataset_args()
    state = np.random.get_state()
    published = package.make_dataset(options)
    np.random.set_state(state)
    data = Mnist1D()
    data.setup("fit")
    signals, digits = data.test_data.tensors  # type: ignore[attr-defined]
    assert np.allclose(signals.numpy(), published["x_test"], atol=1e-6)
    assert (digits.numpy() == published["y_test"]).all()
    assert len(data.train_data) + len(data.val_data) == 4000  # type: ignore[arg-type]


def test_signal_network_has_the_published_sizes() -> None:
    network = SignalNet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 5210
    assert network(torch.zeros(3, 40)).shape == (3, 10)
    with pytest.raises(ConfigError, match=r"length=7"):
        SignalNet(length=7)


def test_plans_of_the_evidence_share_no_seed_with_their_tuning() -> None:
    for path in CONFIGS.glob("evidence_*.yaml"):
        plan = yaml.safe_load(path.read_text())
        assert set(plan["seeds"]).isdisjoint(plan.get("tune", {}).get("seeds", []))
        assert min(plan["seeds"]) >= 1000, "lower seeds have been used to choose options"


def test_celu_is_elu_so_that_plans_leave_it_out() -> None:
    z = torch.linspace(-5, 5, 101)
    assert torch.equal(torch.nn.CELU()(z), torch.nn.ELU()(z))


def test_gpu_script_runs_small_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(CONFIGS / "gpt_30m_gpu.py"))
    size = ["--steps", "6", "--windows", "2", "--block", "16", "--dim", "16", "--depth", "2", "--heads", "2"]
    size += ["--eval-batches", "1", "--megabytes", "0.2"]
    text = str(Path(torch.__file__).parent / "nn")
    common = ["--out", str(tmp_path), "--text", text, *size]
    script["main"]([*common, "--seeds", "1", "--minutes", "5"])
    assert "squared relu, seed 1: " in capsys.readouterr().out
    script["main"]([*common, "--seeds", "1", "2", "--minutes", "5"])
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 10, "finished runs are not run again"
    runs = {(run["arm"], run["seed"]): run for run in map(json.loads, lines)}
    assert {arm for arm, _ in runs} == {"gelu", "relu", "squared relu", "held", "default on squared_relu"}
    assert len({run["parameters"] for run in runs.values()}) == 1
    assert runs["held", 1]["curve"]["step"] == [1, 2, 3, 4, 5, 6]
    shown = capsys.readouterr().out
    assert re.search(r"\| gelu \| 2 \| \d\.\d+ \| \+0\.00 \[\+0\.00, \+0\.00\] \| \+0\.00", shown)
    script["main"]([*common, "--seeds", "3", "--minutes", "0"])
    assert "gelu, seed 3: would not end in time" in capsys.readouterr().out


def test_gpu_script_has_some_thirty_million_parameters() -> None:
    with torch.device("meta"):
        model = GPT(block_size=512, dim=576, depth=8, heads=9)
    assert 29e6 < sum(parameter.numel() for parameter in model.parameters()) < 34e6
