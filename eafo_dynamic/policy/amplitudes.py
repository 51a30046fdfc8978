"""The amplitudes of all sites under their policies: whose gradients reach the optimiser, and where rounds move them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.bank import Bank
from eafo_dynamic.errors import ConfigError, PatternError
from eafo_dynamic.find.sites import FoundSite, matches
from eafo_dynamic.policy.policies import Policy, Rule, make_policy, make_rules

__all__ = ["Amplitudes", "assigned"]


def assigned(policy: str | Policy | Sequence[Rule], found: Sequence[FoundSite]) -> list[Policy]:
    """The policy of every site.

    Args:
        policy: one for all, or rules of which the first match decides.
        found: the sites that are wrapped.

    Returns:
        One policy per site.

    Raises:
        PatternError: if a rule matches no site.
        ConfigError: if a site matches no rule.
    """
    rules = make_rules(policy)
    for rule in rules:
        if found and not any(matches(rule.sites, site) for site in found):
            raise PatternError("policy.sites", rule.sites, [site.module for site in found])
    return [_first_match(rules, site) for site in found]


def _first_match(rules: Sequence[Rule], site: FoundSite) -> Policy:
    for rule in rules:
        if matches(rule.sites, site):
            return make_policy(rule.policy)
    raise ConfigError("policy", site.name, "matches none of the rules", "End the list with sites: '.*'.")


class Amplitudes:
    """The amplitudes of all sites, term by term, each with the policy of its site.

    Args:
        bank: the sites; those whose policy leaves eps to the loss become trainable, the others fixed.
        policies: one per site.

    Attributes:
        follows: sites whose shape follows their data, shape [S], bool.
        adds_gradient: whether the entropy gradient of some site is added to its eps.grad.
    """

    def __init__(self, bank: Bank, policies: Sequence[Policy]) -> None:
        self._bank = bank
        self._policies = list(policies)
        self.follows = torch.tensor([policy.follows_data for policy in policies], device="cpu")
        self.adds_gradient = any(policy.adds_gradient for policy in policies)
        self._trains_all = all(policy.trains_eps for policy in policies)
        self._rows: dict[Policy, list[int]] = {}
        for row, policy in enumerate(policies):
            self._rows.setdefault(policy, []).append(row)
        for amplitude, policy in self._pairs():
            amplitude.requires_grad_(policy.trains_eps)

    def _pairs(self) -> list[tuple[nn.Parameter, Policy]]:
        amplitudes = self._bank.amplitudes
        return list(zip(amplitudes, self._policies * (len(amplitudes) // len(self._policies)), strict=True))

    @property
    def trained(self) -> list[nn.Parameter]:
        """The amplitudes that the loss trains, or will train where the user has frozen their layer for a while."""
        return [amplitude for amplitude, policy in self._pairs() if policy.trains_eps]

    def before_step(self, frozen: bool, gradient: Tensor | None, optimizer: torch.optim.Optimizer | None) -> None:
        """Adds weight * dH_r/d amplitude to the gradients that the optimiser is about to use, or drops them.

        Where C channels have an amplitude each, dH_r/d amplitude is that of their common amplitude, and each gets its
        share of it, 1 / C: moving all by the same step changes H_r by that step times the sum.

        Args:
            frozen: whether nothing may move any more.
            gradient: dH_r/d amplitude, shape [terms, S]; None before the first round.
            optimizer: the one that is about to step; None: all.
        """
        if not frozen and self._trains_all and not self.adds_gradient:
            return  # as nearly always: there is nothing to look for
        for amplitude, policy in self._pairs():
            if frozen or not policy.trains_eps:  # who unfreezes a model's layers makes every eps trainable as well
                amplitude.grad = None
        if not frozen and self.adds_gradient and gradient is not None:
            self._add(gradient, optimizer)

    def _add(self, gradient: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Adds weight * dH_r/d amplitude where a policy asks for it and this optimiser is the one that steps."""
        stepped: set[int] = set()
        if optimizer is not None:
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for (amplitude, policy), slope in zip(self._pairs(), gradient.flatten(), strict=True):
            is_stepped = optimizer is None or id(amplitude) in stepped  # several optimisers would each add it
            if not policy.adds_gradient or not is_stepped or not amplitude.requires_grad:
                continue
            share = policy.adds_gradient * slope / amplitude.numel()
            added = share.to(amplitude.dtype).expand(amplitude.shape).clone()
            if amplitude.grad is not None:
                added += amplitude.grad
            amplitude.grad = added

    def moved(self, amplitudes: Tensor, gradient: Tensor) -> Tensor:
        """Where the policies want amplitudes to be.

        Args:
            amplitudes: one row a term, shape [T, S].
            gradient: of H_r by them, shape [T, S].

        Returns:
            Shape [T, S].
        """
        moved = amplitudes.clone()
        for term, (before, by_amplitude) in enumerate(zip(amplitudes, gradient, strict=True)):
            for policy, rows in self._rows.items():
                moved[term, rows] = policy.move(before[rows], by_amplitude[rows])
        return moved
