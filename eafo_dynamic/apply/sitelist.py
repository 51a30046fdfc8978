"""The list of sites of a model that is wrapped, whoever has wrapped it, and of weights that come without one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from eafo_dynamic.apply.manifest import manifest
from eafo_dynamic.apply.naming import Renaming, plain_name
from eafo_dynamic.apply.surgery import hosted_sites
from eafo_dynamic.correction.kernels import EPS, LIFT, TERMS
from eafo_dynamic.correction.terms import TIED_TERM
from eafo_dynamic.errors import SiteError
from eafo_dynamic.find.sites import FoundSite, SiteReport

__all__ = ["has_corrections", "site_keys", "site_tensors", "sites_from_keys", "sites_of"]

_KEY = re.compile(rf"(?:^|\.)eafo_(\d+)_(shape|table|{'|'.join(TERMS)})$")


def has_corrections(keys: Iterable[str]) -> bool:
    """Whether weights have tensors of corrections among them.

    Args:
        keys: names of the weights.

    Returns:
        Whether they have.
    """
    return any(isinstance(key, str) and _KEY.search(key) for key in keys)


def site_keys(keys: Iterable[str]) -> list[str]:
    """The names of corrections among names of weights.

    Args:
        keys: names of the weights.

    Returns:
        Those of corrections, in the order given.
    """
    return [key for key in keys if _KEY.search(key)]


def site_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a wrapped model's sites: amplitudes, shape, and the table where there is one.

    Args:
        model: wrapped.

    Returns:
        The very tensors, by their names in the state_dict.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, Tensor] = {}
    for host, site in hosted_sites(model):
        for key in site.keys:
            tensor = getattr(host, key, None)
            if tensor is not None:
                found[f"{names[id(host)]}.{key}".removeprefix(".")] = tensor
    return found


def sites_of(model: nn.Module) -> dict[str, Any]:
    """What has to be known to wrap the same sites again, under the names that modules have in this model.

    Args:
        model: wrapped, itself or a part of what was wrapped, or with such a part inside.

    Returns:
        As ``manifest`` gives it.

    Raises:
        SiteError: if the model is not wrapped, its parts were wrapped with different options, or what a site belongs to
            lies outside of the model.
    """
    hosted = hosted_sites(model)
    if not hosted:
        raise SiteError(f"{type(model).__name__} has no corrections: wrap(model) first, or train it with a callback.")
    names = {id(module): name for name, module in model.named_modules()}
    found: list[FoundSite] = []
    forms: list[tuple[bool, bool, tuple[str, ...]]] = []
    bases: dict[str, str] = {}
    for host, site in hosted:
        if site.found is None:
            raise SiteError(
                f"{site.name} was pickled by an earlier version, which did not keep what is needed to wrap it again. "
                "Load the checkpoint of its run with apply_from_checkpoint."
            )
        was, form = site.found
        found.append(_now(was, names[id(host)], model))
        forms.append((form.tabulated, form.per_channel, form.terms))
        if site.base is not None:
            bases[found[-1].name] = site.base
    if len(set(forms)) > 1:
        raise SiteError(
            f"parts of this {type(model).__name__} were wrapped with different options (tabulated, per_channel, terms: "
            f"{', '.join(map(str, sorted(set(forms))))}). Save each part in a file of its own."
        )
    tabulated, per_channel, terms = forms[0]
    report = SiteReport(found, dynamic=True)
    return manifest(report, tabulated=tabulated, per_channel=per_channel, terms=terms, base=bases or None)


def _now(found: FoundSite, host: str, model: nn.Module) -> FoundSite:
    """A site under the names that modules have now."""
    then = found.owner
    if then is None:
        then = found.module
    if plain_name(then) == plain_name(host):
        return found
    renaming = Renaming.between(plain_name(then), plain_name(host))
    module = renaming(plain_name(found.module))
    if module is None:
        raise SiteError(
            f"{found.name}: {found.module!r} lies outside of this {type(model).__name__}. Give the model around it."
        )
    owner = None
    if found.owner is not None:
        owner = renaming(plain_name(found.owner))
    name = found.name
    if name.startswith(found.module):
        name = module + name[len(found.module) :]
    caller = None
    if found.caller is not None:
        caller = renaming(plain_name(found.caller))
    around = {
        key: tuple(now for now in (renaming(plain_name(each)) for each in getattr(found, key)) if now is not None)
        for key in ("guarded", "through", "beside")
    }
    return replace(found, name=name, module=module, owner=owner, caller=caller, **around)


def sites_from_keys(weights: Mapping[str, Tensor], report: SiteReport, names: Sequence[str] | None) -> dict[str, Any]:
    """The list of sites of weights that come without one, as far as it can be known.

    Args:
        weights: by their names in the model.
        report: what is found in the model.
        names: of the sites, in the order of the log, where they are known.

    Returns:
        As ``manifest`` gives it.

    Raises:
        SiteError: if what is found cannot be what was wrapped.
    """
    keys = site_keys(weights)
    wanted = Counter(key.rpartition("eafo_")[0].rstrip(".") for key in keys if key.endswith("_shape"))
    if names is None:
        chosen = [site for site in report.sites if site.wrapped]
    else:
        by_name = {site.name: site for site in report.sites}
        chosen = [by_name[name] for name in names if name in by_name]
    chosen = [site for site in chosen if _host(site) in wanted]
    found = Counter(_host(site) for site in chosen)
    differing = sorted(host for host in wanted if wanted[host] != found[host])
    if differing:
        shown = "; ".join(
            f"{host or 'the model itself'}: {wanted[host]} in the file, {found[host]} found" for host in differing[:6]
        )
        raise SiteError(
            f"the checkpoint holds no corrections of which the calls are known: it has no list of sites ({shown}). "
            "Give an example input, apply_from_checkpoint(model, path, x), or a file of save_corrections."
        )
    last = {key.rpartition("_")[2] for key in keys}
    terms = [name for name in TERMS if name in last]
    if LIFT.name not in terms:
        terms = [TIED_TERM if name == EPS.name else name for name in terms]
    report = replace(report, sites=[replace(site, wrapped=True) for site in chosen])
    return manifest(
        report,
        tabulated="table" in last,
        per_channel=any(weights[key].dim() for key in keys if not key.endswith(("_shape", "_table"))),
        terms=terms,
    )


def _host(site: FoundSite) -> str:
    if site.owner is None:
        return site.module
    return site.owner
