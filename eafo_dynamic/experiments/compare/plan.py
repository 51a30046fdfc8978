"""The plan of a comparison: arms on one task, over seeds, read from a YAML file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import yaml

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.internals.checks import at_least

__all__ = [
    "SEED_KEYS",
    "Arm",
    "Choice",
    "Plan",
    "Tuning",
    "check_seed",
    "content",
    "read_plan",
    "read_yaml",
    "validation_twin",
    "value_text",
]

Options = dict[str, Any]

_PLAN_KEYS = (
    "task",
    "title",
    "arms",
    "sweep",
    "reference",
    "seeds",
    "metric",
    "higher_is_better",
    "also",
    "settings",
    "pretrain",
    "pretrain_settings",
    "directory",
    "threads",
    "select",
    "tune",
    "store",
)
_TUNE_KEYS = ("seeds", "rates", "own", "file", "metric")
_TUNED_ELSEWHERE = ("of",)
_OWN_KEYS = ("rates", "multiples")
_ARM_KEYS = ("activation", "eafo", "set", "against")
SEED_KEYS = ("seed_everything", "data.init_args.seed", "data.init_args.split_seed")
_LARGEST_SEED = 2**32 - 1  # of numpy, and of Lightning's seed_everything
_NAME = re.compile(r"[\w .,=()+:-]+")


@dataclass(frozen=True)
class Arm:
    """One of the ways to train that are compared.

    Attributes:
        name: as tables show it.
        activation: name of the network's activation; None: the task's own.
        eafo: options of the EAFOCallback; None: the model trains without one.
        settings: everything else that is different: configuration keys with dots, and their values.
        swept: the value of the swept option; None where the plan sweeps none.
        against: name of the arm that it is compared with; None: the plan's reference.
    """

    name: str
    activation: str | None = None
    eafo: Options | None = None
    settings: Options = field(default_factory=dict)
    swept: Any = None
    against: str | None = None

    @property
    def slug(self) -> str:
        """The name as a folder's name."""
        return re.sub(r"[^a-z0-9.=+-]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Tuning:
    """How the learning rate of each arm is chosen: as many trainings for every arm, on seeds that no table uses.

    Attributes:
        seeds: what every setting is tried with.
        rates: learning rates that an arm without parameters of its own tries, in units of the task's.
        own_rates: those that an arm with parameters of its own tries.
        multiples: learning rates of these parameters, in units of the model's; each is tried with each of `own_rates`.
        metric: the setting whose mean of it is best is chosen; the twin in validation of the metric of the plan, unless
            the plan names another.
        file: where the choice is written, with everything that was tried.
        of: the plan whose tuning this is, where several plans share one; None: this plan's own.
    """

    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    own_rates: tuple[float, ...]
    multiples: tuple[float, ...]
    metric: str
    file: Path
    of: Path | None = None


@dataclass(frozen=True)
class Choice:
    """The learning rates that an arm was given.

    Attributes:
        rate: learning rate, in units of the task's.
        multiple: learning rate of the arm's own parameters, in units of the model's; None: it has none.
        activation: the network's activation; None: the task's own.
        at_the_edge: whether `rate` is the lowest or the highest that was tried: a better one may lie beyond.
        tried: mean of the metric over the seeds of the tuning, by setting.
    """

    rate: float
    multiple: float | None
    activation: str | None
    at_the_edge: bool
    tried: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """Arms times seeds on one task.

    Attributes:
        name: name of the plan's file, without its ending.
        title: heading of its tables.
        task: configuration of ``eafo-dynamic fit`` that all arms share.
        arms: at least two; the reference is one of them.
        reference: name of the arm that an arm is compared with unless it names another one.
        seeds: a seed decides initial weights, order of the data and its split, in the same way in all arms.
        metric: name of the metric that is compared.
        higher_is_better: the metric's direction; None: known from its name.
        also: further metrics for the tables.
        select: a metric logged in validation; the weights of its best epoch are tested. None: those of the last.
        settings: configuration keys with dots and their values, for all arms.
        pretrain: configuration that is trained once per seed, without corrections; the arms start from its weights.
        pretrain_settings: like `settings`, for the pretraining.
        directory: where finished cells are kept.
        threads: number of threads that torch uses in every cell.
        sweep: name of the swept option, for example ``eafo.eps_init``; None: the arms are listed one by one.
        seed_keys: configuration keys that are set to the seed, where the task has them.
        tuning: how the learning rate of each arm is chosen; None: all arms have the task's.
        chosen: the rates that `apply_choices` has given to the arms, by name.
        store: one file with a line for each finished cell, which can be carried to other machines; None: there is none.
    """

    name: str
    title: str
    task: Path
    arms: tuple[Arm, ...]
    reference: str
    seeds: tuple[int, ...]
    metric: str
    higher_is_better: bool | None
    also: tuple[str, ...]
    select: str | None
    settings: Options
    pretrain: Path | None
    pretrain_settings: Options
    directory: Path
    threads: int
    sweep: str | None = None
    seed_keys: tuple[str, ...] = SEED_KEYS
    tuning: Tuning | None = None
    chosen: Mapping[str, Choice] = field(default_factory=dict)
    store: Path | None = None

    def arm(self, name: str) -> Arm:
        """The arm with this name.

        Args:
            name: as the plan writes it.

        Returns:
            The arm.

        Raises:
            ConfigError: if there is no such arm.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ConfigError("arm", name, "the plan has no such arm", _nearest(name, [arm.name for arm in self.arms]))


def read_yaml(path: Path, option: str) -> Any:
    """The contents of a YAML file; tags that would build objects are an error.

    Args:
        path: the file.
        option: the option that named it, for messages.

    Returns:
        Plain lists, mappings, text and numbers.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(option, str(path), f"cannot be read ({error})", "Name a YAML file.") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(option, str(path), f"is not plain YAML ({problem})", "Correct the file there.") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; this reads it as the number that everybody means."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_plan(path: Path, directory: Path | None = None) -> Plan:
    """Reads and checks a plan; paths in it are relative to its folder.

    Args:
        path: the plan's YAML file.
        directory: where finished cells are kept; None: what the plan says, or ``runs/compare/<name of the file>``.

    Returns:
        The plan.

    Raises:
        ConfigError: for an unknown key, a missing file, an arm that cannot be read or stands there twice.
    """
    raw = _mapping("plan", read_yaml(path, "--config"))
    _check_keys("plan", raw, _PLAN_KEYS)
    if not isinstance(raw.get("task"), str):
        raise ConfigError("task", raw.get("task"), "the plan must name it", "Write task: digits_vit.yaml")
    if not isinstance(raw.get("metric"), str):
        mend = "Write metric: test_loss, or another that is logged."
        raise ConfigError("metric", raw.get("metric"), "the plan must name it", mend)
    sweep, arms = _arms(raw, path.parent)
    pretrain = None
    if raw.get("pretrain"):
        pretrain = _file_beside(path, "pretrain", raw["pretrain"])
    plan = Plan(
        name=path.stem,
        title=str(raw.get("title", path.stem)),
        task=_file_beside(path, "task", raw["task"]),
        arms=arms,
        reference=str(raw.get("reference", arms[0].name)),
        seeds=_seeds(raw.get("seeds", 10)),
        metric=raw["metric"],
        higher_is_better=_direction(raw.get("higher_is_better")),
        also=tuple(raw.get("also", ())),
        select=_selected(raw.get("select")),
        settings=_mapping("settings", raw.get("settings", {})),
        pretrain=pretrain,
        pretrain_settings=_mapping("pretrain_settings", raw.get("pretrain_settings", {})),
        directory=directory or Path(raw.get("directory") or Path("runs") / "compare" / path.stem),
        threads=raw.get("threads", 1),
        sweep=sweep,
        tuning=_tuning(raw, path),
        store=_store(raw, path),
    )
    at_least("threads", plan.threads, 1)
    plan.arm(plan.reference)
    _check_against(plan)
    if plan.tuning is not None:
        shared = sorted(set(plan.seeds) & set(plan.tuning.seeds))
        if shared:
            raise ConfigError(
                "tune.seeds", shared, "stand in the table too", "Choose seeds that the plan does not have."
            )
    return plan


def validation_twin(metric: str) -> str:
    """Name under which a metric of the test is logged in validation.

    Args:
        metric: for example test_loss.

    Returns:
        For example val_loss; a name without "test" as it is.
    """
    return metric.replace("test", "val")


def _tuning(raw: Options, plan: Path) -> Tuning | None:
    if raw.get("tune") is None:
        return None
    given = _mapping("tune", raw["tune"])
    if "of" in given:
        return _tuning_of(given, plan)
    _check_keys("tune", given, _TUNE_KEYS)
    own = _mapping("tune.own", given.get("own"))
    _check_keys("tune.own", own, _OWN_KEYS)
    rates = _positive("tune.rates", given.get("rates"))
    own_rates = _positive("tune.own.rates", own.get("rates"))
    multiples = _positive("tune.own.multiples", own.get("multiples"))
    if len(rates) != len(own_rates) * len(multiples):
        counts = f"{len(rates)} settings, with parameters of its own an arm has {len(own_rates) * len(multiples)}"
        raise ConfigError("tune.rates", list(rates), counts, "Give every arm as many settings.")
    file = given.get("file")
    if not isinstance(file, str):
        mend = "Write file: tuned/<name of the plan>.yaml"
        raise ConfigError("tune.file", file, "the plan must say where the choice is written", mend)
    return Tuning(
        seeds=_seeds(given.get("seeds", 2), "tune.seeds"),
        rates=rates,
        own_rates=own_rates,
        multiples=multiples,
        metric=str(given.get("metric", validation_twin(raw["metric"]))),
        file=plan.parent / file,
    )


def _tuning_of(given: Options, plan: Path) -> Tuning:
    """The tuning of another plan, whose choices this one takes."""
    _check_keys("tune", given, _TUNED_ELSEWHERE)
    other = _file_beside(plan, "tune.of", str(given["of"]))
    theirs = _mapping("tune.of", read_yaml(other, "tune.of"))
    tuning = None
    if "of" not in (theirs.get("tune") or {}):
        tuning = _tuning(theirs, other)
    if tuning is None:
        raise ConfigError("tune.of", given["of"], "chooses no rates itself", "Name a plan with tune: and rates.")
    return replace(tuning, of=other)


def _positive(where: str, given: Any) -> tuple[float, ...]:
    if not isinstance(given, list) or not given:
        raise ConfigError(where, given, "is no list of numbers", "Write for example [0.5, 1, 2].")
    numbers: list[float] = []
    for value in cast("list[Any]", given):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ConfigError(where, value, "is no positive number", "Write for example [0.5, 1, 2].")
        numbers.append(float(value))
    return tuple(numbers)


def _store(raw: Options, plan: Path) -> Path | None:
    given = raw.get("store")
    if given is None:
        return None
    if not isinstance(given, str):
        raise ConfigError("store", given, "is no name of a file", "Write store: results/<name of the plan>.jsonl")
    return plan.parent / given


def _check_against(plan: Plan) -> None:
    for arm in plan.arms:
        if arm.against is None:
            continue
        where = f"arms.{arm.name}.against"
        if arm.name == plan.reference:
            raise ConfigError(where, arm.against, "the reference is compared with nothing", "Remove the line.")
        if plan.arm(arm.against).against is not None:  # itself included
            mend = "Name the reference, or an arm that is compared with it."
            raise ConfigError(where, arm.against, "is itself compared with another arm", mend)


def _arms(raw: Options, folder: Path) -> tuple[str | None, tuple[Arm, ...]]:
    """Return the name of the swept option, if any, and all arms."""
    listed = raw.get("arms", {})
    if isinstance(listed, str):  # a file with arms that several plans share
        listed = read_yaml(folder / listed, "arms")
    arms = [_arm(str(name), options) for name, options in _mapping("arms", listed).items()]
    swept_option = None
    if raw.get("sweep") is not None:
        swept_option, swept_arms = _sweep(_mapping("sweep", raw["sweep"]))
        arms += swept_arms
    if len(arms) < 2:
        raise ConfigError("arms", list(listed), "needs two arms or more", "Add one to compare with.")
    for number, arm in enumerate(arms):
        for earlier in arms[:number]:
            if arm.slug == earlier.slug:
                raise ConfigError("arms", arm.name, f"has the name of {earlier.name!r}", "Give it a name of its own.")
            if content(arm) == content(earlier):
                raise ConfigError("arms", arm.name, f"is the same as {earlier.name!r}", "Remove one of them.")
    return swept_option, tuple(arms)


def _arm(name: str, options: Any, swept: Any = None) -> Arm:
    if not _NAME.fullmatch(name):
        raise ConfigError("arms", name, "is no name for an arm", "Use letters, digits, spaces and . , = + - : ( ).")
    where = f"arms.{name}"
    options = _mapping(where, options or {})
    _check_keys(where, options, _ARM_KEYS)
    eafo = options.get("eafo")
    if eafo is not None:
        eafo = _mapping(f"{where}.eafo", eafo)
    against = options.get("against")
    if against is not None:
        against = str(against)
    return Arm(
        name=name,
        activation=options.get("activation"),
        eafo=eafo,
        settings=_mapping(f"{where}.set", options.get("set", {})),
        swept=swept,
        against=against,
    )


def _sweep(sweep: Options) -> tuple[str, list[Arm]]:
    """Return the name of the swept option, and one arm per value."""
    _check_keys("sweep", sweep, ("option", "values", "arm"))
    option = sweep.get("option")
    values = sweep.get("values")
    if not isinstance(option, str) or not option.startswith(("eafo.", "set.", "activation")):
        mend = "Write option: eafo.eps_init, or set.KEY for a key of the task, or activation."
        raise ConfigError("sweep.option", option, "is nothing that can be swept", mend)
    if not isinstance(values, list) or not values:
        raise ConfigError("sweep.values", values, "is no list of values", "Write values: [0.01, 0.1].")
    shared = _mapping("sweep.arm", sweep.get("arm") or {})
    part, _, key = option.partition(".")
    short = key.rpartition(".")[2] or part
    arms: list[Arm] = []
    for value in cast("list[Any]", values):
        text = value_text(value)
        options = dict(shared)
        if key:
            options[part] = {**(options.get(part) or {}), key: value}
        else:
            options[part] = value
        if options.get("against") is not None:
            options["against"] = str(options["against"]).replace("{}", text)
        arms.append(_arm(f"{short}={text}", options, swept=value))
    return option, arms


def value_text(value: Any) -> str:
    """A value of a sweep as it is written in the name of its arm.

    Args:
        value: a number, a text, a list of these, or a class with its arguments.

    Returns:
        For example ``0.01`` or ``model.2+model.4``.
    """
    if isinstance(value, (list, tuple)):
        return "+".join(value_text(each) for each in cast("Sequence[Any]", value))
    if isinstance(value, Mapping):
        class_path = cast("Mapping[str, Any]", value).get("class_path", value)
        return re.sub(r"[^\w.=+-]", "", str(class_path))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w .,=+-]", "", text)


def content(arm: Arm) -> tuple[str, ...]:
    """What an arm does, whatever its name.

    Args:
        arm: an arm.

    Returns:
        Equal for two arms that would train the same.
    """
    return tuple(repr(part) for part in (arm.activation, arm.eafo, arm.settings))


def check_seed(option: str, seed: int) -> None:
    """Checks that torch, numpy and Lightning take a seed as it is.

    Args:
        option: the option that named it, for the message.
        seed: the seed.

    Raises:
        ConfigError: if it is below 0 or above 2^32 - 1; Lightning would quietly take another one.
    """
    if not 0 <= seed <= _LARGEST_SEED:
        raise ConfigError(option, seed, "is no seed", f"Write a number from 0 to {_LARGEST_SEED}.")


def _seeds(given: Any, where: str = "seeds") -> tuple[int, ...]:
    seeds = list(range(given)) if isinstance(given, int) else given
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in cast("list[Any]", seeds)):
        raise ConfigError(where, given, "is neither a number of seeds nor a list of them", "Write seeds: 10.")
    seeds = cast("list[int]", seeds)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(where, given, "names a seed twice", "Name each once.")
    for seed in seeds:
        check_seed(where, seed)
    return tuple(seeds)


def _direction(given: Any) -> bool | None:
    if given is None or isinstance(given, bool):
        return given
    mend = "Write true or false, without quotes, or remove the line."
    raise ConfigError("higher_is_better", given, "is neither true nor false", mend)


def _selected(given: Any) -> str | None:
    from eafo_dynamic.experiments.compare.paired import is_higher_better

    mend = "Name a metric that is logged in validation, such as val_loss, or remove the line."
    if given is None:
        return None
    if not isinstance(given, str):
        raise ConfigError("select", given, "is no name of a metric", mend)
    is_higher_better(given, "select", mend)
    return given


def _file_beside(plan: Path, key: str, name: str) -> Path:
    path = plan.parent / name
    if not path.is_file():
        raise ConfigError(key, name, f"there is no file {path}", "Name a configuration of eafo-dynamic fit.")
    return path


def _mapping(where: str, value: Any) -> Options:
    if not isinstance(value, dict):
        raise ConfigError(where, value, "is no mapping of names to values", "Write one 'name: value' per line.")
    return cast(Options, value)


def _check_keys(where: str, given: Options, known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(where, key, "unknown key", _nearest(str(key), known))


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"There are: {', '.join(known)}."
