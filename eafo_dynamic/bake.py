"""Bakes the corrections of a model into plain modules, for deployment."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eafo_dynamic.activation import CorrectedActivation, Site, register
from eafo_dynamic.hosting import Hosting, plain_view, revert
from eafo_dynamic.surgery import hosted_sites

__all__ = ["merge"]


def merge(model: nn.Module) -> list[str]:
    """Turns every corrected activation module into a plain module of the same function, in place.

    Afterwards the model computes what it computed before, bit for bit, and trains no amplitude. A site with eps = 0
    leaves the plain activation behind. A module whose calls all have the same correction becomes a
    ``CorrectedActivation`` in its place, with eps as a buffer. What no single module can express (calls of one module
    with different corrections, functional calls) stays wrapped, with eps as a buffer too; the returned names say where.

    Args:
        model: a wrapped model.

    Returns:
        Names of the sites that stay wrapped; empty if nothing of the plugin is left but ``CorrectedActivation``.
    """
    sites = hosted_sites(model)
    by_module: dict[str, list[tuple[nn.Module, Site]]] = {}
    for host, site in sites:
        if site.function is None:
            by_module.setdefault(site.module_name, []).append((host, site))
    baked: dict[int, nn.Module] = {}
    for name, served in by_module.items():
        module = model.get_submodule(name)
        if _all_equal(served):
            host, site = served[0]
            baked[id(module)] = _baked(module, host, site)
    done = {
        id(site) for name, served in by_module.items() if id(model.get_submodule(name)) in baked for _, site in served
    }
    left = [(host, site) for host, site in sites if id(site) not in done and not _is_zero(host, site)]
    remaining = [site.name for _, site in left]
    if not remaining:
        for module in list(model.modules()):
            revert(module)
    else:
        _keep_only(sites, {id(site) for _, site in left})
    _replace(model, baked)
    return remaining


def _state(host: nn.Module, site: Site) -> list[Tensor | None]:
    return [getattr(host, key) for key in site.keys]


def _is_zero(host: nn.Module, site: Site) -> bool:
    eps, _, _, offset = _state(host, site)
    assert eps is not None
    return offset is None and not bool(eps.any())


def _all_equal(served: list[tuple[nn.Module, Site]]) -> bool:
    first = _state(*served[0])
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for host, site in served[1:]
        for a, b in zip(first, _state(host, site), strict=True)
    )


def _baked(module: nn.Module, host: nn.Module, site: Site) -> nn.Module:
    """The plain module that computes what a site computes; the activation itself where there is no correction."""
    plain = plain_view(module)
    base = plain.__class__.__new__(plain.__class__)
    base.__dict__ = {key: value for key, value in vars(module).items() if not key.startswith("eafo_")}
    for part in ("_parameters", "_buffers"):
        kept = {key: value for key, value in vars(module)[part].items() if not key.startswith("eafo_")}
        base.__dict__[part] = type(vars(module)[part])(kept)
    if _is_zero(host, site):
        return base
    eps, shape, table, offset = _state(host, site)
    corrected = CorrectedActivation(base, trainable=False)
    for key, value in (("eps", eps), ("shape", shape), ("table", table), ("offset", offset)):
        corrected._buffers.pop(key, None)
        vars(corrected).pop(key, None)
        register(corrected, key, None if value is None else value.detach().clone())
    return corrected.train(module.training)


def _keep_only(sites: list[tuple[nn.Module, Site]], kept: set[int]) -> None:
    """Takes all other sites off their hosts, and makes the amplitudes of the kept ones buffers."""
    for host, site in sites:
        eps = getattr(host, site.keys[0]).detach()
        assert isinstance(host, Hosting)
        if id(site) in kept:
            del host._parameters[site.keys[0]]
            host.register_buffer(site.keys[0], eps)
            site.switch.collecting = False
            continue
        site.unregister(host)
        host.eafo_sites.remove(site)
        for route in host.eafo_routes.values():
            route[:] = [None if each is site else each for each in route]


def _replace(model: nn.Module, baked: dict[int, nn.Module]) -> None:
    """Puts the new modules where the old ones were, under all their names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in baked:
                parent._modules[name] = baked[id(child)]
