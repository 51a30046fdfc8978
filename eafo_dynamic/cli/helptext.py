"""Parts of the help text that all commands share: examples at the end, and the exit codes."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

__all__ = ["EXIT_CODES", "examples", "exit_codes"]

EXIT_CODES = {
    0: "done",
    1: "the training itself failed, or a cell of a comparison did",
    2: "wrong input; the last line on stderr says what to change",
    130: "interrupted by Ctrl-C",
}


def examples(*lines: str) -> dict[str, Any]:
    """Arguments of ``add_parser`` that put examples at the end of a command's help.

    Args:
        lines: commands, each without the leading ``eafo-dynamic``.

    Returns:
        ``epilog`` and ``formatter_class``.

    Example:
        >>> print(examples("rank --std 2")["epilog"])
        examples:
          eafo-dynamic rank --std 2
    """
    text = "\n".join(["examples:", *(f"  eafo-dynamic {line}" for line in lines)])
    return {"epilog": text, "formatter_class": Formatter}


def exit_codes() -> str:
    """The exit codes as text for a terminal.

    Returns:
        One line per code, under a heading.
    """
    return "\n".join(["exit codes:", *(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items())])


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples and refills descriptions to the terminal's width."""

    def add_argument(self, action: argparse.Action) -> None:
        """Widens the first column by the indentation of the commands' names, which argparse does not count."""
        super().add_argument(action)
        if action.nargs == argparse.PARSER:
            self._action_max_length += 2

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n  " in text:  # indented lines stay as they are
            return super()._fill_text(text, width, indent)
        return textwrap.fill(" ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent)
