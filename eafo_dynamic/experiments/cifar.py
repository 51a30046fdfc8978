"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from their binary files, with crops and flips that seeds alone decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.data import SplitData, split_indices
from eafo_dynamic.experiments.sampling import EpochSampler

__all__ = ["CifarData", "CifarImages", "Crop", "CropSampler", "read_cifar"]

CifarName = Literal["cifar10", "cifar100"]
_PIXELS = 3 * 32 * 32
_PADDING = 4


class _Layout(NamedTuple):
    folder: str
    train: tuple[str, ...]
    test: str
    labels: int  # bytes before the pixels; the last of them is the class
    classes: int


_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-batches-bin", tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin", 1, 10
    ),
    "cifar100": _Layout("cifar-100-binary", ("train.bin",), "test.bin", 2, 100),
}


class Crop(NamedTuple):
    """An image and how it is shown this time."""

    image: int
    top: int
    """Row of the padded image at which the crop begins, 0 ... 8; 4 is the image itself."""
    left: int
    flip: bool


class CropSampler(EpochSampler):
    """The order of an epoch, and for each image a crop and a flip: a function of (seed, epoch) as the order is.

    Drawn here, not where images are read: neither workers nor dropout in the model change what is drawn.
    """

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch + 500_001)
        # One draw an image of the data set, whatever rank shows it.
        offsets = torch.randint(2 * _PADDING + 1, (self.population, 2), generator=generator)
        flips = torch.randint(2, (self.population,), generator=generator).bool()
        for index in super().__iter__():
            top, left = offsets[index].tolist()
            yield Crop(index, top, left, bool(flips[index]))


class CifarImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, normalised by channel when they are read.

    Args:
        images: uint8, shape [n, 3, 32, 32].
        classes: int64, shape [n].
        mean: of each channel in units of 1/255, shape [3, 1, 1].
        deviation: of each channel likewise.
    """

    def __init__(self, images: Tensor, classes: Tensor, mean: Tensor, deviation: Tensor) -> None:
        self.images = images
        self.classes = classes
        self.mean = mean
        self.deviation = deviation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int | Crop) -> tuple[Tensor, Tensor]:
        crop = place if isinstance(place, Crop) else Crop(place, _PADDING, _PADDING, False)
        image = (self.images[crop.image].float() - self.mean) / self.deviation
        if crop[1:] != (_PADDING, _PADDING, False):
            # Zeros around the normalised image: the border has the colour of the mean.
            image = F.pad(image, [_PADDING] * 4)[:, crop.top : crop.top + 32, crop.left : crop.left + 32]
            image = image.flip(-1) if crop.flip else image
        return image, self.classes[crop.image]


class CifarData(SplitData):
    """CIFAR-10 or CIFAR-100: images [3, 32, 32], normalised by the channels of the training part.

    Read from the binary version, "CIFAR-10 binary version (suitable for C programs)" of
    https://www.cs.toronto.edu/~kriz/cifar.html, which unlike the Python version needs no unpickling. The test files
    are the test part; the validation part is cut from the training files, class by class. In training each image
    is padded by 4 pixels, cropped to 32 x 32 at random and flipped left to right with probability 1/2.

    Args:
        root: the unpacked folder, `cifar-10-batches-bin` or `cifar-100-binary`, or the folder that holds it.
        name: "cifar10" or "cifar100" (its 100 fine classes).
        batch_size: see `SplitData`, as the others.
        seed: order, crops and flips of the training images.
        split_seed: cut into training and validation part.
        val_fraction: part of the training files for validation.
        augment: crops and flips in training.
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
        self.folder = _find(Path(root), _LAYOUTS[name])  # at once: a wrong path is said before anything runs

    def setup(self, stage: str) -> None:
        """Read, cut and normalise; the same for every stage.

        Args:
            stage: what Lightning is about to do; not used.
        """
        layout = _LAYOUTS[self.variant]
        images, classes = read_cifar([self.folder / name for name in layout.train], layout.labels, layout.classes)
        tested = read_cifar([self.folder / layout.test], layout.labels, layout.classes)
        split = split_indices(classes, self.val_fraction, 0.0, self.split_seed)
        mean, deviation = _channel_moments(images[split.train])
        self.train_data, self.val_data = (
            CifarImages(images[part], classes[part], mean, deviation) for part in (split.train, split.val)
        )
        self.test_data = CifarImages(*tested, mean, deviation)

    def sampler(self) -> EpochSampler:
        """Order and, with `augment`, crops and flips.

        Returns:
            A sampler over the training images, for this process of the trainer.
        """
        plain = super().sampler()
        if not self.augment:
            return plain
        return CropSampler(plain.population, self.seed, None, plain.num_replicas, plain.rank)


def read_cifar(paths: Sequence[Path], label_bytes: int, classes: int) -> tuple[Tensor, Tensor]:
    """Records of `label_bytes` labels and 3,072 pixels: rows of the red plane, then the green, then the blue one.

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
    for path in paths:
        content = bytearray(path.read_bytes())
        if not content or len(content) % (label_bytes + _PIXELS):
            problem = f"{path.name} has {len(content)} bytes, not a multiple of {label_bytes + _PIXELS}"
            raise ConfigError("root", str(path.parent), problem, "Unpack the binary version again.")
        records = torch.frombuffer(content, dtype=torch.uint8).unflatten(0, (-1, label_bytes + _PIXELS))
        images.append(records[:, label_bytes:].reshape(-1, 3, 32, 32))
        labels.append(records[:, label_bytes - 1].long())
        largest = int(labels[-1].max())
        if largest >= classes:
            problem = f"{path.name} has the class {largest}, there are {classes}"
            raise ConfigError("root", str(path.parent), problem, "Check that name fits the files.")
    return torch.cat(images), torch.cat(labels)


def _find(root: Path, layout: _Layout) -> Path:
    wanted = (*layout.train, layout.test)
    for folder in (root, root / layout.folder):
        if (folder / layout.test).is_file():
            missing = [name for name in wanted if not (folder / name).is_file()]
            if missing:
                raise ConfigError("root", str(root), f"lacks {', '.join(missing)}", "Unpack the binary version again.")
            return folder
    archive = "cifar-10-binary.tar.gz" if layout.classes == 10 else "cifar-100-binary.tar.gz"
    raise ConfigError(
        "root",
        str(root),
        f"no {layout.test} here, nor in {layout.folder}",
        f"Unpack https://www.cs.toronto.edu/~kriz/{archive} and name its folder.",
    )


def _channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, in units of 1/255; from 256 counts, exact without a float copy."""
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([images[:, channel].flatten().bincount(minlength=256) for channel in range(3)]).double()
    total = counts.sum(1)
    mean = (counts * levels).sum(1) / total
    variance = (counts * levels.square()).sum(1) / total - mean.square()
    deviation = torch.where(variance > 0, variance, 1.0).sqrt()
    return mean.float()[:, None, None], deviation.float()[:, None, None]
