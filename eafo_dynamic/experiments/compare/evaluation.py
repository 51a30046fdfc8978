"""The evaluation of finished cells: tables, figures, and the files that hold them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.compare.across import summarise
from eafo_dynamic.experiments.compare.cell import expected_fingerprint
from eafo_dynamic.experiments.compare.paired import Paired, compare, is_higher_better
from eafo_dynamic.experiments.compare.plan import Plan
from eafo_dynamic.experiments.compare.results import Cell, read_cells, step_times, unpaired, values, write_csv
from eafo_dynamic.experiments.compare.tables import across_rows, html, markdown, notes, rows, write_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Evaluation", "evaluate", "write"]


Tables = dict[str, tuple[list[dict[str, str]], list[str]]]
"""By heading: the rows of a table, and the notes below it."""


class Evaluation:
    """The comparison of one plan's finished cells.

    Args:
        plan: the plan.

    Attributes:
        plan: the plan.
        cells: the finished cells.
        pairs: by metric, every arm compared with its reference; the plan's own metric is the first.
        doubts: what makes a pair unfair: cells that did not start as their reference did, or that were not trained as
            the plan says now.

    Raises:
        ConfigError: if no cell has logged the plan's metric.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.cells: list[Cell] = read_cells(plan.directory, [arm.name for arm in plan.arms])
        self.doubts = unpaired(self.cells, plan.reference) + _made_otherwise(plan, self.cells)
        times = step_times(self.cells)
        against = {arm.name: arm.against for arm in plan.arms if arm.against is not None}
        logged = dict.fromkeys(name for cell in self.cells for name in cell.metrics)
        self.pairs: dict[str, list[Paired]] = {}
        for metric in (plan.metric, *plan.also):
            if metric not in logged:
                raise ConfigError("metric", metric, "was not logged", f"There are: {', '.join(logged)}.")
            higher = plan.higher_is_better if metric == plan.metric else None
            self.pairs[metric] = compare(
                values(self.cells, metric),
                plan.reference,
                metric,
                higher_is_better=higher,
                step_ms=times,
                seeds=plan.seeds,
                against=against,
            )

    @property
    def higher_is_better(self) -> bool:
        """The direction of the plan's own metric."""
        if self.plan.higher_is_better is not None:
            return self.plan.higher_is_better
        return is_higher_better(self.plan.metric)

    def tables(self) -> Tables:
        """One table per metric, with notes on what a reader must know.

        Returns:
            The tables; none while nothing can be paired.
        """
        return {
            f"{self.plan.title}: {metric}": (rows(pairs), notes(pairs, self.doubts) + self._unplanned_seeds())
            for metric, pairs in self.pairs.items()
            if pairs
        }

    def _unplanned_seeds(self) -> list[str]:
        seeds = sorted({cell.seed for cell in self.cells} - set(self.plan.seeds))
        if not seeds:
            return []
        return [f"Finished, but not in the plan: seed {', '.join(map(str, seeds))}. --seeds adds them."]

    def figures(self, dark: bool = False) -> dict[str, Figure]:
        """Draws the comparison of the plan's own metric, and the entropies.

        Args:
            dark: whether to draw on a dark background.

        Returns:
            By name: ``differences``; ``sensitivity`` of a sweep; ``entropy`` and ``entropy_change`` where arms have
            a correction log.
        """
        from eafo_dynamic.experiments.compare import figures

        pairs = self.pairs[self.plan.metric]
        drawn: dict[str, Figure] = {}
        if pairs:
            drawn["differences"] = figures.forest(pairs, dark=dark)
        swept = {arm.name: arm.swept for arm in self.plan.arms if arm.swept is not None}
        if self.plan.sweep is not None and any(pair.arm in swept for pair in pairs):
            drawn["sensitivity"] = figures.sensitivity(pairs, swept, self.plan.sweep, dark=dark)
        if any(cell.entropy_steps for cell in self.cells):
            drawn["entropy"] = figures.entropy_trajectories(self.cells, dark=dark)
            drawn["entropy_change"] = figures.entropy_change(self.cells, dark=dark)
        return drawn


def _made_otherwise(plan: Plan, cells: Sequence[Cell]) -> list[str]:
    """One line for each arm with cells that were trained with other settings than the plan has now."""
    seeds: dict[str, list[int]] = {}
    for cell in cells:
        if cell.fingerprint != expected_fingerprint(plan, plan.arm(cell.arm), cell.seed):
            seeds.setdefault(cell.arm, []).append(cell.seed)
    return [
        f"{arm}, seed {', '.join(map(str, of_arm))}: made with other settings, or by a version with other options"
        for arm, of_arm in seeds.items()
    ]


def evaluate(plans: Sequence[Plan]) -> tuple[list[Evaluation], Tables]:
    """Compares what is finished of one plan or several.

    Args:
        plans: the plans.

    Returns:
        One evaluation per plan, and the tables; with several plans the last table is over all of them.
    """
    evaluations = [Evaluation(plan) for plan in plans]
    tables: Tables = {}
    pairs_by_task: dict[str, list[Paired]] = {}
    for each in evaluations:
        tables.update(each.tables())
        pairs = each.pairs[each.plan.metric]
        if pairs:
            pairs_by_task[each.plan.title] = pairs
    if len(pairs_by_task) > 1:
        note = "Arms are the same where their names are."
        tables[f"Over {len(pairs_by_task)} tasks"] = (across_rows(summarise(pairs_by_task)), [note])
    return evaluations, tables


def write(evaluation: Evaluation) -> list[Path]:
    """Writes results.csv, table.md and, with matplotlib, the figures and comparison.html beside the cells.

    Args:
        evaluation: of one plan.

    Returns:
        The files.
    """
    folder = evaluation.plan.directory
    tables = evaluation.tables()
    table = folder / "table.md"
    table.write_text(_markdown(tables), encoding="utf-8")
    written = [write_csv(evaluation.cells, folder / "results.csv"), table]
    if importlib.util.find_spec("matplotlib") is None:
        print("without matplotlib there are no figures: pip install 'eafo-dynamic[plots]'", file=sys.stderr)
        return written
    from eafo_dynamic.experiments.compare.figures import address

    light = evaluation.figures()
    dark = evaluation.figures(dark=True)
    for name, figure in light.items():
        picture = folder / f"{name}.png"
        figure.savefig(picture)
        written.append(picture)
    pictures = {name: (address(light[name]), address(dark[name])) for name in light}
    written.append(write_html(html(evaluation.plan.title, tables, pictures), folder / "comparison.html"))
    return written


def _markdown(tables: Tables) -> str:
    parts: list[str] = []
    for heading, (table, below) in tables.items():
        parts += [f"### {heading}", markdown(table).rstrip(), *below]
    return "\n\n".join(parts) + "\n"
