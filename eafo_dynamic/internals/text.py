"""Text that comes from a user's model or file, made safe to show."""

from __future__ import annotations

import re

__all__ = ["printable"]

# C0 and C1 control characters and DELETE: a terminal acts on them. Line ends and tabs are what they seem.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""Replace control characters by their codes, so that a terminal shows them instead of acting on them.

    Args:
        text: such as the name of a site; module names may hold any character.

    Returns:
        The text, with `\x1b` for an escape character. Line ends and tabs stay.
    """
    return _CONTROL.sub(_code, text)


def _code(found: re.Match[str]) -> str:
    return f"\\x{ord(found[0]):02x}"
