"""Everything that can be set about the corrections of one model, checked at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from torch import Tensor, nn

from eafo_dynamic.correction.kernels import Backend, check_backend, resolve_backend
from eafo_dynamic.density.estimators import Density
from eafo_dynamic.density.running import make_estimator
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.find.sites import Selection
from eafo_dynamic.internals.checks import at_least, flag, number
from eafo_dynamic.policy.policies import Policy, Rule, Static, make_rules
from eafo_dynamic.policy.schedule import Schedule
from eafo_dynamic.policy.trust_region import TrustRegion

__all__ = ["Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that can be set about the corrections of one model; all checked at once when it is made.

    Args:
        target_modules: class names, ends of FQNs or regular expressions of the sites to wrap; None: every hidden
            one.
        exclude_modules: likewise, of the sites to leave alone.
        filter_fn: called with (module, FQN); False leaves the site alone.
        functional: what to do with activations called as functions: "wrap", "warn" (leave alone, say so) or "off".
        policy: who moves eps: a name, a Policy, or a list of Rules by site of which the first match decides.
        density: estimate of the pre-activations' density: "gaussian", "histogram" or a function of samples.
        terms: "tied": one amplitude eps for both terms of the correction, in the proportion that base and density
            give; "free": an amplitude each, (eps u + lift) exp(-u^2 / 2), with lift from 0, which needs the Gaussian
            density and no compounding; "auto": free where that can be, and tied with the policy "static", which then
            is the paper's function on any base.
        eps_init: starting amplitude.
        max_eps: bound of |eps| and |lift|.
        max_delta: bound of max |c_new - c_old| / sigma at one update round.
        update_every_n_steps: optimiser steps, of all optimisers, between update rounds; the first ones come at steps
            1, 2, 4, 8, ...
        update_starting_at_step: first step with a round.
        freeze_at_step: from this step on everything stays; None: never.
        collect_every_n_steps: optimiser steps between sampled steps; None: at most five a round.
        samples_per_site: pre-activations a site contributes to a round, over all ranks.
        momentum: weight of a new round in the running estimate of the density, in (0, 1].
        per_channel: one amplitude a channel in place of one a site; the log then shows their mean.
        compounding: each round settles the correction so far and corrects the corrected function, in place of
            refreshing the correction of the base.
        resolution: r of the resolution-r entropy, in standard deviations of the output.
        backend: what computes activations: "native", compiled from C on this machine, on a CPU; "triton", on CUDA;
            "eager", torch's operations; "auto", native and triton where they can be had.
        rollback_factor: undo a round after which the mean training loss is larger than before it by more than this
            factor; None: never. Needs the losses, see ``EAFOController.observe_loss``.
    """

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    filter_fn: Callable[[nn.Module, str], bool] | None = None
    functional: str = "wrap"
    policy: str | Policy | Sequence[Rule] = "learned"
    density: str | Callable[[Tensor], Density] = "gaussian"
    terms: str = "auto"
    eps_init: float = 0.01
    max_eps: float = 1.0
    max_delta: float = 0.5
    update_every_n_steps: int = 50
    update_starting_at_step: int = 0
    freeze_at_step: int | None = None
    collect_every_n_steps: int | None = None
    samples_per_site: int = 4096
    momentum: float = 0.5
    per_channel: bool = False
    compounding: bool = False
    resolution: float = 0.1
    backend: Backend = "auto"
    rollback_factor: float | None = None

    def __post_init__(self) -> None:
        _check_patterns("target_modules", self.target_modules)
        _check_patterns("exclude_modules", self.exclude_modules)
        if self.filter_fn is not None and not callable(self.filter_fn):
            mend = "Give a function of (module, FQN) that says whether to wrap."
            raise ConfigError("filter_fn", self.filter_fn, "not a function", mend)
        for option in ("per_channel", "compounding"):
            object.__setattr__(self, option, flag(option, getattr(self, option)))
        if check_backend(self.backend) in ("native", "triton"):
            resolve_backend(self.backend)  # an error where there is no compiler, or no GPU
        _ = (self.selection, self.schedule, make_rules(self.policy), make_estimator(self.density))
        self._check_terms()
        self.trust_region.check_start(self.eps_init)
        if self.compounding and abs(self.eps_init) > self.max_eps / 2:
            # what has been settled may take one half of max_eps, the amplitude on top of it the other
            problem = f"with compounding, eps has half of max_eps={self.max_eps} to move in"
            raise ConfigError("eps_init", self.eps_init, problem, "Choose a smaller eps_init or a larger max_eps.")
        at_least("samples_per_site", self.samples_per_site, 16)
        if not 0.0 < number("momentum", self.momentum) <= 1.0:
            raise ConfigError("momentum", self.momentum, "must lie in (0, 1]", "1 forgets all earlier rounds.")
        if not 0.001 <= number("resolution", self.resolution) <= 1.0:
            raise ConfigError("resolution", self.resolution, "must lie in [0.001, 1]", "The default is 0.1.")
        if self.rollback_factor is not None and not number("rollback_factor", self.rollback_factor) > 1.0:
            raise ConfigError("rollback_factor", self.rollback_factor, "must be above 1", "Try 1.5.")

    def _check_terms(self) -> None:
        if self.terms not in ("auto", "tied", "free"):
            raise ConfigError("terms", self.terms, "unknown", "Choose 'auto', 'tied' or 'free'.")
        if self.terms == "free" and self.tabulated:
            problem = "an amplitude for each term needs density='gaussian' and no compounding"
            raise ConfigError("terms", self.terms, problem, "Leave those at their defaults, or use terms='auto'.")

    @property
    def selection(self) -> Selection:
        """The options that say which sites."""
        return Selection(self.target_modules, self.exclude_modules, self.filter_fn, self.functional)

    @property
    def schedule(self) -> Schedule:
        """The options that say when."""
        return Schedule(
            self.update_every_n_steps,
            self.update_starting_at_step,
            self.freeze_at_step,
            self.collect_every_n_steps,
        )

    @property
    def trust_region(self) -> TrustRegion:
        """The options that say how far."""
        return TrustRegion(self.max_eps, self.max_delta)

    @property
    def tabulated(self) -> bool:
        """Whether every shape is a table: only the Gaussian density has a closed form."""
        return self.density != "gaussian" or self.compounding

    @property
    def free(self) -> bool:
        """Whether the two terms of a correction have an amplitude each."""
        if self.terms != "auto":
            return self.terms == "free"
        static = any(isinstance(rule.policy, Static) for rule in make_rules(self.policy))
        return not self.tabulated and not static

    @property
    def form(self) -> dict[str, bool]:
        """The options that say what a site's function is made of, as ``wrap`` takes them."""
        return {
            "tabulated": self.tabulated,
            "per_channel": self.per_channel,
            "compounding": self.compounding,
            "free": self.free,
        }

    def primitives(self) -> dict[str, object]:
        """The options as text and numbers, for the manifest.

        Returns:
            One entry an option.
        """
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _check_patterns(option: str, patterns: str | Sequence[str] | None) -> None:
    several = [] if patterns is None or isinstance(patterns, str) else patterns
    if not isinstance(several, Sequence) or not all(isinstance(each, str) for each in several):
        raise ConfigError(option, patterns, "neither a pattern nor a list of patterns", "Give text, such as 'ReLU'.")


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # JSON has no infinity
    if value is None or isinstance(value, (str, int, float)):
        return value
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else repr(value)
