"""The estimate of every site's density, which follows training from round to round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eafo_dynamic.density.estimators import ESTIMATORS, KINDS, Density, Estimator, Gaussian, gaussian
from eafo_dynamic.density.sample_moments import SampleMoments
from eafo_dynamic.internals.checks import fitting

__all__ = ["RunningDensity"]


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

    def follow(self, samples: Tensor, usable: Tensor, stats: SampleMoments | None = None) -> Density:
        """Updates the estimate with the samples of one round.

        Args:
            samples: pre-activations, shape [S, n], NaN where missing.
            usable: sites whose samples may count, shape [S], bool.
            stats: moments of the samples, where they are known already.

        Returns:
            The estimate after it.
        """
        if stats is not None and self.estimator is gaussian:
            fresh = Gaussian(stats.mean, stats.std, stats.n)
        else:
            fresh = self.estimator(samples)
        if self.density is None or self.rounds is None:
            self.density = fresh
            self.rounds = usable.to(torch.long)
        else:
            self.rounds = self.rounds + usable
            weight = self.rounds.clamp(min=1).to(torch.float32).reciprocal().clamp(min=self.momentum)
            self.density = self.density.blend(fresh, torch.where(usable, weight, 0.0))
        return self.density

    def grow(self, count: int) -> None:
        """Takes in sites, of which nothing is known, behind those that there are.

        A density of the user's own kind, whose parts cannot be known, begins anew for all sites.

        Args:
            count: number of sites that are new.
        """
        if self.density is None or self.rounds is None:
            return
        kind = type(self.density)
        if kind.__name__ not in KINDS:
            self.density = self.rounds = None
            return
        self.rounds = torch.cat([self.rounds, self.rounds.new_zeros(count)])
        fresh = vars(self.estimator(torch.full((count, 2), torch.nan, device=self.rounds.device)))
        tensors = {name: value for name, value in vars(self.density).items() if isinstance(value, Tensor)}
        self.density = kind(**{name: torch.cat([value, fresh[name].to(value)]) for name, value in tensors.items()})

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only.

        Returns:
            The state; the density only where it is one of this package's own kinds.
        """
        kind = type(self.density).__name__
        tensors = None
        if kind in KINDS:
            tensors = {name: value for name, value in vars(self.density).items() if isinstance(value, Tensor)}
        return {"rounds": self.rounds, "kind": kind, "density": tensors}

    def load_state_dict(self, state: Mapping[str, Any], like: Tensor) -> None:
        """Restores a state.

        Args:
            state: from ``state_dict``.
            like: a tensor of shape [S] on the device of the sites.
        """
        if state["density"] is None:
            self.rounds = self.density = None
            return
        self.rounds = fitting(state["rounds"], like.to(torch.long))
        kind = KINDS[state["kind"]]
        own = vars(ESTIMATORS[state["kind"].lower()](torch.zeros(len(like), 2, device=like.device)))
        self.density = kind(**{name: fitting(value, own[name]) for name, value in state["density"].items()})
