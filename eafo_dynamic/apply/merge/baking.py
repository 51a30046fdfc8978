"""What becomes of each corrected activation of a model: plain modules in its place, by a plan that can be saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.hosting import Hosting
from eafo_dynamic.apply.merge.calls import CallCounter, CorrectedCalls, Order, order_of
from eafo_dynamic.apply.noting import note_children, parents_of_noted
from eafo_dynamic.apply.site import Site, register
from eafo_dynamic.apply.standalone import CorrectedActivation
from eafo_dynamic.apply.surgery import hosted_sites
from eafo_dynamic.correction.bases import activation_module, as_base
from eafo_dynamic.correction.kernels import TERMS
from eafo_dynamic.find.functional import function_name
from eafo_dynamic.internals.torch_internals import forget, hook_tables

__all__ = ["Baked", "MergePlan", "State", "apply_plan", "plan_of"]

_TRANSFORMER = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_MODULES: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class State(NamedTuple):
    """The tensors of one corrected function, as its site has them, the dimension of its channels, and another base."""

    eps: Tensor | None
    shape: Tensor
    table: Tensor | None
    lift: Tensor | None = None
    gain: Tensor | None = None
    slope: Tensor | None = None
    channel_dim: int | None = None
    base: str | None = None

    @property
    def amplitudes(self) -> dict[str, Tensor]:
        """The amplitudes by the names of the terms."""
        each = {name: getattr(self, name) for name in TERMS}
        return {name: value for name, value in each.items() if value is not None}


@dataclass(frozen=True)
class Baked:
    """One activation module of the merged model.

    Args:
        module: its FQN.
        sites: names of the sites that it serves.
        functions: its corrected functions; none if no correction acts.
        orders: by FQN of the modules whose forwards tell its calls apart, which call has which function; empty where
            every call has the one there is.
        parents: modules whose children tell those forwards that they have returned.
    """

    module: str
    sites: tuple[str, ...]
    functions: tuple[State, ...]
    orders: Mapping[str, Order] = field(default_factory=dict)
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergePlan:
    """What merging does to a model.

    Args:
        baked: activations that become plain modules in their place.
        calls: sites of functional calls, which only a graph of the whole model can hold; with the names they have.
    """

    baked: tuple[Baked, ...]
    calls: tuple[str, ...]


def plan_of(model: nn.Module) -> MergePlan:
    """What merging a wrapped model comes to; the model is not changed.

    Args:
        model: wrapped.

    Returns:
        The plan.
    """
    names = {id(module): name for name, module in model.named_modules()}
    groups: dict[tuple[str, str], list[_Served]] = {}
    calls: list[str] = []
    tellers = _tellers(model)
    for host, site in hosted_sites(model):
        teller, key = tellers.get(id(site), (host, None))
        called = host if key is None or teller is not host else _called(model, host, site)
        state = _state(host, site)
        if called is not None:
            place = names[id(called)] if site.function is None else f"{names[id(called)]}.activation".lstrip(".")
            groups.setdefault((place, key or ""), []).append(_Served(teller, site, state))
        elif not _is_zero(state):
            calls.append(site.name)
    parents = parents_of_noted(model)
    baked = [_baked(place, key, served, names, parents) for (place, key), served in groups.items()]
    return MergePlan(tuple(baked), tuple(calls))


class _Served(NamedTuple):
    """A site of an activation that is being planned, with the module whose forwards tell its call from others."""

    teller: nn.Module
    site: Site
    state: State


def _state(host: nn.Module, site: Site) -> State:
    tensors: list[Any] = [getattr(host, key, None) for key in site.keys]
    state = State(*tensors, base=site.base)
    # one amplitude for all channels is the same function wherever they are
    by_channel = any(each.dim() for each in state.amplitudes.values())
    return state._replace(channel_dim=site.collector.channel_dim if by_channel else None)


def _tellers(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """The modules whose forwards tell calls apart, and by which key, by ``id`` of the site."""
    return {
        id(site): (module, key)
        for module in model.modules()
        if isinstance(module, Hosting)
        for key, known in module.eafo_routes.items()
        for site in known.all_sites()
        if site is not None
    }


def _called(model: nn.Module, host: nn.Module, site: Site) -> nn.Module | None:
    """The shared activation of a site, or the transformer layer that holds its function.

    Returns:
        The module; None where the function is called by somebody's own code.
    """
    # names are those of the model that was wrapped, which may be a part of this one: the nearest is meant
    for module in (*host.modules(), *model.modules()):
        if isinstance(module, Hosting) and module.eafo_name == site.module_name:
            return module if site.function is None or _holds_function(module, site.function[0]) else None
    return None


def _holds_function(layer: Hosting, function: str) -> bool:
    """Whether this is a transformer layer of torch, whose code calls no other activation than its attribute."""
    held = vars(layer).get("activation")
    return layer.eafo_class in _TRANSFORMER and function in _MODULES and function_name(held) == function


def _is_zero(state: State) -> bool:
    return state.base is None and not any(bool(each.any()) for each in state.amplitudes.values())


def _baked(
    place: str, key: str, served: Sequence[_Served], names: Mapping[int, str], parents: tuple[str, ...]
) -> Baked:
    sites = tuple(each.site.name for each in served)
    acting = [each for each in served if not _is_zero(each.state)]
    kept = [_kept(each.state) for each in acting]
    number = {id(each.site): k for k, each in enumerate(acting)}
    orders: dict[str, Order] = {}
    for each in served:
        known = cast(Hosting, each.teller).eafo_routes.get(key)
        if known is not None:
            orders[names[id(each.teller)]] = order_of(known, number)
    plain = any(None in numbers for order in orders.values() for _, _, numbers in order)
    alone = len(served) == 1  # then there may be other calls of it, which are left plain
    several = plain or alone or any(not _equal(kept[0], each) for each in kept[1:])
    if kept and key and several:
        return Baked(place, sites, tuple(kept), orders, parents)
    return Baked(place, sites, tuple(kept[:1]))


def _kept(state: State) -> State:
    return State._make(each.detach().clone() if isinstance(each, Tensor) else each for each in state)


def _equal(one: State, other: State) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b
        for a, b in zip(one, other, strict=True)
    )


def apply_plan(model: nn.Module, plan: MergePlan) -> None:
    """Puts the corrected functions into a plain model.

    Args:
        model: of the structure that was planned for, not wrapped.
        plan: what to put where.
    """
    counters: dict[str, dict[str, Order]] = {}
    for baked in plan.baked:
        if not baked.functions:
            continue
        module = _activation(model, baked.module)
        base = _moved(module)
        functions = [_corrected(base, state) for state in baked.functions]
        whole = functions[0] if not baked.orders else CorrectedCalls(baked.module, base, functions)
        _take_place(module, whole)
        for owner, order in baked.orders.items():
            counters.setdefault(owner, {})[baked.module] = order
    parents = sorted({parent for baked in plan.baked for parent in baked.parents})
    note_children(model, parents, for_good=True)
    for owner, orders in counters.items():
        CallCounter(orders, parents).register(model.get_submodule(owner))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.activation, _CORRECTED):
            module.activation_relu_or_gelu = 0  # torch's fused kernel knows no correction


_CORRECTED = (CorrectedActivation, CorrectedCalls)


def _activation(model: nn.Module, name: str) -> nn.Module:
    """The activation module of that name; a function that a transformer layer holds is made one."""
    parent, _, attribute = name.rpartition(".")
    holder = model.get_submodule(parent)
    held = vars(holder).get(attribute)
    if held is not None:
        setattr(holder, attribute, _MODULES[function_name(held) or ""]().train(holder.training))
    return model.get_submodule(name)


def _moved(module: nn.Module) -> nn.Module:
    """A second object with a module's class and state, without its hooks, which stay with the first."""
    base = type(module).__new__(type(module))
    vars(base).update(vars(module))
    vars(base).update(hook_tables(nn.Module()))
    return base


def _take_place(module: nn.Module, other: nn.Module) -> None:
    """Makes a module the other, so that whoever refers to it has the other."""
    hooks = hook_tables(module)
    module.__class__ = type(other)
    module.__dict__ = {**vars(other), **hooks, "training": module.training}


def _corrected(base: nn.Module, state: State) -> CorrectedActivation:
    tensors = state._asdict()
    other = tensors.pop("base")
    if other is not None:
        base = activation_module(as_base(other)).train(base.training)
    corrected = CorrectedActivation(base, trainable=False)
    corrected.channel_dim, corrected.other_base = tensors.pop("channel_dim"), other
    for key, value in tensors.items():
        forget(corrected, key)
        register(corrected, key, value)
    corrected.names = list(state.amplitudes)
    return corrected.train(base.training)
