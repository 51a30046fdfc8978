"""What a checkpoint says about its sites, and wrapping a fresh model accordingly."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from reprlib import repr as _shown
from typing import Any

from torch import Tensor, nn

from eafo_dynamic.apply.kept import CHECKPOINT_KEY, keep_sites
from eafo_dynamic.apply.known import warn_of_order
from eafo_dynamic.apply.surgery import hosted_sites, unwrap, wrap
from eafo_dynamic.apply.swaps import check_base, swap_of
from eafo_dynamic.correction.bases import as_base
from eafo_dynamic.correction.terms import LOCAL, TIED, resolve_terms
from eafo_dynamic.errors import CompoundingError, ConfigError, SiteError, legible, printable
from eafo_dynamic.find.evidence import BY_ORDER
from eafo_dynamic.find.functional import WRITTEN, function_base
from eafo_dynamic.find.sites import MAX_CALLS, FoundSite, SiteReport

__all__ = [
    "check_form",
    "check_manifest",
    "check_weights",
    "manifest",
    "report_from_manifest",
    "warn_of_changes",
    "wrap_from_manifest",
]

MANIFEST_VERSION = 3  # 3 tells calls by evidence; 1 and 2 by their order, 2 also by an older kind of places
_BY_EVIDENCE = 3

_FLAGS = ("tabulated", "per_channel")
_DAMAGED = "the checkpoint's list of sites is damaged, or of another version"
_MEND = "Use a checkpoint that eafo-dynamic has written."


def _is_size(value: object, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _all(value: object, kind: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(kind, value))


# by the type that a site's entry is declared with
_KINDS: dict[Any, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: _is_size(value, MAX_CALLS),
    "int | None": lambda value: value is None or (isinstance(value, int) and value in (-1, 1)),
    "tuple[int, ...] | None": lambda value: value is None or _all(value, _is_size),
    "tuple[str, ...]": lambda value: _all(value, lambda part: isinstance(part, str)),
    "dict[str, object] | None": lambda value: value is None or isinstance(value, dict),
}


def manifest(
    report: SiteReport,
    *,
    tabulated: bool = False,
    per_channel: bool = False,
    terms: Sequence[str] = TIED,
    base: str | Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What has to be known to wrap the same sites again; primitives only.

    Args:
        report: what was wrapped.
        tabulated: see ``wrap``.
        per_channel: see ``wrap``.
        terms: from ``resolve_terms``.
        base: see ``wrap``.

    Returns:
        Keys ``manifest_version``, ``sites``, ``tabulated``, ``per_channel``, ``terms`` and, if given, ``base``. The
        ``base`` of a site is the one that it has got.
    """
    sites = [
        {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(found).items()}
        for found in report.wrapped
    ]
    for entry, found in zip(sites, report.wrapped, strict=True):
        name = swap_of(found, base)
        if name is not None:
            entry["base"] = str(as_base(name))
    form: dict[str, Any] = {"tabulated": tabulated, "per_channel": per_channel, "terms": list(terms)}
    if base is not None:
        form["base"] = base if isinstance(base, str) else dict(base)
    return {"manifest_version": MANIFEST_VERSION, "sites": sites, **form}


def _found(saved: Mapping[str, Any]) -> FoundSite:
    # JSON and weights-only loading know lists, a frozen site has tuples
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    return FoundSite(**values)


def _sites(saved: Mapping[str, Any]) -> list[FoundSite]:
    """The sites of a manifest, whose calls are told by their order where the version knew no better."""
    sites = [_found(site) for site in saved["sites"]]
    if saved.get("manifest_version", 1) >= _BY_EVIDENCE:
        return sites
    return [replace(site, places=BY_ORDER.places, after=BY_ORDER.after, turn=site.call) for site in sites]


def check_manifest(saved: object) -> Mapping[str, Any]:
    """Checks that what a checkpoint holds is a list of sites that this version can read.

    Args:
        saved: what stands under ``CHECKPOINT_KEY``; it may be anything.

    Returns:
        The same, without what version 0.1.0 says of corrections that do not compound, and with ``terms`` in place of
        its ``free``.

    Raises:
        SiteError: if it is damaged, somebody else's, or of a newer schema; the message says which entry.
        CompoundingError: if it is of a run of version 0.1.0 whose corrections compound.
    """
    if not isinstance(saved, Mapping) or not isinstance(saved.get("sites"), (list, tuple)) or not saved["sites"]:
        raise SiteError(f"{_DAMAGED}: {CHECKPOINT_KEY!r} holds no list of sites. {_MEND}")
    version = saved.get("manifest_version", 1)
    if not isinstance(version, int) or version > MANIFEST_VERSION:
        raise SiteError(
            f"the checkpoint's list of sites has manifest_version={version!r}, and this version of eafo-dynamic reads "
            f"up to {MANIFEST_VERSION}. Upgrade eafo-dynamic."
        )
    form = {key: saved.get(key) for key in _FLAGS}
    form["compounding"] = saved.get("compounding", False)
    if "terms" not in saved:
        form["free"] = saved.get("free")
    for key, value in form.items():
        if not isinstance(value, bool):
            raise SiteError(f"{_DAMAGED}: {key}={value!r} is neither true nor false. {_MEND}")
    if form["compounding"]:
        raise CompoundingError("the checkpoint")
    for number, site in enumerate(saved["sites"]):
        _check_site(number, site)
    try:
        check_base(saved.get("base"))
    except ConfigError as error:
        raise SiteError(f"{_DAMAGED}: {error}") from None
    kept = {key: value for key, value in saved.items() if key not in ("compounding", "free")}
    return {**kept, "terms": _terms(saved)}


def _terms(saved: Mapping[str, Any]) -> list[str]:
    if "terms" not in saved:
        return list(LOCAL if saved["free"] else TIED)
    terms = saved["terms"]
    known = isinstance(terms, (list, tuple)) and all(isinstance(name, str) for name in terms)
    try:
        if known and list(resolve_terms(terms)) == list(terms):
            return list(terms)
    except ConfigError:
        known = False
    raise SiteError(f"{_DAMAGED}: terms={_shown(terms)} are no terms of a correction. {_MEND}")


def _check_site(number: int, site: object) -> None:
    if not isinstance(site, Mapping):
        raise SiteError(f"{_DAMAGED}: site {number} is {_shown(site)}. {_MEND}")
    name = _shown(site.get("name", number))
    known = {each.name: each for each in fields(FoundSite)}
    for key, field in known.items():
        if key not in site and field.default is MISSING:
            raise SiteError(f"{_DAMAGED}: site {name} lacks {key!r}. {_MEND}")
    for key, value in site.items():
        if key not in known:
            raise SiteError(f"{_DAMAGED}: site {name} has an unknown entry {_shown(key)}. {_MEND}")
        if not _KINDS[known[key].type](value):
            raise SiteError(f"{_DAMAGED}: site {name} has {key}={_shown(value)}. {_MEND}")


@legible(_DAMAGED)
def report_from_manifest(model: nn.Module, saved: Mapping[str, Any], present: SiteReport | None = None) -> SiteReport:
    """The sites that a manifest lists, checked against a model.

    Args:
        model: any module.
        saved: from ``manifest``.
        present: of a search in the model as it is now, with an example; calls are then told by its places, which hold
            where the code has changed since, or another Python runs it.

    Returns:
        The report.

    Raises:
        SiteError: if it is no such list, or the model lacks one of the sites; the message lists all that differ.
    """
    sites = _sites(check_manifest(saved))
    modules = dict(model.named_modules(remove_duplicate=False))
    problems: list[str] = []
    for site in sites:
        for name in (site.module, site.owner, site.caller):
            if name is not None and name not in modules:
                problems.append(f"{site.name}: the model has no module {name!r}")
        kind = type(modules.get(site.module)).__name__
        if site.parameters is None and site.module in modules and kind != site.class_name:
            problems.append(f"{site.name}: {kind} in the model, {site.class_name} in the checkpoint")
    if problems:
        raise SiteError("the model is not the one the checkpoint was made with: " + "; ".join(problems) + ".")
    for site in sites:
        if site.parameters is not None:
            function_base(WRITTEN if site.kind == "written" else site.class_name, site.parameters)
    if present is not None and present.dynamic:
        sites = _told_as_now(sites, present)
    return SiteReport(sites, dynamic=True, note="The sites of the checkpoint.")


def _told_as_now(sites: list[FoundSite], present: SiteReport) -> list[FoundSite]:
    """Takes from a search how to tell the calls that it has found again."""
    now = {site.name: site for site in present.sites}
    told: list[FoundSite] = []
    for site in sites:
        same = now.get(site.name)
        if same is not None and (same.owner, same.call, _function(same)) == (site.owner, site.call, _function(site)):
            site = replace(site, **{name: getattr(same, name) for name in _EVIDENCE})
        elif (site.places, site.after) == BY_ORDER:
            site = replace(site, places=(_GONE,))  # others of its key are told by their places
        told.append(site)
    return told


_EVIDENCE = ("caller", "places", "after", "turn", "through", "beside", "guarded")
_GONE = "gone#"


def check_form(saved: Mapping[str, Any], form: Mapping[str, Any]) -> None:
    """Checks that a run's options make sites of the form that a manifest has.

    Args:
        saved: from ``manifest``.
        form: ``tabulated``, ``per_channel`` and ``terms`` of the run.

    Raises:
        SiteError: if they differ.
    """
    then = check_manifest(saved)
    now = {"base": None, **form, "terms": list(form["terms"])}
    then = {"base": None, **then}
    differing = [key for key, value in now.items() if then[key] != value]
    if differing:
        raise SiteError(
            "the checkpoint was made with other options: "
            + ", ".join(f"{key}={then[key]} (now {now[key]})" for key in differing)
            + ". Use the options of the run that is resumed; its manifest.json lists them."
        )


def warn_of_changes(saved: Mapping[str, Any], report: SiteReport, *, adopts: bool = False) -> None:
    """Names every site in which a checkpoint differs from the model that goes on from it.

    Weights alone do not show it when a forward calls other functions than it did, or other sites are selected.

    Args:
        saved: from ``manifest``.
        report: of a search in the model as it is now; one of the module tree alone shows too little to say anything.
        adopts: whether the run takes in calls as it meets them, so that the checkpoint may well have more of them.
    """
    now = {site.name: site for site in report.wrapped}
    then = {site.name: site for site in _sites(saved) if site.name in now or not adopts}
    changes = _changes(then, now)
    if changes and report.dynamic:
        _warn(changes, "The checkpoint's sites are used; begin a new run from its weights to use the model's.")


def _warn_of_losses(saved: Mapping[str, Any], report: SiteReport) -> None:
    """Names the sites of a checkpoint that a model calls no more, or with other parameters, and what may be instead."""
    every = {site.name: site for site in _sites(saved)}
    # a module that hosts its own site acts wherever it is called
    then = {name: site for name, site in every.items() if site.owner is not None or site.parameters is not None}
    now = {s.name: s for s in report.sites if s.name in then or (s.wrapped and s.name not in every)}
    if _changes(then, {name: site for name, site in now.items() if name in then}):
        _warn(_changes(then, now), "Its corrections were learned with the sites of then; use the code of that run.")


def _warn(changes: list[str], mend: str) -> None:
    shown = printable("; ".join(changes))
    warnings.warn(f"EAFO: the model has changed since the checkpoint: {shown}. {mend}", stacklevel=4)


def _changes(then: Mapping[str, FoundSite], now: Mapping[str, FoundSite]) -> list[str]:
    missing, added = ([name for name in one if name not in other] for one, other in ((then, now), (now, then)))
    changes = [f"only in the checkpoint: {', '.join(missing)}"] if missing else []
    changes += [f"only in the model: {', '.join(added)}"] if added else []
    for name in [name for name in then if name in now]:
        one, two = _function(then[name]), _function(now[name])
        changes += [f"{name}: {two} in the model, {one} in the checkpoint"] if one != two else []
    return changes


def _function(site: FoundSite) -> str:
    given = ", ".join(f"{key}={value}" for key, value in (site.parameters or {}).items())
    return f"{site.class_name}({given})" if given else site.class_name


def wrap_from_manifest(model: nn.Module, saved: Mapping[str, Any], present: SiteReport | None = None) -> SiteReport:
    """Wraps the sites that a manifest lists.

    Args:
        model: any module, not wrapped yet.
        saved: from ``manifest``.
        present: of a search in the model as it is now, with an example; what is lacking there is named in a warning.

    Returns:
        The report of these sites.

    Raises:
        SiteError: if it cannot be done; the model is then as it was.
    """
    saved = check_manifest(saved)
    report = report_from_manifest(model, saved, present)
    by_order = saved.get("manifest_version", 1) < _BY_EVIDENCE and any(site.owner is not None for site in report.sites)
    if by_order and present is None:
        warn_of_order("the checkpoint")
    try:
        with legible(_DAMAGED):
            flags = {key: bool(saved[key]) for key in _FLAGS}
            wrap(model, report, backend="auto", terms=saved["terms"], base=saved.get("base"), **flags)
    except SiteError:
        unwrap(model)
        raise
    keep_sites(model, saved)
    if present is not None:
        _warn_of_losses(saved, present)
    return report


def check_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Checks a checkpoint's tensors of the sites before they are loaded: their sizes, and that they are sound.

    Args:
        model: wrapped as the checkpoint says.
        weights: its state_dict.

    Raises:
        SiteError: if a tensor has another size, or a shape or table could not be a correction's.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for host, site in hosted_sites(model):
        for key in site.keys:
            name = f"{names[id(host)]}.{key}".removeprefix(".")
            own = getattr(host, key, None)
            if own is not None and name in weights:
                _check_tensor(name, weights[name], own)


def _check_tensor(name: str, value: object, own: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != own.shape:
        size = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise SiteError(f"{name}: {size} in the checkpoint, {list(own.shape)} in the model. {_MEND}")
    if name.endswith("_eps"):
        return  # one that is not finite is put back at the next round
    if not bool(value.isfinite().all()) or (name.endswith("_shape") and bool(value[1] <= 0)):
        raise SiteError(f"{name}: holds numbers that no correction can have. {_MEND}")
