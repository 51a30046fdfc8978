"""What several tasks together say about each arm (pure functions)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eafo_dynamic.experiments.compare.paired import Paired, interval

__all__ = ["Across", "summarise"]


@dataclass(frozen=True)
class Across:
    """One arm over all tasks. Gains are positive where the arm is better, whatever the metric's direction.

    Attributes:
        arm: name of the arm.
        better: tasks in which its verdict is `better`.
        worse: tasks in which its verdict is `worse`.
        no_difference: tasks in which its verdict is `no difference found`.
        undecided: tasks in which it diverged or has too few seeds.
        absent: tasks that have no finished cell of this arm.
        gains: relative gain in percent of the reference's mean, by task, where it is defined.
        gain: mean of `gains` [%]; every task has the same weight.
        low: lower end of the 95 % interval of `gain`. The sample is the tasks, not the seeds, so the interval says
            what to expect on another task of this kind. NaN with fewer than two tasks.
        high: upper end of that interval.
        standardised: mean over the tasks of the gain in standard deviations of its paired differences (d_z),
            so that the unit and the size of a metric do not give a task more weight.
        standardised_low: lower end of its interval.
        standardised_high: upper end.
        time_ratio: geometric mean over the tasks of the step time ratios; None without times.
    """

    arm: str
    better: tuple[str, ...]
    worse: tuple[str, ...]
    no_difference: tuple[str, ...]
    undecided: tuple[str, ...]
    absent: tuple[str, ...]
    gains: dict[str, float]
    gain: float
    low: float
    high: float
    standardised: float
    standardised_low: float
    standardised_high: float
    time_ratio: float | None


def summarise(tasks: Mapping[str, Sequence[Paired]]) -> list[Across]:
    """Summarise each arm over several tasks; arms of the same name are the same arm.

    Args:
        tasks: what `compare` returned, by the task's name.

    Returns:
        One entry per arm, in the order in which the arms first appear.
    """
    arms = dict.fromkeys(pair.arm for pairs in tasks.values() for pair in pairs)
    return [_over_tasks(arm, tasks) for arm in arms]


def _over_tasks(arm: str, tasks: Mapping[str, Sequence[Paired]]) -> Across:
    found: dict[str, Paired] = {}
    for task, pairs in tasks.items():
        for pair in pairs:
            if pair.arm == arm:
                found[task] = pair
    gains = {task: pair.sign * pair.relative for task, pair in found.items() if pair.relative is not None}
    standardised = [pair.sign * pair.d_z for pair in found.values() if pair.d_z is not None]
    log_ratios = [math.log(pair.time_ratio) for pair in found.values() if pair.time_ratio is not None]
    time_ratio = None
    if log_ratios:
        time_ratio = math.exp(_mean(log_ratios))
    low, high = interval(list(gains.values()))
    standardised_low, standardised_high = interval(standardised)

    def with_verdict(*verdicts: str) -> tuple[str, ...]:
        return tuple(task for task, pair in found.items() if pair.verdict in verdicts)

    return Across(
        arm=arm,
        better=with_verdict("better"),
        worse=with_verdict("worse"),
        no_difference=with_verdict("no difference found"),
        undecided=with_verdict("diverged", "too few seeds"),
        absent=tuple(task for task in tasks if task not in found),
        gains=gains,
        gain=_mean(list(gains.values())),
        low=low,
        high=high,
        standardised=_mean(standardised),
        standardised_low=standardised_low,
        standardised_high=standardised_high,
        time_ratio=time_ratio,
    )


def _mean(values: Sequence[float]) -> float:
    if not values:
        return math.nan
    return math.fsum(values) / len(values)
