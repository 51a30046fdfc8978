"""The dry run: one forward of a structural copy of a model, in which every activation call is written down."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eafo_dynamic.activation import CorrectedActivation
from eafo_dynamic.channels import channel_dim, mark_channels
from eafo_dynamic.errors import SiteError
from eafo_dynamic.functional import WRITTEN, Tracker, function_name, hyper_parameters, is_hidden_from_compiler
from eafo_dynamic.kernels import describe, is_correctable, size_of

__all__ = ["Call", "Frame", "Trace", "forked_random_states", "trace_calls"]

_COPIED_BYTES = 2**28
"""Parameters up to this size are copied for the dry run, so that not even a forward that overwrites them can do harm;
larger ones are shared."""


@dataclass(frozen=True)
class Frame:
    """One running forward.

    Args:
        module: FQN.
        instance: how many forwards of the run began before it.
        is_forward: False for what runs outside any forward, such as a training_step.
    """

    module: str
    instance: int
    is_forward: bool = True


@dataclass(eq=False)
class Call:
    """One activation call.

    Args:
        module: FQN of the activation module; of a functional call, of the module whose forward makes it.
        path: running forwards, outermost first, without the activation's own.
        shape: of the pre-activation.
        function: name of the function of a functional call; None for a module's.
        parameters: hyper-parameters of the function.
        inplace: whether the function overwrites its input.
        hidden_from_compiler: whether torch.compile would not show the call.
        channel_dim: dimension of the channels of the pre-activation, where it is known.
        role: hidden, gate or unknown.
        reason: why it is not hidden.
    """

    module: str
    path: tuple[Frame, ...]
    shape: tuple[int, ...]
    function: str | None = None
    parameters: dict[str, object] = field(default_factory=dict)
    inplace: bool = False
    hidden_from_compiler: bool = False
    channel_dim: int | None = None
    role: str = "hidden"
    reason: str = ""


@dataclass
class Trace:
    """What a dry run saw.

    Args:
        calls: in their order; parts of a written-out activation have the function WRITTEN's role.
        forwards: number of forwards of each module, those inside another forward of it not counted.
        entered: number of all forwards.
        callees: modules whose forward a module's own forward has called.
        refused: kind of the value that an activation module was called with and that cannot be corrected.
    """

    calls: list[Call] = field(default_factory=list)
    forwards: Counter[str] = field(default_factory=Counter)
    entered: int = 0
    callees: dict[str, dict[str, None]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


class _Running:
    """One running forward, with what is needed to judge the functional calls in it."""

    def __init__(self, frame: Frame, inside: bool = False) -> None:
        self.frame = frame
        self.inside = inside  # an activation module, which is one site whatever it does there
        self.tracker = Tracker()
        # by id; the tensors are kept, so that no number is given twice
        self.made: dict[int, tuple[Tensor, Call]] = {}
        self.constants: dict[int, Tensor] = {}

    def call_that_made(self, tensor: Tensor) -> Call | None:
        return self.made.get(id(tensor), (tensor, None))[1]

    def is_constant(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or id(tensor) in self.constants


class _Listener(TorchFunctionMode):
    """Sees every torch function of the run and writes down those that are activations."""

    def __init__(self, activations: Collection[str]) -> None:
        super().__init__()
        self.trace = Trace()
        self.activations = activations
        self.running = [_Running(Frame("", 0, is_forward=False))]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        mark_channels(func, args, out)
        running = self.running[-1]
        if running.inside:
            return out
        name = function_name(func)
        if name is not None and _is_pointwise_call(args, kwargs, out):
            self._note(running, func, name, args, kwargs, out)
        if isinstance(out, Tensor):
            self._follow(running, func, args, kwargs, out)
        return out

    def path(self) -> tuple[Frame, ...]:
        return tuple(running.frame for running in self.running)

    def _note(self, running: _Running, func: Any, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
        call = Call(running.frame.module, self.path(), size_of(args[0]), name, hyper_parameters(name, args, kwargs))
        call.inplace, call.hidden_from_compiler = out is args[0], is_hidden_from_compiler(func)
        call.channel_dim = channel_dim(args[0])
        if name in ("sigmoid", "hardsigmoid"):
            call.role, call.reason = "gate", "a gate, not a hidden activation"
        elif name == "softplus":
            call.role, call.reason = "unknown", "called as a function, softplus mostly makes a positive scale"
        if running.is_constant(args[0]):
            call.role, call.reason = "gate", "transforms a parameter"
        running.made[id(out)] = (out, call)
        self.trace.calls.append(call)

    def _follow(self, running: _Running, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if tensors and all(running.is_constant(tensor) for tensor in tensors):
            running.constants[id(out)] = out
        before = [running.tracker.find(tensor) for tensor in tensors]
        made = running.tracker.step(func, args, kwargs, out)
        if made is not None and is_correctable(made.root):
            values = tuple(float(scalar.detach()) for scalar in made.scalars)
            parameters: dict[str, object] = {"expression": made.node, "constants": values}
            call = Call(running.frame.module, self.path(), size_of(out), WRITTEN, parameters)
            call.channel_dim = channel_dim(made.root)
            self.trace.calls.append(call)
            for inner in _calls_inside(running, made.root):
                inner.role, inner.reason = "part", "part of a written-out activation"
        name = getattr(func, "__name__", "")
        if name.strip("_") in ("mul", "multiply", "div", "true_divide", "rmul"):
            self._judge_product(running, name, args, tensors, before)

    def _judge_product(self, running: _Running, name: str, args: Any, tensors: Any, before: Any) -> None:
        calls = [running.call_that_made(tensor) for tensor in tensors]
        for call, other in zip(calls, reversed(calls), strict=True):
            if call is None or call.function != "tanh" or call.role != "hidden":
                continue
            if len(calls) == 2 and other is not None and other.role == "gate" and other.function == "sigmoid":
                call.role, call.reason = "gate", "part of a gated cell: multiplied by a sigmoid"
            scale = next((a for a in args if isinstance(a, (int, float))), None)
            inner = before[0]
            if len(calls) == 1 and scale and inner is not None and _is_cap(inner.node, float(scale), name):
                call.role, call.reason = "unknown", "a soft cap, not a hidden activation"


def _is_cap(node: Any, scale: float, name: str) -> bool:
    inner = node[1]
    if not isinstance(inner, tuple) or len(inner) != 3 or inner[0] not in ("mul", "div"):
        return False
    numbers = [term for term in inner[1:] if isinstance(term, float)]
    if len(numbers) != 1 or not numbers[0]:
        return False
    before = numbers[0] if inner[0] == "mul" else 1.0 / numbers[0]
    after = scale if "mul" in name else 1.0 / scale
    return abs(before * after - 1.0) < 1e-6


def _calls_inside(running: _Running, root: Tensor) -> Iterator[Call]:
    """Functional calls whose result lies on the way from the root to the product."""
    for out, call in running.made.values():
        known = running.tracker.find(out)
        if known is not None and known.root is root and call.role != "part":
            yield call


def _is_pointwise_call(args: Any, kwargs: Any, out: Any) -> bool:
    return (
        bool(args)
        and is_correctable(args[0])
        and isinstance(out, Tensor)
        and kwargs.get("out") is None
        and size_of(out) == size_of(args[0])
    )


def trace_calls(model: nn.Module, activations: Collection[str], run: Callable[[nn.Module], object]) -> Trace:
    """Runs a copy of a model once and writes down its activation calls.

    Args:
        model: any module; nothing of it changes.
        activations: FQNs of its activation modules.
        run: runs the copy.

    Returns:
        What was seen.

    Raises:
        SiteError: if the run fails.
    """
    listener = _Listener(frozenset(activations))
    with _probe(model) as probe:
        _listen(probe, listener)
        try:
            with warnings.catch_warnings(), listener:
                warnings.simplefilter("ignore")  # they concern the dry run (no gradient), or come again in training
                run(probe)
        except Exception as error:
            raise SiteError(
                f"the example input does not run through {type(model).__name__}: {type(error).__name__}: {error}. "
                "Give an input that the model's forward accepts."
            ) from error
    return listener.trace


def _listen(probe: nn.Module, listener: _Listener) -> None:
    names = {id(module): name for name, module in probe.named_modules()}
    trace, running = listener.trace, listener.running

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = names[id(module)]
        values = (*args, *kwargs.values())
        value = values[0] if len(values) == 1 else values
        if name in listener.activations and not running[-1].inside:
            if is_correctable(value):
                inplace = bool(getattr(module, "inplace", False))
                dim = channel_dim(value)
                trace.calls.append(Call(name, listener.path(), size_of(value), inplace=inplace, channel_dim=dim))
            else:
                trace.refused[name] = describe(value)
        trace.callees.setdefault(running[-1].frame.module, {})[name] = None
        trace.entered += 1
        if all(each.frame.module != name or not each.frame.is_forward for each in running):
            trace.forwards[name] += 1
        inside = running[-1].inside or name in listener.activations or isinstance(module, CorrectedActivation)
        running.append(_Running(Frame(name, trace.entered), inside))

    def leave(module: nn.Module, args: object, output: object) -> None:
        running.pop()

    for module in probe.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the fused kernel of eval mode would hide the activation
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
            module.register_forward_hook(leave, always_call=True)


@contextmanager
def _probe(model: nn.Module) -> Generator[nn.Module]:
    """A structural copy of the model, to be run without a trace.

    Yields:
        The copy.

    Raises:
        SiteError: if the model refuses to be copied.
    """
    memo = _shared(model)
    try:
        try:
            probe = copy.deepcopy(model, dict(memo))
        except Exception:
            probe = copy.deepcopy(model, {**memo, **_uncopyable(model, memo)})
    except Exception as error:
        raise SiteError(
            f"{type(model).__name__} cannot be copied for a dry run ({type(error).__name__}: {error}). "
            "Search without an example input."
        ) from error
    with forked_random_states(), torch.no_grad():
        yield probe


def _shared(model: nn.Module) -> dict[int, Any]:
    """What a deep copy of the model must not copy, or must copy in its own way, as a memo of deepcopy."""
    memo: dict[int, Any] = {}
    parameters = list(model.parameters())
    if sum(p.numel() * p.element_size() for p in parameters) > _COPIED_BYTES:
        memo |= {id(p): p for p in parameters}
    for module in model.modules():
        for key, value in vars(module).items():
            if key in ("_trainer", "_fabric") and value is not None:
                memo[id(value)] = value  # a LightningModule's trainer holds the whole experiment
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
            elif isinstance(value, torch.Generator):
                memo[id(value)] = torch.Generator(value.device).set_state(value.get_state())
    return memo


def _uncopyable(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Attributes that refuse to be copied (locks, files, handles) are shared."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        for key, value in vars(module).items():
            if key in ("_modules", "_parameters", "_buffers") or isinstance(value, (nn.Module, Tensor)):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                shared[id(value)] = value
    return shared


@contextmanager
def forked_random_states() -> Generator[None]:
    """Restores the global random states of torch (all devices in use), numpy and Python afterwards.

    Yields:
        Nothing.
    """
    numpy_random = sys.modules["numpy"].random if "numpy" in sys.modules else None
    python_state = random.getstate()
    numpy_state = None if numpy_random is None else numpy_random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)
