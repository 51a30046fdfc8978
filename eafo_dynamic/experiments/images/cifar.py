"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from their binary files, with crops and flips that depend on a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.sampling import EpochSampler
from eafo_dynamic.experiments.splits import SplitData, split_indices

__all__ = ["CifarData", "CifarImages", "Crop", "CropSampler", "read_cifar"]

CifarName = Literal["cifar10", "cifar100"]
_PIXELS = 3 * 32 * 32
_PADDING = 4


class _Layout(NamedTuple):
    """How the files of one of the two data sets are named and written."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    label_bytes: int
    """Bytes before the pixels of an image; the last of them is the class."""
    classes: int


_LAYOUTS = {
    "cifar10": _Layout(
        archive="cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        train=("data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"),
        test="test_batch.bin",
        label_bytes=1,
        classes=10,
    ),
    "cifar100": _Layout(
        archive="cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        train=("train.bin",),
        test="test.bin",
        label_bytes=2,
        classes=100,
    ),
}


class Crop(NamedTuple):
    """Which image to read, and which part of it, mirrored or not."""

    image: int
    top: int
    """Row of the padded image at which the crop begins, 0 ... 8; 4 is the image itself."""
    left: int
    flip: bool


class CropSampler(EpochSampler):
    """The order of an epoch with a crop and a flip for each image, all of them a function of (seed, epoch).

    They are drawn here, not where images are read, so that neither loader processes nor the model's dropout change
    them.
    """

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch + 500_001)
        # One draw per image of the data set, so that it does not depend on which rank reads the image.
        offsets = torch.randint(2 * _PADDING + 1, (self.population, 2), generator=generator)
        flips = torch.randint(2, (self.population,), generator=generator).bool()
        for index in super().__iter__():
            top, left = offsets[index].tolist()
            yield Crop(index, top, left, bool(flips[index]))


class CifarImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, normalised channel by channel when they are read.

    Args:
        images: uint8, shape [n, 3, 32, 32].
        classes: int64, shape [n].
        mean: mean of each channel, in units of 1/255, shape [3, 1, 1].
        deviation: standard deviation of each channel, in the same units and shape.
    """

    def __init__(self, images: Tensor, classes: Tensor, mean: Tensor, deviation: Tensor) -> None:
        self.images = images
        self.classes = classes
        self.mean = mean
        self.deviation = deviation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Crop) -> tuple[Tensor, Tensor]:
        if not isinstance(index, Crop):
            return self._normalised(index), self.classes[index]
        crop = index
        # The image is padded after it is normalised: a border of zeros has the mean colour.
        padded = F.pad(self._normalised(crop.image), [_PADDING] * 4)
        image = padded[:, crop.top : crop.top + 32, crop.left : crop.left + 32]
        if crop.flip:
            image = image.flip(-1)
        return image, self.classes[crop.image]

    def _normalised(self, index: int) -> Tensor:
        return (self.images[index].float() - self.mean) / self.deviation


class CifarData(SplitData):
    """CIFAR-10 or CIFAR-100: images [3, 32, 32], each channel normalised by mean and deviation of the training part.

    Read from the binary version, "CIFAR-10 binary version (suitable for C programs)" of
    https://www.cs.toronto.edu/~kriz/cifar.html, which unlike the Python version needs no unpickling. The test files
    are the test part; the validation part is cut from the training files, class by class. In training each image
    is padded by 4 pixels, cropped to 32 x 32 at random and flipped left to right with probability 1/2.

    Args:
        root: the unpacked folder, `cifar-10-batches-bin` or `cifar-100-binary`, or the folder that holds it.
        name: "cifar10" or "cifar100" (its 100 fine classes).
        batch_size: see `SplitData`, as for the other arguments.
        seed: order, crops and flips of the training images.
        split_seed: cut into training and validation part.
        val_fraction: fraction of the training files for validation.
        augment: whether to crop and flip the images in training.
        num_workers: loader processes.

    Raises:
        ConfigError: for an unknown name, or files that are missing or damaged.
    """

    own_test = True

    def __init__(
        self,
        root: str,
        name: CifarName = "cifar10",
        batch_size: int = 128,
        seed: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        augment: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, split_seed, val_fraction, 0.0, num_workers)
        if name not in get_args(CifarName):
            raise ConfigError("name", name, "no such data set", f"Use one of {', '.join(get_args(CifarName))}.")
        self.variant = name
        self.augment = augment
        self.folder = _find(Path(root), _LAYOUTS[name])  # here, so that a wrong path is an error before anything runs

    def setup(self, stage: str) -> None:
        """Reads, cuts and normalises the data; the same for every stage.

        Args:
            stage: what Lightning is about to do; not used.
        """
        layout = _LAYOUTS[self.variant]
        train_files = [self.folder / name for name in layout.train]
        images, classes = read_cifar(train_files, layout.label_bytes, layout.classes)
        test_images, test_classes = read_cifar([self.folder / layout.test], layout.label_bytes, layout.classes)
        train, val, _ = split_indices(classes, self.val_fraction, 0.0, self.split_seed)
        mean, deviation = _channel_moments(images[train])
        self.train_data = CifarImages(images[train], classes[train], mean, deviation)
        self.val_data = CifarImages(images[val], classes[val], mean, deviation)
        self.test_data = CifarImages(test_images, test_classes, mean, deviation)

    def sampler(self) -> EpochSampler:
        """The order of the training images and, with `augment`, their crops and flips.

        Returns:
            A sampler over the training images, for this process of the trainer.
        """
        plain = super().sampler()
        if not self.augment:
            return plain
        return CropSampler(plain.population, self.seed, replicas=plain.num_replicas, rank=plain.rank)


def read_cifar(paths: Sequence[Path], label_bytes: int, classes: int) -> tuple[Tensor, Tensor]:
    """Reads records of `label_bytes` labels and 3,072 pixels: the red plane row by row, then the green, then the blue.

    Args:
        paths: binary files, read one after the other.
        label_bytes: bytes before the pixels; the last of them is the class.
        classes: number of classes.

    Returns:
        Images, uint8, shape [n, 3, 32, 32], and classes, int64, shape [n].

    Raises:
        ConfigError: for a file without whole records, or with a label that is no class.
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    record_bytes = label_bytes + _PIXELS
    for path in paths:
        content = bytearray(path.read_bytes())
        if not content or len(content) % record_bytes != 0:
            problem = f"{path.name} has {len(content)} bytes, not a multiple of {record_bytes}"
            raise ConfigError("root", str(path.parent), problem, "Unpack the binary version again.")
        records = torch.frombuffer(content, dtype=torch.uint8).unflatten(0, (-1, record_bytes))
        images.append(records[:, label_bytes:].reshape(-1, 3, 32, 32))
        labels.append(records[:, label_bytes - 1].long())
        largest = int(labels[-1].max())
        if largest >= classes:
            problem = f"{path.name} has the class {largest}, there are {classes}"
            raise ConfigError("root", str(path.parent), problem, "Check that name fits the files.")
    return torch.cat(images), torch.cat(labels)


def _find(root: Path, layout: _Layout) -> Path:
    """The folder with the files: `root` itself or the one that the archive unpacks to inside it."""
    for folder in (root, root / layout.folder):
        if not (folder / layout.test).is_file():
            continue
        missing = [name for name in layout.train if not (folder / name).is_file()]
        if missing:
            raise ConfigError("root", str(root), f"lacks {', '.join(missing)}", "Unpack the binary version again.")
        return folder
    raise ConfigError(
        "root",
        str(root),
        f"no {layout.test} here, nor in {layout.folder}",
        f"Unpack https://www.cs.toronto.edu/~kriz/{layout.archive} and name its folder.",
    )


def _channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, in units of 1/255, shape [3, 1, 1]."""
    # Counting the 256 levels is exact and needs no copy of the images in floating point.
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([images[:, channel].flatten().bincount(minlength=256) for channel in range(3)]).double()
    total = counts.sum(1)
    mean = (counts * levels).sum(1) / total
    variance = (counts * levels.square()).sum(1) / total - mean.square()
    deviation = torch.where(variance > 0, variance, 1.0).sqrt()
    return mean.float()[:, None, None], deviation.float()[:, None, None]
