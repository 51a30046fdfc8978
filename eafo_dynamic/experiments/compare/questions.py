"""Questions to several comparisons: one arm against another, in every task that has both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.compare.evaluation import Evaluation
from eafo_dynamic.experiments.compare.paired import Paired, compare, corrected, interval, sign_flip
from eafo_dynamic.experiments.compare.plan import Plan, read_yaml
from eafo_dynamic.experiments.compare.ranking import near_best
from eafo_dynamic.experiments.compare.results import values
from eafo_dynamic.experiments.compare.tables import p_text
from eafo_dynamic.experiments.compare.tuning import is_plain

__all__ = ["Question", "question_pairs", "question_rows", "read_questions", "sentence"]


@dataclass(frozen=True)
class Question:
    """One arm against another, in every task that has both.

    Attributes:
        text: as the page asks it.
        arm: name of an arm.
        against: name of another; "reference" for the plan's; "best" for the arm with the best mean of those without
            corrections and without parameters of its own; "base" for the one of these that has the activation of
            `arm`.
    """

    text: str
    arm: str
    against: str


def read_questions(path: Path) -> list[Question]:
    """Reads questions from a YAML list of mappings with question, arm and against.

    Args:
        path: the file.

    Returns:
        The questions.

    Raises:
        ConfigError: for anything else.
    """
    given = read_yaml(path, "--questions")
    mend = "Write a list of mappings with question, arm and against."
    if not isinstance(given, list):
        raise ConfigError("--questions", str(path), "is no list", mend)
    questions: list[Question] = []
    for each in cast("list[Any]", given):
        if not isinstance(each, dict) or set(cast("dict[str, Any]", each)) != {"question", "arm", "against"}:
            raise ConfigError("--questions", each, "is no question", mend)
        questions.append(Question(str(each["question"]), str(each["arm"]), str(each["against"])))
    return questions


def _plain(plan: Plan) -> list[str]:
    """Names of the arms without corrections and without parameters of its own."""
    return [arm.name for arm in plan.arms if is_plain(arm)]


def _best_plain(evaluation: Evaluation) -> str | None:
    plan = evaluation.plan
    plain = {*_plain(plan), plan.reference}
    table = {arm: by for arm, by in values(evaluation.cells, plan.metric).items() if arm in plain}
    near = near_best(table, plan.seeds, evaluation.higher_is_better)
    return None if near is None else near.best


def _plain_of(plan: Plan, name: str) -> str | None:
    """The plain arm that has the activation of another arm; None: there is none."""
    activation = plan.arm(name).activation
    for plain in _plain(plan):
        if plan.arm(plain).activation == activation:
            return plain
    return None


def _opponent(question: Question, evaluation: Evaluation) -> str | None:
    plan = evaluation.plan
    if question.against == "best":
        return _best_plain(evaluation)
    if question.against == "reference":
        return plan.reference
    if question.against == "base":
        return _plain_of(plan, question.arm)
    return question.against


def question_pairs(question: Question, evaluations: Sequence[Evaluation]) -> dict[str, Paired]:
    """The arm of a question against the other, in every task that has finished cells of both.

    Args:
        question: the question.
        evaluations: one for each task.

    Returns:
        By title of the task; p-values are corrected by Holm's method for the number of tasks.
    """
    found: dict[str, Paired] = {}
    for each in evaluations:
        plan = each.plan
        table = values(each.cells, plan.metric)
        if question.arm not in table:
            continue
        against = _opponent(question, each)
        if against is None or against not in table or question.arm == against:
            continue
        both = {name: table[name] for name in (against, question.arm)}
        (pair,) = compare(both, against, plan.metric, higher_is_better=each.higher_is_better, seeds=plan.seeds)
        if len(pair.seeds) > 1:
            found[plan.title] = pair
    return dict(zip(found, corrected(list(found.values())), strict=True))


def question_rows(pairs: Mapping[str, Paired]) -> list[dict[str, str]]:
    """The table of one question.

    Args:
        pairs: from `question_pairs`.

    Returns:
        Text by column.
    """
    table: list[dict[str, str]] = []
    for title, pair in pairs.items():
        relative = "-"
        if pair.relative is not None and pair.relative_interval is not None:
            low, high = pair.relative_interval
            relative = f"{pair.relative:+.2f} [{low:+.2f}, {high:+.2f}]"
        verdict = pair.verdict
        if verdict in ("better", "worse"):
            verdict = f"**{verdict}**"
        table.append(
            {
                "task": title,
                "against": pair.reference,
                "seeds": str(len(pair.seeds)),
                "relative [%]": relative,
                "w/t/l": f"{pair.wins}/{pair.ties}/{pair.losses}",
                "p": p_text(pair.p_corrected),
                "verdict": verdict,
            }
        )
    return table


def sentence(pairs: Mapping[str, Paired], tasks: Mapping[str, str]) -> str:
    """What the pairs of a question say, in one sentence.

    Args:
        pairs: from `question_pairs`.
        tasks: by title, the task itself; gains of plans that have one task count once, as their mean.

    Returns:
        For example "Better in 3 of 8, worse in 1; mean gain +1.2 % [-0.3, +2.9] over 7 tasks (p 0.090)."
    """
    better = sum(pair.verdict == "better" for pair in pairs.values())
    worse = sum(pair.verdict == "worse" for pair in pairs.values())
    gains_by_task: dict[str, list[float]] = {}
    for title, pair in pairs.items():
        if pair.relative is not None:
            gains_by_task.setdefault(tasks[title], []).append(pair.sign * pair.relative)
    text = f"Better in {better} of {len(pairs)}, worse in {worse}"
    if not gains_by_task:
        return f"{text}."
    gains = [fmean(gains) for gains in gains_by_task.values()]
    text += f"; mean gain {fmean(gains):+.1f} %"
    low, high = interval(gains)
    if math.isnan(low):
        return f"{text}."
    p, _ = sign_flip(gains)
    return f"{text} [{low:+.1f}, {high:+.1f}] over {len(gains)} tasks (p {p_text(p)})."
