"""Several comparisons on one page: which arm is best in each task, what else is within noise of it, and questions."""

from __future__ import annotations

import importlib
import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.compare.evaluation import Evaluation
from eafo_dynamic.experiments.compare.paired import Paired, compare, corrected, interval, is_higher_better, sign_flip
from eafo_dynamic.experiments.compare.plan import Choice, Plan, read_yaml
from eafo_dynamic.experiments.compare.results import values
from eafo_dynamic.experiments.compare.tables import markdown, notes, p_text, rows
from eafo_dynamic.experiments.compare.tuning import is_plain

__all__ = [
    "Prediction",
    "Question",
    "arms_table",
    "near_best",
    "predictions",
    "question_rows",
    "read_questions",
    "write_page",
]

_Table = Mapping[str, Mapping[int, float]]


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


@dataclass(frozen=True)
class Near:
    """The best arm of a task, and those that cannot be told from it.

    Attributes:
        best: name of the arm with the best mean.
        within: names of arms whose paired difference from the best is within noise.
    """

    best: str
    within: tuple[str, ...]


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


def arms_table(evaluations: Sequence[Evaluation]) -> list[dict[str, str]]:
    """Arms by tasks: relative difference from the task's plain activation [%].

    Args:
        evaluations: one for each task.

    Returns:
        Text by column. The best of a task is bold, what is within noise of it in italics; - where there is no cell.
    """
    arms = dict.fromkeys(cell.arm for each in evaluations for cell in each.cells)
    shown: dict[str, dict[str, str]] = {arm: {"arm": arm} for arm in arms}
    for each in evaluations:
        metric = each.plan.metric
        near = near_best(values(each.cells, metric), each.plan.seeds, _direction(each))
        relative = {pair.arm: pair.relative for pair in each.pairs[metric]}
        relative[each.plan.reference] = 0.0
        for arm, row in shown.items():
            number = relative.get(arm)
            text = "-" if number is None or math.isnan(number) else f"{number:+.1f}"
            if arm == each.plan.reference:
                text = "0"
            if near is not None and arm == near.best:
                text = f"**{text}**"
            elif near is not None and arm in near.within:
                text = f"*{text}*"
            row[_column(each)] = text
    return list(shown.values())


def _column(evaluation: Evaluation) -> str:
    if _direction(evaluation):
        return f"{evaluation.plan.title} ({evaluation.plan.metric}, higher is better)"
    return evaluation.plan.title


def _direction(evaluation: Evaluation) -> bool:
    if evaluation.plan.higher_is_better is not None:
        return evaluation.plan.higher_is_better
    return is_higher_better(evaluation.plan.metric)


def _plain(plan: Plan) -> list[str]:
    """Names of the arms without corrections and without parameters of its own."""
    return [arm.name for arm in plan.arms if is_plain(arm)]


def _best_plain(evaluation: Evaluation) -> str | None:
    plan = evaluation.plan
    plain = {*_plain(plan), plan.reference}
    table = {arm: by for arm, by in values(evaluation.cells, plan.metric).items() if arm in plain}
    near = near_best(table, plan.seeds, _direction(evaluation))
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
        table = values(each.cells, each.plan.metric)
        if question.arm not in table:
            continue
        against = _opponent(question, each)
        if against is None or against not in table or question.arm == against:
            continue
        both = {name: table[name] for name in (against, question.arm)}
        (pair,) = compare(both, against, each.plan.metric, higher_is_better=_direction(each), seeds=each.plan.seeds)
        if len(pair.seeds) > 1:
            found[each.plan.title] = pair
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
    gains = [_mean(gains) for gains in gains_by_task.values()]
    text += f"; mean gain {_mean(gains):+.1f} %"
    low, high = interval(gains)
    if math.isnan(low):
        return f"{text}."
    p, _ = sign_flip(gains)
    return f"{text} [{low:+.1f}, {high:+.1f}] over {len(gains)} tasks (p {p_text(p)})."


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
        sign = -1 if _direction(other) else 1
        entropy = [_mean(entropies[arm]) for arm in arms]
        end = [sign * _mean(ends[arm].values()) for arm in arms]
        start = [sign * _mean(starts[arm].values()) for arm in arms]
        left = [_spearman(_without(entropy, number), _without(end, number)) for number in range(len(arms))]
        found.append(
            Prediction(
                task=other.plan.title,
                arms=len(arms),
                share=_mean([cell.steps for cell in each.cells]) / _mean([cell.steps for cell in other.cells]),
                correlation=_spearman(entropy, end),
                without_one=(min(left), max(left)),
                of_metric=_spearman(start, end),
            )
        )
    return found


def _mean(numbers: Collection[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _without(numbers: Sequence[float], index: int) -> list[float]:
    return [*numbers[:index], *numbers[index + 1 :]]


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    return float(importlib.import_module("scipy.stats").spearmanr(first, second).statistic)


def _mean_with_interval(numbers: Sequence[float]) -> str:
    low, high = interval(numbers)
    text = f"{_mean(numbers):+.2f}"
    if math.isnan(low):  # as with a single task
        return text
    return f"{text} [{low:+.2f}, {high:+.2f}]"


def _prediction_lines(found: Sequence[Prediction]) -> list[str]:
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


def _tuning_lines(plan: Plan) -> list[str]:
    """How the rates were chosen, and what was not settled by it."""
    if plan.tuning is None:
        return ["Learning rates: the task's for every arm."]
    seeds = ", ".join(map(str, plan.tuning.seeds))
    lines = [f"Learning rates: {plan.tuning.file.name}, as many trainings for every arm, on seeds {seeds}."]
    unfinished = [arm.name for arm in plan.arms if arm.name not in plan.chosen]
    if unfinished:
        lines.append(f"Not tuned, and so not trained: {', '.join(unfinished)}.")
    edge = [arm.name for arm in plan.arms if arm.name in plan.chosen and plan.chosen[arm.name].at_the_edge]
    if edge:
        lines.append(f"Chosen at the edge of what was tried, so that a better rate may lie beyond: {', '.join(edge)}.")
    return lines


def _with_rates(table: Sequence[Mapping[str, str]], plan: Plan) -> list[dict[str, str]]:
    """The rows of a table, in the order of the plan's arms, with the rates that were chosen."""
    if not plan.chosen:
        return [dict(row) for row in table]
    names = {arm.name: arm.name for arm in plan.arms} | {f"{plan.reference} (reference)": plan.reference}
    with_rates: list[dict[str, str]] = []
    for row in table:
        choice = plan.chosen.get(names.get(row["arm"], ""))
        with_rates.append({"arm": row["arm"], "rate": _rate(choice), **row})
    return with_rates


def _rate(choice: Choice | None) -> str:
    if choice is None:
        return "-"
    if choice.multiple is None:
        return f"{choice.rate:g}"
    return f"{choice.rate:g} x {choice.multiple:g}"


def write_page(
    evaluations: Sequence[Evaluation],
    questions: Sequence[Question],
    out: Path,
    *,
    forest_arms: Sequence[str] = (),
    curves_of: Sequence[str] = (),
    early: Sequence[Evaluation] = (),
    configs: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes the page in Markdown, and its figures beside it.

    Args:
        evaluations: one for each task.
        questions: what is asked across tasks.
        out: the page; figures get its name and an ending. Its folder is made if it is not there.
        forest_arms: arms in the figure over tasks; none: all that every task has.
        curves_of: names of plans whose loss is drawn against steps and seconds.
        early: evaluations of plans that measured early entropies.
        configs: path of each plan by its name, for the commands.

    Returns:
        The files.
    """
    from eafo_dynamic.experiments.compare.figures import loss_curves, over_tasks

    pairs_by_task = {each.plan.title: each.pairs[each.plan.metric] for each in evaluations}
    written: list[Path] = []
    parts = [
        "# Activations compared",
        "Relative difference of the test metric from each task's plain activation [%]; below 0 is better unless the "
        "column says otherwise. **Bold**: the arm with the best mean of the test metric, which flatters it. *Italic*: "
        "within noise of it, the 95 % interval of the paired difference, not corrected for the number of arms, holds 0."
        " Intervals in percent take the mean of the plain activation as known.",
        markdown(arms_table(evaluations)).rstrip(),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = out.with_name(f"{out.stem}_tasks.png")
    over_tasks(pairs_by_task, forest_arms).savefig(picture, dpi=80)
    written.append(picture)
    parts.append(f"![Relative differences over tasks]({picture.name})")
    tasks = {each.plan.title: str(each.plan.task) for each in evaluations}
    parts += [
        "## Questions",
        "p is corrected for the number of rows of a question, not for the number of questions. Where several rows are "
        "of one task, at other lengths or rates, the mean gain counts them once.",
    ]
    for question in questions:
        pairs = question_pairs(question, evaluations)
        if pairs:
            parts += [f"### {question.text}", sentence(pairs, tasks), markdown(question_rows(pairs)).rstrip()]
    found = predictions(early, evaluations)
    if found:
        parts += _prediction_lines(found)
    for each in evaluations:
        if each.plan.name in curves_of:
            picture = out.with_name(f"{out.stem}_{each.plan.name}.png")
            loss_curves(each.cells, each.plan.reference).savefig(picture, dpi=80)
            written.append(picture)
            parts += [f"### {each.plan.title}: against steps and seconds", f"![{each.plan.title}]({picture.name})"]
    parts.append("## Detail")
    for each in evaluations:
        pairs = each.pairs[each.plan.metric]
        command = shlex.join(
            ["eafo-dynamic", "compare", "--config", (configs or {}).get(each.plan.name, each.plan.name)]
        )
        parts += [f"### {each.plan.title}", f"`{command} --jobs 2`"]
        parts += _tuning_lines(each.plan)
        if pairs:
            parts += [markdown(_with_rates(rows(pairs), each.plan)).rstrip(), *notes(pairs, each.doubts)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [out, *written]
