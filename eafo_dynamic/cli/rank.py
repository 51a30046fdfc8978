"""`eafo-dynamic rank`: activations by the entropy of their output, for a given pre-activation density."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, TypeAlias

from eafo_dynamic.cli.helptext import examples
from eafo_dynamic.cli.output import add_format_option, emit
from eafo_dynamic.errors import ConfigError

if TYPE_CHECKING:
    from eafo_dynamic.cli.sources import Source

__all__ = ["register"]

Commands: TypeAlias = "argparse._SubParsersAction[Any]"  # pyright: ignore[reportPrivateUsage]

DEFAULT = (
    "relu",
    "leaky_relu",
    "gelu",
    "silu",
    "mish",
    "hardswish",
    "tanh",
    "softplus",
    "elu",
    "normal_cdf",
    "sigmoid",
    "identity",
)

_DESCRIPTION = """\
Rank activations by the entropy of their output. `entropy` is the resolution-r entropy in nats: of the
output divided by its standard deviation, plus noise of standard deviation r, so that it is finite with
atoms and does not depend on scale or shift. The lowest comes first."""


def register(commands: Commands) -> None:
    """Add `rank` to the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "rank",
        help="rank activations by the entropy of their output, for a given pre-activation density",
        description=_DESCRIPTION,
        **examples(
            "rank --mean -0.5 --std 2",
            "rank --log runs/digits_vit --activations relu gelu silu",
            "rank --activations all --format md",
        ),
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--log", metavar="RUN", help="the densities of a run's sites at their last update")
    source.add_argument("--samples", metavar="FILE", help="pre-activations: .npy, or text with numbers")
    parser.add_argument("--mean", type=float, help="mean of a normal density (default: 0)")
    parser.add_argument("--std", type=float, help="standard deviation of a normal density (default: 1)")
    parser.add_argument("--site", metavar="PATTERN", help="with --log: only these sites")
    parser.add_argument(
        "--activations",
        nargs="+",
        default=list(DEFAULT),
        metavar="NAME",
        help="names of activations; all: every known one (default: twelve common ones)",
    )
    parser.add_argument(
        "--resolution",
        type=float,
        default=0.1,
        metavar="R",
        help="r, in standard deviations of the output (default: 0.1)",
    )
    parser.add_argument("--out", metavar="FILE", help="a figure of the ranking: .png, .svg or .pdf")
    add_format_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    source = _source(args)
    rows = ranking(source, args.activations, args.resolution)
    if args.out:
        from eafo_dynamic.records.figures import theory
        from eafo_dynamic.records.figures.style import LIGHT, drawing, save

        with drawing(LIGHT):
            save(theory.ranking(rows, source.label, args.resolution), args.out)
    columns = list(rows[0])
    title = f"Output entropy at resolution {args.resolution:g}, {source.label}"
    optional = ("d_entropy_d_eps", "continuous_entropy", "atom_mass", "lowest", "highest")
    emit(rows, columns=columns, fmt=args.format, title=title, optional=optional)
    return 0


def _source(args: argparse.Namespace) -> Source:
    from eafo_dynamic.cli.sources import from_density, from_file, from_log

    if args.log or args.samples:
        given = "--log" if args.log else "--samples"
        for option, value in (("--mean", args.mean), ("--std", args.std)):
            if value is not None:
                raise ConfigError(option, value, f"does not go with {given}", "Leave one of them out.")
    if args.site and not args.log:
        raise ConfigError("--site", args.site, "needs --log", "Name the run that has these sites.")
    if args.log:
        return from_log(args.log, args.site)
    if args.samples:
        return from_file(args.samples)
    mean = 0.0 if args.mean is None else args.mean
    std = 1.0 if args.std is None else args.std
    return from_density("normal", mean, std)


def ranking(source: Source, activations: list[str], resolution: float) -> list[dict[str, object]]:
    """Entropy of every activation's output, the lowest first.

    Args:
        source: pre-activations.
        activations: names of activations; "all" for every known one.
        resolution: r, in standard deviations of the output.

    Returns:
        Rows with rank, activation, entropy (mean over the sites [nats]; lowest and highest with several sites),
        atom_mass, continuous_entropy ([nats]; None where the output has no continuous part) and d_entropy_d_eps,
        the change of the entropy per unit of eps.
    """
    from eafo_dynamic.correction.bases import activation_names, as_base

    names = activation_names() if "all" in activations else activations
    bases = dict.fromkeys(as_base(name) for name in names)
    rows = [_entropies(base, source, resolution) for base in bases]
    rows.sort(key=lambda row: row["entropy"])
    return [{"rank": place, **row} for place, row in enumerate(rows, 1)]


def _entropies(base: Any, source: Source, resolution: float) -> dict[str, Any]:
    import math

    from eafo_dynamic.correction.shape import correction_shape
    from eafo_dynamic.entropy.output import SmoothedOutput

    density = source.density
    output = SmoothedOutput(base(source.points), resolution, sampled=source.sampled)
    mixed = output.mixed
    u = (source.points - density.mean[:, None]) / density.std[:, None]
    slope = output.gradient(density.std[:, None] * correction_shape(base, density, resolution=resolution)(u))
    row: dict[str, Any] = {"activation": str(base), "entropy": float(mixed.entropy.mean())}
    if len(source.names) > 1:
        row["lowest"] = float(mixed.entropy.min())
        row["highest"] = float(mixed.entropy.max())
    row["atom_mass"] = float(mixed.atom_mass.mean())
    row["continuous_entropy"] = None
    continuous = float(mixed.continuous_entropy.mean())
    if math.isfinite(continuous):
        row["continuous_entropy"] = continuous
    row["d_entropy_d_eps"] = float(slope.mean())
    return row
