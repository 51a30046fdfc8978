"""A network that ends the process that trains it, the first time."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from eafo_dynamic.experiments import MLP


class Mortal(MLP):
    """Ends its process in the fifth forward of a training, unless `mark` is there; then it is an MLP."""

    def __init__(self, mark: str, in_features: int, out_features: int, activation: str = "relu") -> None:
        super().__init__(in_features, out_features, activation=activation)
        self.mark = Path(mark)
        self.calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 5 and not self.mark.exists():
            self.mark.write_text(str(os.getpid()))
            os._exit(9)
        return super().forward(input)
