"""Who moves eps: policies, and rules that give sites different ones (Theory, section 5)."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.internals.checks import flag, number, pattern

__all__ = [
    "Entropy",
    "Frozen",
    "Hybrid",
    "Learned",
    "Observe",
    "Policy",
    "Rule",
    "Static",
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

    def move(self, eps: Tensor, gradient: Tensor) -> Tensor:
        """Eps after an update round, before the trust region bounds it; by default the optimiser's alone.

        Args:
            eps: amplitudes before, shape [sites], no unit.
            gradient: dH_r/d eps, nats, shape [sites]; finite.

        Returns:
            Amplitudes after, shape [sites].
        """
        return eps


@final
@dataclass(frozen=True)
class Static(Policy):
    """The paper's CRReLU: mu = 0 and sigma = 1 for good, eps learned by the task loss."""

    name = "static"
    follows_data = False


@final
@dataclass(frozen=True)
class Learned(Policy):
    """The shape follows the data, eps is learned by the task loss."""

    name = "learned"


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
        ConfigError: if the rate is not positive, or ascent neither True nor False.

    Example:
        >>> Entropy(rate=0.02).move(torch.tensor([0.1]), torch.tensor([1.0]))
        tensor([0.0900])
    """

    rate: float = 0.02
    ascent: bool = False

    name = "entropy"
    trains_eps = False

    def __post_init__(self) -> None:
        if not 0 < number("rate", self.rate) < math.inf:
            problem = "the step along the entropy gradient must be positive and finite"
            raise ConfigError("rate", self.rate, problem, "Try 0.02.")
        flag("ascent", self.ascent)

    def move(self, eps: Tensor, gradient: Tensor) -> Tensor:
        """Takes the damped step.

        Returns:
            Amplitudes after the step.
        """
        step = self.rate * gradient / (1.0 + gradient.abs())
        if self.ascent:
            return eps + step
        return eps - step


@final
@dataclass(frozen=True)
class Hybrid(Policy):
    """As ``learned``, with weight * dH_r/d eps added to eps.grad: the loss plus weight times the site's entropy.

    dH_r/d eps is estimated at an update round, for the functions that the round leaves, and added at every step until
    the next one. With ``per_channel`` each of a site's C channels gets its share, weight / C * dH_r/d eps: H_r is then
    a function of the channels' mean amplitude.

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


@final
@dataclass(frozen=True)
class Frozen(Policy):
    """Eps and shape stay as they are."""

    name = "frozen"
    follows_data = False
    trains_eps = False


@final
@dataclass(frozen=True)
class Observe(Policy):
    """Watches without changing: outputs are those of the plain model bit for bit, and no parameter is added.

    For all sites of a model or for none. mu and sigma follow the data and act on nothing.
    """

    name = "observe"
    trains_eps = False


@dataclass(frozen=True)
class Rule:
    """One line of a list of policies by site; the first rule that matches a site decides.

    Args:
        sites: pattern, as in ``target_modules``.
        policy: name of a policy, or a Policy.

    Raises:
        ConfigError: if the pattern is no text or no valid regular expression, or there is no such policy.

    Example:
        >>> Rule("ReLU", "greedy")
        Traceback (most recent call last):
        eafo_dynamic.errors.ConfigError: policy='greedy': no such policy. Choose one of static, learned...
    """

    sites: str
    policy: str | Policy

    def __post_init__(self) -> None:
        pattern("sites", self.sites)
        make_policy(self.policy)


_POLICIES: dict[str, type[Policy]] = {p.name: p for p in (Static, Learned, Entropy, Hybrid, Frozen, Observe)}


def make_policy(policy: str | Policy) -> Policy:
    """A policy from its name, with its default options, or the policy itself.

    Args:
        policy: "static", "learned", "entropy", "hybrid", "frozen", "observe" or a Policy.

    Returns:
        The policy.

    Raises:
        ConfigError: if there is no policy of that name.

    Example:
        >>> make_policy("hybrid")
        Hybrid(weight=0.01)
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
