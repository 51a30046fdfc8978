"""Several comparisons on one page: arms by tasks, questions, early entropies, curves, and each task's table."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from eafo_dynamic.experiments.compare.early import prediction_lines, predictions
from eafo_dynamic.experiments.compare.evaluation import Evaluation
from eafo_dynamic.experiments.compare.plan import Choice, Plan, content
from eafo_dynamic.experiments.compare.questions import Question, question_pairs, question_rows, sentence
from eafo_dynamic.experiments.compare.ranking import near_best
from eafo_dynamic.experiments.compare.results import values
from eafo_dynamic.experiments.compare.tables import markdown, notes, rows

__all__ = ["arms_table", "write_page"]


def arms_table(evaluations: Sequence[Evaluation]) -> list[dict[str, str]]:
    """Arms by tasks: relative difference from the task's plain activation [%].

    Args:
        evaluations: one for each task.

    Returns:
        Text by column. The best of a task is bold, what is within noise of it in italics; - where there is no cell. An
        arm that has not finished all seeds says how many it has.
    """
    arms = dict.fromkeys(cell.arm for each in evaluations for cell in each.cells)
    shown: dict[str, dict[str, str]] = {arm: {"arm": arm} for arm in arms}
    for each in evaluations:
        column = _arms_of_task(each)
        for arm, row in shown.items():
            row[_column(each)] = column.get(arm, "-")
    return list(shown.values())


def _arms_of_task(evaluation: Evaluation) -> dict[str, str]:
    """What the table of arms has of one task, by arm."""
    plan = evaluation.plan
    near = near_best(values(evaluation.cells, plan.metric), plan.seeds, evaluation.higher_is_better)
    texts = {plan.reference: "0"}
    for pair in evaluation.pairs[plan.metric]:
        if pair.relative is None or math.isnan(pair.relative):
            continue
        texts[pair.arm] = f"{pair.relative:+.1f}"
        if len(pair.seeds) < len(plan.seeds):
            texts[pair.arm] += f" ({len(pair.seeds)} of {len(plan.seeds)} seeds)"
    if near is None:
        return texts
    marks = {**dict.fromkeys(near.within, "*"), near.best: "**"}
    return {arm: f"{marks.get(arm, '')}{text}{marks.get(arm, '')}" for arm, text in texts.items()}


def _column(evaluation: Evaluation) -> str:
    if evaluation.higher_is_better:
        return f"{evaluation.plan.title} ({evaluation.plan.metric}, higher is better)"
    return evaluation.plan.title


def _training_lines(evaluation: Evaluation) -> list[str]:
    """How the arms were trained, and what was not settled by it."""
    plan = evaluation.plan
    trained = {cell.arm for cell in evaluation.cells}
    absent = [arm.name for arm in plan.arms if arm.name not in trained]
    lines = _tuning_lines(plan)
    if absent:
        lines.append(f"Not trained yet: {', '.join(absent)}.")
    for number, arm in enumerate(plan.arms):
        for earlier in plan.arms[:number]:
            if {arm.name, earlier.name} <= trained and content(arm) == content(earlier):
                lines.append(f"{arm.name} is {earlier.name} here: the same trainings, which are counted twice.")
    return lines


def _tuning_lines(plan: Plan) -> list[str]:
    if plan.tuning is None:
        return ["Learning rates: the task's for every arm."]
    seeds = ", ".join(map(str, plan.tuning.seeds))
    lines = [
        f"Learning rates: chosen by {plan.tuning.metric} with as many trainings for every arm, on seeds {seeds}; all "
        f"that was tried is in {plan.tuning.file.name}. The table has them in units of the task's; x: that of the "
        "arm's own parameters, in units of the model's."
    ]
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


def _question_lines(questions: Sequence[Question], evaluations: Sequence[Evaluation]) -> list[str]:
    tasks = {each.plan.title: str(each.plan.task) for each in evaluations}
    answered = {question.text: question_pairs(question, evaluations) for question in questions}
    if not any(answered.values()):
        return []
    lines = [
        "## Questions",
        "p is corrected for the number of rows of a question, not for the number of questions. Where several rows are "
        "of one task, at other lengths or rates, the mean gain counts them once.",
    ]
    for text, pairs in answered.items():
        if pairs:
            lines += [f"### {text}", sentence(pairs, tasks), markdown(question_rows(pairs)).rstrip()]
    return lines


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
    parts += _question_lines(questions, evaluations)
    found = predictions(early, evaluations)
    if found:
        parts += prediction_lines(found)
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
        parts += _training_lines(each)
        if pairs:
            parts += [markdown(_with_rates(rows(pairs), each.plan)).rstrip(), *notes(pairs, each.doubts)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [out, *written]
