"""Whether entropies that are measured early predict the order of activations at the end."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from eafo_dynamic.experiments.compare.evaluation import Evaluation
from eafo_dynamic.experiments.compare.paired import interval
from eafo_dynamic.experiments.compare.results import values
from eafo_dynamic.experiments.compare.tables import markdown

__all__ = ["Prediction", "prediction_lines", "predictions"]


@dataclass(frozen=True)
class Prediction:
    """How well what is measured early orders the arms of a task as their final metric does.

    Attributes:
        task: its title.
        arms: number of arms.
        share: steps of the early training, over those of the final one.
        correlation: Spearman's rank correlation of early entropy and final metric; above 0 where a lower entropy goes
            with a better end.
        without_one: lowest and highest of the correlations that are left when one arm is taken out.
        of_metric: the same correlation for the early value of the metric itself.
    """

    task: str
    arms: int
    share: float
    correlation: float
    without_one: tuple[float, float]
    of_metric: float


def predictions(early: Sequence[Evaluation], final: Sequence[Evaluation]) -> list[Prediction]:
    """Whether entropies that were measured early predict the order of arms at the end.

    A plan of early entropies has the name of another plan and ``_early``. Its arms are those of the other that bear the
    same name; their entropies are `entropy_last`, at the end of a short training.

    Args:
        early: evaluations of the plans with early entropies.
        final: of the plans that they belong to.

    Returns:
        One for each pair with at least three arms.
    """
    by_name = {each.plan.name: each for each in final}
    found: list[Prediction] = []
    for each in early:
        other = by_name.get(each.plan.name.removesuffix("_early"))
        if other is None:
            continue
        entropies: dict[str, list[float]] = {}
        for cell in each.cells:
            if cell.entropy_last is not None:
                entropies.setdefault(cell.arm, []).append(cell.entropy_last)
        ends = values(other.cells, other.plan.metric)
        starts = values(each.cells, other.plan.metric)
        arms = [arm for arm in entropies if arm in ends]
        if len(arms) < 4:
            continue
        sign = -1 if other.higher_is_better else 1
        entropy = [fmean(entropies[arm]) for arm in arms]
        end = [sign * fmean(ends[arm].values()) for arm in arms]
        start = [sign * fmean(starts[arm].values()) for arm in arms]
        left = [_spearman(_without(entropy, number), _without(end, number)) for number in range(len(arms))]
        found.append(
            Prediction(
                task=other.plan.title,
                arms=len(arms),
                share=fmean([cell.steps for cell in each.cells]) / fmean([cell.steps for cell in other.cells]),
                correlation=_spearman(entropy, end),
                without_one=(min(left), max(left)),
                of_metric=_spearman(start, end),
            )
        )
    return found


def _without(numbers: Sequence[float], index: int) -> list[float]:
    return [*numbers[:index], *numbers[index + 1 :]]


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    return float(importlib.import_module("scipy.stats").spearmanr(first, second).statistic)


def _mean_with_interval(numbers: Sequence[float]) -> str:
    low, high = interval(numbers)
    text = f"{fmean(numbers):+.2f}"
    if math.isnan(low):  # as with a single task
        return text
    return f"{text} [{low:+.2f}, {high:+.2f}]"


def prediction_lines(found: Sequence[Prediction]) -> list[str]:
    """The section of a page.

    Args:
        found: from `predictions`.

    Returns:
        Its paragraphs, in Markdown.
    """
    entropy = _mean_with_interval([each.correlation for each in found])
    metric = _mean_with_interval([each.of_metric for each in found])
    table: list[dict[str, str]] = []
    for each in found:
        lowest, highest = each.without_one
        table.append(
            {
                "task": each.task,
                "arms": str(each.arms),
                "share of training": f"{100 * each.share:.0f} %",
                "entropy": f"{each.correlation:+.2f}",
                "without one arm": f"{lowest:+.2f} to {highest:+.2f}",
                "early metric": f"{each.of_metric:+.2f}",
            }
        )
    return [
        "### Does entropy, measured early, predict the final order of activations?",
        f"Mean rank correlation of early entropy and final metric {entropy}, tasks: {len(found)}; +1: the lower the "
        f"entropy, the better the end. For the metric itself, measured as early: {metric}. Early is a short training "
        "of its own, at the task's rate.",
        markdown(table).rstrip(),
    ]
