#!/usr/bin/env python
"""Writes the tables of options into examples/guide/options.md, from the definitions of the options.

Run: python .ci/options_page.py
The first table under a heading is that of the options whose part has the heading's name; all else stays as it is.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from eafo_dynamic.internals.declared import Described, table
from eafo_dynamic.trainers.options import CallbackOptions, TrainerCallbackOptions

PAGE = Path(__file__).parent.parent / "examples/guide/options.md"
CLASSES = (CallbackOptions, TrainerCallbackOptions)


def filled(page: str, options: Iterable[type] = CLASSES) -> str:
    """The page with its tables as the definitions have them."""
    options = tuple(options)
    parts = [described.part for each in options for described in Described.of(each).values()]
    for part in dict.fromkeys(parts):
        before, heading, after = page.partition(f"## {part}\n")
        if not heading:
            raise SystemExit(f"{PAGE} has no heading '## {part}'. Write one, with a table under it.")
        old = re.search(r"(?:^\|.*\n)+", after, flags=re.MULTILINE)
        if old is None:
            raise SystemExit(f"{PAGE} has no table under '## {part}'. Write its first line there.")
        page = before + heading + after[: old.start()] + table(part, options) + after[old.end() :]
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
