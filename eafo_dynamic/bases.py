"""Base activations: one frozen, hashable descriptor per pointwise function, found by name, module or callable."""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eafo_dynamic.errors import ConfigError

__all__ = [
    "Base",
    "Derivatives",
    "Traits",
    "activation_names",
    "activation_types",
    "as_base",
    "derivatives",
    "register_activation",
    "traits",
]

Pointwise = Callable[[Tensor], Tensor]
_Kind = TypeVar("_Kind", bound="type[nn.Module] | Pointwise")


class Derivatives(NamedTuple):
    """f, f' and f'' at the same points; shape and dtype of the points."""

    value: Tensor
    first: Tensor
    second: Tensor


class Traits(NamedTuple):
    """Properties of a base that decide how it is handled.

    Args:
        affine: f'' = 0 and one slope everywhere: a linear layer in disguise, no place for a correction.
        monotone: f never falls (f' >= 0, jumps only upwards): the analytic route applies.
        piecewise_linear: f is continuous and f'' = 0 almost everywhere: the raw correction is p'.
        gate: f rises from 0 to 1 and never leaves [0, 1]: more often a gate than an activation.
        flat: f is constant on an interval, so that the output has atoms.
    """

    affine: bool
    monotone: bool
    piecewise_linear: bool
    gate: bool
    flat: bool


@dataclass(frozen=True)
class Base:
    """A pointwise function f: out of place, differentiable, deterministic.

    Two bases are equal, and hash alike, when they are the same kind of function with the same
    hyper-parameters, so that sites group: ``as_base(nn.LeakyReLU(0.01)) == as_base("leaky_relu")``.

    Args:
        name: short name, as the registry and the command line use it.
        fn: the function itself, on any device, in float32 or float64.
        params: hyper-parameters, part of the identity, as sorted (name, value) pairs.
        key: tells unregistered functions apart (the callable, or the module's type and state).
        label: name with the hyper-parameters that differ from the default; what ``str`` shows.
    """

    name: str
    fn: Pointwise = field(compare=False, repr=False)
    params: tuple[tuple[str, object], ...] = ()
    key: object = field(default=None, repr=False)
    label: str = field(default="", compare=False, repr=False)

    def __call__(self, z: Tensor) -> Tensor:
        """f(z).

        Args:
            z: pre-activations, any shape.

        Returns:
            Activations, same shape.
        """
        return self.fn(z)

    def __str__(self) -> str:
        return self.label or self.name

    @property
    def traits(self) -> Traits:
        """What kind of function this is, found by its behaviour; see :func:`traits`."""
        return traits(self)


class _Entry(NamedTuple):
    """A registered function: its name, its functional form, its hyper-parameters with their defaults."""

    name: str
    function: Callable[..., Tensor]
    defaults: Mapping[str, object] = {}

    def base(self, values: Mapping[str, object]) -> Base:
        used = {key: _number(values.get(key, default)) for key, default in self.defaults.items()}
        changed = {key: value for key, value in used.items() if value != _number(self.defaults[key])}
        shown = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in changed.items())
        fn = functools.partial(self.function, **used) if used else self.function
        label = f"{self.name}({shown})" if shown else self.name
        return Base(self.name, fn, tuple(sorted(used.items())), label=label)


def _number(value: object) -> object:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _identity(z: Tensor) -> Tensor:
    return z * 1.0  # not z itself: a result that aliases its input is not out of place


def _normal_cdf(z: Tensor) -> Tensor:
    # The erfc form keeps its relative precision in the left tail, where 1 + erf rounds to 0.
    return 0.5 * torch.erfc(z * -(0.5**0.5))


def _quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


def _squared_relu(z: Tensor) -> Tensor:
    return F.relu(z).square()


_BY_TYPE: dict[type[nn.Module], _Entry] = {
    nn.Identity: _Entry("identity", _identity),
    nn.ReLU: _Entry("relu", F.relu),
    nn.ReLU6: _Entry("relu6", F.relu6),
    nn.LeakyReLU: _Entry("leaky_relu", F.leaky_relu, {"negative_slope": 0.01}),
    nn.ELU: _Entry("elu", F.elu, {"alpha": 1.0}),
    nn.SELU: _Entry("selu", F.selu),
    nn.CELU: _Entry("celu", F.celu, {"alpha": 1.0}),
    nn.GELU: _Entry("gelu", F.gelu, {"approximate": "none"}),
    nn.SiLU: _Entry("silu", F.silu),
    nn.Mish: _Entry("mish", F.mish),
    nn.Hardswish: _Entry("hardswish", F.hardswish),
    nn.Hardtanh: _Entry("hardtanh", F.hardtanh, {"min_val": -1.0, "max_val": 1.0}),
    nn.Hardsigmoid: _Entry("hardsigmoid", F.hardsigmoid),
    nn.Softplus: _Entry("softplus", F.softplus, {"beta": 1.0, "threshold": 20.0}),
    nn.Softsign: _Entry("softsign", F.softsign),
    nn.Tanh: _Entry("tanh", torch.tanh),
    nn.Sigmoid: _Entry("sigmoid", torch.sigmoid),
    nn.LogSigmoid: _Entry("logsigmoid", F.logsigmoid),
    nn.Softshrink: _Entry("softshrink", F.softshrink, {"lambd": 0.5}),
    nn.Hardshrink: _Entry("hardshrink", F.hardshrink, {"lambd": 0.5}),
    nn.Tanhshrink: _Entry("tanhshrink", F.tanhshrink),
    # torch has no default here; these make it a ReLU that starts at 0.1.
    nn.Threshold: _Entry("threshold", F.threshold, {"threshold": 0.1, "value": 0.0}),
}
_PRELU = _Entry("prelu", F.leaky_relu, {"negative_slope": 0.25})
_RRELU = _Entry("rrelu", F.leaky_relu, {"negative_slope": (1 / 8 + 1 / 3) / 2})
_BY_NAME: dict[str, _Entry | type[nn.Module]] = {}
_BY_CALLABLE: dict[Any, _Entry] = {}
_MODULES: list[type[nn.Module]] = [*_BY_TYPE, nn.PReLU, nn.RReLU]


def _canonical(name: str) -> str:
    return name.replace("_", "").replace("-", "").replace(" ", "").lower()


def _fill_tables() -> None:
    for entry in (*_BY_TYPE.values(), _PRELU, _RRELU):
        _BY_NAME[_canonical(entry.name)] = entry
        # The functional and in-place twins get the identity of the module: F.relu(x) and nn.ReLU group.
        for owner in (F, torch, torch.Tensor):
            for suffix in ("", "_"):
                twin = getattr(owner, entry.name + suffix, None)
                if twin is not None:
                    _BY_CALLABLE.setdefault(twin, entry)
    gelu_tanh = _Entry("gelu_tanh", functools.partial(F.gelu, approximate="tanh"))
    for name, entry in {
        "gelu_tanh": gelu_tanh,
        "normal_cdf": _Entry("normal_cdf", _normal_cdf),
        "quick_gelu": _Entry("quick_gelu", _quick_gelu),
        "squared_relu": _Entry("squared_relu", _squared_relu),
        "relu2": _Entry("squared_relu", _squared_relu),
        "swish": _BY_TYPE[nn.SiLU],
        "linear": _BY_TYPE[nn.Identity],
    }.items():
        _BY_NAME[_canonical(name)] = entry
        _BY_CALLABLE.setdefault(entry.function, entry)


_fill_tables()


def activation_names() -> tuple[str, ...]:
    """Names that :func:`as_base` knows without transformers.

    Returns:
        Sorted names.
    """
    return tuple(
        sorted({e.name if isinstance(e, _Entry) else _canonical(e.__name__) for e in _BY_NAME.values()})
    )


def activation_types() -> tuple[type[nn.Module], ...]:
    """Module classes known as pointwise activations: torch's, registered ones, and transformers' if loaded.

    A model that uses a class of transformers has imported it, so nothing is imported here.

    Returns:
        Classes, without duplicates.
    """
    loaded = sys.modules.get("transformers.activations")
    table = cast("Mapping[str, object]", getattr(loaded, "ACT2CLS", {}))
    theirs = [entry[0] if isinstance(entry, tuple) else entry for entry in table.values()]
    found = [cls for cls in theirs if isinstance(cls, type) and issubclass(cls, nn.Module)]
    return tuple(dict.fromkeys([*_MODULES, *found]))


def register_activation(kind: _Kind, name: str | None = None) -> _Kind:
    """Make a pointwise module class or function known, so that sites of it are found and named.

    Usable as a decorator. An unregistered pointwise callable works all the same wherever a base is
    asked for; registration adds the name and, for a class, the discovery of its sites.

    Args:
        kind: an ``nn.Module`` subclass, or a function of one tensor.
        name: name for :func:`as_base`; by default the name of the class or function.

    Returns:
        ``kind``, unchanged.

    Raises:
        ConfigError: ``kind`` is neither, or is not pointwise.
    """
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        _MODULES.append(kind)
        _BY_NAME[_canonical(name or kind.__name__)] = kind
    elif callable(kind) and not isinstance(kind, type):
        own = name or getattr(kind, "__name__", type(kind).__name__)
        entry = _Entry(own, _checked(cast(Pointwise, kind), own))
        _BY_NAME[_canonical(own)] = _BY_CALLABLE[kind] = entry
    else:
        raise ConfigError("kind", kind, "is no module class and no function", "Pass an nn.Module subclass.")
    return kind


def as_base(obj: str | nn.Module | Pointwise | Base) -> Base:
    """The base that a name, a module or a callable stands for.

    A module is read live: its present hyper-parameters count, in-place modules become out of place.
    ``PReLU`` gives one function a site, with the mean of its channels' slopes. ``RReLU`` gives the
    mean of its slopes, which is also what it computes in eval mode.

    Args:
        obj: a name (``"gelu"``, ``"LeakyReLU"``, a key of transformers' ``ACT2FN``), an ``nn.Module``,
            a function of one tensor (also a ``functools.partial`` of a torch one), or a base.

    Returns:
        The base.

    Raises:
        ConfigError: the name is unknown or the object is not a pointwise function.
    """
    if isinstance(obj, Base):
        return obj
    if isinstance(obj, str):
        return _from_name(obj)
    if isinstance(obj, nn.Module):
        return _from_module(obj)
    if callable(obj):
        return _from_callable(obj)
    raise ConfigError("activation", obj, "is no name, module or callable", "Pass for example 'gelu'.")


def _from_name(name: str) -> Base:
    entry = _BY_NAME.get(_canonical(name))
    if isinstance(entry, _Entry):
        return entry.base({})
    if entry is not None:
        return _from_module(entry(), name)
    if importlib.util.find_spec("transformers") is not None:
        from transformers.activations import ACT2FN

        if name in ACT2FN:
            return _from_module(ACT2FN[name], name)
    known = ", ".join(activation_names())
    raise ConfigError("activation", name, "is not a known activation", f"Use one of: {known}.")


def _from_module(module: nn.Module, name: str | None = None) -> Base:
    if isinstance(module, nn.PReLU):
        return _PRELU.base({"negative_slope": float(module.weight.detach().double().mean())})
    if isinstance(module, nn.RReLU):
        return _RRELU.base({"negative_slope": (float(module.lower) + float(module.upper)) / 2})
    for cls in type(module).__mro__:
        entry = _BY_TYPE.get(cast("type[nn.Module]", cls))
        # A subclass that brings its own forward is another function.
        if entry is not None and type(module).forward is cast("type[nn.Module]", cls).forward:
            return entry.base({key: getattr(module, key) for key in entry.defaults})
    own = name or type(module).__name__
    function = _checked(_ModuleFunction(module), own)
    return Base(own, function, key=_module_key(module))


def _from_callable(function: Pointwise) -> Base:
    if isinstance(function, functools.partial) and not function.args:
        entry = _lookup(function.func)
        if entry is not None and set(function.keywords) <= {*entry.defaults, "inplace"}:
            return entry.base(function.keywords)
    entry = _lookup(function)
    if entry is not None:
        return entry.base({})
    own = getattr(function, "__name__", type(function).__name__)
    return Base(own, _checked(function, own), key=function)


def _lookup(function: object) -> _Entry | None:
    try:
        return _BY_CALLABLE.get(function)
    except TypeError:  # a callable object without a hash
        return None


class _ModuleFunction:
    """A frozen, out-of-place copy of an unregistered module, run on whatever device its input is on."""

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        for part in self.module.modules():
            if hasattr(part, "inplace"):
                part.inplace = False  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, z: Tensor) -> Tensor:
        state = {name: t.to(z.device) for name, t in self.module.state_dict().items()}
        return torch.func.functional_call(self.module, state, (z,)) if state else self.module(z)


class _OutOfPlace:
    """A callable that overwrites its input, made to leave it alone."""

    def __init__(self, function: Pointwise) -> None:
        self.function = function

    def __call__(self, z: Tensor) -> Tensor:
        return self.function(z.clone())


def _module_key(module: nn.Module) -> object:
    """Type and state of a module if that identifies its function, else the module itself."""
    if any(True for _ in module.children()):
        return module
    tensors = (*module.named_parameters(), *module.named_buffers())
    if any(t.numel() > 16 for _, t in tensors):
        return module
    state = tuple((name, tuple(t.detach().flatten().tolist())) for name, t in tensors)
    own = ((k, v) for k, v in vars(module).items() if not k.startswith("_") and k != "training")
    key = (type(module), state, tuple((k, _plain(v)) for k, v in own))
    try:
        hash(key)
    except TypeError:
        return module
    return key


def _plain(value: object) -> object:
    """Partials and bound methods compared by what they do, not by which instance made them."""
    if isinstance(value, functools.partial):
        return (value.func, value.args, tuple(sorted(value.keywords.items())))
    return getattr(value, "__func__", value)


def _checked(function: Pointwise, name: str) -> Pointwise:
    """The function, out of place, after a probe that it is pointwise.

    Args:
        function: the candidate.
        name: what to call it in an error.

    Returns:
        The function or an out-of-place wrapper of it.

    Raises:
        ConfigError: it fails on a tensor, changes its shape or mixes its elements.
    """
    probe = _away_from_kinks(64, 4.0).reshape(8, 8)
    given = probe.clone()
    try:
        with torch.no_grad():
            out = function(given)
            changed = not torch.equal(given, probe)
            again = function(probe.reshape(64, 1).clone())
    except Exception as error:
        raise ConfigError("activation", name, f"fails on a tensor ({error})", "Pass f(z) of one tensor.") from None
    same = isinstance(out, Tensor) and out.shape == probe.shape and again.shape == (64, 1)
    if not same or not torch.allclose(again.view(8, 8), out, rtol=1e-5, atol=1e-6, equal_nan=True):
        problem = "is not a pointwise function: its output depends on the other elements or has another shape"
        raise ConfigError("activation", name, problem, "Softmax, GLU and the like cannot be corrected.")
    return _OutOfPlace(function) if changed else function


def derivatives(base: Base, z: Tensor) -> Derivatives:
    """f, f' and f'' by automatic differentiation.

    At a kink the value is torch's one-sided convention (relu'(0) = 0); the delta function that f''
    has there is not represented, as section 4 of the theory asks for piecewise linear functions.

    Args:
        base: the function.
        z: points, any shape, float32 or float64 (float64 is advised: f'' cancels).

    Returns:
        Value, first and second derivative at z, without graph.
    """
    with torch.inference_mode(False), torch.enable_grad():
        points = z.detach().clone().requires_grad_()
        value = base(points).to(z.dtype)
        first = _slope(value, points, graph=True)
        try:
            second = _slope(first, points, graph=False)
        except RuntimeError:  # F.hardsigmoid and some custom functions have no second backward pass
            second = _difference(base, z.detach())
    return Derivatives(value.detach(), first.detach(), second.detach())


def _difference(base: Base, z: Tensor) -> Tensor:
    step = torch.finfo(z.dtype).eps ** (1 / 3)
    sides = torch.stack([z - step, z + step]).requires_grad_()
    below, above = _slope(base(sides).to(z.dtype), sides, graph=False)
    return (above - below) / (2 * step)


def _slope(value: Tensor, points: Tensor, *, graph: bool) -> Tensor:
    if not value.requires_grad:  # constant, or linear one derivative earlier
        return torch.zeros_like(points)
    (slope,) = torch.autograd.grad(
        value.sum(), points, create_graph=graph, allow_unused=True, materialize_grads=True
    )
    return slope


def _away_from_kinks(count: int, reach: float) -> Tensor:
    """Points from -reach to reach, denser at 0, at no point where a function of interest has a kink."""
    t = torch.linspace(-1, 1, count, dtype=torch.float64)
    return torch.sinh(6 * t) / torch.sinh(torch.tensor(6.0, dtype=torch.float64)) * reach + 1.2345e-3


@functools.lru_cache(maxsize=1024)
def traits(base: Base) -> Traits:
    """Traits of a base, from its values and derivatives on 8193 float64 points of [-100, 100].

    Args:
        base: the function.

    Returns:
        What the function does; properties beyond that range are not seen.
    """
    z = _away_from_kinks(8193, 100.0)
    value, first, second = (torch.nan_to_num(t) for t in derivatives(base, z))
    rise, run = value.diff(), z.diff()
    steepest = torch.maximum(first[1:].abs(), first[:-1].abs())
    jumps = bool((rise.abs() > 4 * run * steepest + 0.05).any())
    piecewise = not jumps and bool((second.abs() <= 1e-9).all())
    tolerance = 1e-9 * (1 + value[1:].abs())
    return Traits(
        affine=piecewise and bool((first - first[0]).abs().max() <= 1e-9),
        monotone=bool((first >= -1e-9).all()) and bool((rise >= -tolerance).all()),
        piecewise_linear=piecewise,
        gate=bool((rise >= -tolerance).all())
        and abs(float(value[0])) < 1e-2
        and abs(float(value[-1]) - 1) < 1e-2
        and bool((value >= -1e-9).all() and (value <= 1 + 1e-9).all()),
        flat=_has_flat_part(z, first),
    )


def _has_flat_part(z: Tensor, first: Tensor) -> bool:
    """Whether f' is exactly 0 on an interval that f' enters other than by fading away.

    A saturating function such as tanh also reaches f' = 0 in floating point, but only where f' is
    already negligible; a flat part begins at a corner or within a few units of 0.
    """
    still = first == 0
    inner = still[:-2] & still[1:-1] & still[2:]
    corner = (still[1:] != still[:-1]) & (torch.maximum(first[1:].abs(), first[:-1].abs()) > 1e-6)
    return bool((inner & (z[1:-1].abs() < 4)).any()) or bool(corner.any() and inner.any())
