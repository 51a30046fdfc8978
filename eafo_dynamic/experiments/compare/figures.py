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

__all__ = [
    "address",
    "embedded",
    "entropy_change",
    "entropy_trajectories",
    "forest",
    "loss_curves",
    "over_tasks",
    "sensitivity",
]

_BETTER = 2  # index of a style's line colours
_WORSE = 1
_DOT = 12  # area [points^2] of a seed's mark
_DIAMOND = 46  # of a mean's mark
_RING = 48  # of a mean entropy's mark


def forest(pairs: Sequence[Paired], dark: bool = False) -> Figure:
    """Draw paired differences: every seed as a dot, the mean as a diamond with its 95 % interval.

    Args:
        pairs: what `compare` returned, of one metric.
        dark: whether to draw on a dark background.

    Returns:
        A figure with one line per arm; green where the verdict is `better`, orange where it is `worse`. In percent
        of the reference's mean, unless that is 0 for some arm.
    """
    from matplotlib.figure import Figure

    style = _style(dark)
    percent = _in_percent(pairs)
    main = main_reference(pairs)
    with drawing(style):
        figure = Figure(figsize=(8, 1.6 + 0.34 * len(pairs)), layout="constrained")
        axes = figure.add_subplot()
        for line, pair in enumerate(pairs):
            scale = _scale(pair, percent)
            colour = _colour(pair, style)
            dots = [scale * value for value in pair.differences]
            heights = [line + shift for shift in _spread(len(dots))]
            axes.scatter(dots, heights, s=_DOT, color=style.faint, linewidths=0)
            if not math.isnan(pair.low):
                axes.plot([scale * pair.low, scale * pair.high], [line, line], color=colour, linewidth=2.5)
            axes.scatter([scale * pair.difference], [line], s=_DIAMOND, marker="D", color=colour, zorder=3)
        axes.axvline(0, color=style.ink, linewidth=0.8)
        _name_lines(axes, [f"{labelled(pair, main)}  (n={len(pair.seeds)})" for pair in pairs])
        axes.set_title(f"{_title(pairs, percent)}; better is {'right' if pairs[0].higher_is_better else 'left'}")
        axes.set_xlabel(_difference_label(pairs, percent))
        figure.draw_without_rendering()
        return figure


def sensitivity(pairs: Sequence[Paired], swept: Mapping[str, Any], option: str, dark: bool = False) -> Figure:
    """Draw the paired difference over the value of a swept option.

    Args:
        pairs: what `compare` returned, of one metric.
        swept: the option's value by arm; arms without one are left out.
        option: name of the option.
        dark: whether to draw on a dark background.

    Returns:
        A figure with the mean, its 95 % interval and every seed as a dot. The axis is logarithmic where all
        values are positive numbers that span a factor of 8 or more; values that are not numbers stand side by side.

    Raises:
        LogError: if no arm has a value.
    """
    from matplotlib.figure import Figure
    from matplotlib.transforms import offset_copy

    chosen = [pair for pair in pairs if pair.arm in swept and pair.seeds]
    if not chosen:
        raise LogError(f"no finished arm has a value of {option}")
    numeric = all(_is_number(swept[pair.arm]) for pair in chosen)
    if numeric:
        chosen.sort(key=lambda pair: swept[pair.arm])
    values = [swept[pair.arm] for pair in chosen]
    places = [float(number) for number in range(len(values))]
    if numeric:
        places = [float(value) for value in values]
    percent = _in_percent(chosen)
    means = [_scale(pair, percent) * pair.difference for pair in chosen]
    style = _style(dark)
    with drawing(style):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.add_subplot()
        if numeric:
            axes.plot(places, means, color=style.faint, linewidth=1, zorder=1)
        # Dots stand beside the interval, which would hide them; in points, as the axis may be logarithmic.
        beside = offset_copy(axes.transData, fig=figure, x=7, units="points")
        for place, mean, pair in zip(places, means, chosen, strict=True):
            scale = _scale(pair, percent)
            colour = _colour(pair, style)
            dots = [scale * value for value in pair.differences]
            axes.scatter([place] * len(dots), dots, s=_DOT, color=style.faint, linewidths=0, transform=beside)
            axes.update_datalim([(place, dot) for dot in dots])
            if not math.isnan(pair.low):
                axes.plot([place, place], [scale * pair.low, scale * pair.high], color=colour, linewidth=2.5)
            axes.scatter([place], [mean], s=_DIAMOND, marker="D", color=colour, zorder=3)
        if numeric:
            _mark_numbers(axes, places)
        else:
            _mark_names(axes, values)
        axes.axhline(0, color=style.ink, linewidth=0.8)
        axes.set_title(f"{_title(chosen, percent)}; better is {'up' if chosen[0].higher_is_better else 'down'}")
        axes.set_xlabel(option)
        axes.set_ylabel(_difference_label(chosen, percent))
        figure.draw_without_rendering()
        return figure


def entropy_trajectories(cells: Sequence[Cell], dark: bool = False) -> Figure:
    """Draw the entropy over training: for each arm the mean over its seeds, and a band of one standard deviation.

    Args:
        cells: cells of one task; those without a correction log are left out.
        dark: whether to draw on a dark background.

    Returns:
        A figure with one line per arm. Seeds are averaged at the steps that all seeds of the arm have.

    Raises:
        LogError: if no cell has a trajectory.
    """
    import numpy
    from matplotlib.figure import Figure

    arms = _by_arm([cell for cell in cells if cell.entropy_steps])
    if not arms:
        raise LogError("no finished cell has a correction log: there is no entropy to draw")
    style = _style(dark)
    with drawing(style):
        figure = Figure(figsize=(8, 4.2 + 0.12 * len(arms)), layout="constrained")
        axes = figure.add_subplot()
        for number, (arm, found) in enumerate(arms.items()):
            series = [dict(zip(cell.entropy_steps, cell.entropy_mean, strict=True)) for cell in found]
            steps = sorted(set(series[0]).intersection(*series))
            # [seeds, steps], also where the seeds have no step in common
            entropies = numpy.array([[one[step] for step in steps] for one in series]).reshape(len(series), len(steps))
            mean = entropies.mean(0)
            colour, dashes = _line(number, style)
            axes.plot(steps, mean, color=colour, linestyle=dashes, linewidth=1.5, label=f"{arm}  (n={len(found)})")
            if len(found) > 1:
                deviation = entropies.std(0, ddof=1)
                axes.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
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
        dark: whether to draw on a dark background.

    Returns:
        A figure with one row per arm: a faint line from first to last for each seed, and the means as a ring and
        a dot. The number of seeds whose entropy fell stands beside the arm's name.

    Raises:
        LogError: if no cell has both entropies.
    """
    from matplotlib.figure import Figure

    ends = _entropy_ends(cells)
    if not ends:
        raise LogError("no finished cell has a correction log: there is no entropy to draw")
    style = _style(dark)
    names: list[str] = []
    with drawing(style):
        figure = Figure(figsize=(8, 1.7 + 0.42 * len(ends)), layout="constrained")
        axes = figure.add_subplot()
        for line, (arm, seeds) in enumerate(ends.items()):
            fell = sum(last < first for first, last in seeds)
            names.append(f"{arm}  (fell in {fell} of {len(seeds)})")
            for shift, (first, last) in zip(_spread(len(seeds)), seeds, strict=True):
                axes.plot([first, last], [line + shift] * 2, color=style.faint, linewidth=0.9, zorder=1)
            mean_first = sum(first for first, _ in seeds) / len(seeds)
            mean_last = sum(last for _, last in seeds) / len(seeds)
            axes.plot([mean_first, mean_last], [line, line], color=style.ink, linewidth=1.2, zorder=2)
            ring = axes.scatter(mean_first, line, s=_RING, facecolor=style.ground, edgecolor=style.lines[1], zorder=3)
            dot = axes.scatter(mean_last, line, s=_RING, color=style.lines[0], zorder=3)
            if line == 0:
                ring.set_label("first update, mean")
                dot.set_label("last update, mean")
        _name_lines(axes, names)
        axes.set_xlabel("entropy, mean over the sites [nats]; one faint line per seed")
        axes.set_title("Entropy, from the first update to the last")
        figure.legend(loc="outside lower right", ncols=2)
        figure.draw_without_rendering()
        return figure


def over_tasks(tasks: Mapping[str, Sequence[Paired]], arms: Sequence[str] = (), dark: bool = False) -> Figure:
    """Draw arms over tasks: mean relative difference from each task's reference and its 95 % interval.

    Args:
        tasks: what `compare` returned, by title of the task.
        arms: names of arms, at most as many as there are colours; none: those that every task has.
        dark: whether to draw on a dark background.

    Returns:
        A figure with a group of lines for each task, a line for each arm; where higher is better, the sign is turned,
        so that left is better everywhere.

    Raises:
        LogError: if no task has one of the arms.
    """
    from matplotlib.figure import Figure

    style = _style(dark)
    if not arms:
        shared = set.intersection(*({pair.arm for pair in pairs} for pairs in tasks.values()))
        arms = [pair.arm for pair in next(iter(tasks.values())) if pair.arm in shared]
    chosen = list(arms)[: len(style.lines)]
    finished = {pair.arm for pairs in tasks.values() for pair in pairs}
    if finished.isdisjoint(chosen):
        raise LogError(f"no task has a finished cell of {', '.join(arms) or 'an arm that all tasks have'}")
    with drawing(style):
        figure = Figure(figsize=(8, 1.5 + len(tasks) * (0.25 + 0.13 * len(chosen))), layout="constrained")
        axes = figure.add_subplot()
        for line, pairs in enumerate(tasks.values()):
            for number, arm in enumerate(chosen):
                pair = next((each for each in pairs if each.arm == arm), None)
                if pair is None or pair.relative is None or pair.relative_interval is None:
                    continue
                height = line + 0.7 * ((number + 0.5) / len(chosen) - 0.5)
                colour = style.lines[number]
                ends = [-pair.sign * end for end in pair.relative_interval]
                if not any(map(math.isnan, ends)):
                    axes.plot(ends, [height, height], color=colour, linewidth=2)
                axes.scatter([-pair.sign * pair.relative], [height], s=22, marker="D", color=colour, zorder=3)
        for number, arm in enumerate(chosen):
            axes.plot([], [], color=style.lines[number], marker="D", markersize=4, linewidth=2, label=arm)
        axes.axvline(0, color=style.ink, linewidth=0.8)
        _name_lines(axes, list(tasks))
        axes.set_xlabel("relative difference from the task's plain activation [%]; left is better")
        figure.legend(loc="outside lower center", ncols=3)
        figure.draw_without_rendering()
        return figure


def loss_curves(cells: Sequence[Cell], reference: str, dark: bool = False) -> Figure:
    """Draw the validation metric, relative to the reference, against steps and against seconds of training.

    Args:
        cells: cells of one task; those without a curve are left out.
        reference: name of the arm that the others are compared with.
        dark: whether to draw on a dark background.

    Returns:
        A figure with two panels. Left: mean over the seeds of the paired relative difference at equal steps. Right: the
        same at equal seconds, CPU time of the training steps; curves are interpolated.

    Raises:
        LogError: if the reference has no curve.
    """
    import numpy
    from matplotlib.figure import Figure

    found = [cell for cell in cells if cell.curve.get("step")]
    references = {cell.seed: cell.curve for cell in found if cell.arm == reference}
    if not references:
        raise LogError(f"no finished cell of {reference} has a curve")
    style = _style(dark)
    metric = next(name for name in next(iter(references.values())) if name not in ("step", "seconds"))
    others = {arm: each for arm, each in _by_arm(found).items() if arm != reference}
    with drawing(style):
        figure = Figure(figsize=(8, 4.4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key in zip(panels, ("step", "seconds"), strict=True):
            for number, (arm, runs) in enumerate(others.items()):
                paired = [(run.curve, references[run.seed]) for run in runs if run.seed in references]
                if not paired:
                    continue
                first = max(max(ours[key][0], theirs[key][0]) for ours, theirs in paired)
                last = min(min(ours[key][-1], theirs[key][-1]) for ours, theirs in paired)
                places = numpy.linspace(first, last, 60)
                ratios = [
                    numpy.interp(places, ours[key], ours[metric]) / numpy.interp(places, theirs[key], theirs[metric])
                    for ours, theirs in paired
                ]
                colour, dashes = _line(number, style)
                label = arm if key == "step" else None
                mean = 100 * (numpy.mean(ratios, axis=0) - 1)
                axes.plot(places, mean, color=colour, linestyle=dashes, linewidth=1.5, label=label)
            axes.axhline(0, color=style.ink, linewidth=0.8)
            axes.set_xlabel("optimiser steps" if key == "step" else "seconds of training steps (CPU)")
        panels[0].set_ylabel(f"{metric}, relative to {reference} [%]")
        figure.legend(loc="outside lower center", ncols=3)
        figure.draw_without_rendering()
        return figure


def embedded(draw: Callable[..., Figure], *args: Any) -> tuple[str, str]:
    """Draw a figure for a page, as in `embedded(forest, pairs)`.

    Args:
        draw: one of the functions above.
        *args: its arguments without `dark`.

    Returns:
        `data:` addresses of an SVG for a light and of one for a dark background.
    """
    return address(draw(*args, dark=False)), address(draw(*args, dark=True))


def address(figure: Figure) -> str:
    """Return a figure as a `data:` address, which holds the picture itself.

    Args:
        figure: the figure.

    Returns:
        The address of an SVG in base64; equal figures give equal text.
    """
    import matplotlib

    out = io.BytesIO()
    # Without a fixed salt, matplotlib names the parts of an SVG at random.
    with matplotlib.rc_context({"svg.hashsalt": "eafo_dynamic"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _style(dark: bool) -> Style:
    if dark:
        return DARK
    return LIGHT


def _in_percent(pairs: Sequence[Paired]) -> bool:
    return all(pair.relative is not None for pair in pairs)


def _scale(pair: Paired, percent: bool) -> float:
    """Return what turns a difference into what is drawn."""
    if percent:
        return 100 / abs(pair.reference_mean)
    return 1.0


def _title(pairs: Sequence[Paired], percent: bool) -> str:
    references = {pair.reference for pair in pairs}
    reference = references.pop() if len(references) == 1 else "its reference"
    unit = f"% of {reference}'s mean" if percent else "in its own unit"
    return f"{pairs[0].metric}: arm minus {reference}, {unit}"


def _difference_label(pairs: Sequence[Paired], percent: bool) -> str:
    unit = "%" if percent else pairs[0].metric
    return f"paired difference [{unit}]"


def _name_lines(axes: Axes, names: Sequence[str]) -> None:
    """Name the lines of a figure on the left, the first line at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _mark_numbers(axes: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) / min(values) >= 8:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(values, [f"{value:g}" for value in values])


def _mark_names(axes: Axes, values: Sequence[Any]) -> None:
    axes.set_xticks(range(len(values)), [_tick(value) for value in values])
    axes.set_xlim(-0.6, len(values) - 0.4)


def _tick(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(value_text, value))
    return value_text(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _colour(pair: Paired, style: Style) -> str:
    verdicts = {"better": style.lines[_BETTER], "worse": style.lines[_WORSE]}
    return verdicts.get(pair.verdict, style.ink)


def _line(number: int, style: Style) -> tuple[str, str]:
    """Return colour and dashes: dashes change once all colours are used."""
    dashes = ("-", "--", ":", "-.")
    return style.lines[number % len(style.lines)], dashes[number // len(style.lines) % len(dashes)]


def _spread(count: int) -> list[float]:
    """Return shifts across a line of the figure, so that equal seeds stay visible."""
    if count == 1:
        return [0.0]
    return [0.26 * (2 * number / (count - 1) - 1) for number in range(count)]


def _by_arm(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.arm, []).append(cell)
    return found


def _entropy_ends(cells: Sequence[Cell]) -> dict[str, list[tuple[float, float]]]:
    """Return the first and the last entropy of each seed, by arm."""
    found: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        if cell.entropy_first is not None and cell.entropy_last is not None:
            found.setdefault(cell.arm, []).append((cell.entropy_first, cell.entropy_last))
    return found
