"""Several comparisons on one page: which arm is best in each task, what else is within noise of it, and questions."""

from __future__ import annotations

import importlib
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.compare.evaluation import Evaluation
from eafo_dynamic.experiments.compare.paired import ALPHA, Paired, compare, holm, interval, is_higher_better, sign_flip
from eafo_dynamic.experiments.compare.plan import read_yaml
from eafo_dynamic.experiments.compare.results import values
from eafo_dynamic.experiments.compare.tables import markdown, notes, rows

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
        against: name of another; "reference" for the plan's, "best" for the best arm without corrections and without
            parameters of its own.
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
    """How well entropies that were measured early order the arms of a task as their final metric does.

    Attributes:
        task: its title.
        arms: number of arms.
        correlation: Spearman's rank correlation of early entropy and final metric; above 0 where a lower entropy goes
            with a better end.
    """

    task: str
    arms: int
    correlation: float


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


def near_best(table: _Table, higher_is_better: bool) -> Near:
    """The best arm by its mean, and those within noise of it: the interval of the paired difference holds 0.

    Args:
        table: `{arm: {seed: value}}`; arms with a value that is not finite are left out.
        higher_is_better: the metric's direction.

    Returns:
        Both; compared over the seeds that all arms have.

    Raises:
        ConfigError: if no seed is finished by all arms.
    """
    finite = {arm: by_seed for arm, by_seed in table.items() if all(map(math.isfinite, by_seed.values()))}
    seeds: list[int] = []
    if finite:
        seeds = sorted(set.intersection(*(set(by_seed) for by_seed in finite.values())))
    if not seeds:
        raise ConfigError("--page", list(table), "no seed is finished by all arms", "Run the missing cells.")
    sign = 1 if higher_is_better else -1
    means = {arm: sign * math.fsum(by_seed[seed] for seed in seeds) / len(seeds) for arm, by_seed in finite.items()}
    best = max(means, key=lambda arm: means[arm])
    within: list[str] = []
    for arm, by_seed in finite.items():
        low, high = interval([by_seed[seed] - finite[best][seed] for seed in seeds])
        if arm != best and not (low > 0 or high < 0):
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
        near = near_best(values(each.cells, metric), _direction(each))
        relative = {pair.arm: pair.relative for pair in each.pairs[metric]}
        relative[each.plan.reference] = 0.0
        for arm, row in shown.items():
            number = relative.get(arm)
            text = "-" if number is None or math.isnan(number) else f"{number:+.1f}"
            if arm == each.plan.reference:
                text = "0"
            if arm == near.best:
                text = f"**{text}**"
            elif arm in near.within:
                text = f"*{text}*"
            row[each.plan.title] = text
    return list(shown.values())


def _direction(evaluation: Evaluation) -> bool:
    if evaluation.plan.higher_is_better is not None:
        return evaluation.plan.higher_is_better
    return is_higher_better(evaluation.plan.metric)


def best_plain(evaluation: Evaluation) -> str:
    """Name of the best arm without corrections and without parameters of its own.

    Args:
        evaluation: of one task.

    Returns:
        The arm's name.
    """
    from eafo_dynamic.experiments.compare.tuning import is_plain

    plain = {arm.name for arm in evaluation.plan.arms if is_plain(arm)} | {evaluation.plan.reference}
    table = {arm: by for arm, by in values(evaluation.cells, evaluation.plan.metric).items() if arm in plain}
    return near_best(table, _direction(evaluation)).best


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
        against = question.against
        if against == "best":
            against = best_plain(each)
        elif against == "reference":
            against = each.plan.reference
        if question.arm not in table or against not in table or question.arm == against:
            continue
        both = {name: table[name] for name in (against, question.arm)}
        (pair,) = compare(both, against, each.plan.metric, higher_is_better=_direction(each))
        if len(pair.seeds) > 1:
            found[each.plan.title] = pair
    corrected = holm([pair.p for pair in found.values()])
    return {title: _corrected(pair, p) for (title, pair), p in zip(found.items(), corrected, strict=True)}


def _corrected(pair: Paired, p: float) -> Paired:
    from dataclasses import replace

    verdict = "no difference found"
    if p < ALPHA and pair.low * pair.high > 0:
        verdict = "better" if pair.sign * pair.difference > 0 else "worse"
    return replace(pair, p_corrected=p, verdict=verdict)


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
                "p": f"{pair.p_corrected:.3f}",
                "verdict": verdict,
            }
        )
    return table


def sentence(pairs: Mapping[str, Paired]) -> str:
    """What the pairs of a question say, in one sentence.

    Args:
        pairs: from `question_pairs`.

    Returns:
        For example "Better in 3 of 8 tasks, worse in 1; mean gain +1.2 % [-0.3, +2.9] over the tasks."
    """
    better = sum(pair.verdict == "better" for pair in pairs.values())
    worse = sum(pair.verdict == "worse" for pair in pairs.values())
    gains = [pair.sign * pair.relative for pair in pairs.values() if pair.relative is not None]
    low, high = interval(gains)
    mean = math.fsum(gains) / max(1, len(gains))
    p, _ = sign_flip(gains)
    text = f"Better in {better} of {len(pairs)} tasks, worse in {worse}; mean gain {mean:+.1f} %"
    if math.isnan(low):
        return f"{text}."
    return f"{text} [{low:+.1f}, {high:+.1f}] over the tasks (p {p:.3f})."


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
    stats = importlib.import_module("scipy.stats")
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
        arms = [arm for arm in entropies if arm in ends]
        if len(arms) < 3:
            continue
        sign = -1 if _direction(other) else 1
        early_means = [math.fsum(entropies[arm]) / len(entropies[arm]) for arm in arms]
        end_means = [sign * math.fsum(ends[arm].values()) / len(ends[arm]) for arm in arms]
        correlation = float(stats.spearmanr(early_means, end_means).statistic)
        found.append(Prediction(other.plan.title, len(arms), correlation))
    return found


def _prediction_lines(found: Sequence[Prediction]) -> list[str]:
    correlations = [each.correlation for each in found]
    mean = math.fsum(correlations) / len(correlations)
    text = f"Mean rank correlation {mean:+.2f}"
    low, high = interval(correlations)
    if not math.isnan(low):  # as with a single task
        text += f" [{low:+.2f}, {high:+.2f}]"
    table = [
        {"task": each.task, "arms": str(each.arms), "rank correlation": f"{each.correlation:+.2f}"} for each in found
    ]
    return [
        "### Does entropy, measured early, predict the final order of activations?",
        f"{text}, tasks: {len(found)}; +1: the lower the entropy, the better the end.",
        markdown(table).rstrip(),
    ]


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
        "Relative difference of the test metric from each task's plain activation [%]. **Bold**: the best arm of a "
        "task. *Italic*: within noise of it, the 95 % interval of the paired difference holds 0.",
        markdown(arms_table(evaluations)).rstrip(),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = out.with_name(f"{out.stem}_tasks.png")
    over_tasks(pairs_by_task, forest_arms).savefig(picture, dpi=80)
    written.append(picture)
    parts.append(f"![Relative differences over tasks]({picture.name})")
    parts.append("## Questions")
    for question in questions:
        pairs = question_pairs(question, evaluations)
        if pairs:
            parts += [f"### {question.text}", sentence(pairs), markdown(question_rows(pairs)).rstrip()]
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
        if each.plan.tuning is not None:
            file = each.plan.tuning.file.name
            parts.append(
                f"Learning rates: {file}, the same number of trainings for every arm, on seeds "
                f"{', '.join(map(str, each.plan.tuning.seeds))}."
            )
        if pairs:
            parts += [markdown(rows(pairs)).rstrip(), *notes(pairs, each.doubts)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [out, *written]
