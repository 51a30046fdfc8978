"""The pointwise functions by name, module class and callable, and how to read a base off each."""

from __future__ import annotations

import ast
import copy
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eafo_dynamic.correction.bases.descriptor import Base, LogSlope, Pointwise, probe_points
from eafo_dynamic.correction.bases.further import (
    normal_cdf,
    quick_gelu,
    squared_leaky_relu,
    squared_relu,
    swish_beta,
    xielu,
)
from eafo_dynamic.correction.bases.log_slopes import LOG_SLOPES
from eafo_dynamic.errors import ConfigError

__all__ = [
    "PointwiseActivation",
    "activation_module",
    "activation_names",
    "activation_types",
    "as_base",
    "register_activation",
]

_Kind = TypeVar("_Kind", bound="type[nn.Module] | Pointwise")


class _Entry(NamedTuple):
    """A registered function: its name, its functional form, its hyper-parameters with their defaults.

    log_slope makes f''/f' from the hyper-parameters.
    """

    name: str
    function: Callable[..., Tensor]
    defaults: Mapping[str, object] = {}
    log_slope: Callable[..., LogSlope] | None = None

    def base(self, values: Mapping[str, object]) -> Base:
        given = [_number(values.get(key, default)) for key, default in self.defaults.items()]
        return _made(self.name, self.function, self.log_slope, tuple(self.defaults.items()), *given)


@functools.lru_cache(maxsize=256, typed=True)  # every update round asks for that of every site
def _made(
    name: str,
    function: Callable[..., Tensor],
    log_slope: Callable[..., LogSlope] | None,
    defaults: tuple[tuple[str, object], ...],
    *values: object,
) -> Base:
    used = {key: value for (key, _), value in zip(defaults, values, strict=True)}
    changed = [f"{key}={_shown(used[key])}" for key, default in defaults if used[key] != _number(default)]
    label = name
    if changed:
        label = f"{name}({', '.join(changed)})"
    fn = function
    if used:
        fn = functools.partial(function, **used)
    closed = None
    if log_slope is not None:
        closed = log_slope(**used)
    return Base(name, fn, tuple(sorted(used.items())), label=label, log_slope=closed)


def _number(value: object) -> object:
    """The value; a number as a float."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return value


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _identity(z: Tensor) -> Tensor:
    return z * 1.0  # not z itself: a result that aliases its input is not out of place


_BY_TYPE: dict[type[nn.Module], _Entry] = {
    nn.Identity: _Entry("identity", _identity),
    nn.ReLU: _Entry("relu", F.relu),
    nn.ReLU6: _Entry("relu6", F.relu6),
    nn.LeakyReLU: _Entry("leaky_relu", F.leaky_relu, {"negative_slope": 0.01}),
    nn.ELU: _Entry("elu", F.elu, {"alpha": 1.0}, log_slope=LOG_SLOPES["elu"]),
    nn.SELU: _Entry("selu", F.selu, log_slope=LOG_SLOPES["selu"]),
    nn.CELU: _Entry("celu", F.celu, {"alpha": 1.0}, log_slope=LOG_SLOPES["celu"]),
    nn.GELU: _Entry("gelu", F.gelu, {"approximate": "none"}),
    nn.SiLU: _Entry("silu", F.silu),
    nn.Mish: _Entry("mish", F.mish),
    nn.Hardswish: _Entry("hardswish", F.hardswish),
    nn.Hardtanh: _Entry("hardtanh", F.hardtanh, {"min_val": -1.0, "max_val": 1.0}),
    nn.Hardsigmoid: _Entry("hardsigmoid", F.hardsigmoid),
    nn.Softplus: _Entry("softplus", F.softplus, {"beta": 1.0, "threshold": 20.0}, log_slope=LOG_SLOPES["softplus"]),
    nn.Softsign: _Entry("softsign", F.softsign, log_slope=LOG_SLOPES["softsign"]),
    nn.Tanh: _Entry("tanh", torch.tanh, log_slope=LOG_SLOPES["tanh"]),
    nn.Sigmoid: _Entry("sigmoid", torch.sigmoid, log_slope=LOG_SLOPES["sigmoid"]),
    nn.LogSigmoid: _Entry("logsigmoid", F.logsigmoid, log_slope=LOG_SLOPES["logsigmoid"]),
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


_CALLED = re.compile(r"\s*([\w\- ]+?)\s*\((.*)\)\s*")


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
        "normal_cdf": _Entry("normal_cdf", normal_cdf, log_slope=LOG_SLOPES["normal_cdf"]),
        "quick_gelu": _Entry("quick_gelu", quick_gelu),
        "squared_relu": _Entry("squared_relu", squared_relu),
        "relu2": _Entry("squared_relu", squared_relu),
        "squared_leaky_relu": _Entry("squared_leaky_relu", squared_leaky_relu, {"negative_slope": 0.5}),
        "swish_beta": _Entry("swish_beta", swish_beta, {"beta": 1.0}),
        "xielu": _Entry("xielu", xielu, {"alpha_p": 0.8, "alpha_n": 0.8, "beta": 0.5}),
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
    names: set[str] = set()
    for known in _BY_NAME.values():
        if isinstance(known, _Entry):
            names.add(known.name)
        else:
            names.add(_canonical(known.__name__))
    return tuple(sorted(names))


def activation_types() -> tuple[type[nn.Module], ...]:
    """Module classes known as pointwise activations: torch's, registered ones, and transformers' if loaded.

    A model that uses a class of transformers has imported it, so nothing is imported here.

    Returns:
        Classes, without duplicates.
    """
    loaded = sys.modules.get("transformers.activations")
    table = cast("Mapping[str, object]", getattr(loaded, "ACT2CLS", {}))
    found: list[type[nn.Module]] = []
    for entry in table.values():
        cls: object = entry
        if isinstance(entry, tuple):  # a class with the arguments that make it another function
            cls = cast("tuple[object, ...]", entry)[0]
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            found.append(cls)
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
        entry = _Entry(own, _checked(kind, own))
        _BY_NAME[_canonical(own)] = _BY_CALLABLE[kind] = entry
    else:
        raise ConfigError("kind", kind, "is no module class and no function", "Pass an nn.Module subclass.")
    return cast(_Kind, kind)


def as_base(obj: str | nn.Module | type[nn.Module] | Pointwise | Base) -> Base:
    """The base that a name, a module or a callable stands for.

    A module is read live: its present hyper-parameters count, in-place modules become out of place.
    ``PReLU`` gives one function a site, with the mean of its channels' slopes. ``RReLU`` gives the
    mean of its slopes, which is also what it computes in eval mode.

    Args:
        obj: a name (``"gelu"``, ``"LeakyReLU"``, a key of transformers' ``ACT2FN``), with hyper-parameters as ``str``
            shows them (``"swish_beta(beta=1.5)"``), an ``nn.Module`` or a class of one, a function of one tensor (also
            a ``functools.partial`` of a torch one), or a base.

    Returns:
        The base.

    Raises:
        ConfigError: the name is unknown or the object is not a pointwise function.

    Example:
        >>> base = as_base(nn.LeakyReLU(0.2))
        >>> base(torch.tensor([-1.0, 1.0]))
        tensor([-0.2000,  1.0000])
        >>> as_base("gelu") == as_base(nn.GELU()) == as_base(nn.functional.gelu)
        True
    """
    if isinstance(obj, Base):
        return obj
    if isinstance(obj, str):
        return _from_name(obj)
    if isinstance(obj, type) and issubclass(obj, nn.Module):
        obj = _instance(obj)
    if isinstance(obj, nn.Module):
        return _from_module(obj)
    if callable(obj):
        return _from_callable(obj)
    raise ConfigError("activation", obj, "is no name, module or callable", "Pass for example 'gelu'.")


def _from_name(name: str) -> Base:
    called = _CALLED.fullmatch(name)
    if called is not None:
        return _with_parameters(name, *called.groups())
    entry = _BY_NAME.get(_canonical(name))
    if isinstance(entry, _Entry):
        return entry.base({})
    if entry is not None:
        return _from_module(_instance(entry), name)
    if importlib.util.find_spec("transformers") is not None:
        from transformers.activations import ACT2FN

        if name in ACT2FN:
            return _from_module(ACT2FN[name], name)
    known = ", ".join(activation_names())
    raise ConfigError("activation", name, "is not a known activation", f"Use one of: {known}.")


def _with_parameters(name: str, stem: str, given: str) -> Base:
    """The base of a name with hyper-parameters in brackets."""
    entry = _BY_NAME.get(_canonical(stem))
    if not isinstance(entry, _Entry):
        return _from_name(stem)  # which says that it is unknown, or takes no hyper-parameters
    try:
        call = ast.parse(f"f({given})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        values = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        problem = "its hyper-parameters cannot be read"
        raise ConfigError("activation", name, problem, "Write them as in leaky_relu(negative_slope=0.2).") from None
    unknown = sorted(set(values) - set(entry.defaults))
    if unknown:
        known = ", ".join(entry.defaults) or "none"
        problem = f"{entry.name} has no hyper-parameter {unknown[0]}"
        raise ConfigError("activation", name, problem, f"It has: {known}.")
    for key, value in values.items():
        if isinstance(_number(entry.defaults[key]), float) is not isinstance(_number(value), float):
            default = entry.defaults[key]
            raise ConfigError("activation", name, f"{key}={value!r} is of another kind", f"The default is {default!r}.")
    return entry.base(values)


def activation_module(base: Base) -> nn.Module:
    """A module that computes a base.

    Args:
        base: the base.

    Returns:
        The module of torch for a function that torch has one for, else one that calls the function.
    """
    for cls, entry in _BY_TYPE.items():
        if entry.name == base.name and base.key is None:
            return cls(**dict(base.params))
    return PointwiseActivation(base)


class PointwiseActivation(nn.Module):
    """A pointwise function as a module.

    Args:
        base: the function.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base

    def forward(self, z: Tensor) -> Tensor:
        """f(z).

        Args:
            z: pre-activations, any shape.

        Returns:
            Activations, same shape.
        """
        return self.base.fn(z)

    def extra_repr(self) -> str:
        """The name of the function with its hyper-parameters.

        Returns:
            For example ``swish_beta(beta=1.5)``.
        """
        return str(self.base)


def _instance(cls: type[nn.Module]) -> nn.Module:
    try:
        return cls()
    except TypeError as error:
        problem = f"cannot be made without arguments ({error})"
        raise ConfigError("activation", cls.__name__, problem, "Pass an instance.") from None


def _from_module(module: nn.Module, name: str | None = None) -> Base:
    if isinstance(module, PointwiseActivation):
        return module.base
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
                object.__setattr__(part, "inplace", False)

    def __call__(self, z: Tensor) -> Tensor:
        state = {name: t.to(z.device) for name, t in self.module.state_dict().items()}
        if not state:
            return self.module(z)
        return torch.func.functional_call(self.module, state, (z,))


class _OutOfPlace:
    """A callable that overwrites its input, made to leave it alone."""

    def __init__(self, function: Pointwise) -> None:
        self.function = function

    def __call__(self, z: Tensor) -> Tensor:
        return self.function(z.clone())


def _module_key(module: nn.Module) -> object:
    """Return type and state of a module if that identifies its function, else the module itself."""
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
    """Return partials and bound methods as something that compares by what they do."""
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
    probe = probe_points(64, 4.0).reshape(8, 8)
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
