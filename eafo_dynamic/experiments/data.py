"""LightningDataModules over data that scikit-learn brings along: nothing is downloaded."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Sized
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.sampling import EpochSampler

__all__ = ["DigitsData", "SplitData", "TabularData", "TabularName"]

TabularName = Literal["wine", "breast_cancer", "diabetes"]


class Split(NamedTuple):
    """Indices of the three disjoint parts of a data set."""

    train: Tensor
    val: Tensor
    test: Tensor


class SplitData(LightningDataModule, ABC):
    """Three data sets in memory and their loaders.

    Args:
        batch_size: examples of a batch. The last, smaller batch of a training epoch is left out.
        seed: seed of the order of the training batches; see `EpochSampler`.
        split_seed: seed of the cut into training, validation and test part.
        val_fraction: part of the data for validation.
        test_fraction: part of the data for testing.
        num_workers: loader processes. The data is in memory: 0 is fastest.

    Raises:
        ConfigError: for a batch size below 1 or fractions that leave a part empty.
    """

    train_data: Dataset[Any]
    val_data: Dataset[Any]
    test_data: Dataset[Any]
    draws: int | None = None
    """Examples that make a training epoch, drawn with replacement; None: every example once."""
    own_test: bool = False
    """Whether the data comes with a test part, so that none is cut from it."""
    collate: Callable[[list[Any]], Any] | None = None
    """What makes a batch of a list of examples; None: torch's own."""

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError("batch_size", batch_size, "must be at least 1", "Choose 1 or more.")
        fractions = {"val_fraction": val_fraction} | ({} if self.own_test else {"test_fraction": test_fraction})
        if min(fractions.values()) <= 0 or sum(fractions.values()) >= 1:
            raise ConfigError(
                ", ".join(fractions),
                tuple(fractions.values()),
                "training, validation or test part would be empty",
                "Choose positive numbers whose sum is below 1.",
            )
        self.batch_size = batch_size
        self.seed = seed
        self.split_seed = split_seed
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.num_workers = num_workers

    @abstractmethod
    def setup(self, stage: str) -> None:
        """Set `train_data`, `val_data` and `test_data`."""

    def sampler(self) -> EpochSampler:
        """What decides the order of the training data: the seed and the epoch.

        Returns:
            A sampler over the training examples, for this process of the trainer.
        """
        ranks = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return EpochSampler(len(cast(Sized, self.train_data)), self.seed, self.draws, *ranks)

    def _loader(self, data: Dataset[Any], sampler: EpochSampler | None = None) -> DataLoader[Any]:
        drop_last = sampler is not None and len(sampler) > self.batch_size
        return DataLoader(
            data,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            drop_last=drop_last,
            collate_fn=self.collate,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches (x, y) of the training part.

        Returns:
            The loader.
        """
        return self._loader(self.train_data, self.sampler())

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches (x, y) of the validation part, in order.

        Returns:
            The loader.
        """
        return self._loader(self.val_data)

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches (x, y) of the test part, in order.

        Returns:
            The loader.
        """
        return self._loader(self.test_data)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The same batches as `test_dataloader`.

        Returns:
            The loader.
        """
        return self.test_dataloader()


class _ScikitData(SplitData):
    """A data set of scikit-learn, standardised with mean and deviation of its training part."""

    def _tensors(self, x: Tensor, y: Tensor, standardise_over: Sequence[int]) -> None:
        split = split_indices(y, self.val_fraction, self.test_fraction, self.split_seed)
        x = standardise(x, split.train, standardise_over)
        if y.is_floating_point():
            y = standardise(y, split.train, (0,))
        self.train_data, self.val_data, self.test_data = (TensorDataset(x[part], y[part]) for part in split)


class DigitsData(_ScikitData):
    """1,797 handwritten digits of 8 x 8 pixels: images [1, 8, 8], classes 0 to 9, split by class.

    Pixels are divided by one mean and one deviation for all of them, as is usual for images.

    Args:
        batch_size: see `SplitData`, as the others.
        seed: order of the training batches.
        split_seed: cut into the three parts.
        val_fraction: part for validation.
        test_fraction: part for testing.
        num_workers: loader processes.
        classes: digits to keep, at least two; they become the classes 0, 1, ... in this order. None: all ten.

    Raises:
        ConfigError: for fewer than two classes, one named twice, or one that is not a digit.
    """

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        num_workers: int = 0,
        classes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(batch_size, seed, split_seed, val_fraction, test_fraction, num_workers)
        self.classes = list(range(10)) if classes is None else list(classes)
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes) or set(self.classes) - set(range(10)):
            raise ConfigError("classes", classes, "not two or more different digits", "Choose among 0 ... 9.")

    def setup(self, stage: str) -> None:
        """Load, cut and standardise; the same for every stage.

        Args:
            stage: what Lightning is about to do; not used.
        """
        x, y = _load_scikit("digits")
        label = torch.full((10,), -1)
        label[self.classes] = torch.arange(len(self.classes))
        kept = label[y] >= 0
        self._tensors(x[kept].unflatten(1, (1, 8, 8)), label[y[kept]], (0, 1, 2, 3))


class TabularData(_ScikitData):
    """Wine (13 features, 3 classes), breast cancer (30 features, 2 classes) or diabetes (10, regression).

    Each feature is standardised, and the target of a regression too. Classes are split evenly.

    Args:
        name: "wine", "breast_cancer" or "diabetes".
        batch_size: see `SplitData`, as the others.
        seed: order of the training batches.
        split_seed: cut into the three parts.
        val_fraction: part for validation.
        test_fraction: part for testing.
        num_workers: loader processes.

    Raises:
        ConfigError: for an unknown name.
    """

    def __init__(
        self,
        name: TabularName,
        batch_size: int = 32,
        seed: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, split_seed, val_fraction, test_fraction, num_workers)
        if name not in get_args(TabularName):
            raise ConfigError("name", name, "no such table", f"Use one of {', '.join(get_args(TabularName))}.")
        self.table = name

    def setup(self, stage: str) -> None:
        """Load, cut and standardise; the same for every stage.

        Args:
            stage: what Lightning is about to do; not used.
        """
        self._tensors(*_load_scikit(self.table), (0,))


def split_indices(targets: Tensor, val_fraction: float, test_fraction: float, seed: int) -> Split:
    """Cut into three disjoint parts; integer targets (classes) get equal shares in each part.

    Args:
        targets: one target an example, shape [n]; int64 classes or floating point values.
        val_fraction: part for validation.
        test_fraction: part for testing.
        seed: seed of the cut.

    Returns:
        Indices of the three parts, int64, together a permutation of 0 ... n - 1.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(targets)
    # Every example gets its place within its class, in [0, 1): the same cuts then fit every class.
    groups = torch.zeros(n, dtype=torch.int64) if targets.is_floating_point() else targets
    place = torch.empty(n)
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        place[members] = (order + 0.5) / len(members)
    in_val = place < val_fraction
    in_test = ~in_val & (place < val_fraction + test_fraction)
    return Split(*(mask.nonzero().flatten() for mask in (~in_val & ~in_test, in_val, in_test)))


def standardise(x: Tensor, train: Tensor, dims: Sequence[int]) -> Tensor:
    """(x - mean) / deviation, both of the training part.

    Args:
        x: examples, shape [n, ...].
        train: indices of the training part.
        dims: dimensions that share one mean and one deviation; 0 is among them.

    Returns:
        Shape of `x`; constant features become 0.
    """
    deviation, mean = torch.std_mean(x[train], dim=tuple(dims), keepdim=True)
    return (x - mean) / torch.where(deviation > 0, deviation, 1.0)


def _load_scikit(name: str) -> tuple[Tensor, Tensor]:
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ConfigError(
            "data", name, "needs scikit-learn", "Install it: pip install 'eafo-dynamic[examples]'."
        ) from error
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    targets = torch.from_numpy(y)
    return torch.from_numpy(x).float(), targets.float() if name == "diabetes" else targets.long()
