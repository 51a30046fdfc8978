"""Data sets that come with scikit-learn, standardised: nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.splits import SplitData, split_indices

__all__ = ["ScikitData", "load_scikit", "standardise"]


class ScikitData(SplitData):
    """A data set of scikit-learn, standardised by the mean and standard deviation of its training part."""

    def fill_parts(self, x: Tensor, y: Tensor, standardise_over: Sequence[int]) -> None:
        """Cuts and standardises the data, and sets `train_data`, `val_data` and `test_data`.

        Args:
            x: inputs, shape [n, ...].
            y: targets, shape [n]: classes as int64, or floating-point values, which are standardised too.
            standardise_over: dimensions of `x` that share one mean and one standard deviation; 0 is among them.
        """
        split = split_indices(y, self.val_fraction, self.test_fraction, self.split_seed)
        x = standardise(x, split.train, standardise_over)
        if y.is_floating_point():
            y = standardise(y, split.train, (0,))
        self.train_data = TensorDataset(x[split.train], y[split.train])
        self.val_data = TensorDataset(x[split.val], y[split.val])
        self.test_data = TensorDataset(x[split.test], y[split.test])


def standardise(x: Tensor, train: Tensor, dims: Sequence[int]) -> Tensor:
    """(x - mean) / deviation, with mean and standard deviation of the training part.

    Args:
        x: examples, shape [n, ...].
        train: indices of the training part.
        dims: dimensions that share one mean and one deviation; 0 is among them.

    Returns:
        Shape of `x`; features that are constant in the training part are 0 there.
    """
    deviation, mean = torch.std_mean(x[train], dim=tuple(dims), keepdim=True)
    return (x - mean) / torch.where(deviation > 0, deviation, 1.0)


def load_scikit(name: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets of `sklearn.datasets.load_<name>`.

    Args:
        name: "digits", "wine", "breast_cancer" or "diabetes".

    Returns:
        Inputs, float32, shape [n, features], and targets, shape [n]: int64 classes; float32 for "diabetes".

    Raises:
        ConfigError: without scikit-learn.
    """
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ConfigError(
            "data", name, "needs scikit-learn", "Install it: pip install 'eafo-dynamic[examples]'."
        ) from error
    load = getattr(datasets, f"load_{name}")
    x, y = load(return_X_y=True)
    inputs = torch.from_numpy(x).float()
    targets = torch.from_numpy(y)
    if name == "diabetes":
        return inputs, targets.float()
    return inputs, targets.long()
