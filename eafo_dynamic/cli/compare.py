"""`eafo-dynamic compare`: arms times seeds on one task, and what the paired differences say."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from eafo_dynamic.cli.helptext import examples
from eafo_dynamic.cli.output import add_format_option, emit, quiet_pipe, table_width
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.internals.files import see_working_directory

if TYPE_CHECKING:
    from eafo_dynamic.experiments.compare.plan import Plan

__all__ = ["register"]

Commands: TypeAlias = "argparse._SubParsersAction[Any]"  # pyright: ignore[reportPrivateUsage]

_DESCRIPTION = """\
Train every arm of a plan with every seed, and show the paired differences from the reference arm. Initial
weights, order of the batches and split are the same in all arms of a seed, which is checked. Finished cells
are kept: the same command goes on where a killed one stopped. To spread the cells over machines that share
a folder, run the lines that --list prints there, in any order, then --show."""


def register(commands: Commands) -> None:
    """Add `compare` to the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "compare",
        help="compare arms over seeds on one task, with paired statistics",
        description=_DESCRIPTION,
        **examples(
            "compare --config configs/compare_digits_vit.yaml --check",
            "compare --config configs/compare_digits_vit.yaml --jobs 2",
            "compare --config configs/compare_*.yaml --show --format md",
        ),
    )
    parser.add_argument("--config", required=True, nargs="+", metavar="PLAN", help="a plan; several: one after another")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help="only these; seeds that are not in the plan are added to it, also for --show",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (default: 1)")
    parser.add_argument("--out", metavar="DIR", help="where results are kept (default: as the plan says)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print one command per unfinished cell; run nothing")
    what.add_argument("--show", action="store_true", help="the tables of what is finished; run nothing")
    what.add_argument(
        "--check",
        action="store_true",
        help="build every arm and the data, try one step, say what differs; train nothing",
    )
    parser.add_argument("--no-tables", action="store_true", help="run the cells, leave the evaluation to --show")
    add_format_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.jobs < 1:
        raise ConfigError("--jobs", args.jobs, "must be at least 1", "Give the number of processes.")
    see_working_directory()
    plans = [_plan(Path(path), args) for path in args.config]
    if args.list:
        _list(plans, args)
        return 0
    if args.check:
        return _check(plans)
    failures = 0
    if not args.show:
        failures = sum(_train(plan, args) for plan in plans)
    if not args.no_tables:
        _show(plans, args.format)
    return 1 if failures else 0


def _plan(path: Path, args: argparse.Namespace) -> Plan:
    """The plan with the seeds that the command line adds to it."""
    from eafo_dynamic.experiments.compare.plan import check_seed, read_plan

    directory = None
    if args.out is not None:
        directory = Path(args.out)
        if len(args.config) > 1:
            directory /= path.stem
    plan = read_plan(path, directory)
    for name in args.arms or ():
        plan.arm(name)
    for seed in args.seeds or ():
        check_seed("--seeds", seed)
    return dataclasses.replace(plan, seeds=tuple(dict.fromkeys([*plan.seeds, *(args.seeds or ())])))


def _cells(plan: Plan, args: argparse.Namespace) -> list[Any]:
    from eafo_dynamic.experiments.compare.runner import cells

    seeds = args.seeds
    if seeds is not None:
        seeds = list(dict.fromkeys(seeds))
    return cells(plan, args.arms, seeds)


def _list(plans: list[Plan], args: argparse.Namespace) -> None:
    from eafo_dynamic.experiments.compare.cell import finished

    for path, plan in zip(args.config, plans, strict=True):
        for arm, seed in _cells(plan, args):
            if not finished(plan, arm, seed):
                words = ["--config", path, "--arms", arm.name, "--seeds", str(seed), "--out", str(plan.directory)]
                print(shlex.join(["eafo-dynamic", "compare", *words, "--no-tables"]))


def _check(plans: list[Plan]) -> int:
    from eafo_dynamic.experiments.compare.cell import check, check_metrics
    from eafo_dynamic.experiments.compare.compose import differences

    for plan in plans:
        check(plan)
        check_metrics(plan)
        print(f"{plan.title}: {len(plan.arms)} arms x {len(plan.seeds)} seeds on {plan.task}, in {plan.directory}")
        for arm in plan.arms:
            different = "; ".join(differences(plan, arm))
            print(f"  {arm.name}: {different or 'the reference'}")
    return 0


def _train(plan: Plan, args: argparse.Namespace) -> int:
    from eafo_dynamic.experiments.compare.cell import check, finished
    from eafo_dynamic.experiments.compare.runner import run

    chosen = _cells(plan, args)
    if all(finished(plan, arm, seed) for arm, seed in chosen):
        return 0
    check(plan)
    failures = run(plan, chosen, args.jobs)
    cells_by_reason: dict[str, list[str]] = {}
    for failure in failures:
        cells_by_reason.setdefault(failure.why, []).append(failure.what)
    for why, cells in cells_by_reason.items():
        named = cells[0]
        if len(cells) > 1:
            named += f" and {len(cells) - 1} more cells"
        print(f"failed: {plan.title}, {named}: {why}", file=sys.stderr)
    return len(failures)


def _show(plans: list[Plan], fmt: str) -> None:
    from eafo_dynamic.experiments.compare.evaluation import evaluate, write
    from eafo_dynamic.experiments.compare.tables import rich_table

    evaluations, tables = evaluate(plans)
    files = [path for each in evaluations for path in write(each)]
    if fmt != "table":
        rows = [{"table": heading, **row} for heading, (table, _) in tables.items() for row in table]
        emit(rows, fmt=fmt)
        return
    from rich.console import Console

    console = Console(width=table_width(), highlight=False)
    with quiet_pipe():
        for heading, (table, notes) in tables.items():
            console.print(rich_table(table, heading, console.width))
            for note in notes:
                console.print(note, markup=False)
            console.print()
        console.print("written: " + ", ".join(map(str, files)), markup=False, soft_wrap=True)
