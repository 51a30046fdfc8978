"""The learning rates of each arm: chosen by validation, with as many trainings for every arm, and written down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import yaml

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.activations import ACTIVATIONS, is_learnable
from eafo_dynamic.experiments.compare.cell import result_path
from eafo_dynamic.experiments.compare.compose import compose, fingerprint, flat
from eafo_dynamic.experiments.compare.paired import is_higher_better
from eafo_dynamic.experiments.compare.plan import Arm, Choice, Plan, Tuning, content, read_plan, read_yaml
from eafo_dynamic.experiments.compare.results import Cell, read_cell
from eafo_dynamic.experiments.compare.runner import Failure, run

__all__ = ["BEST", "Setting", "apply_choices", "is_plain", "settings_of", "tune", "untuned"]

BEST = "best"
"""As the activation of an arm: that of the plain arm which was best on the seeds of the tuning."""

RATE = "model.init_args.lr"
_MULTIPLE = "model.init_args.activation_lr_multiple"


class Setting(NamedTuple):
    """One of the settings that an arm tries.

    Attributes:
        rate: learning rate, in units of the task's.
        multiple: learning rate of the arm's own parameters, in units of the model's; None: it has none.
    """

    rate: float
    multiple: float | None

    @property
    def label(self) -> str:
        """As it stands in names and in the file of choices."""
        if self.multiple is None:
            return f"rate {self.rate:g}"
        return f"rate {self.rate:g} own {self.multiple:g}"


def has_own_parameters(arm: Arm) -> bool:
    """Whether an arm learns numbers that the plain network does not have.

    Args:
        arm: an arm.

    Returns:
        True for corrections that are not frozen, and for learnable activations.
    """
    if arm.eafo is not None and arm.eafo.get("policy") != "frozen":
        return True
    return arm.activation is not None and is_learnable(arm.activation)


def settings_of(tuning: Tuning, arm: Arm) -> list[Setting]:
    """What an arm tries; as many settings for every arm.

    Args:
        tuning: of the plan.
        arm: one of its arms.

    Returns:
        The settings.
    """
    if has_own_parameters(arm):
        return [Setting(rate, multiple) for rate in tuning.own_rates for multiple in tuning.multiples]
    return [Setting(rate, None) for rate in tuning.rates]


def with_setting(plan: Plan, arm: Arm, setting: Setting) -> Arm:
    """An arm with other learning rates.

    Args:
        plan: the plan.
        arm: one of its arms.
        setting: the rates.

    Returns:
        The arm, under the same name.

    Raises:
        ConfigError: if the task has no learning rate where it is looked for.
    """
    config = compose(plan, arm, plan.seeds[0], plan.directory)
    rate = flat(config).get(RATE)
    if not isinstance(rate, (int, float)):
        raise ConfigError(
            "tune", plan.name, f"the task says no {RATE}", "Write the learning rate into the task's file."
        )
    settings = {**arm.settings, RATE: rate * setting.rate}
    eafo = arm.eafo
    if setting.multiple is not None and eafo is not None:
        eafo = {**eafo, "lr_multiple": setting.multiple}
    if setting.multiple is not None and arm.activation is not None and is_learnable(arm.activation):
        settings[_MULTIPLE] = setting.multiple
    return dataclasses.replace(arm, settings=settings, eafo=eafo)


def apply_choices(plan: Plan) -> Plan:
    """The plan with the learning rates that were chosen for its arms.

    Args:
        plan: a plan.

    Returns:
        The plan, with the choices in `chosen`; arms without a choice as they are.

    Raises:
        ConfigError: for an arm on the best base in a plan that chooses none, and for a choice that was made with other
            settings than the plan now has.
    """
    if plan.tuning is None:
        for arm in plan.arms:
            if arm.activation == BEST:
                mend = "Add tune, or name an activation."
                raise ConfigError(f"arms.{arm.name}.activation", BEST, "the plan has no tune that finds it", mend)
        return plan
    chosen = _choices(_owner(plan))
    arms: list[Arm] = []
    for arm in plan.arms:
        choice = chosen.get(arm.name)
        if choice is not None and arm.activation == BEST:
            arm = dataclasses.replace(arm, activation=choice.activation)
        elif arm.activation == BEST:
            arm = dataclasses.replace(arm, activation=None)
        if choice is not None:
            arm = with_setting(plan, arm, Setting(choice.rate, choice.multiple))
        arms.append(arm)
    return dataclasses.replace(plan, arms=tuple(arms), chosen=chosen)


def untuned(plan: Plan) -> list[str]:
    """Names of arms whose learning rate the plan wants chosen and that have none yet.

    Args:
        plan: a plan, with choices applied.

    Returns:
        The names.
    """
    if plan.tuning is None:
        return []
    return [arm.name for arm in plan.arms if arm.name not in plan.chosen]


def _owner(plan: Plan) -> Plan:
    """The plan that chooses the rates: this one, or the one that it names."""
    if plan.tuning is None or plan.tuning.of is None:
        return plan
    owner = read_plan(plan.tuning.of)
    theirs = {arm.name: arm for arm in owner.arms}
    for arm in plan.arms:
        if arm.name not in theirs or content(theirs[arm.name]) != content(arm):
            mend = "Give both plans the same arms."
            raise ConfigError("tune.of", plan.tuning.of.name, f"has no such arm {arm.name!r}", mend)
    return owner


def tune(plan: Plan, arms: Sequence[str] | None, jobs: int, backend: str = "local") -> list[Failure]:
    """Tries all settings of each arm and writes the best one down, arm by arm. Arms with a choice are left alone.

    Args:
        plan: a plan with `tune`, without choices applied.
        arms: names of arms; None: all.
        jobs: number of processes at a time.
        backend: where they run, see `runner.run`.

    Returns:
        Trainings that failed; an arm that has one gets no choice.

    Raises:
        ConfigError: if the plan has no `tune`.
    """
    if plan.tuning is None:
        raise ConfigError("--tune", plan.name, "the plan has no tune", "Add tune: with seeds, rates, own and file.")
    if plan.tuning.of is not None:
        mend = f"Run --tune with {plan.tuning.of}."
        raise ConfigError("--tune", plan.name, "another plan chooses its rates", mend)
    chosen = _choices(plan)
    wanted = [arm for arm in plan.arms if arms is None or arm.name in arms]
    failures: list[Failure] = []
    for arm in wanted:
        if arm.name in chosen:
            continue
        if arm.activation == BEST:
            arm = dataclasses.replace(arm, activation=_best_base(plan, plan.tuning))
        trials = _trials(plan, plan.tuning, arm)
        trying = dataclasses.replace(
            plan,
            arms=tuple(trials.values()),
            reference=next(iter(trials.values())).name,
            seeds=plan.tuning.seeds,
            metric=plan.tuning.metric,
            directory=plan.directory / "tuning",
            store=None,
            tuning=None,
        )
        cells = [(trial, seed) for trial in trying.arms for seed in trying.seeds]
        failed = run(trying, cells, jobs, backend)
        failures += failed
        if not failed:
            _write_choice(plan, plan.tuning, arm, _tried(trying, trials))
    return failures


def _best_base(plan: Plan, tuning: Tuning) -> str | None:
    """The activation of the plain arm that was best; None: the task's own."""
    sign = 1 if is_higher_better(tuning.metric) else -1
    choices = _choices(plan)
    plain = [arm for arm in plan.arms if is_plain(arm)]
    missing = [arm.name for arm in plain if arm.name not in choices]
    if missing:
        mend = "Tune them first, or leave --arms out."
        raise ConfigError("--arms", missing, "the best base is not known without these arms", mend)
    outcomes = {arm.name: max(sign * value for value in choices[arm.name].tried.values()) for arm in plain}
    return max(plain, key=lambda arm: outcomes[arm.name]).activation


def is_plain(arm: Arm) -> bool:
    """Whether an arm is another activation and nothing else: no correction, no parameters of its own.

    Args:
        arm: an arm; its learning rate may have been chosen.

    Returns:
        True for the task's own activation too.
    """
    if arm.eafo is not None or set(arm.settings) - {RATE}:
        return False
    if arm.activation is None:
        return True
    return arm.activation in ACTIVATIONS and not is_learnable(arm.activation)


def _trials(plan: Plan, tuning: Tuning, arm: Arm) -> dict[Setting, Arm]:
    trials: dict[Setting, Arm] = {}
    for setting in settings_of(tuning, arm):
        tried = with_setting(plan, arm, setting)
        trials[setting] = dataclasses.replace(tried, name=f"{arm.name} {setting.label}", against=None)
    return trials


def _tried(trying: Plan, trials: Mapping[Setting, Arm]) -> dict[Setting, float]:
    """Mean of the metric over the seeds, for each setting; NaN where a training diverged."""
    means: dict[Setting, float] = {}
    for setting, arm in trials.items():
        cells = [read_cell(result_path(trying, arm, seed)) for seed in trying.seeds]
        means[setting] = math.fsum(_outcome(cell, trying) for cell in cells) / len(cells)
    return means


def _outcome(cell: Cell, trying: Plan) -> float:
    """The metric at the end, or in the best epoch where the plan tests the weights of that one."""
    metric = trying.metric
    if metric not in cell.metrics:
        raise ConfigError("tune.metric", metric, "was not logged", f"There are: {', '.join(cell.metrics)}.")
    curve = cell.curve.get(metric, [])
    if trying.select != metric or not curve:
        return cell.metrics[metric]
    if is_higher_better(metric):
        return max(curve)
    return min(curve)


def _write_choice(plan: Plan, tuning: Tuning, arm: Arm, tried: Mapping[Setting, float]) -> None:
    sign = 1 if is_higher_better(tuning.metric) else -1
    finite = {setting: mean for setting, mean in tried.items() if math.isfinite(mean)}
    if not finite:
        mend = "Give it lower rates."
        raise ConfigError("tune.rates", [setting.rate for setting in tried], f"{arm.name!r} diverges at all", mend)
    best = max(finite, key=lambda setting: sign * finite[setting])
    rates = [setting.rate for setting in tried]
    choice = Choice(
        rate=best.rate,
        multiple=best.multiple,
        activation=arm.activation,
        at_the_edge=best.rate in (min(rates), max(rates)),
        tried={setting.label: float(f"{mean:.5g}") for setting, mean in finite.items()},
    )
    choices = _read(tuning)
    choices[arm.name] = {**vars(choice), "fingerprint": _tried_fingerprint(plan, tuning, arm)}
    about = {"metric": tuning.metric, "seeds": list(tuning.seeds), "arms": choices}
    heading = (
        "# Learning rates in units of the task's, chosen by `eafo-dynamic compare --tune`; see `tune` in the plan\n"
    )
    tuning.file.parent.mkdir(parents=True, exist_ok=True)
    text = heading + yaml.safe_dump(about, sort_keys=False, width=120)
    unfinished = tuning.file.with_name(f".{tuning.file.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(tuning.file)


def _tried_fingerprint(plan: Plan, tuning: Tuning, arm: Arm) -> str:
    """A hash of what an arm has tried: equal for plans whose choices may be used for each other."""
    folder = plan.directory.absolute()
    config = compose(plan, arm, tuning.seeds[0], folder)
    settings = [setting.label for setting in settings_of(tuning, arm)]
    return fingerprint(config, folder, (plan.threads, plan.select, settings))


def _choices(plan: Plan) -> dict[str, Choice]:
    """By arm: what was chosen for it; a choice that was made with other settings is an error."""
    if plan.tuning is None:
        return {}
    chosen: dict[str, Choice] = {}
    arms = {arm.name: arm for arm in plan.arms}
    names = {each.name for each in dataclasses.fields(Choice)}
    for name, given in _read(plan.tuning).items():
        if name not in arms:
            continue
        if not isinstance(given, dict) or not names <= given.keys():
            mend = "Delete it there and run --tune again."
            raise ConfigError("tune.file", str(plan.tuning.file), f"the entry of {name!r} is not whole", mend)
        entry = cast("dict[str, Any]", given)
        kept = entry.get("fingerprint")
        choice = Choice(**{each: entry[each] for each in names})
        arm = arms[name]
        if arm.activation == BEST:
            arm = dataclasses.replace(arm, activation=choice.activation)
        if kept != _tried_fingerprint(plan, plan.tuning, arm):
            problem = f"{name!r} was tuned with another task, arm or grid than the plan now has"
            mend = "Delete its entry there and run --tune again."
            raise ConfigError("tune.file", str(plan.tuning.file), problem, mend)
        chosen[name] = choice
    return chosen


def _read(tuning: Tuning) -> dict[str, Any]:
    """By arm: its entry in the file of choices; empty while there is no file."""
    if not tuning.file.exists():
        return {}
    kept = read_yaml(tuning.file, "tune.file")
    if not isinstance(kept, dict) or not {"metric", "seeds", "arms"} <= kept.keys():
        raise ConfigError("tune.file", str(tuning.file), "is no file of choices", "Delete it and run --tune again.")
    found = cast("dict[str, Any]", kept)
    if not isinstance(found["arms"], dict):
        raise ConfigError("tune.file", str(tuning.file), "has no arms", "Delete it and run --tune again.")
    if found["metric"] != tuning.metric or found["seeds"] != list(tuning.seeds):
        problem = f"was made by {found['metric']} on seeds {found['seeds']}"
        raise ConfigError("tune.file", str(tuning.file), problem, "Delete it and run --tune again.")
    return found["arms"]
