"""The small tables that come with scikit-learn."""

from __future__ import annotations

from typing import Literal, get_args

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.scikit import ScikitData, load_scikit

__all__ = ["TabularData", "TabularName"]

TabularName = Literal["wine", "breast_cancer", "diabetes"]


class TabularData(ScikitData):
    """Wine (13 features, 3 classes), breast cancer (30 features, 2 classes) or diabetes (10 features, regression).

    Each feature is standardised, and so is the target of the regression. Each class has the same share in every part.

    Args:
        name: "wine", "breast_cancer" or "diabetes".
        batch_size: see `SplitData`, as for the other arguments.
        seed: order of the training batches.
        split_seed: cut into the three parts.
        val_fraction: fraction for validation.
        test_fraction: fraction for testing.
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
        """Loads, cuts and standardises the data; the same for every stage.

        Args:
            stage: what Lightning is about to do; not used.
        """
        x, y = load_scikit(self.table)
        self.fill_parts(x, y, standardise_over=(0,))
