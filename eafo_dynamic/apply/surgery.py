"""Wraps a model's activations in place, and undoes it without a trace.

No module is replaced: the *class of the instance* becomes a generated subclass, so that ``isinstance``, names and the
keys of the state_dict survive. A module that is called once hosts its own site. Where one activation is called several
times in a forward, or called as a function, the module around the calls (the owner) hosts one site a call and tells
them apart, by where they are made and by the children that have run before; see ``find.evidence``.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from eafo_dynamic.apply.holders import give_back_common, take_own_copies
from eafo_dynamic.apply.hosting import Hosting, become, enter_by, revert
from eafo_dynamic.apply.kept import forget_sites
from eafo_dynamic.apply.known import KnownCalls
from eafo_dynamic.apply.noting import forget_children, note_children
from eafo_dynamic.apply.site import Form, Site, Switch
from eafo_dynamic.apply.swaps import check_base, check_swap, check_swaps, swap_of
from eafo_dynamic.apply.unmet import forget_unmet, watch_unmet
from eafo_dynamic.correction.bases import Base, as_base
from eafo_dynamic.correction.kernels import Backend, prepare
from eafo_dynamic.correction.terms import LOCAL, TIED, resolve_terms
from eafo_dynamic.density.collector import Collector
from eafo_dynamic.errors import SiteError
from eafo_dynamic.find.attributes import methods_that_call
from eafo_dynamic.find.evidence import Evidence
from eafo_dynamic.find.functional import function_base
from eafo_dynamic.find.places import function_of, is_unbranched
from eafo_dynamic.find.sites import FoundSite, SiteReport, find_sites
from eafo_dynamic.find.wrapped import ACTIVATION, ENTRY_POINTS, OWNER, plain_view
from eafo_dynamic.find.written import WRITTEN, wanted_for, written_node

__all__ = [
    "disabled",
    "hosted_sites",
    "is_wrapped",
    "plain_view",
    "put_back",
    "site_source",
    "take_off",
    "unwrap",
    "wrap",
]


def hosted_sites(model: nn.Module) -> list[tuple[nn.Module, Site]]:
    """All sites of a wrapped model, with the module that hosts each.

    Args:
        model: wrapped or not.

    Returns:
        Pairs (host, site); empty for a model that is not wrapped.
    """
    return [(host, site) for host in model.modules() if isinstance(host, Hosting) for site in host.eafo_sites]


def is_wrapped(model: nn.Module) -> bool:
    """Whether a model carries corrections.

    Args:
        model: any module.

    Returns:
        Whether it does.
    """
    return any(isinstance(module, Hosting) for module in model.modules())


def site_source(model: nn.Module, site: Site) -> nn.Module | Base:
    """What computes a site's base: the plain view of its module, live, or the base of a functional call.

    Args:
        model: the wrapped model.
        site: one of its sites.

    Returns:
        Something for ``as_base``.
    """
    if site.swap is not None:
        return site.swap.base
    return own_source(model, site)


def own_source(model: nn.Module, site: Site) -> nn.Module | Base:
    """What a site would compute without this package; see ``site_source``.

    Args:
        model: the wrapped model.
        site: one of its sites.

    Returns:
        Something for ``as_base``.
    """
    if site.function is not None:
        return function_base(*site.function)
    return plain_view(model.get_submodule(site.module_name))


def wrap(
    model: nn.Module,
    report: SiteReport | None = None,
    eps_init: float = 0.01,
    *,
    base: str | Mapping[str, str] | None = None,
    backend: Backend = "auto",
    **form: Any,
) -> list[tuple[nn.Module, Site]]:
    """Does what ``eafo_dynamic.wrap`` does, whose text says it, and returns the sites in place of the model.

    Args:
        model: any module.
        report: the sites to wrap; None: a static search.
        eps_init: starting amplitude of every new site.
        base: what takes the place of the activations.
        backend: what computes the functions.
        **form: ``tabulated``, ``per_channel``, ``free`` and ``terms``.

    Returns:
        Pairs (host, site) in the order of the report; all that exist if the report has nothing to add to them.

    Raises:
        SiteError: as ``eafo_dynamic.wrap``, which raises the others, too.
    """
    report = report or find_sites(model)
    if not report.wrapped:
        if is_wrapped(model):
            return hosted_sites(model)
        raise SiteError(_nothing_to_wrap(model, report))
    _check_initialised(model, report)
    check_swaps(report, check_base(base))
    for found in report.wrapped:
        name = swap_of(found, base)
        if name is not None:
            check_swap(name, as_base(_own_source(model, found)), found.name)
    made_of = _form(eps_init, **form)
    if made_of.per_channel:
        for found in report.wrapped:
            _channels(found)  # or an error, before anything is changed
    switch = Switch(backend=backend)
    for _, site in hosted_sites(model):
        switch = site.switch
    take_own_copies(model, _plain_activations(model, report))
    hosted = [_install(model, found, switch, made_of, swap_of(found, base)) for found in report.wrapped]
    _know_what_is_left_alone(model, report)
    _guard(model, report)
    watch_unmet(model, report, hosted[0][1])
    for device in {getattr(host, site.key("shape")).device for host, site in hosted}:
        prepare(device, switch.backend)
    return hosted


def _plain_activations(model: nn.Module, report: SiteReport) -> set[str]:
    names = {found.module for found in report.wrapped if found.parameters is None}
    return {name for name in names if not isinstance(model.get_submodule(name), Hosting)}


def _form(
    eps_init: float,
    tabulated: bool = False,
    per_channel: bool = False,
    free: bool = False,
    terms: str | Sequence[str] | None = None,
) -> Form:
    """What the functions of new sites are made of."""
    if terms is not None:
        names = resolve_terms(terms)
    elif free:
        names = LOCAL
    else:
        names = TIED
    return Form(eps_init, tabulated, per_channel, names)


def _nothing_to_wrap(model: nn.Module, report: SiteReport) -> str:
    if not report.sites:
        return (
            f"{type(model).__name__} has no activation module to correct. Functional calls are found with an example "
            "input (example_input_array in Lightning); a class of your own with register_activation(YourClass)."
        )
    why = "; ".join(sorted({f"{site.base}: {site.reason}" for site in report.skipped}))
    return f"no activation of {type(model).__name__} is selected ({why}). Widen target_modules or exclude less."


def _check_initialised(model: nn.Module, report: SiteReport) -> None:
    """Refuses lazy modules that have corrections and will take another class in their first forward."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for found in report.wrapped:
        for name in (found.module, found.owner, *found.guarded):
            if name is None:
                continue
            module: Any = modules.get(name)
            if not isinstance(module, LazyModuleMixin) or module.cls_to_become is None:
                continue
            if cast(Any, module).has_uninitialized_params():
                raise SiteError(
                    f"{name or type(module).__name__} is a lazy module that is not initialised: it would lose its "
                    "corrections when it is. Run the model once, model(x), before it is wrapped."
                )


def _channels(found: FoundSite) -> int:
    """Number of channels of a site; see FoundSite.channel_dim."""
    if not found.shape:
        raise SiteError(
            f"{found.name}: one amplitude a channel needs the shape of its pre-activations; "
            "search with an example input (example_input_array in Lightning)."
        )
    is_image = found.channel_dim == 1
    if found.channel_dim is None:
        is_image = len(found.shape) >= 3
    if is_image:
        return found.shape[0]
    return found.shape[-1]


def _own_source(model: nn.Module, found: FoundSite) -> nn.Module | Base:
    if found.parameters is not None:
        return function_base(_function(found), found.parameters)
    return plain_view(model.get_submodule(found.module))


def _function(found: FoundSite) -> str:
    """Name of the function that a functional call is of."""
    if found.kind == "written":
        return WRITTEN
    return found.class_name


def _install(
    model: nn.Module, found: FoundSite, switch: Switch, form: Form, base: str | None
) -> tuple[nn.Module, Site]:
    """Makes a site on the module that hosts it, unless it is there, and lets the module that tells its call know it.

    Returns:
        The host and the site.
    """
    module = host = model.get_submodule(found.module)
    if found.owner is not None:
        host = model.get_submodule(found.owner)
    existing = _existing(host, found)
    if existing is not None:
        return host, existing

    # who computes the function, who hosts the tensors, and who tells the calls apart
    is_function = found.parameters is not None
    caller = become(module, OWNER if is_function else ACTIVATION, found.module)
    owner = become(host, OWNER, found.module if found.owner is None else found.owner)
    teller = owner
    if found.caller is not None:
        teller = become(model.get_submodule(found.caller), OWNER, found.caller)

    index = 1 + max((each.index for each in owner.eafo_sites), default=-1)
    site = Site(found.name, index, found.module, switch, Collector(channel_dim=found.channel_dim), base=base)
    site.found = (found, form)
    if is_function:
        _correct_function(caller, found, site)
    else:
        caller.eafo_shared = found.owner is not None
    channels: int | None = None
    if form.per_channel:
        channels = _channels(found)
    site.register(host, as_base(site_source(model, site)), form, channels, _device(model, found))
    owner.eafo_sites.append(site)

    if found.owner is not None or found.caller is not None:
        known = teller.eafo_routes.setdefault(_key(found, caller), KnownCalls())
        known.put(Evidence(found.places, found.after), found.turn, site)
        enter_by(teller, _methods(teller, found))
    if found.caller is not None:
        caller.eafo_checked = teller.eafo_tells_others = True
    return host, site


def _existing(host: nn.Module, found: FoundSite) -> Site | None:
    if not isinstance(host, Hosting):
        return None
    for site in host.eafo_sites:
        if found.owner is None or site.name == found.name:
            return site
    return None


def _correct_function(caller: Hosting, found: FoundSite, site: Site) -> None:
    """Lets the module that calls a function look out for it."""
    parameters = found.parameters or {}
    name = _function(found)
    site.function = name, parameters
    caller.eafo_functions |= {name}
    if found.hidden_from_compiler:
        caller.eafo_uncompiled |= {found.class_name}
    if name == WRITTEN:
        caller.eafo_written |= wanted_for(written_node(parameters))


def _methods(owner: Hosting, found: FoundSite) -> set[str]:
    """Methods of an owner that lie on the way to a call, or name what is called: each of them may run alone."""
    spelled = set(found.module.split("."))
    if found.parameters is not None:
        spelled = {found.class_name, f"{found.class_name}_"}
    functions = {function_of(place) for place in found.places}
    return methods_that_call(owner.eafo_class, spelled, functions) - {*ENTRY_POINTS}


def _key(found: FoundSite, target: Hosting) -> str:
    """What the owner of a site knows its calls by; see frames."""
    if found.parameters is None:
        return target.eafo_name
    function = found.key[len(found.module) :]
    if found.owner == found.module:
        return function
    return f"{target.eafo_name}{function}"


def _know_what_is_left_alone(model: nn.Module, report: SiteReport) -> None:
    """Tells the owners of the calls that have no site, beside others of the same key that have one."""
    for found in report.skipped:
        if _is_known(model, found):
            owner: Any = model.get_submodule(found.owner or "")
            known = owner.eafo_routes[_key(found, cast(Hosting, model.get_submodule(found.module)))]
            evidence = Evidence(found.places, found.after)
            if not known.has(evidence, found.turn):
                known.put(evidence, found.turn, None)


def _device(model: nn.Module, found: FoundSite) -> torch.device | None:
    """Where the nearest parameter or buffer around a site lives; an activation has none of its own."""
    name = found.owner
    if name is None:
        name = found.module
    while True:
        module = model.get_submodule(name)
        near = next(itertools.chain(module.parameters(), module.buffers()), None)
        if near is not None:
            return near.device
        if not name:
            return None
        name = name.rpartition(".")[0]


def _guard(model: nn.Module, report: SiteReport) -> None:
    """Lets the modules around and beside the calls open frames of their own, and their children be noted."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: set[str] = set()
    for found in report.sites:
        if not _is_known(model, found):
            continue
        for name in (*found.guarded, *found.through, *found.beside):
            if name in modules and not isinstance(modules[name], torch.jit.ScriptModule):
                become(modules[name], OWNER, name)
        teller = found.owner
        if teller is None:
            teller = found.caller
        if teller is not None and not is_unbranched(found.places):  # else its place decides, whatever ran before
            owners |= {teller, *found.through, *found.beside}
    for name, module in modules.items():
        if isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.activation, Hosting):
            become(module, OWNER, name)
    note_children(model, owners)


def _is_known(model: nn.Module, found: FoundSite) -> bool:
    """Whether a call has a site, or is one that its owner tells from those that have."""
    if found.wrapped:
        return True
    module, owner = model.get_submodule(found.module), model.get_submodule(found.owner or "")
    if found.owner is None or not isinstance(module, Hosting) or not isinstance(owner, Hosting):
        return False
    return _key(found, module) in owner.eafo_routes


def unwrap(model: nn.Module) -> nn.Module:
    """Takes every correction away: the very module objects with their classes, keys and results of before.

    Args:
        model: a wrapped model; one that is not stays as it is.

    Returns:
        The model.
    """
    for module in list(model.modules()):
        revert(module)
        forget_children(module)
        forget_unmet(module)
        forget_sites(module)
    give_back_common(model)
    return model


@contextmanager
def disabled(model: nn.Module) -> Generator[nn.Module]:
    """Runs the plain functions for a while; afterwards corrections act as before.

    Args:
        model: a wrapped model, or a part of one: the corrections of the other parts then act on.

    Yields:
        The model.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> x = torch.ones(3, 2)
        >>> plain = net(x)
        >>> _ = wrap(net, eps_init=0.3)
        >>> with disabled(net):
        ...     torch.equal(net(x), plain)
        True
        >>> _ = unwrap(net)
    """
    sites = [site for _, site in hosted_sites(model)]
    before = [site.enabled for site in sites]
    for site in sites:
        site.enabled = False
    try:
        yield model
    finally:
        for site, enabled in zip(sites, before, strict=True):
            site.enabled = enabled


def take_off(model: nn.Module) -> dict[str, Tensor]:
    """Unwraps a model but remembers its corrections, so that it can be searched and wrapped anew.

    Args:
        model: wrapped or not.

    Returns:
        The sites' tensors by their keys in the state_dict; empty for a model that is not wrapped.
    """
    names = {id(module): name for name, module in model.named_modules()}
    state: dict[str, Tensor] = {}
    for host, site in hosted_sites(model):
        if site.observes:
            continue
        for key in site.keys:
            tensor: Tensor | None = getattr(host, key, None)
            if tensor is not None:
                state[f"{names[id(host)]}.{key}".removeprefix(".")] = tensor.detach().clone()
    unwrap(model)
    return state


def put_back(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives the sites of a newly wrapped model the corrections that it had before, where site and form are the same.

    Args:
        model: wrapped.
        state: from ``take_off``.
    """
    present = model.state_dict()
    fitting = {key: value for key, value in state.items() if key in present and present[key].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
