"""`eafo-dynamic bench`: what the corrections cost on this machine, beside what one would use otherwise."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, TypeAlias

from eafo_dynamic.cli.helptext import examples
from eafo_dynamic.cli.output import add_format_option, emit
from eafo_dynamic.errors import ConfigError

__all__ = ["register"]

Commands: TypeAlias = "argparse._SubParsersAction[Any]"  # pyright: ignore[reportPrivateUsage]

GROUPS = ("activation", "memory", "floor", "gpu", "statistics", "round", "start", "growth", "step")

_DESCRIPTION = """\
Measure what the corrections cost on this machine. Ratios are medians over pairs measured in alternation in
one run, with the middle half of the pairs as their range. The full run takes a few minutes."""


def register(commands: Commands) -> None:
    """Add `bench` to the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "bench",
        help="measure what the corrections cost on this machine",
        description=_DESCRIPTION,
        **examples("bench --quick", "bench --only activation step --threads 1 --json bench.json --out bench.png"),
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few pairs: a first look")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help=f"some of: {', '.join(GROUPS)}")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that torch may use (default: its own choice)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows and the machine to a file")
    parser.add_argument("--out", metavar="FILE", help="a figure: .png, .svg or .pdf")
    add_format_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    unknown = [name for name in args.only or [] if name not in GROUPS]
    if unknown:
        raise ConfigError("--only", unknown[0], "is no group of measurements", f"Choose from {', '.join(GROUPS)}.")
    if args.threads is not None and args.threads < 1:
        raise ConfigError("--threads", args.threads, "must be at least 1", "Leave it out for torch's own choice.")
    for option, path in (("--json", args.json), ("--out", args.out)):
        if path and not Path(path).absolute().parent.is_dir():
            raise ConfigError(option, path, "is in a folder that does not exist", "Make the folder first.")
    if args.out:
        from eafo_dynamic.records.figures.style import check_picture

        check_picture(args.out)

    import torch

    if args.only == ["gpu"] and not torch.cuda.is_available():
        raise ConfigError("--only", "gpu", "torch sees no CUDA device", "Leave it out, or measure where there is one.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows = _measured(args.only, args.quick)
    if args.json:
        text = json.dumps({"machine": machine(), "quick": args.quick, "rows": rows}, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    if args.out:
        from eafo_dynamic.experiments.benchmark.figure import draw

        draw(rows, args.out)
    shown = [_shown(row) for row in rows] if args.format == "table" else rows
    about = machine()
    title = f"{about['processor']}, {about['threads']} of {about['cores']} cores, torch {about['torch']}"
    columns = ["group", "case", "beside", "value", "range", "target", "met"] if args.format == "table" else None
    emit(shown, columns=columns, fmt=args.format, title=title, optional=("range", "group"))
    return 0


def _measured(only: list[str] | None, quick: bool) -> list[dict[str, Any]]:
    from rich.console import Console

    from eafo_dynamic.experiments.benchmark import run_benchmark

    with Console(file=sys.stderr).status("measuring ...") as status:

        def report(group: str, row: dict[str, Any]) -> None:
            status.update(f"{group}: {row['case']} {row['value']:.3g} {row['unit']}")

        return run_benchmark(only, quick, report)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    target, unit = row["target"], row["unit"]
    spread = f"{row['low']:.3g} - {row['high']:.3g}" if "low" in row and unit == "x" else None
    return {
        **{key: row[key] for key in ("group", "case", "beside")},
        "value": f"{row['value']:.3g} {unit}",
        "range": spread,
        "target": None if target is None else f"{target:g} {unit}",
        "met": None if target is None else "yes" if row["value"] <= target else "no",
    }


def machine() -> dict[str, Any]:
    """What the numbers belong to.

    Returns:
        Processor, cores, threads, versions, the back end of a CPU, and the GPU.
    """
    import os
    import platform

    import torch

    from eafo_dynamic.correction.kernels import resolve_backend
    from eafo_dynamic.internals.version import __version__

    names = [platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or names
    return {
        "processor": names[0] or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "eafo_dynamic": __version__,
        "backend": resolve_backend("auto"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
