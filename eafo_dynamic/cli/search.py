"""`eafo-dynamic search`: which activation, with which correction, should the model of a configuration have?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeAlias

from eafo_dynamic.cli.helptext import examples
from eafo_dynamic.cli.output import add_format_option, emit, quiet_pipe, table_width
from eafo_dynamic.errors import ConfigError

__all__ = ["register"]

Commands: TypeAlias = "argparse._SubParsersAction[Any]"  # pyright: ignore[reportPrivateUsage]

_DESCRIPTION = """\
Find the activation and the correction that suit a model. Bases, corrections and learning rates are tried on
your own task, each against the model as it is on the same seeds. Bad candidates stop early, good ones get
more steps and more seeds, and the best few are compared once more on fresh seeds; the answer comes from
these alone, and may be that nothing beats what you have. The model as it is has no correction, also where
the configuration names one. The same command goes on where a killed one stopped; several may run at once,
also on machines that share the folder of --out."""


def register(commands: Commands) -> None:
    """Add `search` to the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "search",
        help="find the activation and the correction that suit a model",
        description=_DESCRIPTION,
        **examples(
            "search --config configs/digits_autoencoder.yaml --jobs 2",
            "search --config configs/digits_vit.yaml --bases own relu elu --set trainer.max_epochs=20",
            "search --config configs/wine_mlp.yaml --list",
        ),
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a configuration of eafo-dynamic fit")
    parser.add_argument(
        "--space", metavar="FILE", help="YAML with bases, corrections, rates and extra; what it lacks has its default"
    )
    parser.add_argument("--bases", nargs="+", metavar="NAME", help="these activations; own: those that the model has")
    parser.add_argument("--rates", nargs="+", type=float, metavar="X", help="learning rates in units of the task's")
    parser.add_argument("--metric", default="val_loss", help="logged in validation (default: val_loss)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the configuration")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds of the search (default: 3)")
    parser.add_argument("--confirm", type=int, default=8, metavar="N", help="fresh seeds for the answer (default: 8)")
    parser.add_argument("--finalists", type=int, default=3, metavar="N", help="candidates on these (default: 3)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="count seeds from here (default: 0)")
    parser.add_argument(
        "--pruner",
        default="halving",
        choices=("halving", "hyperband", "none"),
        help="what stops bad candidates (default: halving; hyperband keeps some slow starters)",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each (default: 1)")
    parser.add_argument("--out", metavar="DIR", help="journal and results (default: runs/search/<name of the file>)")
    parser.add_argument("--list", action="store_true", help="print the candidates; train nothing")
    add_format_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import dataclasses

    import yaml
    from rich.console import Console

    from eafo_dynamic.experiments.compare.plan import read_yaml
    from eafo_dynamic.experiments.compare.tables import rich_table
    from eafo_dynamic.experiments.search.candidates import read_space
    from eafo_dynamic.experiments.search.searching import Settings, run_search
    from eafo_dynamic.experiments.search.trainings import ConfiguredTask

    path = Path(args.config)
    space = read_space(read_yaml(Path(args.space), "--space") if args.space else None)
    if args.bases:
        space = dataclasses.replace(space, bases=args.bases)
    if args.rates:
        space = dataclasses.replace(space, rates=args.rates)
    settings: dict[str, Any] = {}
    for text in args.set:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError("--set", text, "is no KEY=VALUE", "Write for example trainer.max_epochs=20")
        settings[key] = yaml.safe_load(value)
    task = ConfiguredTask(path, args.metric, settings, args.threads)
    task.identity()  # a file that cannot be read is an error here
    if args.list:
        candidates = space.candidates()
        emit(
            [{"candidate": each.name, "base": each.base or "own", "eafo": each.eafo} for each in candidates],
            fmt=args.format,
        )
        return 0
    how = Settings(args.seeds, args.confirm, args.finalists, args.first_seed, args.pruner)
    out = Path(args.out) if args.out else Path("runs") / "search" / path.stem
    answer = run_search(task, space, how, out, args.jobs)
    if args.format != "table":
        emit(answer.table(), fmt=args.format)
        return 0
    emit(answer.table(), title="All candidates, on the seeds of the search; gain: positive is better")
    finals, below = answer.finals()
    console = Console(width=table_width(), highlight=False)
    with quiet_pipe():
        if finals:
            console.print()
            console.print(rich_table(finals, "The finalists, on seeds that no choice has seen", console.width))
        for line in below:
            print(line)
        print(f"\n{answer.sentence}")
        if answer.snippet:
            print(f"\n{answer.snippet}", end="")
        print(f"\nwritten: {out / 'answer.md'}")
    return 0
