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
    """A forward that is running, with what is needed to judge the functional calls in it."""

    def __init__(self, frame: Frame, inside: bool = False) -> None:
        self.frame = frame
        self.inside = inside  # in an activation module, which is a single site whatever functions it calls
        self.returned: list[Returned] = []  # the children that have returned so far
        self.tracker = Tracker()
        # by id of the tensor; the tensors are kept, so that no two of them get the same id
        self.made: dict[int, tuple[Tensor, Call]] = {}
        self.constants: dict[int, Tensor] = {}
        self.expressions: dict[int, tuple[Tensor, Call]] = {}
        self.of_modules: dict[int, Tensor] = {}
        self.weighted = WeightedExpressions()

    def call_that_made(self, tensor: Tensor) -> Call | None:
        made = self.made.get(id(tensor))
        return None if made is None else made[1]

    def is_constant(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or id(tensor) in self.constants


class _Thread(threading.local):
    """What is running in a thread: the forwards, innermost last, and the number of torch functions."""

    def __init__(self) -> None:
        self.running = [_Running(Frame("", 0, is_forward=False))]
        self.functions = 0  # those that a correction could replace
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
        can_be_replaced = not isinstance(func, _OPERATORS)  # torch.ops.aten.relu cannot
        if can_be_replaced:
            self.here.functions += 1
        try:
            out = func(*args, **kwargs)
        finally:
            if can_be_replaced:
                self.here.functions -= 1
        mark_channels(func, args, out)
        running = self.here.running[-1]
        if running.inside:
            return out
        name = function_name(func)
        call = None
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
        running = self.here.running
        around = running[-1]
        values = (*args, *kwargs.values())
        noted = None
        if name in self.activations and not around.inside:
            noted = self._note_module(name, module, values)
        self.trace.callees.setdefault(around.frame.module, {})[name] = None
        is_within_itself = any(outer.frame.is_forward and outer.frame.module == name for outer in running)
        if not is_within_itself:
            self.trace.forwards[name] += 1
        inside = around.inside or name in self.activations or isinstance(module, CarriesCorrection)
        has_children = next(module.children(), None) is not None
        if has_children and not inside:
            self.lineage.entered(name, (args, kwargs))
        out = self._framed(name, True, inside, call, args, kwargs)
        if not inside:
            loops = pieces(current_frame(2), _ENTRIES, _traced.__code__)[0].loops
            around.returned.append(Returned(name, frozenset(loops)))
        if noted is not None and isinstance(out, Tensor):
            around.made[id(out)] = (out, noted)
            self.lineage.step(None, args, kwargs, out, noted)
            if self.activations[name] in ("sigmoid", "hardsigmoid"):
                self._follow_module(around, self.activations[name], values[0], out)
        is_outermost = not any(outer.frame.is_forward for outer in running)
        self.lineage.left(out, name, is_outermost)
        return out

    def step(self, name: str, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs another entry point of a module, such as ``training_step``, in a frame of its own.

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

    def _framed(
        self, name: str, is_forward: bool, inside: bool, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if not self.here.listening:  # a thread that the model has started does not inherit the mode
            with self:
                return self._framed(name, is_forward, inside, call, args, kwargs)
        self.trace.entered += 1
        frame = Frame(name, self.trace.entered, is_forward)
        self.here.running.append(_Running(frame, inside))
        try:
            return call(*args, **kwargs)
        finally:
            ended = self.here.running.pop()
            for root in ended.weighted.activations():
                if self.lineage.is_learned(root):
                    self.trace.by_channel[name] = size_of(root)

    def _note_module(self, name: str, module: nn.Module, values: tuple[Any, ...]) -> Call | None:
        value = values[0] if len(values) == 1 else values
        if is_correctable(value):
            call = Call(name, self.path(), size_of(value))
            call.inplace = bool(getattr(module, "inplace", False))
            call.channel_dim = channel_dim(value)
            return self._noted(call)
        self.trace.refused[name] = describe(value)
        if len(values) != 1:
            self.trace.crowded.add(name)
        return None

    def hear_kernel(self, name: str, shape: tuple[int, ...]) -> None:
        """Notes an activation kernel that runs without a torch function around it.

        Args:
            name: the function that the kernel computes.
            shape: of the kernel's input.
        """
        running = self.here.running[-1]
        if not self.here.functions and not running.inside:
            self.trace.opaque.setdefault((running.frame.module, name), shape)

    def hear_control_flow(self, name: str) -> None:
        """Notes an operator whose branches no mode sees.

        Args:
            name: of the operator.
        """
        running = self.here.running[-1]
        self.trace.opaque.setdefault((running.frame.module, name), ())

    def _note(self, running: _Running, func: Any, name: str, args: Any, kwargs: Any, out: Tensor) -> Call:
        value = args[0]
        call = Call(running.frame.module, self.path(), size_of(value), name, hyper_parameters(name, args, kwargs))
        call.inplace = out is value
        caller = current_frame(2)  # the frame that calls the function: those of this method and of the mode lie between
        call.hidden_from_compiler = is_hidden_from_compiler(func, code_of(caller))
        call.channel_dim = channel_dim(value)
        if running.is_constant(value):
            call.role = "gate"
            call.reason = "transforms a parameter"
        elif name in ("sigmoid", "hardsigmoid"):
            call.role = "gate"
            call.reason = "a gate, not a hidden activation"
        elif name == "softplus":
            call.role = "unknown"
            call.reason = "called as a function, softplus mostly makes a positive scale"
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
        """Follows what a function makes of the results of other functions, up to a written-out activation."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        is_constant = bool(tensors) and all(running.is_constant(tensor) for tensor in tensors)
        # but not of a product: a network over learned queries has hidden activations
        if is_constant and not is_product(func):
            running.constants[id(out)] = out
        variables = [tensor for tensor in tensors if not running.is_constant(tensor)]
        # an expression that bends without a weight has a site of its own
        if not any(id(tensor) in running.expressions for tensor in variables):
            running.weighted.step(func, args, kwargs, out, running.is_constant)
        before = [running.tracker.find(tensor) for tensor in tensors]
        name = getattr(func, "__name__", "")
        overwrites = name == "mul_"
        operation = torch.mul if overwrites else func
        made = running.tracker.step(operation, args, kwargs, out)
        of_module = any(id(tensor) in running.of_modules for tensor in tensors)
        if made is not None and is_correctable(made.root):
            call = self._expression(running, made)
            if overwrites:
                call.refusal = _OVERWRITES
            elif of_module:
                call.refusal = _OF_MODULE
            else:
                call.refusal = _unknown_to_backward()
            self._mark_inner(running, tensors)
            for inner in _calls_inside(running, made):
                inner.role = "part"
                inner.reason = "part of a written-out activation"
        else:
            self._follow_expression(running, tensors, out, of_module)
        if name.strip("_") in ("mul", "multiply", "div", "true_divide", "rmul"):
            self._judge_product(running, name, args, tensors, before)

    def _expression(self, running: _Running, made: Made) -> Call:
        """Notes a written-out activation."""
        values = tuple(float(scalar.detach()) for scalar in made.scalars)
        parameters: dict[str, object] = {"expression": made.node, "constants": values}
        call = Call(running.frame.module, self.path(), size_of(made.out), WRITTEN, parameters)
        call.channel_dim = channel_dim(made.root)
        self.lineage.made(made.out, call)
        return self._noted(call)

    def _follow_expression(self, running: _Running, tensors: list[Tensor], out: Tensor, of_module: bool) -> None:
        """Notes what may be a written-out activation; a larger expression that contains it takes its place later."""
        made = running.tracker.find(out)
        if made is None or made.out is not out:
            return
        if of_module:
            running.of_modules[id(out)] = out
        self._mark_inner(running, tensors)
        if bends(made.node) and out.is_floating_point() and is_correctable(made.root):
            call = self._expression(running, made)
            call.role = "data"
            if self.lineage.is_learned(made.root):
                call.role = "open"
            call.refusal = _unknown_to_backward()
            running.expressions[id(out)] = (out, call)

    def _mark_inner(self, running: _Running, tensors: list[Tensor]) -> None:
        """Marks the expressions that gave these tensors as parts of a larger one."""
        for tensor in tensors:
            expression = running.expressions.get(id(tensor))
            if expression is not None:
                _, call = expression
                call.role = "inner"

    def _follow_module(self, running: _Running, name: str, value: Any, out: Tensor) -> None:
        """Follows the result of a gate module as if a function had made it."""
        function = torch.sigmoid if name == "sigmoid" else F.hardsigmoid
        running.tracker.step(function, (value,), {}, out)
        running.of_modules[id(out)] = out

    def _function(self, call: Call) -> str:
        return self.activations[call.module] if call.function is None else call.function

    def _judge_product(self, running: _Running, name: str, args: Any, tensors: Any, before: Any) -> None:
        """Finds the tanh of a gated cell, sigmoid(a) * tanh(b), and of a soft cap, c * tanh(x / c)."""
        calls = [running.call_that_made(tensor) for tensor in tensors]
        for call, other in zip(calls, reversed(calls), strict=True):
            if call is None or self._function(call) != "tanh" or call.role != "hidden":
                continue
            if len(calls) == 2 and other is not None and other.role != "part" and self._function(other) == "sigmoid":
                call.role = "gate"
                call.reason = "part of a gated cell: multiplied by a sigmoid"
            scale = next((arg for arg in args if isinstance(arg, (int, float))), None)
            inner = before[0]
            if len(calls) == 1 and scale and inner is not None and _is_cap(inner.node, float(scale), name):
                call.role = "unknown"
                call.reason = SOFT_CAP


_OVERWRITES = "written out in place, which leaves no pre-activation; write x * x.sigmoid()"
_OF_MODULE = "written out with a module, which is no part of an expression; call torch.sigmoid, or nn.SiLU as a whole"
_ENTRIES = (_Listener.forward.__code__, _Listener.step.__code__)


def _unknown_to_backward() -> str:
    """Why a running call cannot be corrected if it is part of an autograd function of the user; else empty."""
    function = foreign_function()
    return f"inside {function}, whose backward would not know of a correction" if function else ""


def _is_cap(node: Any, scale: float, name: str) -> bool:
    """Whether multiplying tanh(inner) by scale, or dividing by it, makes a cap: inner is scaled by the reciprocal."""
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
            # warnings concern only the dry run, which has no gradient, or come again in training
            warnings.simplefilter("ignore")
            run(probe)
    keep_expressions(listener.trace)
    assign_roles(listener.trace, listener.lineage, model)
    return listener.trace


def _listen(probe: nn.Module, listener: _Listener) -> None:
    """Opens a frame in each forward of the copy's modules, however it is called.

    Hooks would not do: a direct call of ``forward`` does not run them, and what other hooks call is not the module's.
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
    plain = None
    if replaced is None:
        plain = unbound(type(module), entry)
    around = listener.step
    if entry == "forward":
        around = listener.forward
    name = names[id(module)]  # also of a copy of the module that a forward makes

    @functools.wraps(plain or replaced)  # pyright: ignore[reportArgumentType]
    def heard(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = replaced
        if plain is not None:
            call = functools.partial(plain, self)
        assert call is not None
        return around(name, self, call, args, kwargs)

    return heard
