"""The calls that a later search finds beside those of an earlier one, as where a branch opens in mid-training."""

from __future__ import annotations

import re
from dataclasses import replace

from eafo_dynamic.find.evidence import Evidence, which
from eafo_dynamic.find.selection import FoundSite, SiteReport

__all__ = ["with_new_calls"]


def with_new_calls(report: SiteReport, now: SiteReport) -> SiteReport:
    """A report with the calls that a later search has found for the first time.

    Args:
        report: of the search by which a model was wrapped.
        now: of a search in the same model, plain, with another example.

    Returns:
        What ``report`` has, and behind it the sites that ``now`` wraps and ``report`` does not know, under names that
        are free. A module that ``report`` lists as not reached is one of them. A call of a module that corrects
        itself, and that ``now`` calls at several places, is not: its correction would have to change hands.
    """
    sites = list(report.sites)
    for found in now.wrapped:
        if _is_alone(found):
            earlier = [site for site in sites if site.module == found.module and site.parameters is None]
            if not any(site.wrapped for site in earlier):
                sites = [site for site in sites if site not in earlier] + [found]
        elif not _is_known(report.sites, found):
            sites.append(_named_anew(found, sites))
    return replace(report, sites=sites)


def _is_alone(site: FoundSite) -> bool:
    """Whether the module hosts its own site, whoever calls it."""
    return site.owner is None and site.parameters is None


def _of_key(sites: list[FoundSite], found: FoundSite) -> list[FoundSite]:
    return [site for site in sites if site.key == found.key]


def _is_known(sites: list[FoundSite], found: FoundSite) -> bool:
    """Whether an owner that is asked for this call has an answer, or cannot be asked."""
    same_key = _of_key(sites, found)
    if any(_is_alone(site) and site.wrapped for site in same_key):
        return True
    known = list(dict.fromkeys(Evidence(site.places, site.after) for site in same_key if site.owner == found.owner))
    return which(known, Evidence(found.places, found.after)) is not None


def _named_anew(found: FoundSite, sites: list[FoundSite]) -> FoundSite:
    call = 1 + max((site.call for site in _of_key(sites, found)), default=-1)
    stem = re.sub(r"#\d+$", "", found.name)
    return replace(found, name=f"{stem}#{call}", call=call)
