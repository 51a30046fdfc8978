"""What finished cells say: tables in the terminal; files with tables, a page and figures beside the cells."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.compare.across import summarise
from eafo_dynamic.experiments.compare.paired import Paired, compare
from eafo_dynamic.experiments.compare.plan import Plan
from eafo_dynamic.experiments.compare.results import Cell, read_cells, step_times, unpaired, values, write_csv
from eafo_dynamic.experiments.compare.tables import across_rows, html, markdown, notes, rows, write_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Evaluation", "evaluate", "write"]


class Evaluation:
    """One plan's finished cells, compared.

    Args:
        plan: the plan.

    Attributes:
        plan: the plan.
        cells: what is finished.
        pairs: every arm against its reference, by metric; the plan's own metric is the first.
        doubts: cells that did not start as their reference did.

    Raises:
        ConfigError: if no cell has logged the plan's metric.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.cells: list[Cell] = read_cells(plan.directory, [arm.name for arm in plan.arms])
        self.doubts = unpaired(self.cells, plan.reference)
        times = step_times(self.cells)
        against = {arm.name: arm.against for arm in plan.arms if arm.against is not None}
        logged = dict.fromkeys(name for cell in self.cells for name in cell.metrics)
        self.pairs: dict[str, list[Paired]] = {}
        for metric in (plan.metric, *plan.also):
            if metric not in logged:
                raise ConfigError("metric", metric, "was not logged", f"There are: {', '.join(logged)}.")
            higher = plan.higher_is_better if metric == plan.metric else None
            found = values(self.cells, metric)
            self.pairs[metric] = compare(
                *(found, plan.reference, metric),
                higher_is_better=higher,
                step_ms=times,
                seeds=plan.seeds,
                against=against,
            )

    def tables(self) -> dict[str, tuple[list[dict[str, str]], list[str]]]:
        """One table a metric, and what a reader must know of it.

        Returns:
            By heading: rows and notes; empty while nothing can be paired.
        """
        doubts = self.doubts
        return {
            f"{self.plan.title}: {metric}": (rows(pairs), notes(pairs, doubts))
            for metric, pairs in self.pairs.items()
            if pairs
        }

    def figures(self, dark: bool = False) -> dict[str, Figure]:
        """What the numbers look like.

        Args:
            dark: whether to draw on a dark ground.

        Returns:
            By name: ``differences``; ``sensitivity`` of a sweep; ``entropy`` and ``entropy_change`` where arms have
            a correction log.
        """
        from eafo_dynamic.experiments.compare import figures

        pairs = self.pairs[self.plan.metric]
        drawn: dict[str, Figure] = {"differences": figures.forest(pairs, dark=dark)} if pairs else {}
        swept = {arm.name: arm.swept for arm in self.plan.arms if arm.swept is not None}
        if self.plan.sweep is not None and any(pair.arm in swept for pair in pairs):
            drawn["sensitivity"] = figures.sensitivity(pairs, swept, self.plan.sweep, dark=dark)
        if any(cell.entropy_steps for cell in self.cells):
            drawn["entropy"] = figures.entropy_trajectories(self.cells, dark=dark)
            drawn["entropy_change"] = figures.entropy_change(self.cells, dark=dark)
        return drawn


def evaluate(plans: Sequence[Plan]) -> tuple[list[Evaluation], dict[str, tuple[list[dict[str, str]], list[str]]]]:
    """Compares what is finished of one plan or several.

    Args:
        plans: the plans.

    Returns:
        One evaluation a plan, and the tables; with several plans the last one goes across them.
    """
    done = [Evaluation(plan) for plan in plans]
    tables = {heading: table for each in done for heading, table in each.tables().items()}
    over = {each.plan.title: each.pairs[each.plan.metric] for each in done if each.pairs[each.plan.metric]}
    if len(over) > 1:
        tables[f"Over {len(over)} tasks"] = (across_rows(summarise(over)), ["Arms are the same where their names are."])
    return done, tables


def write(evaluation: Evaluation) -> list[Path]:
    """Writes results.csv, table.md and, with matplotlib, the figures and comparison.html beside the cells.

    Args:
        evaluation: of one plan.

    Returns:
        The files.
    """
    folder = evaluation.plan.directory
    tables = evaluation.tables()
    made = [write_csv(evaluation.cells, folder / "results.csv"), folder / "table.md"]
    made[1].write_text(_markdown(tables), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("without matplotlib there are no figures: pip install 'eafo-dynamic[plots]'", file=sys.stderr)
        return made
    light, dark = evaluation.figures(), evaluation.figures(dark=True)
    from eafo_dynamic.experiments.compare.figures import address

    for name, figure in light.items():
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1])
    pictures = {name: (address(light[name]), address(dark[name])) for name in light}
    made.append(write_html(html(evaluation.plan.title, tables, pictures), folder / "comparison.html"))
    return made


def _markdown(tables: Mapping[str, tuple[Any, Sequence[str]]]) -> str:
    parts: list[str] = []
    for heading, (table, below) in tables.items():
        parts += [f"### {heading}", markdown(table).rstrip(), *below]
    return "\n\n".join(parts) + "\n"
