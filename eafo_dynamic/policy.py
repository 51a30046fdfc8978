"""Who moves eps and when: policies, the schedule of update rounds, the trust region (Theory, section 5)."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from eafo_dynamic.errors import ConfigError

__all__ = [
    "Entropy",
    "Frozen",
    "Hybrid",
    "Learned",
    "Policy",
    "Rule",
    "Schedule",
    "Static",
    "TrustRegion",
    "make_policy",
    "make_rules",
]


class Policy(ABC):
    """Decides what moves a site's amplitude eps and whether its shape follows the data.

    Attributes:
        name: what the log and the configuration call it.
        follows_data: whether mu, sigma and the shape are refreshed from batch statistics at an update round.
        trains_eps: whether eps is a parameter of the optimiser.
        adds_gradient: weight of dH_r/d eps added to eps.grad before each optimiser step; 0 adds nothing.
    """

    name: ClassVar[str]
    follows_data: ClassVar[bool] = True
    trains_eps: ClassVar[bool] = True

    @property
    def adds_gradient(self) -> float:
        """Weight of the entropy gradient in eps.grad."""
        return 0.0

    @abstractmethod
    def move(self, eps: Tensor, gradient: Tensor) -> Tensor:
        """Eps after an update round, before the trust region bounds it.

        Args:
            eps: amplitudes before, shape [sites], no unit.
            gradient: dH_r/d eps, nats, shape [sites]; finite.

        Returns:
            Amplitudes after, shape [sites].
        """


@final
@dataclass(frozen=True)
class Static(Policy):
    """The paper's CRReLU: mu = 0 and sigma = 1 for good, eps learned by the task loss."""

    name = "static"
    follows_data = False

    def move(self, eps: Tensor, gradient: Tensor) -> Tensor:
        """Leaves eps to the optimiser.

        Returns:
            eps.
        """
        return eps


@final
@dataclass(frozen=True)
class Learned(Policy):
    """The shape follows the data, eps is learned by the task loss."""

    name = "learned"

    def move(self, eps: Tensor, gradient: Tensor) -> Tensor:
        """Leaves eps to the optimiser.

        Returns:
            eps.
        """
        return eps


@final
@dataclass(frozen=True)
class Entropy(Policy):
    """No gradient of the loss: eps takes a damped step along the entropy gradient at every update round.

        eps <- eps - rate * g / (1 + |g|),   g = dH_r/d eps

    so that one step is at most ``rate`` however steep the entropy is.

    Args:
        rate: largest step, no unit.
        ascent: climb instead of descend, for ablation.

    Raises:
        ConfigError: if the rate is not positive.
    """

    rate: float = 0.02
    ascent: bool = False

    name = "entropy"
    trains_eps = False

    def __post_init__(self) -> None:
        if not 0 < number("rate", self.rate) < math.inf:
            problem = "the step along the entropy gradient must be positive and finite"
            raise ConfigError("rate", self.rate, problem, "Try 0.02.")

    def move(self, eps: Tensor, gradient: Tensor) -> Tensor:
        """Takes the damped step.

        Returns:
            Amplitudes after the step.
        """
        step = self.rate * gradient / (1.0 + gradient.abs())
        return eps + step if self.ascent else eps - step


@final
@dataclass(frozen=True)
class Hybrid(Policy):
    """As ``learned``, with weight * dH_r/d eps added to eps.grad: the loss plus weight times the site's entropy.

    Args:
        weight: lambda, in units of the loss per nat; negative favours higher entropy.

    Raises:
        ConfigError: if the weight is not finite.
    """

    weight: float = 0.01

    name = "hybrid"

    def __post_init__(self) -> None:
        if not abs(number("weight", self.weight)) < math.inf:
            raise ConfigError("weight", self.weight, "the weight of the entropy must be finite", "Try 0.01.")

    @property
    def adds_gradient(self) -> float:
        """Weight of the entropy gradient in eps.grad."""
        return self.weight

    def move(self, eps: Tensor, gradient: Tensor) -> Tensor:
        """Leaves eps to the optimiser.

        Returns:
            eps.
        """
        return eps


@final
@dataclass(frozen=True)
class Frozen(Policy):
    """Eps and shape stay as they are."""

    name = "frozen"
    follows_data = False
    trains_eps = False

    def move(self, eps: Tensor, gradient: Tensor) -> Tensor:
        """Leaves eps alone.

        Returns:
            eps.
        """
        return eps


@dataclass(frozen=True)
class Rule:
    """One line of a list of policies by site; the first rule that matches a site decides.

    Args:
        sites: pattern, as in ``target_modules``.
        policy: name of a policy, or a Policy.
    """

    sites: str
    policy: str | Policy


_POLICIES: dict[str, type[Policy]] = {p.name: p for p in (Static, Learned, Entropy, Hybrid, Frozen)}


def make_policy(policy: str | Policy) -> Policy:
    """A policy from its name, with its default options, or the policy itself.

    Args:
        policy: "static", "learned", "entropy", "hybrid", "frozen" or a Policy.

    Returns:
        The policy.

    Raises:
        ConfigError: if there is no policy of that name.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str) or policy not in _POLICIES:
        raise ConfigError("policy", policy, "no such policy", f"Choose one of {', '.join(_POLICIES)}.")
    return _POLICIES[policy]()


def make_rules(policy: str | Policy | Sequence[Rule]) -> list[Rule]:
    """The rules that an option ``policy`` stands for, each with a Policy object.

    Args:
        policy: one policy for all sites, or rules.

    Returns:
        The rules, at least one.

    Raises:
        ConfigError: if there are none, or a name is unknown.
    """
    if isinstance(policy, (str, Policy)):
        return [Rule(".*", make_policy(policy))]
    mend = "Give one policy, or a list of rules with sites and policy."
    if not isinstance(policy, Sequence):
        raise ConfigError("policy", policy, "neither a policy nor a list of rules", mend)
    if not policy:
        raise ConfigError("policy", policy, "an empty list of rules", mend)
    for rule in policy:
        if not isinstance(rule, Rule):
            raise ConfigError("policy", rule, "not a rule", mend)
    return [Rule(rule.sites, make_policy(rule.policy)) for rule in policy]


@dataclass(frozen=True)
class Schedule:
    """When statistics are collected and when an update round runs, counted in optimiser steps.

    The first round runs after step max(1, update_starting_at_step), so that the log shows how training began and
    the shapes fit the data early; the next ones after every multiple of update_every_n_steps. Counted from the
    last such multiple, every ``collect_every_n_steps``-th step is sampled, and so is the step of every round.

    Args:
        update_every_n_steps: optimiser steps from one update round to the next.
        update_starting_at_step: first step after which a round may run.
        freeze_at_step: from this step on nothing is collected, updated or learned; None: never.
        collect_every_n_steps: optimiser steps from one sampled step to the next; None: at most five a round.

    Raises:
        ConfigError: if a number is out of range.
    """

    update_every_n_steps: int = 50
    update_starting_at_step: int = 0
    freeze_at_step: int | None = None
    collect_every_n_steps: int | None = None

    def __post_init__(self) -> None:
        at_least("update_every_n_steps", self.update_every_n_steps, 1)
        at_least("update_starting_at_step", self.update_starting_at_step, 0)
        if self.collect_every_n_steps is not None:
            at_least("collect_every_n_steps", self.collect_every_n_steps, 1)
            if self.collect_every_n_steps > self.update_every_n_steps:
                raise ConfigError(
                    "collect_every_n_steps",
                    self.collect_every_n_steps,
                    f"larger than update_every_n_steps={self.update_every_n_steps}: rounds would find no sample",
                    "Collect at least once per update.",
                )
        if self.freeze_at_step is not None:
            at_least("freeze_at_step", self.freeze_at_step, 0)

    @property
    def collect_period(self) -> int:
        """Optimiser steps from one sampled step to the next."""
        return self.collect_every_n_steps or math.ceil(self.update_every_n_steps / 5)

    @property
    def first_update(self) -> int:
        """The step after which the first round runs."""
        return max(1, self.update_starting_at_step)

    def updates(self, step: int) -> bool:
        """Whether an update round runs after this many optimiser steps.

        Args:
            step: optimiser steps taken so far.

        Returns:
            Whether it is time.
        """
        if step < self.first_update or self.frozen(step):
            return False
        return step == self.first_update or step % self.update_every_n_steps == 0

    def collects(self, step: int) -> bool:
        """Whether the batches of the coming step are sampled.

        Args:
            step: optimiser steps taken so far, so that the coming one is step + 1.

        Returns:
            Whether to collect.
        """
        coming = step + 1
        if coming < self.first_update or self.frozen(coming):
            return False
        return coming == self.first_update or coming % self.update_every_n_steps % self.collect_period == 0

    def frozen(self, step: int) -> bool:
        """Whether everything is frozen after this many optimiser steps.

        Args:
            step: optimiser steps taken so far.

        Returns:
            Whether it is.
        """
        return self.freeze_at_step is not None and step >= self.freeze_at_step


@dataclass(frozen=True)
class TrustRegion:
    """Bounds that keep a correction harmless (Theory, section 5).

    Args:
        max_eps: kappa, bound of |eps|; the slope of f stays within kappa of the base's, since |ghat'| <= 1.
        max_delta: bound of max over z of |c_new(z) - c_old(z)| / sigma at one update round.

    Raises:
        ConfigError: if a bound is not positive.
    """

    max_eps: float = 0.5
    max_delta: float = 0.1

    def __post_init__(self) -> None:
        for option in ("max_eps", "max_delta"):
            value = getattr(self, option)
            if not number(option, value) > 0:
                raise ConfigError(option, value, "a bound must be positive", "Leave it out for the default.")

    def check_start(self, eps: float) -> None:
        """Checks a starting value of eps.

        Args:
            eps: the option eps_init.

        Raises:
            ConfigError: if it lies outside the trust region.
        """
        if not abs(number("eps_init", eps)) <= self.max_eps:
            raise ConfigError(
                "eps_init",
                eps,
                f"outside the trust region |eps| <= max_eps={self.max_eps}",
                "Choose a smaller eps_init or a larger max_eps.",
            )

    def clamp(self, eps: Tensor) -> Tensor:
        """Eps brought back into the trust region.

        Args:
            eps: amplitudes, any shape.

        Returns:
            The amplitudes, none larger than max_eps in absolute value.
        """
        return eps.clamp(-self.max_eps, self.max_eps)

    def admissible(self, jumps: Tensor, fractions: Tensor) -> Tensor:
        """The largest tried fraction of a move whose jump is within bounds.

        Args:
            jumps: max |c_new - c_old| / sigma of each tried fraction, shape [fractions, sites].
            fractions: the fractions tried, shape [fractions], from large to small.

        Returns:
            The fraction to take, shape [sites]; 0 where even the smallest jumps too far or is not finite.
        """
        allowed = jumps <= self.max_delta  # false for NaN too
        first = allowed.to(torch.int8).argmax(0)
        return torch.where(allowed.any(0), fractions[first], 0.0)


def number(option: str, value: object) -> float:
    """Checks that an option is a number.

    Args:
        option: its name.
        value: what was given.

    Returns:
        The number; it may be infinite or NaN.

    Raises:
        ConfigError: if it is none.
    """
    if not isinstance(value, numbers.Real):
        raise ConfigError(option, value, "not a number", "Give a number.")
    return float(value)


def at_least(option: str, value: int, least: int) -> None:
    """Checks that an option is a whole number and large enough.

    Args:
        option: its name.
        value: what was given.
        least: smallest value allowed.

    Raises:
        ConfigError: if it is not.
    """
    if not isinstance(value, numbers.Integral) or value < least:
        raise ConfigError(option, value, f"must be at least {least}", f"Give a whole number of {least} or more.")
