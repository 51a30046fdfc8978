"""The dry run: one forward of a structural copy of a model, in which every activation call is written down."""

from __future__ import annotations

import functools
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from eafo_dynamic.correction.kernels import describe, is_correctable, size_of
from eafo_dynamic.errors import SiteError
from eafo_dynamic.find.beneath import listening, uncompiled
from eafo_dynamic.find.by_channel import WeightedExpressions
from eafo_dynamic.find.channels import channel_dim, mark_channels
from eafo_dynamic.find.expressions import keep_expressions
from eafo_dynamic.find.foreign import foreign_function
from eafo_dynamic.find.functional import (
    function_name,
    hyper_parameters,
    is_hidden_from_compiler,
    unbound,
    with_input_first,
)
from eafo_dynamic.find.lineage import Lineage, in_method, is_product
from eafo_dynamic.find.observers import global_observers_silenced, silence_observers
from eafo_dynamic.find.places import pieces
from eafo_dynamic.find.probe import structural_copy
from eafo_dynamic.find.roles import assign_roles
from eafo_dynamic.find.trace import SOFT_CAP, Call, Frame, Returned, Trace
from eafo_dynamic.find.wrapped import ENTRY_POINTS, CarriesCorrection
from eafo_dynamic.find.written import WRITTEN, Made, Tracker, bends, parts
from eafo_dynamic.internals.torch_internals import caller_of, code_of, current_frame

__all__ = ["trace_calls"]

_OPERATORS = (type(torch.ops.aten.relu), type(torch.ops.aten.relu.default))


class _Running:
    """One running forward, with what is needed to judge the functional calls in it."""

    def __init__(self, frame: Frame, inside: bool = False) -> None:
        self.frame = frame
        self.inside = inside  # an activation module, which is one site whatever it does there
        self.returned: list[Returned] = []  # its children
        self.tracker = Tracker()
        # by id; the tensors are kept, so that no number is given twice
        self.made: dict[int, tuple[Tensor, Call]] = {}
        self.constants: dict[int, Tensor] = {}
        self.expressions: dict[int, tuple[Tensor, Call]] = {}
        self.of_modules: dict[int, Tensor] = {}
        self.weighted = WeightedExpressions()

    def call_that_made(self, tensor: Tensor) -> Call | None:
        return self.made.get(id(tensor), (tensor, None))[1]

    def is_constant(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or id(tensor) in self.constants


class _Thread(threading.local):
    """What runs in one thread: forwards, innermost last, and how many functions of torch."""

    def __init__(self) -> None:
        self.running = [_Running(Frame("", 0, is_forward=False))]
        self.functions = 0
        self.listening = False


class _Listener(TorchFunctionMode):
    """Sees every torch function of the run and writes down those that are activations."""

    def __init__(self, activations: Mapping[str, str], lineage: Lineage) -> None:
        super().__init__()
        self.trace = Trace()
        self.lineage = lineage
        self.activations = activations
        self.here = _Thread()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = with_input_first(func, args, kwargs)
        shows = not isinstance(func, _OPERATORS)  # torch.ops.aten.relu cannot be corrected
        self.here.functions += shows
        try:
            out = func(*args, **kwargs)
        finally:
            self.here.functions -= shows
        mark_channels(func, args, out)
        running = self.here.running[-1]
        if running.inside:
            return out
        name, call = function_name(func), None
        if name is not None and _is_pointwise_call(args, kwargs, out):
            call = self._note(running, func, name, args, kwargs, out)
        self.lineage.step(func, args, kwargs, out, call)
        if isinstance(out, Tensor):
            self._follow(running, func, args, kwargs, out)
        return out

    def __enter__(self) -> _Listener:
        self.here.listening = True
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self.here.listening = False
        super().__exit__(*problem)

    def path(self) -> tuple[Frame, ...]:
        return tuple(running.frame for running in self.here.running)

    def forward(self, name: str, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a module's forward in a frame of its own.

        Args:
            name: FQN of the module.
            module: the module.
            call: its forward.
            args: positional arguments.
            kwargs: keyword arguments.

        Returns:
            What forward returns.
        """
        running, trace = self.here.running, self.trace
        noted = None
        if name in self.activations and not running[-1].inside:
            noted = self._note_module(name, module, (*args, *kwargs.values()))
        trace.callees.setdefault(running[-1].frame.module, {})[name] = None
        if all(each.frame.module != name or not each.frame.is_forward for each in running):
            trace.forwards[name] += 1
        inside = running[-1].inside or name in self.activations or isinstance(module, CarriesCorrection)
        if not inside and next(module.children(), None) is not None:
            self.lineage.entered(name, (args, kwargs))
        out = self._framed(name, True, inside, call, args, kwargs)
        if not inside:
            loops = pieces(current_frame(2), _ENTRIES, _traced.__code__)[0].loops
            running[-1].returned.append(Returned(name, frozenset(loops)))
        if noted is not None and isinstance(out, Tensor):
            running[-1].made[id(out)] = (out, noted)
            self.lineage.step(None, args, kwargs, out, noted)
            if self.activations[name] in ("sigmoid", "hardsigmoid"):
                self._follow_module(running[-1], self.activations[name], (*args, *kwargs.values())[0], out)
        self.lineage.left(out, name, outermost=not any(each.frame.is_forward for each in running))
        return out

    def step(self, name: str, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs another entry point of a module, such as a training_step, in a frame of its own.

        Args:
            name: FQN of the module.
            module: the module.
            call: the entry point.
            args: positional arguments.
            kwargs: keyword arguments.

        Returns:
            What it returns.
        """
        self.lineage.stepped = True
        out = self._framed(name, False, self.here.running[-1].inside, call, args, kwargs)
        self.lineage.returned(out)
        return out

    def _framed(self, name: str, is_forward: bool, inside: bool, call: Callable[..., Any], args: Any, kw: Any) -> Any:
        if not self.here.listening:  # modes are a thread's own
            with self:
                return self._framed(name, is_forward, inside, call, args, kw)
        self.trace.entered += 1
        self.here.running.append(_Running(Frame(name, self.trace.entered, is_forward), inside))
        try:
            return call(*args, **kw)
        finally:
            ended = self.here.running.pop()
            for root in ended.weighted.activations():
                if self.lineage.is_learned(root):
                    self.trace.by_channel[name] = size_of(root)

    def _note_module(self, name: str, module: nn.Module, values: tuple[Any, ...]) -> Call | None:
        value = values[0] if len(values) == 1 else values
        if is_correctable(value):
            inplace, dim = bool(getattr(module, "inplace", False)), channel_dim(value)
            return self._noted(Call(name, self.path(), size_of(value), inplace=inplace, channel_dim=dim))
        self.trace.refused[name] = describe(value)
        if len(values) != 1:
            self.trace.crowded.add(name)
        return None

    def hear_kernel(self, name: str, shape: tuple[int, ...]) -> None:
        """Takes down an activation kernel, if no torch function shows it.

        Args:
            name: the function it computes.
            shape: of its input.
        """
        running = self.here.running[-1]
        if not self.here.functions and not running.inside:
            self.trace.opaque.setdefault((running.frame.module, name), shape)

    def hear_control_flow(self, name: str) -> None:
        """Takes down an operator whose branches no mode sees.

        Args:
            name: of the operator.
        """
        self.trace.opaque.setdefault((self.here.running[-1].frame.module, name), ())

    def _note(self, running: _Running, func: Any, name: str, args: Any, kwargs: Any, out: Tensor) -> Call:
        call = Call(running.frame.module, self.path(), size_of(args[0]), name, hyper_parameters(name, args, kwargs))
        call.inplace = out is args[0]
        call.hidden_from_compiler = is_hidden_from_compiler(func, code_of(current_frame(2)))  # past the mode's own
        call.channel_dim = channel_dim(args[0])
        if name in ("sigmoid", "hardsigmoid"):
            call.role, call.reason = "gate", "a gate, not a hidden activation"
        elif name == "softplus":
            call.role, call.reason = "unknown", "called as a function, softplus mostly makes a positive scale"
        if running.is_constant(args[0]):
            call.role, call.reason = "gate", "transforms a parameter"
        call.refusal = _unknown_to_backward()
        running.made[id(out)] = (out, call)
        return self._noted(call)

    def _noted(self, call: Call) -> Call:
        here: types.FrameType | None = current_frame(2)
        if call.function is None:
            here = caller_of(here)  # past the activation's own forward, which is not in the path
        call.pieces = pieces(here, _ENTRIES, _traced.__code__)
        call.returned = [(running.returned, len(running.returned)) for running in self.here.running]
        call.in_method = self.lineage.stepped and in_method(here, _ENTRIES)
        self.trace.calls.append(call)
        return call

    def _follow(self, running: _Running, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        # a network over learned queries has hidden activations
        if tensors and not is_product(func) and all(running.is_constant(tensor) for tensor in tensors):
            running.constants[id(out)] = out
        # what bends without a weight has a site of its own
        if not any(id(each) in running.expressions and not running.is_constant(each) for each in tensors):
            running.weighted.step(func, args, kwargs, out, running.is_constant)
        before = [running.tracker.find(tensor) for tensor in tensors]
        name = getattr(func, "__name__", "")
        overwrites = name == "mul_"
        made = running.tracker.step(torch.mul if overwrites else func, args, kwargs, out)
        of_module = any(id(tensor) in running.of_modules for tensor in tensors)
        if made is not None and is_correctable(made.root):
            call = self._expression(running, made)
            call.refusal = _OVERWRITES if overwrites else _OF_MODULE if of_module else _unknown_to_backward()
            self._within(running, tensors)
            for inner in _calls_inside(running, made):
                inner.role, inner.reason = "part", "part of a written-out activation"
        else:
            self._follow_expression(running, tensors, out, of_module)
        if name.strip("_") in ("mul", "multiply", "div", "true_divide", "rmul"):
            self._judge_product(running, name, args, tensors, before)

    def _expression(self, running: _Running, made: Made) -> Call:
        """Writes down a written-out activation."""
        values = tuple(float(scalar.detach()) for scalar in made.scalars)
        parameters: dict[str, object] = {"expression": made.node, "constants": values}
        call = Call(running.frame.module, self.path(), size_of(made.out), WRITTEN, parameters)
        call.channel_dim = channel_dim(made.root)
        self.lineage.made(made.out, call)
        return self._noted(call)

    def _follow_expression(self, running: _Running, tensors: list[Tensor], out: Tensor, of_module: bool) -> None:
        """Writes down what may be a written-out activation, unless a larger expression turns out to have it in it."""
        made = running.tracker.find(out)
        if made is None or made.out is not out:
            return
        if of_module:
            running.of_modules[id(out)] = out
        self._within(running, tensors)
        if bends(made.node) and out.is_floating_point() and is_correctable(made.root):
            call = self._expression(running, made)
            call.role = "open" if self.lineage.is_learned(made.root) else "data"
            call.refusal = _unknown_to_backward()
            running.expressions[id(out)] = (out, call)

    def _within(self, running: _Running, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            known = running.expressions.get(id(tensor))
            if known is not None:
                known[1].role = "inner"

    def _follow_module(self, running: _Running, name: str, value: Any, out: Tensor) -> None:
        """Follows the result of a gate that is a module as that of a function."""
        function = torch.sigmoid if name == "sigmoid" else F.hardsigmoid
        running.tracker.step(function, (value,), {}, out)
        running.of_modules[id(out)] = out

    def _function(self, call: Call) -> str:
        return self.activations[call.module] if call.function is None else call.function

    def _judge_product(self, running: _Running, name: str, args: Any, tensors: Any, before: Any) -> None:
        calls = [running.call_that_made(tensor) for tensor in tensors]
        for call, other in zip(calls, reversed(calls), strict=True):
            if call is None or self._function(call) != "tanh" or call.role != "hidden":
                continue
            if len(calls) == 2 and other is not None and other.role != "part" and self._function(other) == "sigmoid":
                call.role, call.reason = "gate", "part of a gated cell: multiplied by a sigmoid"
            scale = next((a for a in args if isinstance(a, (int, float))), None)
            inner = before[0]
            if len(calls) == 1 and scale and inner is not None and _is_cap(inner.node, float(scale), name):
                call.role, call.reason = "unknown", SOFT_CAP


_OVERWRITES = "written out in place, which leaves no pre-activation; write x * x.sigmoid()"
_OF_MODULE = "written out with a module, which is no part of an expression; call torch.sigmoid, or nn.SiLU as a whole"
_ENTRIES = (_Listener.forward.__code__, _Listener.step.__code__)


def _unknown_to_backward() -> str:
    """Why a call that is running cannot be corrected, if it is a part of somebody's autograd function."""
    function = foreign_function()
    return f"inside {function}, whose backward would not know of a correction" if function else ""


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


def _calls_inside(running: _Running, product: Made) -> Iterator[Call]:
    """Functional calls whose result lies on the way from the root to the product."""
    inside = parts(product.node)
    for out, call in running.made.values():
        known = running.tracker.find(out)
        if known is not None and known.root is product.root and known.node in inside and call.role != "part":
            yield call


def _is_pointwise_call(args: Any, kwargs: Any, out: Any) -> bool:
    return (
        bool(args)
        and is_correctable(args[0])
        and isinstance(out, Tensor)
        and kwargs.get("out") is None
        and size_of(out) == size_of(args[0])
    )


def trace_calls(model: nn.Module, activations: Mapping[str, str], run: Callable[[nn.Module], object]) -> Trace:
    """Runs a copy of a model once and writes down its activation calls.

    The run has no gradient; one that fails for want of it is tried again with.

    Args:
        model: any module; nothing of it changes.
        activations: names of the functions that its activation modules compute, by FQN.
        run: runs the copy.

    Returns:
        What was seen.

    Raises:
        SiteError: if the run fails.
    """
    problem: Exception | None = None
    for grad in (False, True):
        if grad and not any(words in str(problem) for words in _WANTS_GRADIENT):
            break
        try:
            return _traced(model, activations, run, grad)
        except SiteError:
            raise
        except Exception as error:
            problem = error
    raise SiteError(
        f"the example input does not run through {type(model).__name__}: {type(problem).__name__}: {problem}. "
        "Give an input that the model's forward accepts."
    ) from problem


_WANTS_GRADIENT = ("require grad", "requires_grad", "requires grad")  # of torch, where a forward differentiates


def _traced(model: nn.Module, activations: Mapping[str, str], run: Callable[[nn.Module], object], grad: bool) -> Trace:
    with structural_copy(model) as probe, torch.set_grad_enabled(grad):
        listener = _Listener(activations, Lineage(probe))
        silence_observers(probe)
        _listen(probe, listener)
        with (
            warnings.catch_warnings(),
            uncompiled(),
            global_observers_silenced(),
            listening(listener.hear_kernel, listener.hear_control_flow),
            listener,
        ):
            warnings.simplefilter("ignore")  # they concern the dry run (no gradient), or come again in training
            run(probe)
    keep_expressions(listener.trace)
    assign_roles(listener.trace, listener.lineage, model)
    return listener.trace


def _listen(probe: nn.Module, listener: _Listener) -> None:
    """Opens a frame in each forward of the copy's modules, however it is called.

    Not by hooks: a direct call of ``forward`` passes them by, and what other hooks call is not the module's own.
    """
    names = {id(module): name for name, module in probe.named_modules()}
    for module in probe.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the fused kernel of eval mode would hide the activation
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for entry in ENTRY_POINTS:
            if callable(getattr(module, entry, None)):
                vars(module)[entry] = types.MethodType(_heard(module, entry, names, listener), module)


def _heard(module: nn.Module, entry: str, names: dict[int, str], listener: _Listener) -> Callable[..., Any]:
    replaced = vars(module).get(entry)
    plain = unbound(type(module), entry) if replaced is None else None
    around = listener.forward if entry == "forward" else listener.step
    name = names[id(module)]  # of a copy that a forward makes, too

    @functools.wraps(plain or replaced)  # pyright: ignore[reportArgumentType]
    def heard(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = replaced if plain is None else functools.partial(plain, self)
        assert call is not None
        return around(name, self, call, args, kwargs)

    return heard
