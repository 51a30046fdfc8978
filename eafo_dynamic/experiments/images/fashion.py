"""Fashion-MNIST, or any data set in the four IDX files of MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.splits import SplitData, split_indices

__all__ = ["FashionData", "read_idx"]

_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_UNSIGNED_BYTE = 8  # the only type of entries that these files have


class FashionData(SplitData):
    """Fashion-MNIST (Xiao et al., 2017): 60,000 + 10,000 images of clothes, [1, 28, 28], ten classes.

    Read from the four IDX files, packed (.gz) or not: those of the Debian package `dataset-fashion-mnist`, of
    https://github.com/zalandoresearch/fashion-mnist, or what torchvision leaves in `FashionMNIST/raw`. MNIST and
    KMNIST have files of the same names. The test files are the test part; the validation part is cut from the training
    files, class by class. All pixels share one mean and one standard deviation, those of the training part.

    Args:
        root: folder of the files.
        batch_size: see `SplitData`, as for the other arguments.
        seed: order of the training batches.
        split_seed: cut into training and validation part, and choice of the subset.
        val_fraction: fraction of the training images for validation.
        subset: number of images of the training files that are used, validation included, with the same share in every
            class; None: all.
        num_workers: loader processes.

    Raises:
        ConfigError: for files that are missing or damaged, or a subset that is too large.
    """

    own_test = True

    def __init__(
        self,
        root: str,
        batch_size: int = 128,
        seed: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        subset: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, split_seed, val_fraction, 0.0, num_workers)
        if subset is not None and subset < 1:
            raise ConfigError("subset", subset, "must be at least 1", "Choose 1 or more, or leave it out.")
        self.subset = subset
        self.files = [_find(Path(root), name) for name in _FILES]  # here, so that a wrong path is an error at once

    def setup(self, stage: str) -> None:
        """Reads, cuts and standardises the data; the same for every stage.

        Args:
            stage: what Lightning is about to do; not used.
        """
        images, labels, test_images, test_labels = (read_idx(path) for path in self.files)
        _check_pairs(self.files[0], images, labels)
        _check_pairs(self.files[2], test_images, test_labels)
        labels = labels.long()
        kept = self._subset(labels)
        split = split_indices(labels[kept], self.val_fraction, 0.0, self.split_seed)
        train, val = kept[split.train], kept[split.val]
        deviation, mean = torch.std_mean(images[train].double())
        parts = ((images[train], labels[train]), (images[val], labels[val]), (test_images, test_labels.long()))
        self.train_data, self.val_data, self.test_data = (
            TensorDataset((((part.double() - mean) / deviation).float()).unsqueeze(1), classes)
            for part, classes in parts
        )

    def _subset(self, labels: Tensor) -> Tensor:
        """Indices of the images that are used."""
        if self.subset is None:
            return torch.arange(len(labels))
        if self.subset > len(labels):
            mend = "Choose fewer, or leave it out."
            raise ConfigError("subset", self.subset, f"the training files have {len(labels)} images", mend)
        # A cut of its own seed: the subset's own cut into two parts must not depend on it.
        return split_indices(labels, self.subset / len(labels), 0.0, self.split_seed + 1_000_003).val


def read_idx(path: Path) -> Tensor:
    """Reads an IDX file of bytes: two zeros, the type, the number of dimensions, their sizes, the entries.

    Args:
        path: the file; one that ends in .gz is unpacked.

    Returns:
        uint8, of the shape that the file says.

    Raises:
        ConfigError: for a file that is none of these, or that is shorter or longer than it says.
    """
    mend = "Fetch the file again."
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError("root", str(path), f"cannot be read ({error})", mend) from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise ConfigError("root", str(path), "is no IDX file of bytes", mend)
    dimensions = content[3]
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4)]
    if len(content) != start + math.prod(sizes):
        problem = f"has {len(content) - start} entries, its head says {' x '.join(map(str, sizes))}"
        raise ConfigError("root", str(path), problem, mend)
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(sizes)


def _check_pairs(path: Path, images: Tensor, labels: Tensor) -> None:
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
        problem = f"has shape {list(images.shape)}, its labels {list(labels.shape)}"
        raise ConfigError("root", str(path), problem, "Images and labels must be of one data set.")


def _find(root: Path, name: str) -> Path:
    for folder in (root, root / "FashionMNIST" / "raw"):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    mend = "Install Debian's dataset-fashion-mnist and give /usr/share/datasets/fashion-mnist, or another folder."
    raise ConfigError("root", str(root), f"no {name} here, with or without .gz", mend)
