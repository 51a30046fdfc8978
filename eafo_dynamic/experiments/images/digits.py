"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.scikit import ScikitData, load_scikit

__all__ = ["DigitsData"]


class DigitsData(ScikitData):
    """1,797 handwritten digits of 8 x 8 pixels: images [1, 8, 8], classes 0 to 9 with the same share in every part.

    All pixels share one mean and one standard deviation, as is usual for images.

    Args:
        batch_size: see `SplitData`, as for the other arguments.
        seed: order of the training batches.
        split_seed: cut into the three parts.
        val_fraction: fraction for validation.
        test_fraction: fraction for testing.
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
        digits = range(10)
        self.classes = list(digits if classes is None else classes)
        different = set(self.classes)
        if len(different) < 2 or len(different) < len(self.classes) or not different.issubset(digits):
            raise ConfigError("classes", classes, "not two or more different digits", "Choose among 0 ... 9.")

    def setup(self, stage: str) -> None:
        """Loads, cuts and standardises the data; the same for every stage.

        Args:
            stage: what Lightning is about to do; not used.
        """
        x, y = load_scikit("digits")
        images = x.unflatten(1, (1, 8, 8))
        label_of_digit = torch.full((10,), -1)
        label_of_digit[self.classes] = torch.arange(len(self.classes))
        labels = label_of_digit[y]
        kept = labels >= 0
        self.fill_parts(images[kept], labels[kept], standardise_over=(0, 1, 2, 3))
