"""The figure of a benchmark: ratios with their targets, and how the cost grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = ["draw"]


def draw(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draws ratios as bars with their quartiles, targets as ticks, and the growth of the cost as lines.

    Args:
        rows: from ``run_benchmark``.
        path: file to write: .png, .svg or .pdf.
    """
    import matplotlib.pyplot as plt

    from eafo_dynamic.records.figures.style import LIGHT, drawing, save

    ratios = [row for row in rows if row["unit"] == "x"]
    growth = [row for row in rows if "over" in row]
    overs = list(dict.fromkeys(row["over"] for row in growth))
    with drawing(LIGHT):
        bars_height = 0.24 * len(ratios) + 1.2
        growth_height = 2.4 if growth else 0.0
        figure = plt.figure(figsize=(6.5, max(bars_height + growth_height, 3.0)), layout="constrained")
        heights = [max(bars_height, 1e-3), max(growth_height, 1e-3)]  # [inches]; matplotlib takes no 0
        grid = figure.add_gridspec(2, max(len(overs), 1), height_ratios=heights)
        if ratios:
            _bars(figure.add_subplot(grid[0, :]), ratios)
        for column, over in enumerate(overs):
            axes = figure.add_subplot(grid[1, column])
            _line(axes, over, [row for row in growth if row["over"] == over])
        save(figure, path)


def _bars(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    from eafo_dynamic.records.figures.style import LIGHT

    for place, row in enumerate(rows):
        target = row["target"]
        if target is None:
            colour = LIGHT.faint
        elif row["value"] <= target:
            colour = LIGHT.lines[0]
        else:
            colour = LIGHT.lines[1]
        axes.barh(place, row["value"], color=colour, height=0.7)
        if "low" in row:
            axes.plot([row["low"], row["high"]], [place, place], color=LIGHT.ink, linewidth=1)
        if target is not None:
            axes.plot([target, target], [place - 0.45, place + 0.45], color=LIGHT.ink, linewidth=2)
        end = max(row["value"], row.get("high", 0.0), target or 0.0)
        axes.annotate(f" {row['value']:.2f}", (end, place), va="center", fontsize=7)
    labels = [f"{row['case']} / {row['beside']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    _write_out(axes.xaxis)
    axes.set_xlabel("ratio; black ticks are targets, thin lines the middle half of the pairs")


def _line(axes: Axes, over: str, rows: Sequence[dict[str, Any]]) -> None:
    axes.plot([row["at"] for row in rows], [row["value"] for row in rows], marker="o")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _write_out(axes.yaxis)
    axes.set_xlabel(over)
    axes.set_ylabel("us per site and step")


def _write_out(axis: Axis) -> None:
    """Ticks of a logarithmic axis without powers of ten."""
    from matplotlib.ticker import FormatStrFormatter

    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(FormatStrFormatter("%g"))
