"""What several tasks say together about each arm (pure functions)."""

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
        better: tasks with this verdict.
        worse: the same.
        no_difference: the same.
        undecided: tasks where it diverged or has too few seeds.
        absent: tasks that have no finished cell of this arm.
        gains: relative gain in percent of the reference's mean, by task, where it is defined.
        gain: mean of `gains` [%]; every task counts alike.
        low: lower end of the 95 % interval of `gain`; the sample are the tasks, not the seeds, so it says what
            to expect on another task of this kind. NaN with fewer than two.
        high: upper end.
        standardised: mean over the tasks of the gain in standard deviations of its paired differences (d_z),
            so that no task counts more for the unit or the size of its metric.
        standardised_low: lower end of its interval.
        standardised_high: upper end.
        time_ratio: geometric mean over the tasks of the step time ratios, or None.
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
    """Put the comparisons of several tasks together; arms are the same where their names are.

    Args:
        tasks: what `compare` returned, by the task's name.

    Returns:
        One entry an arm, in the order in which they first appear.
    """
    arms = dict.fromkeys(pair.arm for pairs in tasks.values() for pair in pairs)
    return [_one(arm, tasks) for arm in arms]


def _one(arm: str, tasks: Mapping[str, Sequence[Paired]]) -> Across:
    found = {task: pair for task, pairs in tasks.items() for pair in pairs if pair.arm == arm}
    gains = {task: pair.sign * pair.relative for task, pair in found.items() if pair.relative is not None}
    standardised = [pair.sign * pair.d_z for pair in found.values() if pair.d_z is not None]
    ratios = [pair.time_ratio for pair in found.values() if pair.time_ratio is not None]
    low, high = interval(list(gains.values()))
    standardised_low, standardised_high = interval(standardised)

    def judged(*verdicts: str) -> tuple[str, ...]:
        return tuple(task for task, pair in found.items() if pair.verdict in verdicts)

    return Across(
        arm=arm,
        better=judged("better"),
        worse=judged("worse"),
        no_difference=judged("no difference found"),
        undecided=judged("diverged", "too few seeds"),
        absent=tuple(task for task in tasks if task not in found),
        gains=gains,
        gain=_mean(list(gains.values())),
        low=low,
        high=high,
        standardised=_mean(standardised),
        standardised_low=standardised_low,
        standardised_high=standardised_high,
        time_ratio=math.exp(_mean([math.log(ratio) for ratio in ratios])) if ratios else None,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
