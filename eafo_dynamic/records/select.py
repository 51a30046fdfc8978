"""Which sites a user's pattern means."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from eafo_dynamic.errors import LogError

__all__ = ["matching_sites"]


def matching_sites(patterns: str | Iterable[str], sites: Sequence[str], source: Path) -> list[str]:
    """Return the sites that one pattern or any of several selects.

    A pattern is tried as a site's name, then as a glob (`…`, the mark of shortened names, stands for `*`),
    then as a part of the dotted name, then part by part as beginnings (`b.0.m.act` for `blocks.0.mlp.act`),
    then as a regular expression for the whole name; the first that matches counts.

    Args:
        patterns: one pattern or several.
        sites: names of the sites.
        source: where the sites are from, for the message.

    Returns:
        The selected names in the order of `sites`.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    found = {site for pattern in patterns for site in _matches(pattern, sites, source)}
    return [site for site in sites if site in found]


def _matches(pattern: str, sites: Sequence[str], source: Path) -> list[str]:
    if pattern in sites:
        return [pattern]
    inner, glob = f".{pattern}.", pattern.replace("…", "*")
    found = [site for site in sites if fnmatch.fnmatchcase(site, glob)]
    found = found or [site for site in sites if inner in f".{site}."]
    found = found or [site for site in sites if _is_short_for(glob, site)]
    found = found or _regular(pattern, sites)
    if found:
        return found
    near = [site for site in sites if pattern.lower() in site.lower()][:3]
    near = near or difflib.get_close_matches(pattern, sites, n=3, cutoff=0.3) or list(sites[:3])
    shown = ", ".join(near) or "none, the log has no rows"
    raise LogError(f"site={pattern!r} is no site of {source} ({len(sites)} sites). Nearest: {shown}")


def _is_short_for(glob: str, site: str) -> bool:
    short, whole = glob.split("."), site.split(".")
    if len(short) != len(whole):
        return False
    pairs = zip(short, whole, strict=True)
    return all(part == name if part.isdecimal() else fnmatch.fnmatchcase(name, f"{part}*") for part, name in pairs)


def _regular(pattern: str, sites: Sequence[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error:
        return []
    return [site for site in sites if compiled.fullmatch(site)]
