"""The command line ``eafo-dynamic``: a LightningCLI for training, and commands that inspect.

Exit codes: 0 done, 1 the training itself failed, 2 wrong input (one line on stderr says what to change),
130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from eafo_dynamic.errors import EAFOError

__all__ = ["main"]

_TRAINING = {
    "fit": "train a model from a YAML configuration",
    "validate": "run the validation loop on a checkpoint",
    "test": "run the test loop on a checkpoint",
    "predict": "run the prediction loop on a checkpoint",
}
_INSPECTION = ("log", "sites", "rank", "shape", "compare", "search", "merge", "bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments without the program's name; None: those of this process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a letter that the terminal cannot print is not an error
    try:
        if arguments and arguments[0] in _TRAINING:
            from eafo_dynamic.cli.fit import train

            return train(None if argv is None else arguments)
        parsed = _parser().parse_args(arguments)
        code: int = parsed.run(parsed)
        return code
    except EAFOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    from eafo_dynamic.cli import completion
    from eafo_dynamic.cli.helptext import Formatter, exit_codes
    from eafo_dynamic.internals.version import __version__

    parser = argparse.ArgumentParser(
        prog="eafo-dynamic",
        description="Entropy-based activation function optimisation while a model trains.",
        epilog=f"{exit_codes()}\n\neafo-dynamic COMMAND --help tells more about a command, with examples.",
        formatter_class=Formatter,
    )
    parser.add_argument("--version", action="version", version=f"eafo-dynamic {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in _TRAINING.items():
        commands.add_parser(name, help=text, add_help=False)
    for name in _INSPECTION:
        importlib.import_module(f"eafo_dynamic.cli.{name}").register(commands)
    completion.register(commands, _parser, tuple(_TRAINING))
    return parser
