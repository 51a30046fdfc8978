"""The search: trials, pruning, storage and parallel workers are Optuna's; seeds are paired with the model as it is.

Three stages, each a study in one journal file:

1. reference: the model as it is, on each seed of the search.
2. candidates: a trial trains a candidate on one seed after the other. It reports the relative difference from the
   reference of the same seed at the same validation, then the mean over the seeds so far. The pruner (Hyperband or
   successive halving) ends bad ones early, so that good ones get more steps and more seeds.
3. confirm: the best few and the reference, on seeds that no choice has seen. The answer comes from these alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import platform
import sys
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eafo_dynamic.errors import ConfigError, EAFOError, interruptible, one_line
from eafo_dynamic.experiments.compare.paired import is_higher_better, seeds_needed
from eafo_dynamic.experiments.search.answer import Answer, make_answer
from eafo_dynamic.experiments.search.candidates import Candidate, Space, read_space
from eafo_dynamic.experiments.search.trainings import MadeTask, Run, Task
from eafo_dynamic.internals.checks import at_least

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.trial import FrozenTrial, Trial

__all__ = ["Pruner", "Settings", "run_search", "search"]

Pruner = Literal["hyperband", "halving", "none"]
Stage = Literal["reference", "candidates", "confirm"]

REFERENCE = "your model"
"""Name of the model without any change."""
_ATTEMPTS = 2  # of a candidate whose process was killed
_INTERRUPTED = "interrupted"
_UNCLAIMED = timedelta(seconds=60)  # after which a trial that began has no process
_POLL = 0.5  # seconds between two looks at the workers


@dataclass(frozen=True)
class Settings:
    """How much is tried.

    Attributes:
        seeds: seeds of the search, of which good candidates see all.
        confirm: fresh seeds on which the best few are compared with the model as it is.
        finalists: number of these few; of two or more one has no correction, where such a candidate was finished.
        first_seed: seeds are counted from here.
        pruner: "halving" (successive halving), "hyperband" (for gains that come late) or "none".
        higher_is_better: direction of the metric; None: known from its name.
    """

    seeds: int = 3
    confirm: int = 8
    finalists: int = 3
    first_seed: int = 0
    pruner: Pruner = "halving"
    higher_is_better: bool | None = None

    def __post_init__(self) -> None:
        for option in ("seeds", "confirm", "finalists"):
            at_least(option, getattr(self, option), 1)
        at_least("first_seed", self.first_seed, 0)
        needed = seeds_needed(self.finalists)
        if self.confirm < needed:
            problem = f"with {self.finalists} finalists the test cannot find anything below {needed} seeds"
            raise ConfigError("confirm", self.confirm, problem, f"Give {needed} or more, or fewer finalists.")
        if self.pruner not in ("hyperband", "halving", "none"):
            raise ConfigError("pruner", self.pruner, "no such pruner", "Use hyperband, halving or none.")

    @property
    def search_seeds(self) -> range:
        """Seeds of the search."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def confirm_seeds(self) -> range:
        """Seeds that no choice has seen."""
        start = self.first_seed + self.seeds
        return range(start, start + self.confirm)


@dataclass(frozen=True)
class _Search:
    """All that a worker process needs."""

    task: Task
    candidates: tuple[Candidate, ...]
    settings: Settings
    higher_is_better: bool
    out: Path

    def candidate(self, name: str) -> Candidate:
        return next((each for each in self.candidates if each.name == name), Candidate(REFERENCE))

    def relative(self, value: float, reference: float) -> float:
        """Relative difference from the reference, below 0 where the value is better."""
        sign = -1.0 if self.higher_is_better else 1.0
        return sign * (value - reference) / max(abs(reference), sys.float_info.min)


def search(
    make_model: Callable[[], LightningModule],
    make_data: Callable[[int], Any],
    *,
    metric: str = "val_loss",
    trainer: Mapping[str, Any] | None = None,
    space: Space | Mapping[str, Any] | None = None,
    out: str | Path = "runs/search",
    seeds: int = 3,
    confirm: int = 8,
    finalists: int = 3,
    first_seed: int = 0,
    pruner: Pruner = "halving",
    higher_is_better: bool | None = None,
    jobs: int = 1,
    threads: int = 1,
    verbose: bool = True,
) -> Answer:
    """Finds out which activation, with which correction, a model should have.

    Candidates are trained as the model would be. Weights, data order and split of a seed are the same for all of them,
    and each is compared with the model as it is on the same seed. Bad ones stop early; the best few are compared with
    the model as it is once more, on fresh seeds, and the answer comes from these alone. The same call goes on where an
    interrupted one stopped; several may run at once, also on machines that share `out`.

    Args:
        make_model: called without arguments after all seeds are set; returns a new LightningModule, its activations
            modules. With `jobs` above 1 it must be a function that can be pickled, as those of a module are.
        make_data: called with the seed; returns a LightningDataModule, or a training and a validation loader.
        metric: logged in validation.
        trainer: options of Lightning's Trainer, such as max_epochs; the metric is looked at after each validation.
        space: what to try; None: a default set of bases and corrections. A mapping has the keys of `Space`.
        out: folder of the journal, the tables and the figure.
        seeds: seeds of the search, of which good candidates see all.
        confirm: fresh seeds for the answer.
        finalists: number of candidates that are compared on these; the best one without a correction is among them.
        first_seed: seeds are counted from here.
        pruner: "halving" (successive halving), "hyperband" (for gains that come late) or "none".
        higher_is_better: direction of the metric; None: known from its name.
        jobs: processes at a time.
        threads: threads of torch in each.
        verbose: whether to show progress on stderr.

    Returns:
        The ranking, and what to write into the code; `best` is None where nothing beats the model as it is.

    Raises:
        ConfigError: for options that cannot work, or a folder with another search.
        EAFOError: without Optuna, or if the model as it is cannot be trained.

    Example:
        ``search(make_model, make_data, trainer={"max_epochs": 20}, jobs=4).best``
    """
    if space is None or not isinstance(space, Space):
        space = read_space(space)
    task = MadeTask(make_model, make_data, metric, dict(trainer or {}), threads)
    settings = Settings(seeds, confirm, finalists, first_seed, pruner, higher_is_better)
    if jobs > 1:
        try:
            pickle.dumps(task)
        except Exception as error:
            problem = f"the task cannot be sent to other processes ({one_line(error)})"
            raise ConfigError(
                "jobs", jobs, problem, "Define make_model and make_data at the top of a module."
            ) from None
    return run_search(task, space, settings, Path(out), jobs, verbose)


@interruptible()
def run_search(task: Task, space: Space, settings: Settings, out: Path, jobs: int = 1, verbose: bool = True) -> Answer:
    """Runs a search, or goes on with it.

    Args:
        task: what is trained.
        space: what is tried.
        settings: how much is tried.
        out: folder of the journal, the tables and the figure.
        jobs: processes at a time.
        verbose: whether to show progress on stderr.

    Returns:
        The answer.

    Raises:
        EAFOError: without Optuna, if the folder holds another search, or if the model as it is cannot be trained.
    """
    at_least("jobs", jobs, 1)
    higher = settings.higher_is_better
    if higher is None:
        higher = is_higher_better(task.metric)
    this = _Search(task, tuple(space.candidates()), settings, higher, out)
    out.mkdir(parents=True, exist_ok=True)
    with _optuna():
        studies = {stage: _study(this, stage) for stage in ("reference", "candidates", "confirm")}
        _check_identity(this, studies["reference"])
        _enqueue(studies["reference"], [{"candidate": REFERENCE, "seed": seed} for seed in settings.search_seeds])
        _run_stage(this, "reference", jobs, verbose)
        _check_reference(this, studies["reference"])
        _enqueue(studies["candidates"], [{"candidate": each.name} for each in this.candidates])
        _run_stage(this, "candidates", jobs, verbose)
        finalists = _finalists(this, studies["candidates"])
        names = [REFERENCE, *finalists]
        confirming = [{"candidate": name, "seed": seed} for seed in settings.confirm_seeds for name in names]
        _enqueue(studies["confirm"], confirming)
        _run_stage(this, "confirm", jobs, verbose)
        answer = make_answer(
            task=task,
            candidates=this.candidates,
            searched=_best_trials(studies["candidates"]),
            references=_references(studies["reference"]),
            confirmed=_confirmed(studies["confirm"]),
            reference_name=REFERENCE,
            relative=this.relative,
            higher_is_better=higher,
        )
    answer.write(out)
    return answer


@contextmanager
def _optuna() -> Generator[None]:
    """Imports Optuna and keeps it quiet.

    Yields:
        Nothing.

    Raises:
        EAFOError: if it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise EAFOError("a search needs optuna: pip install 'eafo-dynamic[search]'") from None
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _study(this: _Search, stage: Stage, validations: int | None = None) -> Study:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(this.out / "journal.log")))
    pruner: BasePruner = optuna.pruners.NopPruner()
    if stage == "candidates" and validations is not None:
        pruner = _pruner(this.settings, validations)
    sampler = optuna.samplers.RandomSampler(seed=0)  # every trial is enqueued: nothing is sampled
    return optuna.create_study(
        study_name=stage, storage=storage, pruner=pruner, sampler=sampler, direction="minimize", load_if_exists=True
    )


def _pruner(settings: Settings, validations: int) -> BasePruner:
    """The resource is the number of validations, over all seeds of a candidate."""
    import optuna

    least = max(1, validations // 4)
    if settings.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=2)
    if settings.pruner == "hyperband":
        most = max(least + 1, validations * settings.seeds)
        return optuna.pruners.HyperbandPruner(min_resource=least, max_resource=most, reduction_factor=3)
    return optuna.pruners.NopPruner()


def _check_identity(this: _Search, study: Study) -> None:
    settings = this.settings
    identity = [
        this.task.identity(),
        [[each.name, each.base, each.eafo, each.rate] for each in this.candidates],
        [settings.seeds, settings.first_seed, settings.pruner, this.higher_is_better],
    ]
    text = json.dumps(identity, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    kept = study.user_attrs.get("identity")
    if kept is None:
        study.set_user_attr("identity", digest)
    elif kept != digest:
        raise ConfigError("out", str(this.out), "holds a search with other settings", "Name another folder.")


def _enqueue(study: Study, wanted: Sequence[Mapping[str, Any]]) -> None:
    known = [_params(trial) for trial in study.get_trials(deepcopy=False)]
    for params in wanted:
        if params not in known:
            study.enqueue_trial(dict(params), user_attrs={"enqueued": True, **params})


def _params(trial: FrozenTrial) -> dict[str, Any]:
    return {key: trial.user_attrs[key] for key in ("candidate", "seed") if key in trial.user_attrs}


# ---- one stage, in this process or in several ----


def _run_stage(this: _Search, stage: Stage, jobs: int, verbose: bool) -> None:
    """Runs all trials of a stage that wait, and waits for those that other processes run."""
    with _progress(stage, verbose) as show:
        while True:
            study = _study(this, stage)
            _requeue_orphans(study)
            show(study)
            states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
            if "WAITING" in states:
                if jobs == 1:
                    _work(this, stage, show)
                else:
                    _in_processes(this, stage, jobs, show)
            elif "RUNNING" in states:
                time.sleep(_POLL)  # another machine's, or another call's
            else:
                return


def _in_processes(this: _Search, stage: Stage, jobs: int, show: Callable[[Study], None]) -> None:
    context = get_context("spawn")  # a forked torch may hang in its thread pool
    workers = [context.Process(target=_work, args=(this, stage), daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers):
            time.sleep(_POLL)
            show(_study(this, stage))
    except KeyboardInterrupt:
        for worker in workers:
            worker.kill()
        _mark_interrupted(_study(this, stage), [worker.pid for worker in workers])
        raise
    finally:
        for worker in workers:
            worker.join()


def _mark_interrupted(study: Study, processes: Sequence[int | None]) -> None:
    for trial in study.get_trials(deepcopy=False):
        host, process = trial.user_attrs.get("owner", (None, None))
        if trial.state.name == "RUNNING" and host == platform.node() and process in processes:
            study.set_user_attr(f"{_INTERRUPTED} {trial.number}", True)


def _work(this: _Search, stage: Stage, show: Callable[[Study], None] | None = None) -> None:
    """Takes waiting trials one after the other until there is none."""
    with _optuna():
        study = _study(this, stage)
        references: dict[int, Run] = {}
        if stage == "candidates":
            references = _references(_study(this, "reference"))
            study = _study(this, stage, len(next(iter(references.values())).curve))
        while any(trial.state.name == "WAITING" for trial in study.get_trials(deepcopy=False)):
            trial = study.ask()
            # Another process was faster: the trial is made up, or enqueued by both.
            if not trial.user_attrs.get("enqueued") or _is_duplicate(study, trial):
                trial.set_user_attr("duplicate", True)
                _tell(study, trial, "FAIL")
                continue
            trial.set_user_attr("owner", [platform.node(), os.getpid()])
            if stage == "candidates":
                _attempt(study, trial, lambda trial=trial: _search_trial(this, trial, references))
            else:
                _attempt(study, trial, lambda trial=trial: _single_trial(this, trial))
            if show is not None:
                show(study)


def _is_duplicate(study: Study, trial: Trial) -> bool:
    earlier = study.get_trials(deepcopy=False)[: trial.number]
    params = {key: trial.user_attrs[key] for key in ("candidate", "seed") if key in trial.user_attrs}
    return any(_params(each) == params and each.state.name != "FAIL" for each in earlier)


def _attempt(study: Study, trial: Trial, run: Callable[[], tuple[str, float | None]]) -> None:
    """Runs a trial; what goes wrong in it is kept and leaves the others alone."""
    try:
        state, value = run()
    except KeyboardInterrupt:
        study.set_user_attr(f"{_INTERRUPTED} {trial.number}", True)  # it is no attempt that has failed
        raise
    except Exception as error:
        trial.set_user_attr("why", one_line(error))
        _tell(study, trial, "FAIL")
    else:
        _tell(study, trial, state, value)


def _tell(study: Study, trial: Trial, state: str, value: float | None = None) -> None:
    from optuna.trial import TrialState

    if state == "COMPLETE":
        study.tell(trial, value)
    else:
        study.tell(trial, state=TrialState[state])


def _single_trial(this: _Search, trial: Trial) -> tuple[str, float | None]:
    candidate = this.candidate(trial.user_attrs["candidate"])
    run = this.task.train(candidate, trial.user_attrs["seed"])
    _keep(trial, trial.user_attrs["seed"], run)
    if not run.curve or not math.isfinite(run.curve[-1]):
        trial.set_user_attr("why", "diverged")
        return "FAIL", None
    return "COMPLETE", run.curve[-1]


def _search_trial(this: _Search, trial: Trial, references: Mapping[int, Run]) -> tuple[str, float | None]:
    candidate = this.candidate(trial.user_attrs["candidate"])
    outcomes: list[float] = []
    for seed, reference in references.items():
        report = None
        if not outcomes:
            report = _reporter(this, trial, reference)
        run = this.task.train(candidate, seed, report)
        _keep(trial, seed, run)
        if run.stopped:
            return "PRUNED", None
        if not run.curve or not math.isfinite(run.curve[-1]):
            trial.set_user_attr("why", "diverged")
            return "FAIL", None
        outcomes.append(this.relative(run.curve[-1], reference.curve[-1]))
        if len(outcomes) > 1:
            trial.report(math.fsum(outcomes) / len(outcomes), len(outcomes) * len(reference.curve))
            if len(outcomes) < len(references) and trial.should_prune():
                return "PRUNED", None
    return "COMPLETE", math.fsum(outcomes) / len(outcomes)


def _reporter(this: _Search, trial: Trial, reference: Run) -> Callable[[int, float], bool]:
    def report(validations: int, value: float) -> bool:
        if validations > len(reference.curve) or not math.isfinite(value):
            return False
        trial.report(this.relative(value, reference.curve[validations - 1]), validations)
        return trial.should_prune()

    return report


def _keep(trial: Trial, seed: int, run: Run) -> None:
    trial.set_user_attr(f"run {seed}", {"curve": run.curve, "step_ms": run.step_ms, "stopped": run.stopped})


def _kept(trial: FrozenTrial) -> dict[int, Run]:
    runs: dict[int, Run] = {}
    for key, value in trial.user_attrs.items():
        if key.startswith("run "):
            runs[int(key.removeprefix("run "))] = Run(value["curve"], value["step_ms"], value["stopped"])
    return runs


# ---- what the studies hold ----


def _requeue_orphans(study: Study) -> None:
    """Trials whose process on this machine is gone wait again; one that was killed twice has failed."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        if not _is_orphan(trial):
            continue
        try:
            study.tell(trial.number, state=TrialState.FAIL)
        except UpdateFinishedTrialError:  # another process has seen it too
            continue
        params = _params(trial)
        same = [each for each in trials if _params(each) == params and not each.user_attrs.get("duplicate")]
        attempts = sum(f"{_INTERRUPTED} {each.number}" not in study.user_attrs for each in same)
        if attempts < _ATTEMPTS:
            study.enqueue_trial(dict(params), user_attrs={"enqueued": True, **params})


def _is_orphan(trial: FrozenTrial) -> bool:
    """Whether nobody runs a trial that is said to be running. This process runs none when it asks."""
    if "owner" not in trial.user_attrs:
        started = trial.datetime_start
        return started is not None and datetime.now() - started > _UNCLAIMED
    host, process = trial.user_attrs["owner"]
    return host == platform.node() and (process == os.getpid() or not _is_alive(process))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _best_trials(study: Study) -> dict[str, FrozenTrial]:
    """By candidate: its trial, the one that came furthest if there are several."""
    order = {"COMPLETE": 3, "PRUNED": 2, "FAIL": 1}
    found: dict[str, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        name = trial.user_attrs.get("candidate")
        if name is None or trial.state.name not in order:
            continue
        if name not in found or order[trial.state.name] > order[found[name].state.name]:
            found[name] = trial
    return found


def _finalists(this: _Search, study: Study) -> list[str]:
    complete = {
        name: trial.value
        for name, trial in _best_trials(study).items()
        if trial.state.name == "COMPLETE" and trial.value is not None
    }
    order = sorted(complete, key=lambda name: complete[name])
    finalists = order[: this.settings.finalists]
    plain = [name for name in order if this.candidate(name).eafo is None]
    if plain and plain[0] not in finalists and len(finalists) > 1:
        finalists[-1] = plain[0]  # a correction is to be measured against the best activation without one
    return finalists


def _references(study: Study) -> dict[int, Run]:
    runs: dict[int, Run] = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name == "COMPLETE":
            runs |= _kept(trial)
    return dict(sorted(runs.items()))


def _check_reference(this: _Search, study: Study) -> None:
    if set(_references(study)) >= set(this.settings.search_seeds):
        return
    why = "it was not trained"
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name == "FAIL" and "duplicate" not in trial.user_attrs:
            why = trial.user_attrs.get("why", "its process was killed")
    raise EAFOError(f"the model as it is cannot be trained: {why}. Delete {this.out} once that is corrected.")


def _confirmed(study: Study) -> dict[str, dict[int, Run]]:
    runs: dict[str, dict[int, Run]] = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name in ("COMPLETE", "FAIL") and "candidate" in trial.user_attrs:
            runs.setdefault(trial.user_attrs["candidate"], {}).update(_kept(trial))
    return runs


@contextmanager
def _progress(stage: Stage, verbose: bool) -> Generator[Callable[[Study], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    console = Console(file=sys.stderr, quiet=not verbose)
    with Progress(*columns, TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task(stage, total=None)

        def show(study: Study) -> None:
            everything = study.get_trials(deepcopy=False)
            trials = [
                each for each in everything if "candidate" in each.user_attrs and "duplicate" not in each.user_attrs
            ]
            done = sum(each.state.is_finished() for each in trials)
            bar.update(task, total=len(trials), completed=done, description=stage)

        yield show
