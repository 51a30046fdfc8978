"""``eafo-dynamic sites``: which activations a model has, and which of them would be wrapped."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.internals.files import see_working_directory
from eafo_dynamic.internals.tables import clipped

__all__ = ["make", "register", "shape"]


_PATTERNS = "class names, ends of module names or regular expressions"


def register(commands: Any) -> None:
    """Adds the command.

    Args:
        commands: the subparsers of the main parser.
    """
    from eafo_dynamic.cli.helptext import examples
    from eafo_dynamic.cli.output import add_format_option

    parser: argparse.ArgumentParser = commands.add_parser(
        "sites",
        help="list the activation sites of a model: wrapped, skipped, and why",
        description="List every activation call of a model and whether EAFOCallback would wrap it. Changes nothing.",
        **examples(
            "sites my_project.net:make",
            "sites my_project.net:make --shape 2,3,32,32 --target-modules ReLU mlp.act",
            "sites transformers:ViTModel --format md",
        ),
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="package.module:callable that returns the model; the working directory may hold the package",
    )
    parser.add_argument(
        "--shape",
        type=shape,
        metavar="N,N,...",
        help="run the model on zeros of this shape, for example 2,3,32,32, to see shared and functional calls",
    )
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="PATTERN",
        help=f"sites to wrap: {_PATTERNS} (default: every hidden one)",
    )
    parser.add_argument("--exclude-modules", nargs="+", metavar="PATTERN", help=f"sites to leave alone: {_PATTERNS}")
    parser.add_argument(
        "--functional",
        choices=["wrap", "warn", "off"],
        default="wrap",
        help="activations called as functions: wrap them too (default), only warn about them, or leave them",
    )
    add_format_option(parser)
    parser.add_argument("--wide", action="store_true", help="a table with whole names")
    parser.set_defaults(run=_run)


def shape(text: str) -> tuple[int, ...]:
    """The sizes in a text such as ``2,3,32,32`` or ``2x3x32x32``.

    Args:
        text: as given on the command line.

    Returns:
        The sizes.
    """
    return tuple(int(part) for part in text.replace("x", ",").split(","))


def _run(args: argparse.Namespace) -> int:
    import torch

    from eafo_dynamic.cli.output import emit, is_unicode, table_width
    from eafo_dynamic.find.sites import Selection, find_sites

    model = make(args.model)
    example: tuple[torch.Tensor, ...] = ()
    if args.shape is not None:
        example = (torch.zeros(args.shape),)
    selection = Selection(args.target_modules, args.exclude_modules, functional=args.functional)
    report = find_sites(model, *example, selection=selection)
    title = f"{len(report.wrapped)} of {len(report.sites)} activation sites would be wrapped. {report.note}".strip()
    rows = report.rows()
    if args.format == "table" and not args.wide:
        mark = "…" if is_unicode() else "~"
        names = clipped([str(row["site"]) for row in rows], max(20, table_width() * 2 // 5), mark)
        rows = [{**row, "site": name} for name, row in zip(names, rows, strict=True)]
    emit(rows, fmt=args.format, title=title)
    return 0


def make(path: str) -> Any:
    """Calls a factory that returns a model.

    Args:
        path: ``package.module:callable``; the working directory may hold the package.

    Returns:
        The model.

    Raises:
        ConfigError: if there is no such callable, or it fails.
    """
    module_name, _, attribute = path.partition(":")
    see_working_directory()
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        return factory()
    except Exception as error:
        problem = f"cannot be made ({type(error).__name__}: {error})"
        raise ConfigError("model", path, problem, "Give package.module:callable.") from None
