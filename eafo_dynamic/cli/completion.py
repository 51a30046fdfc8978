"""`eafo-dynamic completion`: a script that lets a shell complete commands, options and file names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeAlias

from eafo_dynamic.cli.helptext import examples
from eafo_dynamic.cli.output import quiet_pipe
from eafo_dynamic.errors import EAFOError

__all__ = ["register"]

Commands: TypeAlias = "argparse._SubParsersAction[Any]"  # pyright: ignore[reportPrivateUsage]

_DESCRIPTION = """\
Print a completion script. It is made once: completing starts no Python. The options of fit, validate, test
and predict are those of LightningCLI."""

_FILE_OPTIONS = ("--config", "--ckpt_path")
_FILES = ("FILE", "PLAN", "CHECKPOINT", "NAME|FILE")
_FOLDERS = ("RUN", "DIR")


def register(commands: Commands, whole: Callable[[], argparse.ArgumentParser], training: tuple[str, ...]) -> None:
    """Add `completion` to the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
        whole: makes the parser of the whole command line.
        training: names of the commands that LightningCLI parses.
    """
    parser = commands.add_parser(
        "completion",
        help="print a script by which your shell completes this command",
        description=_DESCRIPTION,
        **examples(
            "completion bash > ~/.local/share/bash-completion/completions/eafo-dynamic",
            "completion zsh > ~/.zfunc/_eafo-dynamic",
        ),
    )
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "tcsh"), help="bash, zsh or tcsh")

    def run(args: argparse.Namespace) -> int:
        return _run(args, whole(), training)

    parser.set_defaults(run=run)


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser, training: tuple[str, ...]) -> int:
    try:
        import shtab
    except ImportError:
        raise EAFOError("completion needs shtab: pip install 'eafo-dynamic[completion]'") from None
    from eafo_dynamic.experiments.configured import AGAINST_PLAIN, TRAINING_OPTIONS

    for name, command in _commands(parser).items():
        if name in training:
            for option in TRAINING_OPTIONS:
                metavar = "FILE" if option in _FILE_OPTIONS else None
                command.add_argument(option, metavar=metavar)
        if name == "fit":
            command.add_argument(AGAINST_PLAIN, action="store_true")
    _mark_paths(parser, shtab.FILE, shtab.DIRECTORY)
    with quiet_pipe():
        print(shtab.complete(parser, args.shell))
    return 0


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The subcommands of a parser, by name."""
    for action in parser._actions:
        if action.nargs == argparse.PARSER:
            return dict(action.choices or {})
    return {}


def _mark_paths(parser: argparse.ArgumentParser, file: object, folder: object) -> None:
    """Tells shtab which arguments are paths, by their metavar."""
    for action in parser._actions:
        if action.metavar in _FILES:
            vars(action)["complete"] = file
        elif action.metavar in _FOLDERS:
            vars(action)["complete"] = folder
    for command in _commands(parser).values():
        _mark_paths(command, file, folder)
