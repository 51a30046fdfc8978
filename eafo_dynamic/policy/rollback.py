"""The training loss between rounds, and whether a round has made it jump."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["LossWatch"]


class LossWatch:
    """Mean training loss between rounds, without a transfer to the host before somebody asks.

    Args:
        factor: a round is bad if the mean loss after it exceeds the mean before it by more than (factor - 1) times
            the latter's size: for losses above zero, if it is more than factor times as large.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self._sum: Tensor | float = 0.0
        self._count = 0
        self._before: float | None = None
        self._blamed = False

    def observe(self, loss: Tensor) -> None:
        """Adds the loss of a batch.

        Args:
            loss: a single number; anything else is left out.
        """
        if loss.numel() == 1:
            # a sum in half precision stops growing after a few hundred losses
            self._sum = self._sum + loss.detach().to(torch.float32).reshape(())
            self._count += 1

    @property
    def has_any(self) -> bool:
        """Whether a loss has come since ``drain``."""
        return self._count > 0

    def state_dict(self) -> dict[str, Any]:
        """What all ranks agree on; primitives only.

        Returns:
            The state.
        """
        return {"before": self._before, "blamed": self._blamed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state.

        Args:
            state: from ``state_dict``.
        """
        self._before = None
        if state["before"] is not None:
            self._before = float(state["before"])
        self._blamed = bool(state["blamed"])

    def own_state(self) -> dict[str, Any]:
        """What this rank has seen since the last round; a tensor on the CPU and primitives only.

        Returns:
            The state.
        """
        return {"sum": self._total().cpu(), "count": self._count}

    def load_own_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restores what one rank, or several, had seen.

        Args:
            states: from ``own_state``.
        """
        self._sum = sum((float(state["sum"]) for state in states), 0.0)
        self._count = sum(int(state["count"]) for state in states)

    def _total(self) -> Tensor:
        if isinstance(self._sum, Tensor):
            return self._sum
        return torch.tensor(self._sum, dtype=torch.float32, device="cpu")

    def drain(self) -> Tensor:
        """Hands out the losses since the last call and forgets them.

        Returns:
            Their sum and their number, float32, shape [2].
        """
        total = self._total()
        both = torch.stack([total, torch.full_like(total, float(self._count))])
        self._sum = 0.0
        self._count = 0
        return both

    def jumped(self, losses: Tensor | None = None) -> bool:
        """Whether the losses since the last call are worse than those before it by more than the factor.

        Losses that are not finite always are a jump. Other losses that stay high after the round has been undone had
        another cause: they are the new level.

        Args:
            losses: sum and number over all ranks, so that they come to the same decision; None: what ``drain`` gives.

        Returns:
            Whether the last round should be undone.
        """
        if self.factor is None:
            return False
        if losses is None:
            losses = self.drain()
        total, count = losses.tolist()
        if not count:
            return False
        mean = total / count
        if not math.isfinite(mean):
            self._blamed = True
            return True
        jump = self._before is not None and mean > self._before + (self.factor - 1) * abs(self._before)
        if jump and not self._blamed:
            self._blamed = True
            return True
        self._before = mean
        self._blamed = False
        return False
