"""Short names of sites for tables and figures."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["shortened"]


def shortened(names: Sequence[str], width: int, mark: str = "…") -> list[str]:
    """Shorten dotted names to a width: first letters for the leading parts, then the middle of the last one.

    `CorrectionLog.select` understands the short names.

    Args:
        names: names of sites.
        width: number of characters wanted.
        mark: one character for what was left out.

    Returns:
        The names in the same order; unchanged if two of them would become equal.
    """
    short = [_shortened(name, width, mark) for name in names]
    if len(set(short)) < len(set(names)):
        return list(names)
    return short


def _shortened(name: str, width: int, mark: str) -> str:
    *leading, last = name.split(".")
    for place, part in enumerate(leading):
        if len(".".join([*leading, last])) <= width:
            break
        if not part.isdecimal():
            leading[place] = part[:1]
    head = "".join(f"{part}." for part in leading)
    if len(head) + len(last) <= width:
        return head + last
    kept = width - len(head) - len(mark)  # characters of the last part
    if kept < 4:
        return head + last
    end = kept // 2
    return head + last[: kept - end] + mark + last[len(last) - end :]
