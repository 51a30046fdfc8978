"""An independent witness: which activation kernels a forward really runs, and which of them a site has corrected.

Nothing here asks the library what an activation is. Kernels are seen by a TorchDispatchMode, the running module by
hooks, and what a kernel is used for by following its tensors: a sigmoid that multiplies its own input is a written-out
activation, one that multiplies anything else is a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Key = tuple[int, int, int]

_KERNELS = {
    "relu",
    "gelu",
    "silu",
    "tanh",
    "elu",
    "celu",
    "selu",
    "leaky_relu",
    "hardtanh",
    "relu6",
    "hardswish",
    "mish",
    "softplus",
    "log_sigmoid_forward",
    "threshold",
    "_prelu_kernel",
    "softshrink",
    "hardshrink",
    "rrelu_with_noise",
    "sigmoid",
    "hardsigmoid",
    "erf",
}
_GATES = {"sigmoid", "hardsigmoid", "erf"}
_LIMITS = {"tanh", "softplus", "log_sigmoid_forward"}  # what a model ends with to limit its output
_POINTWISE = _KERNELS | {
    "mul",
    "add",
    "sub",
    "div",
    "rsub",
    "pow",
    "neg",
    "exp",
    "square",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "clamp",
    "clamp_min",
    "clamp_max",
    "sin",
    "cos",
    "abs",
    "_to_copy",
    "clone",
    "log",
    "log1p",
    "expm1",
    "detach",
    "alias",
    "where",
}
_LAYERS = {"mm", "bmm", "addmm", "baddbmm", "linear", "convolution"}  # what a network does, and no transform
_HARMLESS = {"detach", "alias", "_to_copy", "clone", "view", "_unsafe_view", "t", "transpose", "expand", "unsqueeze"}
_BATCHED = _HARMLESS | {"permute", "select", "slice", "squeeze", "unbind", "split", "chunk"}


@dataclass(eq=False)
class Event:
    """One activation kernel that ran."""

    op: str
    module: str
    kind: str
    hidden: bool
    why: str = ""
    source: Key | None = None
    sites: list[str] = field(default_factory=list)


class _Flow(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.stack: list[tuple[str, nn.Module]] = []
        self.running_sites: list[str] = []
        self.kept: list[Any] = []
        self.ancestors: dict[Key, set[Key]] = {}
        self.made_by: dict[Key, Event] = {}
        self.scaled_by: dict[Key, float] = {}
        self.constant: set[Key] = set()
        self.before_layers: set[Event] = set()
        for tensor in model.parameters():
            self.constant.add(self.key(tensor))

    def key(self, tensor: Tensor) -> Key:
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        storage = tensor.untyped_storage()
        self.kept.append(storage)
        return (storage._cdata, tensor.storage_offset(), tensor.numel())

    def lineage(self, key: Key) -> set[Key]:
        return self.ancestors.get(key, set()) | {key}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name() if isinstance(func, HigherOrderOperator) else func.overloadpacket.__name__.rstrip("_")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        inputs = [self.key(t) for t in tensors]
        before = [self.lineage(k) for k in inputs]
        constant = bool(inputs) and all(k in self.constant for k in inputs)
        makers = [self.made_by.get(k) for k in inputs]
        scales = [self.scaled_by.get(k) for k in inputs]
        out = func(*args, **(kwargs or {}))
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name in _LAYERS:
            self.before_layers |= {maker for maker in makers if maker is not None}
        if not results:
            return out
        key = self.key(results[0])
        if constant and name not in _LAYERS:
            self.constant.update(self.key(t) for t in results)
        if name == "mul" or name == "div":
            self._products(name, args, inputs, before, makers, scales, key)
        if name in _POINTWISE and results[0].is_floating_point():
            same = [b for t, b in zip(tensors, before, strict=True) if t.numel() == results[0].numel() and t.dim()]
            if same and len(same) == len([t for t in tensors if t.dim()]):
                joint = set.intersection(*same)
                self.ancestors[key] = joint - {key} if key in inputs else joint
        if name in _KERNELS and tensors[0].is_floating_point():
            event = self._event(name, inputs[0], constant, scales[0])
            self.events.append(event)
            self.made_by[key] = event
        elif name in {"add", "rsub", "mul", "div", "neg"} | _BATCHED and len(tensors) == 1 and makers[0] is not None:
            scaled_tanh = name in ("mul", "div") and makers[0].op == "tanh"
            self.made_by |= {} if scaled_tanh or key in self.made_by else {key: makers[0]}
        return out

    def _products(self, name: str, args: Any, inputs: Any, before: Any, makers: Any, scales: Any, out: Key) -> None:
        numbers = [a for a in args if isinstance(a, (int, float)) and not isinstance(a, bool)]
        if numbers and len(inputs) == 1:
            scale = float(numbers[0]) if name == "mul" else 1.0 / float(numbers[0] or 1.0)
            self.scaled_by[out] = scale
            maker = makers[0]
            before_tanh = maker.why.removeprefix("scaled ") if maker is not None and maker.op == "tanh" else ""
            if maker is not None and before_tanh != maker.why and abs(float(before_tanh or 0) * scale - 1.0) < 1e-6:
                maker.hidden, maker.why = False, "soft cap"
        if name != "mul" or len(inputs) != 2:
            return
        for this, other in ((0, 1), (1, 0)):
            event = makers[this]
            if event is None:
                continue
            if event.op in _GATES and event.source is not None and event.source in before[this]:
                own = before[this] & before[other] if event.source in self.ancestors else before[this]
                if inputs[other] in before[this] or (own and event.op == "erf"):
                    event.hidden, event.why = True, "multiplies its own input"
                    if event.kind == "functional":
                        event.kind = "written"
            partner = makers[other]
            if event.op == "tanh" and partner is not None and partner.op == "sigmoid" and not partner.hidden:
                event.hidden, event.why = False, "cell gate"

    def _event(self, op: str, source: Key, constant: bool, scale: float | None) -> Event:
        name, module = self.stack[-1] if self.stack else ("", nn.Module())
        small = sum(p.numel() for n, p in module.named_parameters() if "eafo_" not in n) <= 64
        leaf = small and next(module.children(), None) is None and bool(self.stack)
        kind = "module" if leaf else "functional"
        hidden, why = op not in _GATES, ""
        if op == "tanh" and scale is not None:
            why = f"scaled {scale}"
        if op == "softplus" and not leaf:
            hidden, why = False, "positive scale"
        if constant:
            hidden, why = False, "parameter transform"
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            hidden, why = False, "inside a fused cell, which is listed as unreachable"
        return Event(op, name, kind, hidden, why, source, list(self.running_sites[-1:]))


def witness(model: nn.Module, run: Callable[[nn.Module], object]) -> list[Event]:
    """Every activation kernel of one forward, in order, with what it is for and the site that handled it."""
    flow = _Flow(model)
    names = {id(m): n for n, m in model.named_modules()}
    calls: dict[str, int] = {}
    handles = []

    def enter(module: nn.Module, args: Any) -> None:
        name = names.get(id(module), "(copy)")  # made in a forward, with the hooks of the original
        calls[name] = calls.get(name, 0) + 1
        flow.stack.append((name, module))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        flow.stack.pop()

    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            handles += [
                module.register_forward_pre_hook(enter, prepend=True),
                module.register_forward_hook(leave, always_call=True),
            ]
    try:
        with _marked_sites(flow), flow:
            returned = run(model)
    finally:
        for handle in handles:
            handle.remove()
    for tensor in tree_leaves(returned):
        event = flow.made_by.get(flow.key(tensor)) if isinstance(tensor, Tensor) else None
        if event is not None and event.op in _LIMITS and event not in flow.before_layers:
            event.hidden, event.why = False, "limits the output"
    for event in flow.events:
        if event.kind == "module" and calls.get(event.module, 0) > 1:
            event.kind = "shared"
        if event.op == "erf" and not event.hidden:
            event.why = "not an activation"
    return flow.events


@contextmanager
def _marked_sites(flow: _Flow) -> Iterator[None]:
    """Notes the site under which each kernel runs, or that later corrects what was computed from its input."""
    from eafo_dynamic.apply.site import Site

    plain = Site.__call__

    def marked(self: Site, host: Any, base: Any, z: Tensor, *rest: Any, **more: Any) -> Any:
        if not self.enabled:
            return plain(self, host, base, z, *rest, **more)
        label = f"{self.name}"
        source = flow.key(z)
        # an expression's kernels have run before its site is asked
        frame = flow.stack[-1][0] if flow.stack else ""
        before = len(flow.events)
        flow.running_sites.append(label)
        try:
            out = plain(self, host, base, z, *rest, **more)
        finally:
            flow.running_sites.pop()
        if len(flow.events) == before:
            for event in reversed(flow.events):
                mine = event.module == frame and not event.sites and event.source is not None
                if mine and source in flow.lineage(event.source):
                    event.sites.append(label)
                    break
        return out

    Site.__call__ = marked  # type: ignore[method-assign]
    try:
        yield
    finally:
        Site.__call__ = plain  # type: ignore[method-assign]
