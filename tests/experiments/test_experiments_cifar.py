"""CIFAR from files in the real binary layout, which the tests write: pixels, classes, crops, and what is missing."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_experiments import CONFIGS, training_configs
from torch import Tensor

from eafo_dynamic.cli import main
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments import CifarData
from eafo_dynamic.experiments.images.cifar import Crop, CropSampler
from eafo_dynamic.records import CorrectionLog

FILES = {
    "cifar10": ("cifar-10-batches-bin", [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"], 1, 10),
    "cifar100": ("cifar-100-binary", ["train.bin", "test.bin"], 2, 100),
}


def write_cifar(folder: Path, name: str, each: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Files as the data set's page describes them; gives all pixels as rows, columns, channels, and the classes."""
    sub, files, label_bytes, classes = FILES[name]
    (folder / sub).mkdir(parents=True)
    generator = np.random.default_rng(0)
    pixels = generator.integers(256, size=(len(files) * each, 32, 32, 3), dtype=np.uint8)
    pixels[..., 0] //= 2  # channels of different means
    labels = np.arange(len(pixels), dtype=np.uint8) % classes
    for place, file in enumerate(files):
        content = bytearray()
        for row in range(place * each, (place + 1) * each):
            content += bytes([0] * (label_bytes - 1) + [labels[row]])
            for channel in range(3):  # planes: red, green, blue; each row by row
                content += pixels[row, :, :, channel].tobytes()
        (folder / sub / file).write_bytes(content)
    return pixels, labels


def ready(folder: Path, name: str, **options: Any) -> CifarData:
    data = CifarData(str(folder), name, **{"batch_size": 10, **options})
    data.setup("fit")
    return data


@pytest.mark.parametrize("name", FILES)
def test_every_image_is_read_once_and_with_its_class(name: str, tmp_path: Path) -> None:
    pixels, labels = write_cifar(tmp_path, name)
    data = ready(tmp_path, name)
    trained = len(labels) - 40
    assert len(data.train_data) + len(data.val_data) == trained
    images = torch.cat([data.train_data.images, data.val_data.images]).permute(0, 2, 3, 1).numpy()
    classes = torch.cat([data.train_data.classes, data.val_data.classes]).tolist()
    known = {image.tobytes(): label for image, label in zip(pixels, labels, strict=True)}
    assert [known[image.tobytes()] for image in images] == classes
    assert len({image.tobytes() for image in images}) == trained
    assert np.array_equal(data.test_data.images.permute(0, 2, 3, 1).numpy(), pixels[trained:])
    assert data.test_data.classes.tolist() == labels[trained:].tolist()


def test_images_are_normalised_by_the_channels_of_the_training_part(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10")
    data = ready(tmp_path, "cifar10", augment=False)
    seen = torch.stack([image for image, _ in data.train_data]).double()
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.var((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("crop", [(4, 4, False), (0, 0, False), (8, 3, True), (4, 4, True)])
def test_a_crop_is_a_part_of_the_padded_image(crop: tuple[int, int, bool], tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10")
    data = ready(tmp_path, "cifar10").train_data
    whole = data[5][0].numpy()
    padded = np.pad(whole, ((0, 0), (4, 4), (4, 4)))
    top, left, flip = crop
    expected = padded[:, top : top + 32, left : left + 32]
    expected = expected[:, :, ::-1] if flip else expected
    assert np.array_equal(data[Crop(5, *crop)][0].numpy(), expected)


def batches(data: CifarData, epoch: int) -> Tensor:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize("workers", [0, 1])
def test_crops_are_a_function_of_seed_and_epoch(workers: int, tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10")
    reference = batches(ready(tmp_path, "cifar10", seed=3), epoch=1)
    torch.manual_seed(17)
    state = torch.get_rng_state()
    again = ready(tmp_path, "cifar10", seed=3, num_workers=workers)
    assert torch.equal(batches(again, epoch=1), reference)
    if not workers:
        plain = ready(tmp_path, "cifar10", seed=3, augment=False)
        assert not torch.equal(batches(plain, epoch=1), reference)
    assert not torch.equal(batches(again, epoch=2), reference)
    assert len(state) == len(torch.get_rng_state())


def test_crops_follow_the_order_and_are_spread_evenly() -> None:
    sampler = CropSampler(9000, seed=0)
    crops = list(sampler)
    assert sorted(crop.image for crop in crops) == list(range(9000))
    for values in ([crop.top for crop in crops], [crop.left for crop in crops]):
        counts = np.bincount(values, minlength=9)
        assert len(counts) == 9
        assert (abs(counts - 1000) < 150).all()  # five standard deviations
    assert abs(sum(crop.flip for crop in crops) - 4500) < 240
    shares = [list(CropSampler(9000, 0, None, replicas=2, rank=rank)) for rank in range(2)]
    assert [crop for pair in zip(*shares, strict=True) for crop in pair] == crops


def test_the_folder_itself_or_the_one_that_holds_it(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar100")
    inner = ready(tmp_path / "cifar-100-binary", "cifar100")
    assert inner.folder == ready(tmp_path, "cifar100").folder


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no test_batch\.bin here.*cifar-10-binary\.tar\.gz"):
        CifarData(str(tmp_path))
    write_cifar(tmp_path, "cifar10")
    with pytest.raises(ConfigError, match=r"no test\.bin here.*cifar-100-binary\.tar\.gz"):
        CifarData(str(tmp_path), "cifar100")
    with pytest.raises(ConfigError, match=r"name='cifar20'.*cifar10, cifar100"):
        CifarData(str(tmp_path), "cifar20")
    with pytest.raises(ConfigError, match=r"val_fraction=\(1\.0,\)"):
        CifarData(str(tmp_path), val_fraction=1.0)
    third = tmp_path / "cifar-10-batches-bin/data_batch_3.bin"
    whole = third.read_bytes()
    third.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=r"data_batch_3\.bin has 122919 bytes, not a multiple of 3073"):
        CifarData(str(tmp_path)).setup("fit")
    third.write_bytes(bytes([10]) + whole[1:])
    with pytest.raises(ConfigError, match=r"data_batch_3\.bin has the class 10, there are 10"):
        CifarData(str(tmp_path)).setup("fit")
    third.unlink()
    with pytest.raises(ConfigError, match=r"root=.*lacks data_batch_3\.bin"):
        CifarData(str(tmp_path))


CIFAR = [path for path in training_configs(files=True) if path.stem.startswith("cifar")]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["eafo-dynamic", *arguments])
    return main()


def test_there_are_configurations_for_cifar() -> None:
    assert len(CIFAR) == len(list(CONFIGS.glob("cifar*.yaml"))) >= 3


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("path", CIFAR, ids=lambda path: path.stem)
def test_cifar_configuration(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = yaml.safe_load(path.read_text())["data"]["init_args"]["name"]
    short = [
        "--trainer.max_steps=1",
        "--trainer.max_epochs=1",
        "--trainer.limit_val_batches=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.accelerator=cpu",
        "--data.init_args.batch_size=2",
        "--data.init_args.num_workers=0",
        "--data.init_args.val_fraction=0.5",  # two images of a class: one for each part
    ]
    arguments = ["fit", f"--config={path}", *short]
    assert run(monkeypatch, tmp_path, *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.match(rf"error: root='data/{FILES[name][0]}': no test", line)
    write_cifar(tmp_path / "data", name, each=2 * FILES[name][3])
    assert run(monkeypatch, tmp_path, *arguments) == 0
    sites = CorrectionLog.load(tmp_path / "runs" / path.stem).sites
    assert len(sites) >= 12
