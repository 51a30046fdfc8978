"""Figures of the theory: activations ranked by output entropy, and what a correction does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eafo_dynamic.records.figures.style import LIGHT, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Study", "ranking", "shape"]


@dataclass(frozen=True)
class Study:
    """An activation, its correction and what the correction does to the output, as curves and numbers.

    Args:
        activation: name of the base.
        label: what the pre-activations are.
        eps: amplitude.
        resolution: r, in standard deviations of the output.
        route: "analytic" or "score".
        gain: largest |slope| of ghat.
        u: standardised pre-activations of all curves.
        z: pre-activations at u.
        density: p(z) at u.
        ghat: shape of the correction at u.
        base: base function at u.
        corrected: base + eps sigma ghat at u.
        outputs_before: activation outputs and their density at resolution r, without the correction.
        outputs_after: the same with it.
        entropy: H_r without the correction, nats.
        entropy_after: H_r with it.
        slope: dH_r / d eps at eps = 0.
        atom_mass: probability on atoms of the output, without the correction.
    """

    activation: str
    label: str
    eps: float
    resolution: float
    route: str
    gain: float
    u: list[float]
    z: list[float]
    density: list[float]
    ghat: list[float]
    base: list[float]
    corrected: list[float]
    outputs_before: tuple[list[float], list[float]]
    outputs_after: tuple[list[float], list[float]]
    entropy: float
    entropy_after: float
    slope: float
    atom_mass: float


def ranking(rows: Sequence[Mapping[str, Any]], label: str, resolution: float, style: Style = LIGHT) -> Figure:
    """Draw activations ranked by the entropy of their output.

    Args:
        rows: rows of ``eafo-dynamic rank``, the lowest entropy first.
        label: what the pre-activations are.
        resolution: r, in standard deviations of the output.
        style: colours.

    Returns:
        A figure with one bar per activation, which starts at a constant's entropy, whiskers over the sites if
        there are several, the share on atoms as text, and the Gaussian's entropy, which none can exceed.
    """
    from matplotlib.figure import Figure

    lowest = 0.5 * math.log(2 * math.pi * math.e * resolution**2)
    highest = 0.5 * math.log(2 * math.pi * math.e * (1 + resolution**2))
    figure = Figure(figsize=(7.2, 1.5 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    entropies = [row["entropy"] for row in rows]
    axes.barh(places, [value - lowest for value in entropies], left=lowest, color=style.lines[0], height=0.68)
    if "lowest" in rows[0]:
        spread = [
            [row["entropy"] - row["lowest"] for row in rows],
            [row["highest"] - row["entropy"] for row in rows],
        ]
        axes.errorbar(entropies, places, xerr=spread, fmt="none", ecolor=style.ink, capsize=2.5, linewidth=1)
    # In one column right of the bound, where no bar and no whisker can cross them.
    column = max(highest, *(row.get("highest", row["entropy"]) for row in rows))
    for place, row in zip(places, rows, strict=True):
        atoms = f"   {row['atom_mass']:.0%} on atoms" if row["atom_mass"] > 0.005 else ""
        axes.annotate(
            f"{row['entropy']:.3f}{atoms}",
            (column, place),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(highest, color=style.lines[1], linestyle="--", linewidth=1.2)
    axes.annotate(
        "Gaussian, the bound",
        (highest, 1),
        (0, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=style.lines[1],
    )
    axes.set_yticks(places, [row["activation"] for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(lowest, column + 0.3 * (column - lowest))
    axes.set_xlabel(f"entropy of the output at resolution {resolution:g} [nats]; the axis starts at a constant's")
    figure.suptitle(f"Activations ranked by output entropy\n{label}", x=0.01, ha="left", fontsize=10)
    return figure


def shape(study: Study, style: Style = LIGHT) -> Figure:
    """Draw a base with its correction, the correction alone, and the densities before and after.

    Args:
        study: curves and numbers.
        style: colours.

    Returns:
        A figure with four panels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(2, 2)
    _functions(panels[0, 0], study, style)
    _correction(panels[0, 1], study, style)
    _pre_activations(panels[1, 0], study, style)
    _outputs(panels[1, 1], study, style)
    figure.suptitle(f"{study.activation}: {study.label}", x=0.01, ha="left", fontsize=11)
    return figure


def _functions(axes: Axes, study: Study, style: Style) -> None:
    axes.plot(study.z, study.base, color=style.ink, linewidth=1.4, linestyle="--", label="base")
    label = f"base + correction, eps = {study.eps:g}"
    axes.plot(study.z, study.corrected, color=style.lines[0], linewidth=1.8, label=label)
    axes.set(xlabel="pre-activation z", ylabel="activation a = f(z)", title="function")
    axes.legend()


def _correction(axes: Axes, study: Study, style: Style) -> None:
    axes.axhline(0, color=style.faint, linewidth=0.8)
    axes.plot(study.u, study.ghat, color=style.lines[0], linewidth=1.8, label=f"{study.route} route")
    peak = math.exp(-0.5)
    crrelu = [value * math.exp(-0.5 * value * value) for value in study.u]
    axes.plot(study.u, crrelu, color=style.lines[1], linewidth=1.2, linestyle=":", label="CRReLU's, u exp(-u²/2)")
    reach = max(peak, *map(abs, study.ghat)) * 1.1
    axes.set(xlabel="standardised pre-activation u", ylabel="shape ĝ(u)", ylim=(-reach, reach))
    axes.set_title(f"correction, largest slope {study.gain:.2g}")
    axes.legend()


def _pre_activations(axes: Axes, study: Study, style: Style) -> None:
    axes.fill_between(study.z, study.density, color=style.lines[0], alpha=0.25, linewidth=0)
    axes.plot(study.z, study.density, color=style.lines[0], linewidth=1.6)
    axes.set(xlabel="pre-activation z", ylabel="density p(z)", title="what comes in", ylim=(0, None))


def _outputs(axes: Axes, study: Study, style: Style) -> None:
    before, after = study.outputs_before, study.outputs_after
    label = f"base, entropy {study.entropy:.3f}"
    axes.plot(*before, color=style.ink, linewidth=1.4, linestyle="--", label=label)
    label = f"eps = {study.eps:g}, entropy {study.entropy_after:.3f}"
    axes.plot(*after, color=style.lines[0], linewidth=1.8, label=label)
    axes.set(xlabel="activation a", ylabel=f"density at resolution {study.resolution:g}", ylim=(0, None))
    axes.set_title(f"what goes out, d entropy / d eps = {study.slope:+.3f}")
    reach = [curve[0][index] for curve in (before, after) for index in _bulk(curve[1])]
    margin = 0.05 * (max(reach) - min(reach))
    axes.set_xlim(min(reach) - margin, max(reach) + margin)
    axes.legend()


def _bulk(density: Sequence[float]) -> tuple[int, int]:
    """Return the first and the last place where a density is worth drawing."""
    worth = [place for place, value in enumerate(density) if value > 2e-3 * max(density)]
    return worth[0], worth[-1]
