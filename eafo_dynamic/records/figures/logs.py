"""Figures of a correction log: each function takes a log and returns a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from eafo_dynamic.errors import ConfigError, LogError
from eafo_dynamic.records import COLUMNS, CorrectionLog
from eafo_dynamic.records.figures.curves import densities, functions
from eafo_dynamic.records.figures.style import DARK, LIGHT, Style, drawing
from eafo_dynamic.records.names import shortened
from eafo_dynamic.records.schema import AMPLITUDES
from eafo_dynamic.records.summary import drift_changes, entropy_changes, layer_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "densities", "functions", "heatmap", "plot", "prediction", "ranking", "trajectories"]

_WIDEST = 600
# As many as a style has colours for single lines.
_NAMED = 7
_POINTS = 20_000


def plot(log: CorrectionLog, what: str, column: str = "entropy", dark: bool = False) -> Figure:
    """Draw one of the figures.

    Args:
        log: the log, perhaps of some sites and steps only; it has rows.
        what: a key of `FIGURES`.
        column: column of the log to draw, for the figures that show a column.
        dark: whether to draw on a dark ground.

    Returns:
        The figure.

    Raises:
        ConfigError: if there is no such figure or column.
    """
    if what not in FIGURES:
        raise ConfigError("--what", what, "no such figure", f"Figures: {', '.join(FIGURES)}.")
    numbers = [name for name in log.columns if _is_number(log, name)]
    if column not in numbers:
        raise ConfigError("--column", column, "no column of numbers", f"Columns: {', '.join(numbers)}.")
    style = DARK if dark else LIGHT
    with drawing(style):
        figure = FIGURES[what](log, column, style)
        # Ticks are made when they are first drawn, in the colours of that moment.
        figure.draw_without_rendering()
        return figure


def heatmap(log: CorrectionLog, column: str, style: Style = LIGHT) -> Figure:
    """Draw a column over sites and steps.

    Args:
        log: the log.
        column: the column.
        style: colours.

    Returns:
        A figure with one line per site, the first site of the model on top, and one field per update and
        for the end of the fit. Where there are more than 600, a field is the mean over neighbours.
    """
    import numpy
    from matplotlib.figure import Figure

    sites = log.sites
    known = {site: _known_points(log, site, column) for site in sites}
    # The end of a fit has a field only in the columns that have a value there.
    steps = sorted({*log.update_steps, *(step for points in known.values() for step, _ in points)})
    place = {step: number for number, step in enumerate(steps)}
    values = numpy.full((len(sites), len(steps)), numpy.nan)
    for number, site in enumerate(sites):
        for step, value in known[site]:
            values[number, place[step]] = value
    values, shown = _merged(values, steps)
    figure = Figure(figsize=(8, min(12.0, max(2.6, 1.3 + 0.24 * len(sites)))), layout="constrained")
    axes = figure.add_subplot()
    scale: dict[str, Any] = {"cmap": style.scale}
    has_both_signs = (values < 0).any() and (values > 0).any()
    if has_both_signs:
        largest = float(numpy.nanmax(numpy.abs(values)))
        scale = {"cmap": style.around_zero, "vmin": -largest, "vmax": largest}
    rows = numpy.arange(len(sites) + 1) - 0.5
    mesh = axes.pcolormesh(_borders(shown), rows, values, rasterized=True, **scale)
    axes.set_facecolor(style.faint)
    axes.grid(False)
    axes.invert_yaxis()
    named = range(0, len(sites), math.ceil(len(sites) / 40))
    names = shortened(sites, 32)
    axes.set_yticks(named, [names[number] for number in named])
    axes.set_xlabel("step")
    axes.set_title(f"{log.name}: {column} of every site")
    figure.colorbar(mesh, ax=axes, label=_label(column), aspect=max(8, min(40, 2 * len(sites))))
    return figure


def _merged(values: Any, steps: Sequence[int]) -> tuple[Any, list[float]]:
    """Return values and steps, neighbours averaged where there are more than a figure can show."""
    import numpy

    if len(steps) <= _WIDEST:
        return values, [float(step) for step in steps]
    parts = numpy.array_split(numpy.arange(len(steps)), _WIDEST)
    known = numpy.isfinite(values)
    sums = [numpy.where(known[:, part], values[:, part], 0.0).sum(1) for part in parts]
    counts = [known[:, part].sum(1) for part in parts]
    merged = numpy.stack(sums, 1) / numpy.where(numpy.stack(counts, 1) > 0, numpy.stack(counts, 1), numpy.nan)
    return merged, [float(numpy.mean([steps[place] for place in part])) for part in parts]


def _borders(centres: Sequence[float]) -> list[float]:
    """Return the borders of fields around centres."""
    if len(centres) == 1:
        return [centres[0] - 0.5, centres[0] + 0.5]
    inner = [(left + right) / 2 for left, right in pairwise(centres)]
    return [2 * centres[0] - inner[0], *inner, 2 * centres[-1] - inner[-1]]


def trajectories(log: CorrectionLog, column: str, style: Style = LIGHT) -> Figure:
    """Draw a column over steps, one line per site.

    Args:
        log: the log.
        column: the column.
        style: colours.

    Returns:
        A figure; up to 7 sites have colours and names of their own, more are coloured by depth.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    sites = log.sites
    for number, (site, name) in enumerate(zip(sites, shortened(sites, 32), strict=True)):
        values = _numbers(log.series(site, column))
        colour = _colour(number, len(sites), style)
        marker = "o" if len(_known_points(log, site, column)) == 1 else ""
        axes.plot(log.series(site, "step"), values, color=colour, linewidth=1.5, label=name, marker=marker)
    if any(event for site in sites for event in log.series(site, "event")):
        _mark_events(axes, log, column, style)
    if len(sites) <= _NAMED:
        figure.legend(loc="outside right upper")
    else:
        _depth_bar(figure, axes, sites, style)
    axes.set_xlabel("step")
    axes.set_ylabel(_label(column))
    axes.set_title(f"{log.name}: {column} of {_counted(sites)}")
    return figure


def _mark_events(axes: Axes, log: CorrectionLog, column: str, style: Style) -> None:
    points = [
        (step, value)
        for site in log.sites
        for step, value, event in zip(*(log.series(site, name) for name in ("step", column, "event")), strict=True)
        if event and value is not None
    ]
    x, y = [point[0] for point in points], [point[1] for point in points]
    axes.scatter(x, y, marker="x", s=30, color=style.ink, zorder=3, label="event")


def _depth_bar(figure: Figure, axes: Axes, sites: Sequence[str], style: Style) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(0, len(sites) - 1), style.scale)
    bar = figure.colorbar(scale, ax=axes, aspect=30)
    named = range(0, len(sites), math.ceil(len(sites) / 12))
    names = shortened(sites, 32)
    bar.set_ticks(named)
    bar.set_ticklabels([names[number] for number in named])
    bar.ax.invert_yaxis()


def prediction(log: CorrectionLog, column: str = "entropy", style: Style = LIGHT) -> Figure:
    """Draw what moving eps was predicted to do to the entropy against what the entropy did.

    Args:
        log: the log.
        column: not used: the figure is about the entropy.
        style: colours.

    Returns:
        A figure with the changes of `entropy_changes` on the left, one point each, and on the right the
        entropy of the sites whose amplitudes are largest, with the sum of what moving them was predicted to do.

    Raises:
        LogError: if no site has two updates with entropy, eps and d_entropy_d_eps.
    """
    from matplotlib.figure import Figure

    which, changes = entropy_changes(log)
    if not any(changes.values()):
        raise LogError(f"{log.path}: no two updates of a site have entropy, eps and d_entropy_d_eps")
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_changes(left, which, changes, style)
    layers = layer_rows(log)
    sizes = {layer["site"]: [abs(layer[name]) for name in AMPLITUDES if layer[name] is not None] for layer in layers}
    largest = sorted((layer for layer in layers if sizes[layer["site"]]), key=lambda layer: -max(sizes[layer["site"]]))
    for number, layer in enumerate(largest[:4]):
        colour = number
        if len(changes) <= _NAMED:  # the same colour as on the left
            colour = log.sites.index(layer["site"])
        _draw_sum(right, log, layer["site"], style.lines[colour])
    right.plot(
        [], [], color=style.ink, linewidth=1.2, linestyle="--", label="what amplitudes alone were predicted to do"
    )
    right.set_xlabel("step")
    right.set_ylabel(_label("entropy"))
    right.set_title("sites with the largest amplitudes")
    # Below, as the lines may be anywhere.
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    figure.suptitle(f"{log.name}: entropy, predicted and measured", x=0.01, ha="left", fontsize=11)
    return figure


def _draw_changes(axes: Axes, which: str, changes: dict[str, list[tuple[float, float]]], style: Style) -> None:
    import numpy

    count = sum(map(len, changes.values()))
    for number, found in enumerate(changes.values()):
        points = numpy.array(found[:: math.ceil(count / _POINTS)]).reshape(-1, 2)
        colour = _colour(number, len(changes), style)
        axes.scatter(*points.T, s=12, alpha=0.7, color=colour, linewidths=0, rasterized=True)
    every = numpy.array([pair for found in changes.values() for pair in found])
    steady = count < 3 or every.std(0).min() == 0
    correlation = "" if steady else f", correlation {numpy.corrcoef(every.T)[0, 1]:.4f}"
    axes.axline((0, 0), slope=1, color=style.ink, linewidth=0.8, linestyle="--", label="as predicted")
    axes.legend(loc="upper left")
    axes.locator_params(nbins=6)
    axes.set_xlabel("predicted change of entropy [nats]")
    axes.set_ylabel("measured change [nats]")
    axes.set_title(f"{count} changes {which}{correlation}")


def _draw_sum(axes: Axes, log: CorrectionLog, site: str, colour: Any) -> None:
    points = _known_points(log, site, "entropy")
    steps = [step for step, _ in points]
    entropy = [value for _, value in points]
    found = drift_changes(log, site)
    axes.plot(
        steps,
        entropy,
        color=colour,
        linewidth=1.5,
        label=shortened(log.sites, 32)[log.sites.index(site)],
    )
    if len(found) == len(entropy) - 1:
        sums = [entropy[0]]
        for predicted, _ in found:
            sums.append(sums[-1] + predicted)
        axes.plot(steps, sums, color=colour, linewidth=1.2, linestyle="--")


def ranking(log: CorrectionLog, column: str, style: Style = LIGHT) -> Figure:
    """Draw the sites in the order of a column, with its first and last value.

    Args:
        log: the log.
        column: the column.
        style: colours.

    Returns:
        A figure with one line per site, the largest last value on top; of more than 40 sites only the first
        and the last 20.
    """
    from matplotlib.figure import Figure

    series = {site: [value for value in log.series(site, column) if value is not None] for site in log.sites}
    ranked = sorted((site for site in series if series[site]), key=lambda site: -series[site][-1])
    shown = ranked if len(ranked) <= 40 else [*ranked[:20], *ranked[-20:]]
    figure = Figure(figsize=(8, max(2.4, 1.3 + 0.22 * len(shown))), layout="constrained")
    axes = figure.add_subplot()
    for number, site in enumerate(shown):
        first, last = series[site][0], series[site][-1]
        axes.plot([first, last], [number, number], color=style.faint, linewidth=1.5, zorder=1)
    places = range(len(shown))
    first, last = style.lines[1], style.lines[0]
    firsts, lasts = [series[site][0] for site in shown], [series[site][-1] for site in shown]
    axes.scatter(firsts, places, s=28, facecolor=style.ground, edgecolor=first, label="first update", zorder=2)
    axes.scatter(lasts, places, s=28, color=last, label="last update", zorder=3)
    if min([*firsts, *lasts, 0.0]) < 0 < max([*firsts, *lasts, 0.0]):
        axes.axvline(0, color=style.ink, linewidth=0.8)
    axes.set_yticks(places, shortened(shown, 32))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(_label(column))
    left_out = "" if len(shown) == len(ranked) else f", the {len(ranked) - 40} in the middle left out"
    axes.set_title(f"{log.name}: sites by their last {column}{left_out}")
    figure.legend(loc="outside lower right", ncols=2)
    return figure


FIGURES: dict[str, Callable[[CorrectionLog, str, Style], Figure]] = {
    "heatmap": heatmap,
    "trajectories": trajectories,
    "functions": functions,
    "densities": densities,
    "prediction": prediction,
    "ranking": ranking,
}


def _colour(number: int, count: int, style: Style) -> Any:
    if count <= _NAMED:
        return style.lines[number]
    return style.scale(number / max(count - 1, 1))


def _label(column: str) -> str:
    known = COLUMNS.get(column)
    if known is None or known.unit in ("", "1"):
        return column
    return f"{column} [{known.unit}]"


def _counted(sites: Sequence[str]) -> str:
    if len(sites) == 1:
        return sites[0]
    return f"{len(sites)} sites"


def _known_points(log: CorrectionLog, site: str, column: str) -> list[tuple[int, float]]:
    """Return (step, value) of the rows in which the column has a value."""
    points = zip(log.series(site, "step"), log.series(site, column), strict=True)
    return [(step, value) for step, value in points if value is not None]


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _is_number(log: CorrectionLog, column: str) -> bool:
    if column in COLUMNS:
        return COLUMNS[column].kind != "text" and column not in ("step", "epoch")
    values = (value for site in log.sites for value in log.series(site, column) if value is not None)
    return isinstance(next(values, None), (int, float))
