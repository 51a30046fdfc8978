"""What a search found: a ranking with intervals, the cost, a figure, and what to paste."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eafo_dynamic.experiments.compare.paired import Paired, compare, interval
from eafo_dynamic.experiments.compare.tables import markdown, notes, rows
from eafo_dynamic.experiments.search.candidates import Candidate

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from eafo_dynamic.experiments.search.trainings import Run, Task

__all__ = ["Answer", "Row", "make_answer"]

NOTHING = "nothing beats what you have"


@dataclass(frozen=True)
class Row:
    """A candidate in the ranking of the search.

    Attributes:
        candidate: its name.
        relative: mean relative difference from the model as it is on the same seeds [%], positive is better; NaN where
            no seed was finished.
        low: lower end of its 95 % interval; NaN with fewer than two seeds.
        high: upper end.
        seeds: seeds that were finished.
        outcome: how far it came: "finalist", "finished", "stopped" or "failed: ...".
    """

    candidate: str
    relative: float
    low: float
    high: float
    seeds: int
    outcome: str


@dataclass(frozen=True)
class Answer:
    """What a search found.

    Attributes:
        best: the candidate to take; None: nothing beats the model as it is. Where a candidate without a correction is
            within noise of the best, it is that one.
        ranking: all candidates, by how far they came and how good they were there.
        pairs: the finalists against the model as it is, on seeds that no choice has seen. The answer comes from these.
        snippet: what to paste for `best`; empty without one.
        metric: what was compared.
    """

    best: Candidate | None
    ranking: list[Row]
    pairs: list[Paired]
    snippet: str
    metric: str

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        if self.best is None:
            return f"{NOTHING}: no finalist is better beyond noise on the fresh seeds"
        pair = next(pair for pair in self.pairs if pair.arm == self.best.name)
        text = f"take {self.best.name!r}: {self.metric} {pair.mean:.4g} against {pair.reference_mean:.4g}"
        if pair.relative is not None and pair.relative_interval is not None:
            low, high = pair.relative_interval
            text += f", {pair.relative:+.1f} % [{low:+.1f}, {high:+.1f}]"
        if pair.time_ratio is not None:
            text += f"; a step takes {pair.time_ratio:.2f} times as long"
        return text

    def finals(self) -> tuple[list[dict[str, str]], list[str]]:
        """The table of the finalists, and the notes below it.

        Returns:
            Both; empty where no finalist was finished.
        """
        if not self.pairs:
            return [], []
        return rows(self.pairs), notes(self.pairs)

    def table(self) -> list[dict[str, str]]:
        """The ranking of the search.

        Returns:
            Text by column.
        """
        return [
            {
                "candidate": row.candidate,
                "gain [%]": _with_interval(row),
                "seeds": str(row.seeds),
                "outcome": row.outcome,
            }
            for row in self.ranking
        ]

    def write(self, folder: Path) -> list[Path]:
        """Writes answer.md, and with matplotlib answer.png.

        Args:
            folder: where.

        Returns:
            The files.
        """
        finals, below = self.finals()
        parts = [f"# {self.sentence}"]
        if self.snippet:
            parts.append(f"```\n{self.snippet.rstrip()}\n```")
        if finals:
            parts += ["## On seeds that no choice has seen", markdown(finals).rstrip(), *below]
        columns = "| candidate | gain [%] | seeds | outcome |\n|---|---:|---:|---|\n"
        lines = "".join(f"| {' | '.join(row.values())} |\n" for row in self.table())
        parts += ["## All candidates, on the seeds of the search", (columns + lines).rstrip()]
        page = folder / "answer.md"
        page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        written = [page]
        if self.pairs and importlib.util.find_spec("matplotlib") is not None:
            from eafo_dynamic.experiments.compare.figures import forest

            picture = folder / "answer.png"
            forest(self.pairs).savefig(picture)
            written.append(picture)
        return written


def _with_interval(row: Row) -> str:
    if math.isnan(row.relative):
        return "-"
    if math.isnan(row.low):
        return f"{row.relative:+.2f}"
    return f"{row.relative:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"


def make_answer(
    *,
    task: Task,
    candidates: Sequence[Candidate],
    searched: Mapping[str, FrozenTrial],
    references: Mapping[int, Run],
    confirmed: Mapping[str, Mapping[int, Run]],
    reference_name: str,
    relative: Callable[[float, float], float],
    higher_is_better: bool,
) -> Answer:
    """Draws the answer from what was trained.

    Args:
        task: what was trained.
        candidates: what was tried.
        searched: trial of each candidate.
        references: runs of the model as it is, by seed of the search.
        confirmed: runs on fresh seeds, by candidate and seed.
        reference_name: name of the model as it is.
        relative: relative difference of two values, below 0 where the first is better.
        higher_is_better: direction of the metric.

    Returns:
        The answer.
    """
    finals = {name: runs for name, runs in confirmed.items() if name != reference_name and runs}
    pairs = _pairs(confirmed, reference_name, task.metric, higher_is_better)
    by_name = {each.name: each for each in candidates}
    better = [pair for pair in pairs if pair.verdict == "better"]
    best = None
    if better:
        winner = max(better, key=lambda pair: pair.sign * pair.difference)
        best = by_name[_simplest(winner, better, by_name)]
    ranking = [
        _row(each.name, searched.get(each.name), references, relative, each.name in finals) for each in candidates
    ]
    order = {"finalist": 0, "finished": 1, "stopped": 2, "failed": 3}
    ranking.sort(key=lambda row: (order[row.outcome.partition(":")[0].partition(" ")[0]], -_or_low(row.relative)))
    snippet = ""
    if best is not None:
        snippet = task.snippet(best)
    return Answer(best, ranking, pairs, snippet, task.metric)


def _simplest(winner: Paired, better: Sequence[Paired], candidates: Mapping[str, Candidate]) -> str:
    """The winner, or a candidate without a correction that is within noise of it: the interval holds 0."""
    ours = dict(zip(winner.seeds, winner.differences, strict=True))
    for pair in better:
        if candidates[pair.arm].eafo is not None or candidates[winner.arm].eafo is None:
            continue
        theirs = dict(zip(pair.seeds, pair.differences, strict=True))
        low, high = interval([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
        if low <= 0 <= high:
            return pair.arm
    return winner.arm


def _pairs(
    confirmed: Mapping[str, Mapping[int, Run]], reference: str, metric: str, higher_is_better: bool
) -> list[Paired]:
    values: dict[str, dict[int, float]] = {}
    step_ms: dict[str, dict[int, float]] = {}
    for name, runs in confirmed.items():
        values[name] = {seed: run.curve[-1] for seed, run in runs.items() if run.curve}
        step_ms[name] = {seed: run.step_ms for seed, run in runs.items()}
    if len(values) < 2 or not values.get(reference):
        return []
    return compare(values, reference, metric, higher_is_better=higher_is_better, step_ms=step_ms)


def _row(
    name: str,
    trial: FrozenTrial | None,
    references: Mapping[int, Run],
    relative: Callable[[float, float], float],
    is_finalist: bool,
) -> Row:
    if trial is None:
        return Row(name, math.nan, math.nan, math.nan, 0, "failed: its process was killed")
    attributes: Mapping[str, Any] = trial.user_attrs
    gains: list[float] = []
    done = 0
    for seed, reference in references.items():
        run = attributes.get(f"run {seed}")
        if run is None:
            continue
        done += len(run["curve"])
        if not run["stopped"] and run["curve"]:
            gains.append(-100 * relative(run["curve"][-1], reference.curve[-1]))
    low, high = interval(gains)
    mean = math.fsum(gains) / len(gains) if gains else math.nan
    state = trial.state.name
    outcome = "finished"
    if is_finalist:
        outcome = "finalist"
    elif state == "PRUNED":
        total = sum(len(reference.curve) for reference in references.values())
        outcome = f"stopped after {done} of {total} validations"
    elif state == "FAIL":
        outcome = f"failed: {attributes.get('why', 'its process was killed')}"
    return Row(name, mean, low, high, len(gains), outcome)


def _or_low(value: float) -> float:
    if math.isnan(value):
        return -math.inf
    return value
