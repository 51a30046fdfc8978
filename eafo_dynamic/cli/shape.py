"""`eafo-dynamic shape`: an activation, its correction and the correction's effect, for a given density."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, TypeAlias

from eafo_dynamic.cli.helptext import examples
from eafo_dynamic.cli.output import add_format_option, emit
from eafo_dynamic.errors import ConfigError

if TYPE_CHECKING:
    from eafo_dynamic.cli.sources import Source
    from eafo_dynamic.records.figures.theory import Study

__all__ = ["register", "study"]

_ROUTE = "analytic: the paper's formula; score: by the score of the output; auto (default): the first where it exists"

Commands: TypeAlias = "argparse._SubParsersAction[Any]"  # pyright: ignore[reportPrivateUsage]


def register(commands: Commands) -> None:
    """Add `shape` to the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    from eafo_dynamic.cli.sources import DENSITIES

    parser = commands.add_parser(
        "shape",
        help="show an activation's correction and its effect, for a given pre-activation density",
        description="Show an activation's correction, the corrected function and the densities around them.",
        **examples(
            "shape gelu --std 1.4 --out gelu.png",
            "shape relu --density student-t3 --route score",
            "shape tanh --curve --format csv",
        ),
    )
    parser.add_argument("activation", metavar="NAME", help="its name, for example gelu")
    parser.add_argument(
        "--density",
        default="normal",
        metavar="NAME|FILE",
        help=f"{', '.join(DENSITIES)}, or a file of samples",
    )
    parser.add_argument("--mean", type=float, default=0.0, help="mean of a named density (default: 0)")
    parser.add_argument("--std", type=float, default=1.0, help="standard deviation of a named density (default: 1)")
    parser.add_argument("--eps", type=float, default=0.3, help="amplitude of the correction shown (default: 0.3)")
    parser.add_argument("--route", choices=("auto", "analytic", "score"), default="auto", help=_ROUTE)
    parser.add_argument(
        "--resolution",
        type=float,
        default=0.1,
        metavar="R",
        help="r, in standard deviations of the output (default: 0.1)",
    )
    parser.add_argument("--curve", action="store_true", help="print the curves instead of the summary")
    parser.add_argument("--out", metavar="FILE", help="a figure: .png, .svg or .pdf")
    add_format_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    result = study(
        args.activation,
        _source(args),
        eps=args.eps,
        route=args.route,
        resolution=args.resolution,
    )
    if args.out:
        from eafo_dynamic.records.figures import theory
        from eafo_dynamic.records.figures.style import LIGHT, drawing, save

        with drawing(LIGHT):
            save(theory.shape(result), args.out)
    if args.curve:
        emit(_curve(result), fmt=args.format)
    else:
        title = f"Correction of {result.activation}, {result.label}"
        emit([_summary(result)], fmt=args.format, title=title, optional=("gain", "atom_mass"))
    return 0


def _source(args: argparse.Namespace) -> Source:
    from pathlib import Path

    from eafo_dynamic.cli.sources import DENSITIES, from_density, from_file

    if args.density not in DENSITIES and (Path(args.density).exists() or Path(args.density).suffix):
        return from_file(args.density)
    return from_density(args.density, args.mean, args.std)


def study(activation: str, source: Source, *, eps: float, route: str = "auto", resolution: float = 0.1) -> Study:
    """The curves and numbers that the figure and the summary of a correction show.

    Args:
        activation: name of the activation.
        source: pre-activations of one site.
        eps: amplitude of the correction.
        route: "auto", "analytic" or "score".
        resolution: r, in standard deviations of the output.

    Returns:
        The curves and numbers.

    Raises:
        ConfigError: if eps is not finite, or another argument cannot work.
    """
    import math

    import torch

    from eafo_dynamic.correction.bases import as_base
    from eafo_dynamic.correction.shape import correction_shape
    from eafo_dynamic.entropy.output import SmoothedOutput
    from eafo_dynamic.records.figures.theory import Study

    if not math.isfinite(eps):
        raise ConfigError("--eps", eps, "is not a number", "The default is 0.3.")
    base = as_base(activation)
    shape = correction_shape(base, source.density, route, resolution)  # pyright: ignore[reportArgumentType]
    mean = source.density.mean[:, None]
    std = source.density.std[:, None]
    direction = std * shape((source.points - mean) / std)
    before = SmoothedOutput(base(source.points), resolution, sampled=source.sampled)
    after = SmoothedOutput(base(source.points) + eps * direction, resolution, sampled=source.sampled)
    u = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    z = mean + std * u
    correction = eps * std * shape(u)
    return Study(
        activation=str(base),
        label=source.label,
        eps=eps,
        resolution=resolution,
        route=shape.route,
        gain=float(shape.gain[0]),
        u=u.tolist(),
        z=z[0].tolist(),
        density=(source.density.pdf(u) / std)[0].tolist(),
        ghat=shape(u)[0].tolist(),
        base=base(z)[0].tolist(),
        corrected=(base(z) + correction)[0].tolist(),
        outputs_before=_curve_of(before),
        outputs_after=_curve_of(after),
        entropy=float(before.entropy[0]),
        entropy_after=float(after.entropy[0]),
        slope=float(before.gradient(direction)[0]),
        atom_mass=float(before.mixed.atom_mass[0]),
    )


def _curve_of(output: Any) -> tuple[list[float], list[float]]:
    values, density = output.curve
    return values[0].tolist(), density[0].tolist()


def _summary(result: Study) -> dict[str, object]:
    return {
        "activation": result.activation,
        "route": result.route,
        "gain": result.gain,
        "entropy": result.entropy,
        "atom_mass": result.atom_mass,
        "d_entropy_d_eps": result.slope,
        "eps": result.eps,
        "entropy_at_eps": result.entropy_after,
    }


def _curve(result: Study) -> list[dict[str, object]]:
    """Every tenth point of the curves, one row per point."""
    columns = ("u", "z", "density", "ghat", "base", "corrected")
    curves = [getattr(result, name)[::10] for name in columns]
    return [dict(zip(columns, values, strict=True)) for values in zip(*curves, strict=True)]
