"""Everything that can be set about the corrections of one model, each option defined once: ``Options``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from eafo_dynamic.apply.swaps import check_base
from eafo_dynamic.correction.kernels import Backend, check_backend, resolve_backend
from eafo_dynamic.correction.terms import LOCAL, TIED, local_terms, resolve_terms
from eafo_dynamic.density.estimators import Density, make_estimator
from eafo_dynamic.density.ranks import RankGroup
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.find.sites import Selection
from eafo_dynamic.internals.checks import at_least, flag, number
from eafo_dynamic.internals.declared import Check, Checked, option, options_class
from eafo_dynamic.policy.policies import Observe, Policy, Rule, Static, make_rules
from eafo_dynamic.policy.schedule import Schedule
from eafo_dynamic.policy.trust_region import TrustRegion

__all__ = ["HOW", "HOW_FAR", "MOVES", "SITES", "WHEN", "Options"]

# headings of the guide's page
SITES, MOVES, HOW_FAR = "Which sites", "What moves the corrections", "How far they may go"
WHEN, HOW = "When", "How it is computed"


def _patterns(name: str, value: object) -> object:
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, Sequence) or not all(isinstance(each, str) for each in several):
        raise ConfigError(name, value, "neither a pattern nor a list of patterns", "Give text, such as 'ReLU'.")
    return _selects(name, value)


def _selects(name: str, value: Any) -> object:
    Selection(**{name: value})
    return value


def _function(name: str, value: object) -> object:
    if not callable(value):
        raise ConfigError(name, value, "not a function", "Give a function of (module, FQN) that says whether to wrap.")
    return value


def _made_by(make: Callable[[Any], object]) -> Check:
    """A check by what will be made of the value."""

    def check(name: str, value: object) -> object:
        make(value)
        return value

    return check


def _terms(name: str, value: Any) -> object:
    if value == "auto":
        return value
    resolve_terms(value)
    return value


def _base(name: str, value: Any) -> object:
    return check_base(value)


def _number(fits: Callable[[float], bool], problem: str, mend: str) -> Check:
    def check(name: str, value: object) -> float:
        given = number(name, value)
        if not fits(given):
            raise ConfigError(name, value, problem, mend)
        return given

    return check


_BOUND = _number(lambda bound: bound > 0, "a bound must be positive", "Leave it out for the default.")


def _backend(name: str, value: Any) -> Backend:
    backend = check_backend(value)
    if backend in ("native", "triton"):
        resolve_backend(backend)  # an error where there is no compiler, or no GPU
    return backend


def _ranks(name: str, value: object) -> RankGroup:
    mend = "Give a process group or a DeviceMesh of one dimension, such as mesh['data'], on each of its ranks."
    try:
        return RankGroup(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(name, value, str(error), mend) from error


@options_class
class Options(Checked):
    """Everything that can be set about the corrections of one model.

    All of it is checked when the object is made. What each option does stands at its definition below, in the
    docstring of ``__init__`` and in the guide.
    """

    target_modules: str | Sequence[str] | None = option(
        default=Selection.target_modules,
        part=SITES,
        text=(
            "class names (`ReLU`), ends of module names (`mlp.act`) or regular expressions over whole module "
            "names; `None`: every hidden activation"
        ),
        check=_patterns,
        when="to correct some layers only, or an output activation; a pattern that matches nothing is an error",
    )
    exclude_modules: str | Sequence[str] | None = option(
        default=Selection.exclude_modules,
        part=SITES,
        text="patterns as in `target_modules`: the sites to leave alone",
        check=_patterns,
        when="for gates, and parts that must stay as they are",
    )
    filter_fn: Callable[[nn.Module, str], bool] | None = option(
        default=Selection.filter_fn,
        part=SITES,
        text="called with (module, module name); `False` leaves the site alone",
        check=_function,
        when="where patterns do not suffice",
    )
    functional: str = option(
        default=Selection.functional,
        part=SITES,
        text=(
            "what to do with activations called as functions (`F.relu(x)`, `x.relu()`, an attribute "
            '`self.act = F.gelu`): `"wrap"`, `"warn"` (leave them alone and say so) or `"off"`'
        ),
        check=_selects,
        when='`"off"` where only modules are to be touched',
    )
    per_channel: bool = option(
        default=False,
        part=SITES,
        text="one amplitude per channel in place of one per site; the log then shows their mean",
        check=flag,
        when=(
            "wide convolutions; costs as many numbers as channels. Channels lie behind the batch after a "
            "convolution or batch norm, last after a Linear or layer norm, otherwise behind the batch with four "
            "dimensions or more"
        ),
    )
    base: str | Mapping[str, str] | None = option(
        default=None,
        part=SITES,
        text=(
            "another activation in place of the model's own, corrected in their stead: a name (`relu`, `gelu`, "
            "`squared_relu`, `squared_leaky_relu`, `xielu`, `swish_beta(beta=1.5)`, ...), or a mapping from patterns "
            "as in `target_modules` to names, of which the first that matches decides; `None`: each its own"
        ),
        check=_base,
        when="the base is worth more than the correction in short trainings; not for gates, which it refuses",
    )

    policy: str | Policy | Sequence[Rule] = option(
        default="learned",
        part=MOVES,
        text=(
            'who moves eps: `"static"` (the paper\'s CRReLU), `"learned"`, `"entropy"`, `"hybrid"`, `"frozen"`, a '
            "Policy object, or a list of Rules by site, of which the first that matches decides"
        ),
        check=_made_by(make_rules),
        when=(
            'see [Concepts](concepts.md#who-moves-eps-policies); `"static"` is the baseline, `"entropy"` ignores '
            'the loss, `"observe"` watches and changes nothing; rules for mixtures'
        ),
    )
    density: str | Callable[[Tensor], Density] = option(
        default="gaussian",
        part=MOVES,
        text=(
            'estimate of the density of the pre-activations: `"gaussian"`, `"histogram"`, or a function from '
            "samples of shape (sites, n) to a Density"
        ),
        check=_made_by(make_estimator),
        when='`"histogram"` where the log\'s `negentropy` is large: heavy tails, skew, several modes',
    )
    eps_init: float = option(
        default=0.01,
        part=MOVES,
        text="starting amplitude of every correction",
        check=number,
        unit="1",
        when="`0.0` starts exactly at the plain model, as for fine-tuning",
    )

    max_eps: float = option(
        default=1.0,
        part=HOW_FAR,
        text=(
            "bound of every amplitude: the slope of f stays within this of the base's with tied terms, within "
            "1.16 times this with local ones; tails add this times (1 + the base's steepest slope)"
        ),
        check=_BOUND,
        unit="1",
        when=(
            "0.2 for models that diverge easily; 2 where the log says that eps ends at the bound: see "
            "[what was measured](../results/archive/2026-11-26-ten-times.md)"
        ),
    )
    terms: str | Sequence[str] = option(
        default="auto",
        part=HOW_FAR,
        text=(
            "what is added to the base, `f(z) = (1 + gain) base(z) + slope z + sigma (eps u + lift) exp(-u^2 / 2)`: "
            '`"local"`: eps and lift, which bend f where the data lie; `"tails"`: gain and slope; `"full"`: all four; '
            '`"tied"`: one amplitude eps for both local ones, in the proportion that base and density give; or a list '
            'of names; `"auto"`: local where the density is Gaussian and no policy is `static`, otherwise tied. '
            '`"free"` is the older name of `"local"`'
        ),
        check=_terms,
        when=(
            '`"tied"` for one number per site, as in the paper, and where data are few: it gained less and harmed '
            "nowhere, see [what was measured](../results/archive/2026-11-28-cpu-2core.md)"
        ),
    )
    max_delta: float = option(
        default=0.5,
        part=HOW_FAR,
        text="bound of the change of a function at one update round, max |f_new - f_old| over the range of the data",
        check=_BOUND,
        unit="standard deviations of the pre-activation",
        when="smaller if the loss jumps at updates; larger if the log says `bounded` all the time",
    )
    rollback_factor: float | None = option(
        default=None,
        part=HOW_FAR,
        text=(
            "undo a round after which the mean training loss is larger than before it by more than this factor; "
            "`None`: never. Needs the losses: in a loop of your own call `EAFOController.observe_loss`"
        ),
        check=_number(lambda factor: factor > 1, "must be above 1", "Try 1.5."),
        unit="1",
        when="1.5 as a safety net",
    )

    update_every_n_steps: int = option(
        default=50,
        part=WHEN,
        text="distance between update rounds; the first ones come at steps 1, 2, 4, 8 and so on",
        check=partial(at_least, least=1),
        unit="optimiser steps",
        when="smaller for short runs; larger where steps are so short that rounds weigh",
    )
    update_starting_at_step: int = option(
        default=0,
        part=WHEN,
        text="first step with an update round",
        check=partial(at_least, least=0),
        unit="optimiser steps",
        when="after the warm-up, if the statistics of the first steps mislead",
    )
    freeze_at_step: int | None = option(
        default=None,
        part=WHEN,
        text="from this step on nothing is collected, updated or learned; `None`: never",
        check=partial(at_least, least=0),
        unit="optimiser steps",
        when="to end a training with fixed functions",
    )
    collect_every_n_steps: int | None = option(
        default=None,
        part=WHEN,
        text="distance between sampled steps; `None`: at most five of them per round",
        check=partial(at_least, least=1),
        unit="optimiser steps",
        when="1 for the broadest sample, the period of the rounds for the cheapest",
    )
    samples_per_site: int = option(
        default=4096,
        part=WHEN,
        text="how large a sample a site contributes to a round, over all ranks",
        check=partial(at_least, least=16),
        unit="pre-activations",
        when="more for a smoother histogram and a surer entropy",
    )
    momentum: float = option(
        default=0.5,
        part=WHEN,
        text="weight of a new round in the running estimate of the density, in (0, 1]",
        check=_number(lambda weight: 0 < weight <= 1, "must lie in (0, 1]", "1 forgets all earlier rounds."),
        unit="1",
        when="smaller for small batches; 1 forgets all earlier rounds",
    )

    resolution: float = option(
        default=0.1,
        part=HOW,
        text="r of the resolution-r entropy, in [0.001, 1]",
        check=_number(lambda r: 0.001 <= r <= 1, "must lie in [0.001, 1]", "The default is 0.1."),
        unit="standard deviations of the output",
        when="to see finer structure, with more samples",
    )
    backend: Backend = option(
        default="auto",
        part=HOW,
        text=(
            'what computes activations: `"native"`: on a CPU, C compiled once on your machine in about 1 s; '
            '`"triton"`: on CUDA, an error where it cannot run; `"eager"`: torch\'s operations; `"auto"`: native '
            "and triton where they can be had"
        ),
        check=_backend,
        when='`"eager"` to rule the compiled code out',
    )

    process_group: Any = option(
        default=None,
        part=HOW,
        text=(
            "the ranks that train this model: a process group, or a DeviceMesh of one dimension. Their samples are "
            "pooled, and their amplitudes are equal; `None`: all ranks"
        ),
        check=_ranks,
        when="pipeline stages, or one model per rank; see [several processes](ranks.md)",
    )
    tensor_parallel: Any = option(
        default=None,
        part=HOW,
        text=(
            "the ranks that hold shards of one layer, among those of `process_group`: a process group, or a "
            "DeviceMesh of one dimension; `None`: no layer is sharded so"
        ),
        check=_ranks,
        when="with `parallelize_module`; see [several processes](ranks.md)",
    )

    def conflicts(self) -> Iterator[ConfigError]:
        """Looks for options that cannot work together.

        Yields:
            One error per conflict.
        """
        yield from super().conflicts()
        if not abs(self.eps_init) <= self.max_eps:
            problem = f"outside the trust region |eps| <= max_eps={self.max_eps}"
            yield ConfigError("eps_init", self.eps_init, problem, "Choose a smaller eps_init or a larger max_eps.")
        period = self.schedule.update_every_n_steps
        collect = self.collect_every_n_steps
        if collect is not None and collect > period:
            problem = f"larger than update_every_n_steps={period}: rounds would find no sample"
            yield ConfigError("collect_every_n_steps", collect, problem, "Collect at least once per update.")
        if self.per_channel and self.tensor_parallel is not None:
            problem = "a shard has other channels than the layer, and each of them an amplitude"
            yield ConfigError("per_channel", True, problem, "Leave it out with tensor_parallel.")
        observing = [isinstance(rule.policy, Observe) for rule in make_rules(self.policy)]
        if any(observing) and not all(observing):
            problem = "'observe' leaves the whole model as it is, and stands beside a policy that does not"
            yield ConfigError("policy", self.policy, problem, "Use 'frozen' with eps_init=0.0 for single sites.")
        if any(observing) and self.base is not None:
            problem = "policy='observe' leaves the model as it is, and another base would change what it computes"
            yield ConfigError("base", self.base, problem, "Leave base out, or use another policy.")
        local = local_terms(self.resolved_terms)
        if local and self.tabulated:
            problem = f"{' and '.join(local)} need{'s' if len(local) == 1 else ''} density='gaussian'"
            mend = "Leave the density at its default, or use 'auto', 'tails', or tied in the list."
            yield ConfigError("terms", self.terms, problem, mend)

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
        return self.density != "gaussian"

    @property
    def resolved_terms(self) -> tuple[str, ...]:
        """The terms of a correction; see ``resolve_terms``."""
        if self.terms != "auto":
            return resolve_terms(self.terms)
        static = any(isinstance(rule.policy, Static) for rule in make_rules(self.policy))
        return TIED if self.tabulated or static else LOCAL

    @property
    def observes(self) -> bool:
        """Whether the model is watched only."""
        return any(isinstance(rule.policy, Observe) for rule in make_rules(self.policy))

    @property
    def form(self) -> dict[str, Any]:
        """The options that say what a site's function is made of, as ``wrap`` takes them."""
        return {
            "tabulated": self.tabulated,
            "per_channel": self.per_channel,
            "terms": self.resolved_terms,
            "base": self.base,
        }

    def primitives(self) -> dict[str, object]:
        """The options of the corrections as text and numbers, for the manifest; not what a subclass adds.

        Returns:
            One entry per option.
        """
        return {each.name: _plain(getattr(self, each.name)) for each in fields(Options)}


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # JSON has no infinity
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in cast("Sequence[object]", value)]
    return repr(value)
