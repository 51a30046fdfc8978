"""Figures from the snapshots of a log: how each site's function and density went."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from eafo_dynamic.errors import LogError
from eafo_dynamic.records import CorrectionLog
from eafo_dynamic.records.figures.style import LIGHT, Style, evenly
from eafo_dynamic.records.names import shortened
from eafo_dynamic.records.schema import AMPLITUDES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["densities", "functions"]

_CELLS = 12
_FILM = 8

Snapshot = dict[str, Any]


def functions(log: CorrectionLog, column: str = "entropy", style: Style = LIGHT) -> Figure:
    """Draw how each site's function went: the base, the first snapshot to the last, and the correction alone.

    Args:
        log: the log; of more than 12 sites, 12 are drawn, evenly spaced.
        column: not used: the figure is about the functions.
        style: colours.

    Returns:
        A figure with two panels per site, the function above its correction.
    """
    chosen = _chosen(log)
    last_step = max(film[-1]["step"] for film in chosen.values())
    first_step = min(film[0]["step"] for film in chosen.values())

    def colour(step: int) -> Any:
        return style.scale((step - first_step) / max(last_step - first_step, 1))

    def cell(part: SubFigure, site: str, film: list[Snapshot]) -> None:
        upper, lower = part.subplots(2, 1, sharex=True, height_ratios=[2, 1.2])
        upper.plot(film[-1]["z"], film[-1]["base"], color=style.ink, linewidth=1.0, linestyle=":", zorder=3)
        for snapshot in evenly(film, _FILM):
            width = 1.0
            if snapshot is film[-1]:
                width = 1.8
            line = {"color": colour(snapshot["step"]), "linewidth": width}
            correction = [value - base for value, base in zip(snapshot["function"], snapshot["base"], strict=True)]
            upper.plot(snapshot["z"], snapshot["function"], **line)
            lower.plot(snapshot["z"], correction, **line)
        lower.axhline(0, color=style.ink, linewidth=0.8, linestyle=":")
        title = site
        values = {name: film[-1].get(name) for name in AMPLITUDES}
        known = [f"{name} {value:+.3f}" for name, value in values.items() if value is not None]
        if known:
            title += "\n" + ", ".join(known)
        upper.set_title(title, fontsize=9)
        upper.set_ylabel("f(z)")
        lower.set_ylabel("f - base")
        lower.set_xlabel("pre-activation z")

    figure = _figure(chosen, 3.6)
    # A figure's layout cannot place one scale beside several subfigures, so it gets one of its own.
    ratios = [figure.get_figwidth() - 1, 1]
    cells, bar = figure.subfigures(1, 2, squeeze=False, width_ratios=ratios).ravel()
    _cells(cells, chosen, cell)
    _time_bar(bar, first_step, last_step, style)
    _headline(figure, log, "functions (base dotted)", chosen)
    return figure


def densities(log: CorrectionLog, column: str = "entropy", style: Style = LIGHT) -> Figure:
    """Draw each site's fitted density over the histogram of the batch, for the first and the last snapshot.

    Args:
        log: the log; of more than 12 sites, 12 are drawn, evenly spaced.
        column: not used: the figure is about the densities.
        style: colours.

    Returns:
        A figure with one panel per site.

    Raises:
        LogError: if no snapshot has a density or a histogram.
    """
    chosen = _chosen(log)
    if not any(_density(film[-1]) or _histogram(film[-1]) for film in chosen.values()):
        raise LogError(f"{log.path}: the snapshots hold neither a density (u, pdf) nor a histogram (edges, counts)")
    first_colour, last_colour = style.lines[1], style.lines[0]

    def cell(part: SubFigure, site: str, film: list[Snapshot]) -> None:
        axes = part.subplots()
        single = len(film) == 1
        _draw_density(axes, film[-1], last_colour, filled=True)
        if not single:
            _draw_density(axes, film[0], first_colour, filled=False)
        axes.set_title(site, fontsize=9)
        axes.set_xlabel("pre-activation z")
        axes.set_ylabel("density p(z)")

    figure = _figure(chosen, 2.6)
    _cells(figure, chosen, cell)
    _key(figure, chosen, first_colour, last_colour)
    _headline(figure, log, "fitted density over the batch", chosen)
    return figure


def _chosen(log: CorrectionLog) -> dict[str, list[Snapshot]]:
    films: dict[str, list[Snapshot]] = {}
    for snapshot in log.shapes():
        films.setdefault(snapshot["site"], []).append(snapshot)
    sites = [site for site in log.sites if site in films]
    if not sites:
        raise LogError(f"{log.path}: no snapshots of these sites' functions (shapes.jsonl); run with save_log=True")
    return {site: films[site] for site in evenly(sites, _CELLS)}


def _cells(
    figure: Figure | SubFigure,
    chosen: dict[str, list[Snapshot]],
    draw: Callable[[SubFigure, str, list[Snapshot]], None],
) -> None:
    """Draw one cell per site, up to four side by side."""
    lines, columns = _grid(chosen)
    parts = figure.subfigures(lines, columns, squeeze=False).ravel()
    names = shortened(list(chosen), 28)
    for part, name, film in zip(parts, names, chosen.values(), strict=False):
        draw(part, name, film)


def _grid(chosen: dict[str, list[Snapshot]]) -> tuple[int, int]:
    lines = math.ceil(len(chosen) / 4)
    return lines, math.ceil(len(chosen) / lines)


def _figure(chosen: dict[str, list[Snapshot]], height: float) -> Figure:
    from matplotlib.figure import Figure

    lines, columns = _grid(chosen)
    return Figure(figsize=(max(5.5, 3.1 * columns + 0.8), height * lines + 0.6), layout="constrained")


def _time_bar(part: SubFigure, first: int, last: int, style: Style) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes = part.add_axes((0.05, 0.2, 0.15, 0.6))
    part.colorbar(ScalarMappable(Normalize(first, max(last, first + 1)), style.scale), cax=axes, label="step")


def _headline(figure: Figure, log: CorrectionLog, what: str, chosen: dict[str, list[Snapshot]]) -> None:
    left_out = len(log.sites) - len(chosen)
    more = f"; {left_out} more sites, choose with --site" if left_out else ""
    figure.suptitle(f"{log.name}: {what}{more}", x=0.01, ha="left", fontsize=11)


def _key(figure: Figure, chosen: dict[str, list[Snapshot]], first: str, last: str) -> None:
    from matplotlib.lines import Line2D

    steps = [snapshot["step"] for film in chosen.values() for snapshot in (film[0], film[-1])]
    handles = [Line2D([], [], color=last, linewidth=1.8, label=f"step {max(steps)}")]
    if min(steps) < max(steps):
        handles.insert(0, Line2D([], [], color=first, linewidth=1.8, label=f"step {min(steps)}"))
    figure.legend(handles=handles, loc="outside upper right", ncols=2)


def _draw_density(axes: Axes, snapshot: Snapshot, colour: str, filled: bool) -> None:
    histogram, density = _histogram(snapshot), _density(snapshot)
    if histogram is not None:
        edges, heights = histogram
        axes.stairs(heights, edges, fill=filled, color=colour, alpha=0.3 if filled else 0.6)
    if density is not None:
        axes.plot(*density, color=colour, linewidth=1.6)


def _histogram(snapshot: Snapshot) -> tuple[Sequence[float], list[float]] | None:
    """Return edges and heights of the batch's histogram, area 1."""
    edges, counts = snapshot.get("edges"), snapshot.get("counts")
    if not edges or not counts or len(edges) != len(counts) + 1 or not sum(counts):
        return None
    widths = [right - left for left, right in pairwise(edges)]
    if min(widths) <= 0:  # the log keeps six digits, too few for data far from zero that hardly vary
        return None
    return edges, [count / sum(counts) / width for count, width in zip(counts, widths, strict=True)]


def _density(snapshot: Snapshot) -> tuple[list[float], list[float]] | None:
    """Return grid and values of the fitted density in units of the pre-activation."""
    u, pdf, mu, sigma = (snapshot.get(name) for name in ("u", "pdf", "mu", "sigma"))
    if not u or not pdf or mu is None or not sigma:
        return None
    return [mu + sigma * knot for knot in u], [value / sigma for value in pdf]
