"""`eafo-dynamic compare`: arms times seeds on one task, and what the paired differences say."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from eafo_dynamic.cli.helptext import examples
from eafo_dynamic.cli.output import add_format_option, emit, quiet_pipe, table_width
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.internals.files import see_working_directory

if TYPE_CHECKING:
    from eafo_dynamic.experiments.compare.plan import Plan
    from eafo_dynamic.experiments.compare.runner import Failure

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
            "compare --config configs/evidence_digits_autoencoder.yaml --tune --jobs 2",
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
    parser.add_argument(
        "--backend",
        choices=("local", "ray"),
        default="local",
        help="local: processes of this machine (default); ray: a cluster of Ray whose nodes share the folders",
    )
    parser.add_argument("--out", metavar="DIR", help="where results are kept (default: as the plan says)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print one command per unfinished cell; run nothing")
    what.add_argument("--show", action="store_true", help="the tables of what is finished; run nothing")
    what.add_argument(
        "--check",
        action="store_true",
        help="build every arm and the data, try one step, say what differs; train nothing",
    )
    what.add_argument(
        "--tune",
        action="store_true",
        help="choose the learning rates of each arm as the plan's tune says and write them down; no tables",
    )
    parser.add_argument("--page", metavar="FILE", help="with --show: one page in Markdown over all plans, with figures")
    parser.add_argument("--questions", metavar="FILE", help="with --page: YAML, which arm is asked about against which")
    parser.add_argument("--forest", nargs="+", default=[], metavar="ARM", help="with --page: arms in its first figure")
    parser.add_argument("--curves", nargs="+", default=[], metavar="NAME", help="with --page: plans to draw over steps")
    parser.add_argument("--no-tables", action="store_true", help="run the cells, leave the evaluation to --show")
    add_format_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.jobs < 1:
        raise ConfigError("--jobs", args.jobs, "must be at least 1", "Give the number of processes.")
    see_working_directory()
    plans = [_plan(Path(path), args) for path in args.config]
    if args.tune:
        return 1 if sum(_tune(plan, args) for plan in plans) else 0
    if args.list:
        _list(plans, args)
        return 0
    if args.check:
        return _check(plans)
    failures = 0
    if not args.show:
        failures = sum(_train(plan, args) for plan in plans)
    if args.page is not None:
        _page(plans, args)
    elif not args.no_tables:
        _show(plans, args.format)
    return 1 if failures else 0


def _plan(path: Path, args: argparse.Namespace) -> Plan:
    """The plan with the seeds that the command line adds to it."""
    from eafo_dynamic.experiments.compare.plan import check_seed, read_plan
    from eafo_dynamic.experiments.compare.tuning import apply_choices

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
    plan = dataclasses.replace(plan, seeds=tuple(dict.fromkeys([*plan.seeds, *(args.seeds or ())])))
    if args.tune:
        return plan
    return apply_choices(plan)


def _cells(plan: Plan, args: argparse.Namespace) -> list[Any]:
    from eafo_dynamic.experiments.compare.runner import cells

    seeds = args.seeds
    if seeds is not None:
        seeds = list(dict.fromkeys(seeds))
    return cells(plan, args.arms, seeds)


def _restore(plan: Plan) -> None:
    """Brings cells back from the plan's store, and says how many of them do not fit the plan."""
    from eafo_dynamic.experiments.compare.cell import restore

    refused = restore(plan).refused
    if refused:
        problem = f"{refused} cells were made with other settings, or by a version with other options"
        print(f"{plan.store}: {problem}; they are left out", file=sys.stderr)


def _list(plans: list[Plan], args: argparse.Namespace) -> None:
    from eafo_dynamic.experiments.compare.cell import finished

    for path, plan in zip(args.config, plans, strict=True):
        _restore(plan)
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
    from eafo_dynamic.experiments.compare.tuning import untuned

    chosen = _cells(plan, args)
    without_choice = [name for name in untuned(plan) if any(arm.name == name for arm, _ in chosen)]
    if without_choice:
        mend = "Run the same command with --tune first."
        raise ConfigError("tune", without_choice, "no learning rate has been chosen for these arms", mend)
    _restore(plan)
    if all(finished(plan, arm, seed) for arm, seed in chosen):
        return 0
    check(plan)
    return _report(plan, run(plan, chosen, args.jobs, args.backend))


def _tune(plan: Plan, args: argparse.Namespace) -> int:
    from eafo_dynamic.experiments.compare.cell import check
    from eafo_dynamic.experiments.compare.tuning import apply_choices, tune

    check(apply_choices(plan))
    failed = _report(plan, tune(plan, args.arms, args.jobs, args.backend))
    if plan.tuning is not None and plan.tuning.file.exists():
        print(f"written: {plan.tuning.file}")
    return failed


def _report(plan: Plan, failures: Sequence[Failure]) -> int:
    cells_by_reason: dict[str, list[str]] = {}
    for failure in failures:
        cells_by_reason.setdefault(failure.why, []).append(failure.what)
    for why, cells in cells_by_reason.items():
        named = cells[0]
        if len(cells) > 1:
            named += f" and {len(cells) - 1} more cells"
        print(f"failed: {plan.title}, {named}: {why}", file=sys.stderr)
    return len(failures)


def _page(plans: list[Plan], args: argparse.Namespace) -> None:
    from eafo_dynamic.experiments.compare.evaluation import Evaluation
    from eafo_dynamic.experiments.compare.evidence import write_page
    from eafo_dynamic.experiments.compare.questions import read_questions

    questions = read_questions(Path(args.questions)) if args.questions else []
    for plan in plans:
        _restore(plan)
    evaluations = [Evaluation(plan) for plan in plans]
    files = write_page(
        [each for each in evaluations if not each.plan.name.endswith("_early")],
        questions,
        Path(args.page),
        forest_arms=args.forest,
        curves_of=args.curves,
        early=[each for each in evaluations if each.plan.name.endswith("_early")],
        configs={Path(path).stem: path for path in args.config},
    )
    print("written: " + ", ".join(map(str, files)))


def _show(plans: list[Plan], fmt: str) -> None:
    from eafo_dynamic.experiments.compare.evaluation import evaluate, write
    from eafo_dynamic.experiments.compare.tables import rich_table

    for plan in plans:
        _restore(plan)
    evaluations, tables = evaluate(plans)
    files = [path for evaluation in evaluations for path in write(evaluation)]
    if fmt != "table":
        rows: list[dict[str, Any]] = []
        for heading, (table, _) in tables.items():
            rows += [{"table": heading, **row} for row in table]
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
