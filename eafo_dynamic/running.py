"""What runs along from round to round: the estimate of every site's density, and the training loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eafo_dynamic.checks import fitting
from eafo_dynamic.density import Density, Gaussian, Histogram, gaussian, histogram
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.statistics import Moments

__all__ = ["LossWatch", "RunningDensity", "make_estimator"]

Estimator = Callable[[Tensor], Density]

_KINDS: dict[str, type[Any]] = {"Gaussian": Gaussian, "Histogram": Histogram}
_ESTIMATORS: dict[str, Estimator] = {"gaussian": gaussian, "histogram": histogram}


def make_estimator(density: str | Estimator) -> Estimator:
    """A density estimator from its name, or the estimator itself.

    Args:
        density: "gaussian", "histogram", or a function from samples [sites, n] to a Density.

    Returns:
        The estimator.

    Raises:
        ConfigError: if there is none of that name.
    """
    if isinstance(density, str) and density in _ESTIMATORS:
        return _ESTIMATORS[density]
    if isinstance(density, str) or not callable(density):
        mend = f"Choose one of {', '.join(_ESTIMATORS)}, or give a function from samples to a Density."
        raise ConfigError("density", density, "no such density", mend)
    return density


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
        """Takes in the loss of one batch.

        Args:
            loss: 0-dim.
        """
        if self.factor is not None:
            # a sum in half precision stops growing after a few hundred losses
            self._sum = self._sum + loss.detach().to(torch.float32)
            self._count += 1

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
        before = state["before"]
        self._before, self._blamed = None if before is None else float(before), bool(state["blamed"])

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
        total = self._sum
        return total if isinstance(total, Tensor) else torch.tensor(total, dtype=torch.float32, device="cpu")

    def drain(self) -> Tensor:
        """Hands out the losses since the last call and forgets them.

        Returns:
            Their sum and their number, float32, shape [2].
        """
        total = self._total()
        both = torch.stack([total, torch.full_like(total, float(self._count))])
        self._sum, self._count = 0.0, 0
        return both

    def jumped(self, losses: Tensor | None = None) -> bool:
        """Whether the losses since the last call are worse than those before it by more than the factor.

        Losses that are not finite are a jump always. Other losses that stay high after a jump, when the round has
        been undone, had another cause: they are the new level.

        Args:
            losses: sum and number over all ranks, which so come to the same decision; None: what ``drain`` gives here.

        Returns:
            Whether the last round should be undone.
        """
        if self.factor is None:
            return False
        total, count = (self.drain() if losses is None else losses).tolist()
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
        self._before, self._blamed = mean, False
        return False


class RunningDensity:
    """Estimate of every site's density that follows training.

    A plain mean over a site's first rounds, then an exponential average: the weight of a new round is
    max(1 / rounds, momentum), so that there is no bias towards a starting value.

    Args:
        estimator: from samples [S, n] to a Density.
        momentum: weight of a new round in the long run, in (0, 1].
    """

    def __init__(self, estimator: Estimator, momentum: float) -> None:
        self.estimator = estimator
        self.momentum = momentum
        self.density: Density | None = None
        self.rounds: Tensor | None = None

    def follow(self, samples: Tensor, usable: Tensor, stats: Moments | None = None) -> Density:
        """Takes in the samples of one round.

        Args:
            samples: pre-activations, shape [S, n], NaN where missing.
            usable: sites whose samples may count, shape [S], bool.
            stats: moments of the samples, if somebody has them already.

        Returns:
            The estimate after it.
        """
        if stats is not None and self.estimator is gaussian:
            fresh = Gaussian(stats.mean, stats.std, stats.n)
        else:
            fresh = self.estimator(samples)
        if self.density is None or self.rounds is None:
            self.density, self.rounds = fresh, usable.to(torch.long)
        else:
            self.rounds = self.rounds + usable
            weight = self.rounds.clamp(min=1).to(torch.float32).reciprocal().clamp(min=self.momentum)
            self.density = self.density.blend(fresh, torch.where(usable, weight, 0.0))
        return self.density

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only.

        Returns:
            The state; the density only where it is one of this package's own kinds.
        """
        kind = type(self.density).__name__
        tensors = {k: v for k, v in vars(self.density).items() if isinstance(v, Tensor)} if kind in _KINDS else None
        return {"rounds": self.rounds, "kind": kind, "density": tensors}

    def load_state_dict(self, state: Mapping[str, Any], like: Tensor) -> None:
        """Restores a state.

        Args:
            state: from ``state_dict``.
            like: any numbers of the sites, shape [S], where they live.
        """
        if state["density"] is None:
            self.rounds = self.density = None
            return
        self.rounds = fitting(state["rounds"], like.to(torch.long))
        kind = _KINDS[state["kind"]]
        own = vars(_ESTIMATORS[state["kind"].lower()](torch.zeros(len(like), 2, device=like.device)))
        self.density = kind(**{name: fitting(value, own[name]) for name, value in state["density"].items()})
