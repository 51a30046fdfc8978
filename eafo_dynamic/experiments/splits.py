"""Data in memory, cut into a training, a validation and a test part, with a loader for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sized
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.sampling import EpochSampler

__all__ = ["Split", "SplitData", "split_indices"]


class Split(NamedTuple):
    """Indices of the three disjoint parts of a data set."""

    train: Tensor
    val: Tensor
    test: Tensor


def split_indices(targets: Tensor, val_fraction: float, test_fraction: float, seed: int) -> Split:
    """Cuts a data set into three disjoint parts; each class has the same share in every part.

    Args:
        targets: one target per example, shape [n]; classes as int64, or floating-point values.
        val_fraction: fraction of the examples for validation.
        test_fraction: fraction of the examples for testing.
        seed: seed of the cut.

    Returns:
        Indices of the three parts, int64, together a permutation of 0 ... n - 1.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = targets
    if targets.is_floating_point():
        groups = torch.zeros(len(targets), dtype=torch.int64)
    # Each example gets a random place in [0, 1) within its class, so that the same two cuts fit every class.
    place = torch.empty(len(targets))
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        place[members] = (order + 0.5) / len(members)
    in_val = place < val_fraction
    in_test = ~in_val & (place < val_fraction + test_fraction)
    in_train = ~in_val & ~in_test
    return Split(
        train=in_train.nonzero().flatten(),
        val=in_val.nonzero().flatten(),
        test=in_test.nonzero().flatten(),
    )


class SplitData(LightningDataModule, ABC):
    """Three data sets in memory and their loaders. Subclasses fill the three in `setup`.

    Args:
        batch_size: examples per batch. The last, smaller batch of a training epoch is left out.
        seed: seed of the order of the training batches; see `EpochSampler`.
        split_seed: seed of the cut into training, validation and test part.
        val_fraction: fraction of the data for validation.
        test_fraction: fraction of the data for testing.
        num_workers: loader processes. The data is in memory: 0 is fastest.

    Raises:
        ConfigError: for a batch size below 1 or fractions that leave a part empty.
    """

    train_data: Dataset[Any]
    val_data: Dataset[Any]
    test_data: Dataset[Any]
    draws: int | None = None
    """Number of examples in a training epoch, drawn with replacement; None: every example once."""
    own_test: bool = False
    """Whether the data comes with a test part, so that none is cut from it."""
    collate: Callable[[list[Any]], Any] | None = None
    """Makes a batch of a list of examples; None: torch's default."""

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
        fractions = {"val_fraction": val_fraction}
        if not self.own_test:
            fractions["test_fraction"] = test_fraction
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
        """The order of the training data, a function of the seed and the epoch.

        Returns:
            A sampler over the training examples, for this process of the trainer.
        """
        replicas = 1
        rank = 0
        if self.trainer is not None:
            replicas = self.trainer.world_size
            rank = self.trainer.global_rank
        examples = len(cast(Sized, self.train_data))
        return EpochSampler(examples, self.seed, self.draws, replicas, rank)

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
