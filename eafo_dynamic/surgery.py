"""Wraps a model's activations in place, and undoes it without a trace.

No module is replaced: the *class of the instance* becomes a generated subclass, so that ``isinstance``, names and the
keys of the state_dict survive. A module that is called once hosts its own site. Where one module is called several
times in a forward, the module that calls it (the owner) hosts one site a call and counts the calls in each of its
forwards, from zero, so that recomputation under activation checkpointing finds the same sites again.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from eafo_dynamic.activation import Site, Switch, describe_state
from eafo_dynamic.bases import as_base
from eafo_dynamic.errors import SiteError
from eafo_dynamic.sites import FoundSite, SiteReport, find_sites

__all__ = [
    "CHECKPOINT_KEY",
    "apply_from_checkpoint",
    "disabled",
    "hosted_sites",
    "is_wrapped",
    "manifest",
    "plain_view",
    "unwrap",
    "wrap",
    "wrap_from_manifest",
]

CHECKPOINT_KEY = "eafo"

_ENTRY_POINTS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


class _Frame:
    """One running forward of an owner: how often it has called each of its shared activations."""

    __slots__ = ("counts", "owner")

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.counts: dict[str, int] = {}


class _FrameStack(threading.local):
    """Running forwards of owners, innermost last; one stack a thread."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []


_STACK = _FrameStack()


class _Hosting:
    """Part of every generated class: copying, pickling and the repr of a module with sites.

    Attributes:
        eafo_class: the class the module had before.
        eafo_sites: the sites it hosts.
    """

    eafo_class: type[nn.Module]
    eafo_sites: list[Site]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the generated class has no importable name; build it again from the original class
        state: Any = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)  # Python 3.10 has none
        return _rebuild, (self.eafo_class, _kind_of(type(self))), state

    def extra_repr(self) -> str:
        """The original text, then the live state of the sites.

        Returns:
            For example ``inplace=True, eps=+0.0100, mu=+0.000, sigma=1.000``.
        """
        parts = [self.eafo_class.extra_repr(cast(nn.Module, self))]
        for site in self.eafo_sites:
            eps, shape, _ = (getattr(self, key) for key in site.keys)
            parts.append(describe_state(eps, shape))
        return ", ".join(part for part in parts if part)


    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # a checkpoint of the plain model lacks the corrections: they stay as they are
        _, _, missing, _, _ = args
        cast(Any, super())._load_from_state_dict(state_dict, prefix, *args)
        own = {prefix + key for site in self.eafo_sites for key in site.keys}
        if not own & set(state_dict):
            missing[:] = [key for key in missing if key not in own]


class _CorrectedMixin(_Hosting):
    """The forward of a wrapped activation module.

    Attributes:
        eafo_name: FQN of the module, by which owners know it.
        eafo_shared: whether an owner hosts its sites.
    """

    eafo_name: str
    eafo_shared: bool

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        base = cast(Callable[..., Tensor], super().forward)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
        if not isinstance(input, Tensor) or not input.is_floating_point() or input.is_nested or args or kwargs:
            return base(input, *args, **kwargs)
        if not self.eafo_shared:
            return self.eafo_sites[0](cast(nn.Module, self), base, input, getattr(self, "inplace", False))
        frame, site = _route(self.eafo_name)
        if frame is None or site is None:
            return base(input)
        return site(frame.owner, base, input, getattr(self, "inplace", False))


class _OwnerMixin(_Hosting):
    """Counts the calls of shared activations in each forward of their owner.

    Attributes:
        eafo_routes: indices of the sites of each shared activation, by its FQN, in the order of the calls.
    """

    eafo_routes: dict[str, list[int]]


def _route(name: str) -> tuple[_Frame | None, Site | None]:
    """The site of the coming call of a shared activation, by the innermost owner that knows it.

    A call beyond those discovered (a longer loop than in the example) uses the last site.

    Returns:
        The owner's frame and the site; None where the call comes from outside any owner.
    """
    for frame in reversed(_STACK.frames):
        routes: list[int] | None = frame.owner.eafo_routes.get(name)  # pyright: ignore[reportAssignmentType, reportCallIssue, reportAttributeAccessIssue]
        if routes is not None:
            k = frame.counts.get(name, 0)
            frame.counts[name] = k + 1
            sites = cast("list[Site]", frame.owner.eafo_sites)
            return frame, sites[routes[min(k, len(routes) - 1)]]
    return None, None


def _counted(method: Callable[..., Any]) -> Callable[..., Any]:
    """An entry point of an owner that opens a frame around the original.

    Returns:
        A function with the signature of the original.
    """

    @functools.wraps(method)
    def entry(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _STACK.frames.append(_Frame(self))
        try:
            return method(self, *args, **kwargs)
        finally:
            _STACK.frames.pop()

    return entry


@functools.cache
def _generated(cls: type[nn.Module], kind: str) -> type[nn.Module]:
    """The subclass of a module class that carries corrections; the same object for the same class.

    Args:
        cls: the original class.
        kind: "activation" or "owner".

    Returns:
        A class with the name, module and documentation of the original.
    """
    body: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    # defaults for instances that user code makes of the class, as slicing an nn.Sequential does
    body.update(eafo_class=cls, eafo_sites=[], eafo_routes={}, eafo_name="", eafo_shared=True)
    if kind == "activation":
        return type(cls.__name__, (_CorrectedMixin, cls), body)
    for name in _ENTRY_POINTS:
        method = getattr(cls, name, None)
        if callable(method):
            body[name] = _counted(method)
    return type(cls.__name__, (_OwnerMixin, cls), body)


def _kind_of(cls: type) -> str:
    return "owner" if issubclass(cls, _OwnerMixin) else "activation"


def _rebuild(cls: type[nn.Module], kind: str) -> nn.Module:
    generated = _generated(cls, kind)
    return generated.__new__(generated)


def hosted_sites(model: nn.Module) -> list[tuple[nn.Module, Site]]:
    """All sites of a wrapped model, with the module that hosts each.

    Args:
        model: wrapped or not.

    Returns:
        Pairs (host, site); empty for a model that is not wrapped.
    """
    return [(host, site) for host in model.modules() if isinstance(host, _Hosting) for site in host.eafo_sites]


def plain_view(module: nn.Module) -> nn.Module:
    """The module without its correction: an object of the original class that shares all its state, live.

    Args:
        module: wrapped or not.

    Returns:
        The view; the module itself where it is not wrapped.
    """
    if not isinstance(module, _Hosting):
        return module
    view = module.eafo_class.__new__(module.eafo_class)
    view.__dict__ = module.__dict__
    return view


def is_wrapped(model: nn.Module) -> bool:
    """Whether a model carries corrections.

    Args:
        model: any module.

    Returns:
        Whether it does.
    """
    return any(isinstance(module, _Hosting) for module in model.modules())


def wrap(
    model: nn.Module, report: SiteReport | None = None, eps_init: float = 0.01, tabulated: bool = False
) -> list[tuple[nn.Module, Site]]:
    """Gives every selected activation call of a model its correction, in place.

    With all eps = 0 the wrapped model equals the plain one bit for bit, outputs and gradients.

    Args:
        model: any module.
        report: the sites to wrap, from ``find_sites``; None: a static search.
        eps_init: starting amplitude of every site.
        tabulated: whether every shape is a table, as densities other than the Gaussian need.

    Returns:
        Pairs (host, site) in the order of the report; the existing ones if the model is wrapped already.

    Raises:
        SiteError: if the report selects no site.
    """
    if is_wrapped(model):
        return hosted_sites(model)
    report = report or find_sites(model)
    if not report.wrapped:
        raise SiteError(_nothing_to_wrap(model, report))
    switch = Switch()
    hosted: list[tuple[nn.Module, Site]] = []
    for found in report.wrapped:
        module = model.get_submodule(found.module)
        host = module if found.owner is None else model.get_submodule(found.owner)
        hosted.append((host, _install(host, module, found, switch, eps_init, tabulated)))
    _leave_fast_path(model)
    return hosted


def _nothing_to_wrap(model: nn.Module, report: SiteReport) -> str:
    if not report.sites:
        return (
            f"{type(model).__name__} has no activation module to correct. "
            "Use modules such as nn.ReLU or nn.GELU in place of functional calls, or register_activation(YourClass)."
        )
    why = "; ".join(sorted({f"{site.base}: {site.reason}" for site in report.skipped}))
    return f"no activation of {type(model).__name__} is selected ({why}). Widen target_modules or exclude less."


def _install(
    host: nn.Module, module: nn.Module, found: FoundSite, switch: Switch, eps: float, tabulated: bool
) -> Site:
    if not isinstance(module, _CorrectedMixin):
        module.__class__ = _generated(type(module), "activation")
        vars(module).update(eafo_sites=[], eafo_name=found.module, eafo_shared=found.owner is not None)
    if not isinstance(host, _Hosting):
        host.__class__ = _generated(type(host), "owner")
        vars(host).update(eafo_sites=[], eafo_routes={})
    site = Site(found.name, len(host.eafo_sites), found.module, switch)
    site.register(host, as_base(plain_view(module)), eps, tabulated)
    host.eafo_sites.append(site)
    if isinstance(host, _OwnerMixin):
        host.eafo_routes.setdefault(found.module, []).append(site.index)
    return site


def unwrap(model: nn.Module) -> None:
    """Takes every correction away: the very module objects with their classes, keys and results of before.

    Args:
        model: a wrapped model; one that is not stays as it is.
    """
    for module in list(model.modules()):
        if isinstance(module, _Hosting):
            for site in module.eafo_sites:
                site.unregister(module)
            module.__class__ = module.eafo_class
            for name in ("eafo_sites", "eafo_name", "eafo_shared", "eafo_routes"):
                vars(module).pop(name, None)
        if "eafo_fast_path" in vars(module):
            module.activation_relu_or_gelu = vars(module).pop("eafo_fast_path")


def manifest(report: SiteReport, tabulated: bool) -> dict[str, Any]:
    """What has to be known to wrap the same sites again; primitives only.

    Args:
        report: what was wrapped.
        tabulated: see ``wrap``.

    Returns:
        Keys ``sites`` and ``tabulated``.
    """
    return {"sites": [asdict(found) for found in report.wrapped], "tabulated": tabulated}


def wrap_from_manifest(model: nn.Module, saved: Mapping[str, Any]) -> SiteReport:
    """Wraps the sites that a manifest lists.

    Args:
        model: any module, not wrapped yet.
        saved: from ``manifest``.

    Returns:
        The report of these sites.

    Raises:
        SiteError: if the model lacks one of them; the message lists all that differ.
    """
    sites = [FoundSite(**{**site, "shape": _tuple(site["shape"])}) for site in saved["sites"]]
    modules = dict(model.named_modules(remove_duplicate=False))
    problems: list[str] = []
    for site in sites:
        for name in (site.module, site.owner):
            if name is not None and name not in modules:
                problems.append(f"{site.name}: the model has no module {name!r}")
        kind = type(modules.get(site.module)).__name__
        if site.module in modules and kind != site.class_name:
            problems.append(f"{site.name}: {kind} in the model, {site.class_name} in the checkpoint")
    if problems:
        raise SiteError("the model is not the one the checkpoint was made with: " + "; ".join(problems) + ".")
    report = SiteReport(sites, dynamic=True, note="The sites of the checkpoint.")
    wrap(model, report, tabulated=bool(saved["tabulated"]))
    return report


def _tuple(shape: Any) -> tuple[int, ...] | None:
    return None if shape is None else tuple(shape)


def apply_from_checkpoint(model: nn.Module, checkpoint: str | Path | Mapping[str, Any]) -> nn.Module:
    """Wraps a fresh model as a checkpoint's model was wrapped, and loads the checkpoint's weights into it.

    Args:
        model: a model of the same structure, not wrapped.
        checkpoint: a checkpoint saved by a Trainer with an EAFOCallback, or the mapping in it.

    Returns:
        The model.

    Raises:
        SiteError: if the checkpoint holds no sites, or those of another model.
    """
    if not isinstance(checkpoint, Mapping):
        checkpoint = cast("Mapping[str, Any]", torch.load(checkpoint, map_location="cpu", weights_only=True))
    if CHECKPOINT_KEY not in checkpoint:
        raise SiteError("the checkpoint holds no corrections: it was saved without an EAFOCallback.")
    wrap_from_manifest(model, checkpoint[CHECKPOINT_KEY])
    model.load_state_dict(checkpoint["state_dict"])
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Runs the plain functions for a while; afterwards corrections act as before.

    Args:
        model: a wrapped model.

    Yields:
        The model.
    """
    switches = {id(site.switch): site.switch for _, site in hosted_sites(model)}.values()
    before = [switch.enabled for switch in switches]
    for switch in switches:
        switch.enabled = False
    try:
        yield model
    finally:
        for switch, enabled in zip(switches, before, strict=True):
            switch.enabled = enabled


def _leave_fast_path(model: nn.Module) -> None:
    """In eval, nn.TransformerEncoderLayer runs a fused kernel that knows only plain ReLU and GELU."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.activation, _CorrectedMixin):
            vars(module)["eafo_fast_path"] = module.activation_relu_or_gelu
            module.activation_relu_or_gelu = 0
