"""What a wrapped module is: an instance of a generated subclass of its own class.

An *activation* runs its site; an *owner* opens a frame in each of its forwards, in which calls are told apart.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx import GraphModule
from torch.nn.utils.parametrize import is_parametrized

from eafo_dynamic.apply.frames import (
    STACK,
    close_frame,
    entered,
    function_mode,
    in_backward,
    name_missing_turns,
    name_outside,
    open_frame,
    refuse_symbols,
    route,
)
from eafo_dynamic.apply.known import ENTRIES, KnownCalls, warn_of_order
from eafo_dynamic.apply.site import Site, register
from eafo_dynamic.correction.kernels import is_correctable, known_module, prepare
from eafo_dynamic.errors import CompoundingError, SiteError, printable
from eafo_dynamic.find.functional import unbound
from eafo_dynamic.find.wrapped import (
    ACTIVATION,
    ENTRY_POINTS,
    OWNER,
    Wrapped,
    class_before,
    derived_class,
    plain_view,
    rebased,
)
from eafo_dynamic.find.written import Node
from eafo_dynamic.internals.torch_internals import CAN_COMPILE_FRAMES, current_frame, forget, hide_from_compiler

__all__ = ["Hosting", "become", "enter_by", "revert"]

_SLOPE_BY_RESULT = (nn.ELU, nn.CELU, nn.SELU)  # in place, in the last bit other than by the input
_HALF = (torch.float16, torch.bfloat16)
_STATE = (
    "eafo_sites", "eafo_name", "eafo_child", "eafo_shared", "eafo_checked", "eafo_tells_others", "eafo_routes",
    "eafo_functions", "eafo_uncompiled", "eafo_written",
)  # fmt: skip


class Hosting(Wrapped):
    """Part of every generated class: copying, pickling, loading and the repr of a module with sites.

    Attributes:
        eafo_class: the class the module had before.
        eafo_kind: ACTIVATION or OWNER.
        eafo_sites: the sites it hosts.
        eafo_name: FQN of the module when it was wrapped, by which owners know it.
        eafo_methods: other methods of an owner that make calls, and may be called from outside its forward.
        eafo_shared: of an activation: whether owners host its sites.
        eafo_tells_others: of an owner: whether it tells calls of activations that host their own sites.
        eafo_checked: of an activation that hosts its own site: whether an owner tells its one call from others.
        eafo_child: its name in the frame around it, when it has returned; empty for what is not noted.
        eafo_routes: of an owner: for each of its activations and functions, the calls that it knows.
        eafo_functions: of an owner: names of the functions that its own code calls and a site corrects.
        eafo_uncompiled: of an owner: those of its functions that torch.compile would not show.
        eafo_written: of an owner: expressions that written-out activations of its own code consist of.
    """

    eafo_class: type[nn.Module]
    eafo_kind: str
    eafo_sites: list[Site]
    eafo_name: str
    eafo_methods: frozenset[str]
    eafo_shared: bool
    eafo_checked: bool
    eafo_tells_others: bool
    eafo_child: str
    eafo_routes: dict[str, KnownCalls]
    eafo_functions: frozenset[str]
    eafo_uncompiled: frozenset[str]
    eafo_written: frozenset[Node]

    def __init_subclass__(cls) -> None:
        """Does not tell the original class of its generated subclass: it may keep a register, or ask for arguments."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the generated class has no importable name; build it again from the original class
        state: Any = (
            cast(Any, self).__getstate__() if hasattr(self, "__getstate__") else vars(self)
        )  # Python 3.10 has none
        return _rebuild, (self.eafo_class, self.eafo_kind, self.eafo_methods), state

    def __setstate__(self, state: Any) -> None:
        """Takes a pickled state; refuses one of version 0.1.0 that this version cannot compute.

        Raises:
            CompoundingError: if its corrections compound.
        """
        cast(Any, super()).__setstate__(state)
        vars(self).pop("eafo_places", None)  # of version 0.1.0, as are routes that are lists
        for key, route_then in vars(self).get("eafo_routes", {}).items():
            if isinstance(route_then, list):
                warn_of_order("the pickled model")
                self.eafo_routes[key] = KnownCalls.by_order(cast("list[Site | None]", route_then))
        for key in self._offset_keys():
            if cast(nn.Module, self)._buffers.get(key) is not None:
                raise CompoundingError("the pickled model")
            vars(self).pop(key, None)  # which version 0.1.0 had where nothing compounded, too

    def _offset_keys(self) -> list[str]:
        """Where version 0.1.0 kept what corrections that compound had settled."""
        return [f"eafo_{site.index}_offset" for site in vars(self).get("eafo_sites", ())]

    def __prepare_scriptable__(self) -> Any:
        raise SiteError(
            f"{self.eafo_name or 'the model'}: torch.jit.script cannot read a wrapped model. Take script(merge(model))."
        )

    def extra_repr(self) -> str:
        """The original text, then the live state of the sites.

        Returns:
            For example ``inplace=True, eps=+0.0100, mu=+0.000, sigma=1.000, backend=native``; a line for each call of a
            function or of a shared activation, with the name of its site.
        """
        parts = [self.eafo_class.extra_repr(cast(nn.Module, self))]
        lines: list[str] = []
        for site in self.eafo_sites:
            state = "observed" if site.observes else site.describe(cast(nn.Module, self))
            if site.module_name == site.name:
                parts.append(state)
            else:
                lines.append(f"{site.name}: {state}")
        own = ", ".join(part for part in parts if part)
        return "\n".join(line for line in [own, *lines] if line)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and casts as ever, but for two things that concern the sites' tensors.

        They stay float32 where the rest of the model becomes half: half precision would swallow the optimiser's small
        steps of an amplitude. And when they leave the meta device, as by ``to_empty``, they get the values that they
        had when the model was wrapped: a checkpoint of the plain model would not fill them.

        Returns:
            The module.
        """
        host = cast(nn.Module, self)
        own = [key for site in self.eafo_sites for key in site.keys if getattr(self, key, None) is not None]
        before = {key: getattr(host, key).detach() for key in own}
        cast(Any, super())._apply(fn, recurse)
        for key, tensor in before.items():
            now = getattr(host, key)
            if now.dtype in _HALF and tensor.dtype not in _HALF:
                now.data = tensor.to(now.device, torch.float32)
                if now.grad is not None:
                    now.grad.data = now.grad.data.to(torch.float32)
        for site in self.eafo_sites:
            shape = site.key("shape")
            if before[shape].is_meta and not getattr(host, shape).is_meta:
                site.reset(host)
            prepare(getattr(host, shape).device, site.switch.backend)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # a checkpoint of the plain model lacks the corrections: they stay as they are
        _, _, missing, _, _ = args
        if any(prefix + key in state_dict for key in self._offset_keys()):  # torch need not be strict
            raise CompoundingError("the checkpoint")
        cast(Any, super())._load_from_state_dict(state_dict, prefix, *args)
        own = {prefix + key for site in self.eafo_sites for key in site.keys}
        if not own & set(state_dict):
            missing[:] = [key for key in missing if key not in own]


def _reset_parameters(self: Any) -> None:
    """Initialises the module as its own class does, and the sites' tensors as when the model was wrapped.

    Who makes a model on the meta device calls this for every module that has it. An owner has it only if its own class
    does: where there is none, some callers go on to a module's children.
    """
    own = getattr(self.eafo_class, "reset_parameters", None)
    if own is not None:
        own(self)
    for site in self.eafo_sites:
        site.reset(self)


class _Activation(Hosting):
    """The forward of a wrapped activation module."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Hosting):  # unwrapped, but somebody has kept this method
            return type(self).forward(self, *args, **kwargs)
        base: Any = super().forward  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
        if is_compiling() and not CAN_COMPILE_FRAMES:  # then no owner is compiled, nor is what it calls
            return base(*args, **kwargs) if self.eafo_shared else _correct(self, base, args, kwargs)
        frames = STACK.frames
        if not frames or frames[-1].mode is None:
            if self.eafo_shared and not frames and not in_backward():
                name_outside(self.eafo_name, is_compiling())
                return base(*args, **kwargs)  # no owner is there to tell which call it is
        else:
            # the caller's mode must not take the functions inside the activation for the caller's own
            outer = open_frame(self, 0 if is_compiling() else id(current_frame()))
            try:
                return _correct(self, base, args, kwargs)
            finally:
                close_frame(outer)
        return _correct(self, base, args, kwargs)


def _correct(host: Any, base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    compiling = is_compiling()
    values = (*args, *kwargs.values()) if kwargs else args
    if len(values) != 1 or not is_correctable(values[0]):
        if len(values) == 1 and not compiling and _acts(host):
            refuse_symbols(values[0], host)
        if not host.eafo_shared:
            host.eafo_sites[0].pass_over(host, values[0] if len(values) == 1 else values)
        return base(*args, **kwargs)
    inplace, known = getattr(host, "inplace", False), None
    if not compiling and not (inplace and issubclass(host.eafo_class, _SLOPE_BY_RESULT)):
        known = known_module(host, host.eafo_class)
    if not host.eafo_shared:
        if host.eafo_checked and STACK.frames:
            owner, site = route(host.eafo_name, compiling)
            if owner is not None and site is None:
                return base(values[0])  # another call than the one that the example made
        return host.eafo_sites[0](host, base, values[0], inplace, known)
    owner, site = route(host.eafo_name, compiling)
    if owner is None:
        name_outside(host.eafo_name, compiling)
    if owner is None or site is None:
        return base(values[0])
    telling: Any = owner
    return site(telling, base, values[0], inplace, known)


def _counted(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """An entry point of an owner that opens a frame around the original.

    Returns:
        A function with the signature of the original.
    """
    is_forward, is_method = name == "forward", name not in ENTRY_POINTS

    @functools.wraps(method)
    def entry(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Hosting):  # unwrapped, but somebody has kept this method
            return method(self, *args, **kwargs)
        idle, frames = _all_idle(self), STACK.frames
        if is_method and any(frame.owner is self for frame in frames):
            return method(self, *args, **kwargs)  # by the owner's own forward or step
        if idle and (not frames or frames[-1].mode is None):
            STACK.idle += 1  # nothing acts, and no mode takes its functions for the caller's
            try:
                result = method(self, *args, **kwargs)
            finally:
                STACK.idle -= 1
        elif is_compiling() and not idle and (self.eafo_uncompiled or not CAN_COMPILE_FRAMES):
            result = _uncompiled(self, method, args, kwargs, is_forward)
        elif is_compiling():
            result = entered(self, method, args, kwargs, is_forward, bool(self.eafo_functions) and not idle)
        else:
            if self.eafo_sites and not idle:  # a graph would open no frames, and its activations would be plain
                refuse_symbols(args[0] if args else next(iter(kwargs.values()), None), self)
            # as entered does, but all in one function: recursive models need the depth of Python's stack
            outer = open_frame(self, id(current_frame()), is_forward)
            try:
                if self.eafo_functions and not idle:
                    with function_mode():
                        result = method(self, *args, **kwargs)
                else:
                    result = method(self, *args, **kwargs)
                name_missing_turns()
            finally:
                close_frame(outer)
        if frames and is_forward and self.eafo_child:
            frames[-1].returned.append(self.eafo_child)
        return result

    ENTRIES.add(cast(Any, entry).__code__)
    return entry


@hide_from_compiler
def _uncompiled(
    owner: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], is_forward: bool
) -> Any:
    """Runs an entry point as it runs without torch.compile, and says so: slower, but never silently uncorrected."""
    name = printable(owner.eafo_name or type(owner).__name__)
    if CAN_COMPILE_FRAMES:
        hidden = " and ".join(sorted(owner.eafo_uncompiled))
        text = (
            f"EAFO: {name} is not compiled: torch.compile hides its {hidden} from the correction. Write x.relu_() for "
            "F.relu_(x), x.tanh() for F.tanh(x), nn.Hardswish()(x) for F.hardswish(x) to compile it."
        )
    else:
        text = (
            f"EAFO: {name} is not compiled: torch.compile of torch {torch.__version__} cannot tell the calls of its "
            "activations apart. Take torch 2.5 or newer to compile it."
        )
    warnings.warn(text, stacklevel=2)
    return entered(owner, method, args, kwargs, is_forward, bool(owner.eafo_functions))


def _acts(host: Hosting) -> bool:
    return (
        any(not site.idle(cast(nn.Module, host)) for site in host.eafo_sites) if host.eafo_sites else host.eafo_shared
    )


def _all_idle(owner: Hosting) -> bool:
    """Whether no function of the owner has anything to do, so that its code runs as if it had none."""
    if owner.eafo_tells_others:
        return False
    host: Any = owner
    for site in owner.eafo_sites:
        if not site.idle(host):
            return False
    return bool(owner.eafo_sites)


class _FastPath:
    """Tells nn.TransformerEncoderLayer in eval which fused kernel to run: none that ignores a correction that acts."""

    def __get__(self, layer: Any, owner: type) -> Any:
        if layer is None:
            return self
        activation = layer.activation
        if isinstance(activation, Hosting) and activation.eafo_shared:
            return 0  # its sites are elsewhere
        hosts: list[Any] = [layer, *([activation] if isinstance(activation, Hosting) else [])]
        if any(not site.idle(host) for host in hosts for site in host.eafo_sites):
            return 0
        return vars(layer)["activation_relu_or_gelu"]

    def __set__(self, layer: Any, value: int) -> None:
        vars(layer)["activation_relu_or_gelu"] = value


class _HostedGraph(Hosting):
    """A wrapped graph of torch.fx, which keeps its code in a class of its own and writes it there anew."""

    def recompile(self) -> Any:
        """Makes the code of the graph anew, as its own class does.

        Returns:
            What that returns.
        """
        module, plain, kind, methods = cast(Any, self), self.eafo_class, self.eafo_kind, self.eafo_methods
        module.__class__ = plain
        try:
            return module.recompile()
        finally:
            module.__class__ = _generated.__wrapped__(plain, kind, methods)  # of the code that is there now

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = copy.deepcopy(plain_view(cast(nn.Module, self)), memo)
        memo[id(self)] = copied
        return _rehosted(copied, self.eafo_kind, *copy.deepcopy(self._hosted(), memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rehosted, (plain_view(cast(nn.Module, self)), self.eafo_kind, *self._hosted())

    def _hosted(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the graph does not know of: the state of an owner, and the sites' tensors."""
        keys = [key for site in self.eafo_sites for key in site.keys]
        state = {name: value for name, value in vars(self).items() if name in _STATE}
        return state, {key: getattr(self, key) for key in keys}


def _rehosted(graph: nn.Module, kind: str, state: dict[str, Any], tensors: dict[str, Tensor | None]) -> nn.Module:
    vars(become(graph, kind, "")).update(state)
    for key, tensor in tensors.items():
        forget(graph, key)
        register(graph, key, tensor)
    return graph


@functools.cache
def _generated(cls: type[nn.Module], kind: str, methods: frozenset[str] = frozenset()) -> type[nn.Module]:
    """The subclass of a module class that carries corrections; the same object for the same arguments.

    Args:
        cls: the original class.
        kind: ACTIVATION or OWNER.
        methods: of an owner: methods beside the entry points that open frames, too.

    Returns:
        A class with the name, module and documentation of the original.
    """
    body: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    # defaults for instances that user code makes of the class, as slicing an nn.Sequential does
    body.update(eafo_class=cls, eafo_kind=kind, eafo_sites=[], eafo_routes={}, eafo_name="", eafo_child="")
    body.update(eafo_shared=True, eafo_checked=False, eafo_tells_others=False, eafo_methods=methods)
    body.update(eafo_functions=frozenset(), eafo_uncompiled=frozenset(), eafo_written=frozenset())
    if kind == ACTIVATION:
        body["reset_parameters"] = _reset_parameters
        return derived_class(cls.__name__, (_Activation, cls), body)
    for name in (*ENTRY_POINTS, *sorted(methods)):
        method = unbound(cls, name)
        if method is not None:
            body[name] = _counted(method, name)
    if hasattr(cls, "reset_parameters"):
        body["reset_parameters"] = _reset_parameters
    if issubclass(cls, nn.TransformerEncoderLayer):
        body["activation_relu_or_gelu"] = _FastPath()
    if issubclass(cls, GraphModule):
        return derived_class(cls.__name__, (_HostedGraph, cls), body)
    return derived_class(cls.__name__, (Hosting, cls), body)


def _class_for(module: nn.Module, kind: str, methods: frozenset[str] = frozenset()) -> type[nn.Module]:
    """The generated class for a module instance.

    A parametrized one has a class of its own on top of the original, which ``remove_parametrizations`` takes away: the
    generated class goes between the two, so that it stays.

    Returns:
        The class.
    """
    cls = type(module)
    if not is_parametrized(module):
        return _generated(cls, kind, methods)
    plain = cls.__bases__[0]
    made = rebased(cls, plain, _generated(plain, kind, methods))
    made["body"].update(eafo_class=cls, eafo_names=frozenset(vars(cls)))
    return derived_class(**made)


def _rebuild(cls: type[nn.Module], kind: str, methods: frozenset[str] = frozenset()) -> nn.Module:
    generated = _generated(cls, kind, methods)
    return generated.__new__(generated)


def become(module: nn.Module, kind: str, name: str) -> Hosting:
    """Changes the class of a module instance to the generated one; does nothing to one that has it.

    Args:
        module: the instance.
        kind: ACTIVATION or OWNER.
        name: its FQN.

    Returns:
        The same instance.
    """
    if isinstance(module, Hosting):
        if module.eafo_kind != kind == ACTIVATION and not module.eafo_sites:
            cast(Any, module).__class__ = class_before(module)  # so far it only guarded its own code
            cast(Any, module).__class__ = _class_for(cast(nn.Module, module), kind)
    else:
        module.__class__ = _class_for(module, kind)
        vars(module).update(eafo_sites=[], eafo_name=name, eafo_child="", eafo_routes={}, eafo_shared=False)
    return cast(Hosting, module)


def enter_by(owner: Hosting, methods: Collection[str]) -> None:
    """Lets methods of an owner open frames where they are called from outside its forward.

    Args:
        owner: the module.
        methods: their names.
    """
    module = cast(nn.Module, owner)
    wanted = owner.eafo_methods | frozenset(methods)
    if owner.eafo_kind == OWNER and wanted != owner.eafo_methods:
        cast(Any, owner).__class__ = class_before(owner)
        cast(Any, owner).__class__ = _class_for(module, OWNER, wanted)


def revert(module: nn.Module) -> None:
    """Gives a module instance its own class back, and takes the sites' tensors away.

    Args:
        module: wrapped or not.
    """
    if not isinstance(module, Hosting):
        return
    for site in module.eafo_sites:
        site.unregister(module)
    cast(Any, module).__class__ = class_before(module)
    for name in _STATE:
        vars(module).pop(name, None)
