"""Figures of a comparison: each function returns a matplotlib figure."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eafo_dynamic.errors import LogError
from eafo_dynamic.experiments.compare.paired import Paired, labelled, main_reference
from eafo_dynamic.experiments.compare.plan import value_text
from eafo_dynamic.experiments.compare.results import Cell
from eafo_dynamic.records.figures.style import DARK, LIGHT, Style, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["address", "embedded", "entropy_change", "entropy_trajectories", "forest", "sensitivity"]

_BETTER, _WORSE = 2, 1


def forest(pairs: Sequence[Paired], dark: bool = False) -> Figure:
    """Draw paired differences: every seed as a dot, the mean as a diamond with its 95 % interval.

    Args:
        pairs: what `compare` returned, of one metric.
        dark: whether to draw on a dark ground.

    Returns:
        A figure with one line an arm; green is a gain, orange a loss, as far as the verdict says so. In percent
        of the reference's mean where that is not 0.
    """
    from matplotlib.figure import Figure

    style = DARK if dark else LIGHT
    percent = all(pair.relative is not None for pair in pairs)
    with drawing(style):
        figure = Figure(figsize=(8, 1.6 + 0.34 * len(pairs)), layout="constrained")
        axes = figure.add_subplot()
        for place, pair in enumerate(pairs):
            scale = 100 / abs(pair.reference_mean) if percent else 1.0
            colour = _colour(pair, style)
            dots = [scale * value for value in pair.differences]
            axes.scatter(dots, [place + shift for shift in _spread(len(dots))], s=12, color=style.faint, linewidths=0)
            if not math.isnan(pair.low):
                axes.plot([scale * pair.low, scale * pair.high], [place, place], color=colour, linewidth=2.5)
            axes.scatter([scale * pair.difference], [place], s=46, marker="D", color=colour, zorder=3)
        axes.axvline(0, color=style.ink, linewidth=0.8)
        main = main_reference(pairs)
        axes.set_yticks(range(len(pairs)), [f"{labelled(pair, main)}  (n={len(pair.seeds)})" for pair in pairs])
        axes.set_ylim(len(pairs) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        _label_direction(axes, pairs, percent)
        figure.draw_without_rendering()
        return figure


def sensitivity(pairs: Sequence[Paired], swept: Mapping[str, Any], option: str, dark: bool = False) -> Figure:
    """Draw the paired difference over the value of a swept option.

    Args:
        pairs: what `compare` returned, of one metric.
        swept: the option's value by arm; arms without one are left out.
        option: name of the option.
        dark: whether to draw on a dark ground.

    Returns:
        A figure with the mean, its 95 % interval and every seed as a dot. The axis is logarithmic where all
        values are positive numbers that span a factor of 8 or more; values that are no numbers stand side by side.

    Raises:
        LogError: if no arm has a value.
    """
    from matplotlib.figure import Figure
    from matplotlib.transforms import offset_copy

    chosen = [pair for pair in pairs if pair.arm in swept and pair.seeds]
    if not chosen:
        raise LogError(f"no finished arm has a value of {option}")
    numeric = all(isinstance(swept[pair.arm], (int, float)) and type(swept[pair.arm]) is not bool for pair in chosen)
    chosen = sorted(chosen, key=lambda pair: swept[pair.arm]) if numeric else chosen
    places = [float(swept[pair.arm]) for pair in chosen] if numeric else [float(n) for n in range(len(chosen))]
    percent = all(pair.relative is not None for pair in chosen)
    scales = [100 / abs(pair.reference_mean) if percent else 1.0 for pair in chosen]
    style = DARK if dark else LIGHT
    with drawing(style):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.add_subplot()
        means = [scale * pair.difference for scale, pair in zip(scales, chosen, strict=True)]
        if numeric:
            axes.plot(places, means, color=style.faint, linewidth=1, zorder=1)
        for place, mean, scale, pair in zip(places, means, scales, chosen, strict=True):
            dots = [scale * value for value in pair.differences]
            # Beside the interval, which would hide them; in points, as the axis may be logarithmic.
            beside = offset_copy(axes.transData, fig=figure, x=7, units="points")
            axes.scatter([place] * len(dots), dots, s=12, color=style.faint, linewidths=0, transform=beside)
            axes.update_datalim([(place, dot) for dot in dots])
            colour = _colour(pair, style)
            if not math.isnan(pair.low):
                axes.plot([place, place], [scale * pair.low, scale * pair.high], color=colour, linewidth=2.5)
            axes.scatter([place], [mean], s=46, marker="D", color=colour, zorder=3)
        _mark_values(axes, places, [swept[pair.arm] for pair in chosen], numeric)
        axes.axhline(0, color=style.ink, linewidth=0.8)
        axes.set_xlabel(option)
        _label_direction(axes, chosen, percent, upright=True)
        figure.draw_without_rendering()
        return figure


def entropy_trajectories(cells: Sequence[Cell], dark: bool = False) -> Figure:
    """Draw the entropy over training: for each arm the mean over its seeds, and a band of one standard deviation.

    Args:
        cells: cells of one task; those without a correction log are left out.
        dark: whether to draw on a dark ground.

    Returns:
        A figure with one line an arm. Seeds are averaged at the steps that all seeds of the arm have.

    Raises:
        LogError: if no cell has a trajectory.
    """
    import numpy
    from matplotlib.figure import Figure

    arms = _by_arm([cell for cell in cells if cell.entropy_steps])
    if not arms:
        raise LogError("no finished cell has a correction log: there is no entropy to draw")
    style = DARK if dark else LIGHT
    with drawing(style):
        figure = Figure(figsize=(8, 4.2 + 0.12 * len(arms)), layout="constrained")
        axes = figure.add_subplot()
        for number, (arm, found) in enumerate(arms.items()):
            series = [dict(zip(cell.entropy_steps, cell.entropy_mean, strict=True)) for cell in found]
            steps = sorted(set(series[0]).intersection(*series))
            values = numpy.array([[one[step] for step in steps] for one in series]).reshape(len(series), -1)
            colour, dashes = _line(number, style)
            label = f"{arm}  (n={len(found)})"
            axes.plot(steps, values.mean(0), color=colour, linestyle=dashes, linewidth=1.5, label=label)
            if len(found) > 1:
                low, high = values.mean(0) - values.std(0, ddof=1), values.mean(0) + values.std(0, ddof=1)
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylabel("entropy, mean over the sites [nats]")
        axes.set_title("Entropy while training: mean and standard deviation over the seeds")
        figure.legend(loc="outside lower left", ncols=2)
        figure.draw_without_rendering()
        return figure


def entropy_change(cells: Sequence[Cell], dark: bool = False) -> Figure:
    """Draw the entropy at the first and at the last update: does training choose a lower one?

    Args:
        cells: cells of one task; those without a correction log are left out.
        dark: whether to draw on a dark ground.

    Returns:
        A figure with one row an arm: a faint line from first to last for each seed, and the means, a ring and
        a dot. The share of seeds whose entropy fell stands beside the arm's name.

    Raises:
        LogError: if no cell has both entropies.
    """
    from matplotlib.figure import Figure

    arms = _by_arm([cell for cell in cells if cell.entropy_first is not None and cell.entropy_last is not None])
    if not arms:
        raise LogError("no finished cell has a correction log: there is no entropy to draw")
    style = DARK if dark else LIGHT
    names: list[str] = []
    with drawing(style):
        figure = Figure(figsize=(8, 1.7 + 0.42 * len(arms)), layout="constrained")
        axes = figure.add_subplot()
        for place, (arm, found) in enumerate(arms.items()):
            first, last = [cell.entropy_first or 0.0 for cell in found], [cell.entropy_last or 0.0 for cell in found]
            fell = sum(after < before for before, after in zip(first, last, strict=True))
            names.append(f"{arm}  (fell in {fell} of {len(found)})")
            for shift, before, after in zip(_spread(len(found)), first, last, strict=True):
                axes.plot([before, after], [place + shift] * 2, color=style.faint, linewidth=0.9, zorder=1)
            means = sum(first) / len(first), sum(last) / len(last)
            axes.plot(means, [place, place], color=style.ink, linewidth=1.2, zorder=2)
            ring = axes.scatter(means[0], place, s=48, facecolor=style.ground, edgecolor=style.lines[1], zorder=3)
            dot = axes.scatter(means[1], place, s=48, color=style.lines[0], zorder=3)
            if place == 0:
                ring.set_label("first update, mean")
                dot.set_label("last update, mean")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("entropy, mean over the sites [nats]; faint lines: one a seed")
        axes.set_title("Entropy, from the first update to the last")
        figure.legend(loc="outside lower right", ncols=2)
        figure.draw_without_rendering()
        return figure


def embedded(draw: Callable[..., Figure], *args: Any) -> tuple[str, str]:
    """Draw a figure for a page: `embedded(forest, pairs)`.

    Args:
        draw: one of the functions above.
        *args: what it takes, without `dark`.

    Returns:
        Addresses of an SVG for a light and for a dark ground, their contents in them.
    """
    return address(draw(*args, dark=False)), address(draw(*args, dark=True))


def address(figure: Figure) -> str:
    """Return a figure as a `data:` address.

    Args:
        figure: the figure.

    Returns:
        An SVG, in base64; equal figures give equal text.
    """
    import matplotlib

    out = io.BytesIO()
    # Without a salt of its own every SVG has other names for the same things.
    with matplotlib.rc_context({"svg.hashsalt": "eafo_dynamic"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _label_direction(axes: Axes, pairs: Sequence[Paired], percent: bool, upright: bool = False) -> None:
    pair = pairs[0]
    reference = pair.reference if len({each.reference for each in pairs}) == 1 else "its reference"
    unit = f"% of {reference}'s mean" if percent else "in its own unit"
    arrow = ("up" if pair.higher_is_better else "down") if upright else "right" if pair.higher_is_better else "left"
    axes.set_title(f"{pair.metric}: arm less {reference}, {unit}; better is {arrow}")
    (axes.set_ylabel if upright else axes.set_xlabel)(f"paired difference [{'%' if percent else pair.metric}]")


def _mark_values(axes: Axes, places: Sequence[float], values: Sequence[Any], numeric: bool) -> None:
    if not numeric:
        texts = [
            "\n".join(map(value_text, value)) if isinstance(value, list) else value_text(value) for value in values
        ]
        axes.set_xticks(places, texts)
        axes.set_xlim(-0.6, len(places) - 0.4)
        return
    if min(places) > 0 and max(places) / min(places) >= 8:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(places, [f"{value:g}" for value in places])


def _colour(pair: Paired, style: Style) -> str:
    verdicts = {"better": style.lines[_BETTER], "worse": style.lines[_WORSE]}
    return verdicts.get(pair.verdict, style.ink)


def _line(number: int, style: Style) -> tuple[str, str]:
    dashes = ("-", "--", ":", "-.")
    return style.lines[number % len(style.lines)], dashes[number // len(style.lines) % len(dashes)]


def _spread(count: int) -> list[float]:
    """Return places across a line of the figure, so that equal seeds stay visible."""
    return [0.0] if count == 1 else [0.26 * (2 * number / (count - 1) - 1) for number in range(count)]


def _by_arm(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.arm, []).append(cell)
    return found
