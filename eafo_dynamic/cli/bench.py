"""`eafo-dynamic bench`: what the corrections cost on this machine, compared with the alternatives."""

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

GROUPS = (
    "activation", "memory", "floor", "gpu", "gpu_step", "statistics", "round", "start", "growth", "step", "short",
    "compiled",
)  # fmt: skip
_ON_GPU = {"gpu", "gpu_step"}

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
    for name in args.only or ():
        if name not in GROUPS:
            raise ConfigError("--only", name, "is no group of measurements", f"Choose from {', '.join(GROUPS)}.")
    if args.threads is not None and args.threads < 1:
        raise ConfigError("--threads", args.threads, "must be at least 1", "Leave it out for torch's own choice.")
    for option, path in (("--json", args.json), ("--out", args.out)):
        if path and not Path(path).absolute().parent.is_dir():
            raise ConfigError(option, path, "is in a folder that does not exist", "Make the folder first.")
    if args.out:
        from eafo_dynamic.records.figures.style import check_picture

        check_picture(args.out)

    import torch

    if args.only and _ON_GPU.issuperset(args.only) and not torch.cuda.is_available():
        only = " ".join(args.only)
        raise ConfigError("--only", only, "torch sees no CUDA device", "Leave it out, or measure where there is one.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows = _measured(args.only, args.quick)
    about = machine()
    if args.json:
        text = json.dumps({"machine": about, "quick": args.quick, "rows": rows}, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    if args.out:
        from eafo_dynamic.experiments.benchmark.figure import draw

        draw(rows, args.out)
    if args.format != "table":
        emit(rows, fmt=args.format)
        return 0
    columns = ["group", "case", "beside", "value", "range", "target", "met"]
    title = f"{about['processor']}, {about['threads']} of {about['cores']} cores, torch {about['torch']}"
    emit([_in_words(row) for row in rows], columns=columns, title=title, optional=("range", "group"))
    return 0


def _measured(only: list[str] | None, quick: bool) -> list[dict[str, Any]]:
    from rich.console import Console

    from eafo_dynamic.correction.kernels.node import build_node
    from eafo_dynamic.experiments.benchmark import run_benchmark

    with Console(file=sys.stderr).status("building what a second run finds built ...") as status:
        build_node()
        status.update("measuring ...")

        def report(group: str, row: dict[str, Any]) -> None:
            status.update(f"{group}: {row['case']} {row['value']:.3g} {row['unit']}")

        return run_benchmark(only, quick, report)


def _in_words(row: dict[str, Any]) -> dict[str, Any]:
    unit = row["unit"]
    shown = {
        "group": row["group"],
        "case": row["case"],
        "beside": row["beside"],
        "value": f"{row['value']:.3g} {unit}",
        "range": None,
        "target": None,
        "met": None,
    }
    if "low" in row and unit == "x":
        shown["range"] = f"{row['low']:.3g} - {row['high']:.3g}"
    if row["target"] is not None:
        shown["target"] = f"{row['target']:g} {unit}"
        shown["met"] = "yes" if row["value"] <= row["target"] else "no"
    return shown


def machine() -> dict[str, Any]:
    """The machine that was measured.

    Returns:
        Processor, cores, threads, versions, the kernels' back end on the CPU, the language of small tensors' autograd
        node, and the GPU (None without one).
    """
    import os
    import platform

    import torch

    from eafo_dynamic.correction.kernels import resolve_backend
    from eafo_dynamic.correction.kernels.fused import node_in_cpp
    from eafo_dynamic.internals.version import __version__

    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "eafo_dynamic": __version__,
        "backend": resolve_backend("auto"),
        "node": "Python" if node_in_cpp() is None else "C++",
        "gpu": gpu,
    }


def _processor() -> str:
    import platform

    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
