"""Which arm of a task is best, and what cannot be told from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eafo_dynamic.experiments.compare.paired import interval

__all__ = ["Near", "near_best"]

_Table = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Near:
    """The best arm of a task, and those that cannot be told from it.

    Attributes:
        best: name of the arm with the best mean.
        within: names of arms whose paired difference from the best is within noise.
    """

    best: str
    within: tuple[str, ...]


def near_best(table: _Table, seeds: Sequence[int], higher_is_better: bool) -> Near | None:
    """The best arm by its mean, and those within noise of it: the interval of the paired difference holds 0.

    Args:
        table: `{arm: {seed: value}}`.
        seeds: those of the plan; an arm that has not finished all of them with a finite value takes no part.
        higher_is_better: the metric's direction.

    Returns:
        Both; None while no arm has finished all seeds.
    """
    whole: dict[str, list[float]] = {}
    for arm, by_seed in table.items():
        found = [by_seed.get(seed, math.nan) for seed in seeds]
        if all(map(math.isfinite, found)):
            whole[arm] = found
    if not whole:
        return None
    sign = 1 if higher_is_better else -1
    best = max(whole, key=lambda arm: sign * math.fsum(whole[arm]))
    within: list[str] = []
    for arm, found in whole.items():
        low, high = interval([ours - theirs for ours, theirs in zip(found, whole[best], strict=True)])
        if arm != best and low <= 0 <= high:
            within.append(arm)
    return Near(best, tuple(within))
