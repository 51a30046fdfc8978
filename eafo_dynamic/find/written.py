"""Activations written out as products, such as ``x * torch.sigmoid(1.702 * x)``.

A *written-out* activation is a product of a tensor with a sigmoid, tanh or erf of itself, or
``0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x ** 3)))``. It is recognised by following the pointwise operations of
a frame back to the single tensor that they all start from.
"""

from __future__ import annotations

import functools
import operator
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from eafo_dynamic.correction.bases import Base, as_base
from eafo_dynamic.correction.kernels import size_of
from eafo_dynamic.errors import SiteError

__all__ = [
    "WRITTEN",
    "Made",
    "Node",
    "Tracker",
    "Written",
    "acts",
    "bends",
    "parts",
    "wanted_for",
    "written_base",
    "written_node",
]

WRITTEN = "written"
"""Stands for the function's name where the activation is written out."""

Node = tuple[Any, ...]
"""An expression of a tensor, such as ``("mul", "x", ("sigmoid", ("mul", "x", 1.702)))``: an operation and its operands.
``"x"`` is the tensor, ``"?"`` a scalar tensor such as a learnable beta."""


def _as_tensors(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Two operands, of which one may be a number, as tensors of one dtype and device."""
    like = a if isinstance(a, Tensor) else b
    first = torch.as_tensor(a, dtype=like.dtype, device=like.device)
    return first, torch.as_tensor(b, dtype=like.dtype, device=like.device)


def _maximum(a: Any, b: Any) -> Tensor:
    return torch.maximum(*_as_tensors(a, b))


def _minimum(a: Any, b: Any) -> Tensor:
    return torch.minimum(*_as_tensors(a, b))


_END = "end"  # marks a complete expression among those that a Tracker wants
_KERNELS = {"sigmoid", "tanh", "erf", "hardsigmoid", "relu6"}
_UNARY: dict[str, Callable[..., Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "hardsigmoid": F.hardsigmoid,
    "relu6": F.relu6,
    "softplus": F.softplus,
    "square": torch.square,
    "neg": torch.neg,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "sin": torch.sin,
    "atan": torch.atan,
    "abs": torch.abs,
    "zeros_like": torch.zeros_like,
}
_BINARY: dict[str, Callable[..., Any]] = {
    "mul": operator.mul,
    "add": operator.add,
    "sub": operator.sub,
    "div": operator.truediv,
    "pow": operator.pow,
    "maximum": _maximum,
    "minimum": _minimum,
    "gt": operator.gt,
    "lt": operator.lt,
    "ge": operator.ge,
    "le": operator.le,
}
_TERNARY: dict[str, Callable[..., Any]] = {"where": torch.where}
_OPERANDS = dict.fromkeys(_UNARY, 1) | dict.fromkeys(_BINARY, 2) | dict.fromkeys(_TERNARY, 3)
_BENDS = {"exp", "expm1", "sin", "atan", "abs", "maximum", "minimum", "gt", "lt", "ge", "le", "where"}
_DEEPEST = 32  # operations inside each other
_REFLECTED = {"__radd__": "add", "__rmul__": "mul", "__rsub__": "sub", "__rdiv__": "div", "__rtruediv__": "div"}


def _operation_table() -> dict[Any, tuple[str, bool]]:
    spellings = {name: name for name in _OPERANDS}
    spellings |= {"clamp": "clamp", "clip": "clamp", "clamp_min": "maximum", "clamp_max": "minimum"}
    spellings |= {"arctan": "atan", "absolute": "abs", "__abs__": "abs", "greater": "gt", "less": "lt"}
    spellings |= {"greater_equal": "ge", "less_equal": "le"}
    spellings |= {f"__{name}__": name for name in ("gt", "lt", "ge", "le")}
    spellings |= {"multiply": "mul", "true_divide": "div", "divide": "div", "subtract": "sub", "__pow__": "pow"}
    spellings |= {"__mul__": "mul", "__add__": "add", "__sub__": "sub", "__truediv__": "div", "__neg__": "neg"}
    spellings |= {"special_expit": "sigmoid", "expit": "sigmoid"}
    table: dict[Any, tuple[str, bool]] = {}
    for spelling, name in spellings.items():
        for home in (torch, torch.Tensor, F, torch.special):
            if hasattr(home, spelling):
                table[getattr(home, spelling)] = (name, False)
    for spelling, name in _REFLECTED.items():
        table[getattr(torch.Tensor, spelling)] = (name, True)
    for name, function in _BINARY.items():
        table[function] = (name, False)
    table[operator.neg] = ("neg", False)
    return table


_OPERATIONS = _operation_table()
_CLAMPS = {func for func, (name, _) in _OPERATIONS.items() if name == "clamp"}


def written_node(parameters: Mapping[str, object]) -> Node:
    """The expression of a written-out activation.

    Args:
        parameters: of its site.

    Returns:
        The expression.
    """
    return _as_node(parameters["expression"])


def _as_node(saved: Any, depth: int = 0) -> Any:
    """Checks a node that went through JSON or a checkpoint, and makes its lists tuples again."""
    is_operand = depth > 0
    if is_operand and saved in ("x", "?"):
        return saved
    if is_operand and isinstance(saved, (int, float)):
        return float(saved)
    name: Any = None
    operands: list[Any] = []
    if isinstance(saved, (list, tuple)) and saved:
        name, *operands = cast("list[Any]", saved)
    is_operation = isinstance(name, str) and _OPERANDS.get(name) == len(operands)
    if not is_operation or depth > _DEEPEST:
        raise SiteError(f"{reprlib.repr(saved)} is no expression of a written-out activation.")
    return (name, *(_as_node(operand, depth + 1) for operand in operands))


class Written:
    """A written-out activation as a function of one tensor.

    Args:
        node: its expression.
        constants: values of the scalar tensors in it, ``"?"``, from left to right.
    """

    def __init__(self, node: Node, constants: tuple[float, ...] = ()) -> None:
        self.node = node
        self.constants = constants

    def __call__(self, z: Tensor) -> Tensor:
        """Computes the expression.

        Args:
            z: pre-activations, any shape.

        Returns:
            Activations, same shape.
        """
        return cast(Tensor, _evaluate(self.node, z, iter(self.constants)))


def _evaluate(node: Any, z: Tensor, constants: Iterator[float]) -> Any:
    if node == "x":
        return z
    if node == "?":
        return next(constants)
    if not isinstance(node, tuple):
        return node
    name, *operands = cast("tuple[Any, ...]", node)
    values = [_evaluate(operand, z, constants) for operand in operands]
    for table in (_UNARY, _BINARY, _TERNARY):
        if name in table:
            return table[name](*values)
    raise SiteError(f"{name} is no operation of a written-out activation.")


@functools.lru_cache(maxsize=256)
def written_base(node: Node, constants: tuple[float, ...]) -> Base:
    """The base of a written-out activation; if its values are those of a named base, that base.

    Args:
        node: its expression.
        constants: values of the scalar tensors in it, from left to right.

    Returns:
        The base.
    """
    written = Written(node, constants)
    z = torch.linspace(-6.0, 6.0, 97, dtype=torch.float64, device="cpu")
    value = written(z)
    for known in ("silu", "gelu", "gelu_tanh", "quick_gelu", "mish", "hardswish", "relu", "elu", "softsign"):
        base = as_base(known)
        if torch.allclose(base(z), value, rtol=1e-6, atol=1e-6):
            return base
    return Base(WRITTEN, written, key=(node, constants))


class Made(NamedTuple):
    """A tensor made in the frame by pointwise operations on a single other tensor.

    Args:
        out: the tensor.
        root: the other tensor.
        node: what ``out`` is as an expression of ``root``.
        scalars: the scalar tensors in it, ``"?"``, from left to right.
    """

    out: Tensor
    root: Tensor
    node: Node
    scalars: tuple[Tensor, ...] = ()


class Tracker:
    """Follows the pointwise operations of one frame, and says when they complete a written-out activation.

    Args:
        wanted: expressions to remember, from ``wanted_for``; None: all. Remembered tensors live as long as the frame.
    """

    __slots__ = ("_by_id", "made", "wanted")

    def __init__(self, wanted: Collection[Node] | None = None) -> None:
        self.wanted = wanted
        self.made: list[Made] = []
        # the tensors are kept, so that no two of them get the same id
        self._by_id: dict[int, Made] | None = {} if wanted is None else None

    def find(self, tensor: object) -> Made | None:
        """What is known of a tensor.

        Args:
            tensor: any object.

        Returns:
            How it was made; None if it was not made here.
        """
        if self._by_id is not None:
            return self._by_id.get(id(tensor))
        for made in self.made:
            if made.out is tensor:
                return made
        return None

    def step(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Made | None:
        """Follows a function that runs.

        Args:
            func: the torch function.
            args: its positional arguments.
            kwargs: its keyword arguments.
            out: what it returned.

        Returns:
            The written-out activation that the function completes; None if it completes none.
        """
        if func not in _OPERATIONS or not isinstance(out, Tensor):
            return None
        if func in _CLAMPS:
            return self._clamp(args, kwargs, out)
        if any(value is not False for value in kwargs.values()):  # inplace=False says nothing
            return None
        name, reflected = _OPERATIONS[func]
        if len(args) != _OPERANDS[name]:
            return None
        terms: list[Any] = []
        scalars: list[tuple[Tensor, ...]] = []
        root: Tensor | None = None
        for arg in reversed(args) if reflected else args:
            if isinstance(arg, (int, float)):
                terms.append(float(arg))
                scalars.append(())
                continue
            if not isinstance(arg, Tensor):
                return None
            known = self.find(arg)
            if known is None and arg.dim() == 0:
                terms.append("?")
                scalars.append((arg,))
                continue
            start = arg if known is None else known.root
            if root is not None and root is not start:
                return None
            root = start
            if known is None:
                terms.append("x")
                scalars.append(())
            else:
                terms.append(known.node)
                scalars.append(known.scalars)
        if root is None or size_of(root) != size_of(out):
            return None
        if name in ("mul", "add") and (terms[0] == "?" or isinstance(terms[0], float)):
            # 2 * x and x * 2 are the same expression, whichever of them a compiler makes of it
            terms.reverse()
            scalars.reverse()
        made = Made(out, root, (name, *terms), tuple(scalar for group in scalars for scalar in group))
        if name == "mul" and _completes(terms):
            return made
        return self._remembered(made)

    def _clamp(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Made | None:
        """``x.clamp(low, high)`` as a maximum and a minimum; a bound that is None is left out."""
        names = ("input", "min", "max")
        given: dict[str, Any] = dict(zip(names, args, strict=False))
        given.update(kwargs)
        value = given.get("input")
        if not isinstance(value, Tensor) or not given.keys() <= set(names):
            return None
        low = given.get("min")
        high = given.get("max")
        if low is None and high is None:
            return None
        if low is None:
            return self.step(torch.minimum, (value, high), {}, out)
        if high is None:
            return self.step(torch.maximum, (value, low), {}, out)
        if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
            return None
        known = self.find(value)
        if known is None:
            known = Made(value, value, cast(Node, "x"))
        node = ("minimum", ("maximum", known.node, float(low)), float(high))
        return self._remembered(Made(out, known.root, node, known.scalars))

    def _remembered(self, made: Made) -> Made | None:
        if self.wanted is not None and (_END, made.node) in self.wanted:
            return made
        if self._by_id is not None:
            self._by_id[id(made.out)] = made
        elif self.wanted is not None and made.node in self.wanted:
            self.made.append(made)
        return None


def wanted_for(node: Node) -> set[Node]:
    """What a Tracker must remember to recognise a written-out activation.

    Args:
        node: its expression.

    Returns:
        The expression, its parts, and a mark that it is complete.
    """
    return {node, *parts(node), (_END, node)}


def bends(node: Any) -> bool:
    """Whether an expression may be an activation that is not made of sigmoid, tanh or the like.

    Args:
        node: the expression.

    Returns:
        Whether there is a kink, a wave or an exponential in it, and no function that has a site of its own.
    """
    operations = {part[0] for part in (node, *parts(node))}
    with_own_site = {*_KERNELS, "softplus"}
    return not operations.isdisjoint(_BENDS) and operations.isdisjoint(with_own_site)


def acts(node: Node, constants: tuple[float, ...]) -> bool:
    """Whether an expression behaves like an activation: finite, neither straight nor in steps, no faster than 2 |z|.

    Even functions, such as ``x.abs()`` or ``x * x``, are distances more often than activations.

    Args:
        node: the expression.
        constants: values of the scalar tensors in it, from left to right.

    Returns:
        Whether it does.
    """
    z = torch.linspace(-30.0, 30.0, 2401, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        values = Written(node, constants)(z)
    if values.dtype != z.dtype or not bool(values.isfinite().all()) or float(values.abs().max()) > 60.0:
        return False
    near = values[z.abs() <= 6.0]
    rises = near.diff()
    is_even = torch.allclose(near, near.flip(0))
    is_straight = torch.allclose(rises, rises.mean().expand_as(rises), atol=1e-9)
    is_in_steps = int((rises.abs() < 1e-12).sum()) > len(near) - 4
    return not is_even and not is_straight and not is_in_steps


def _completes(terms: list[Any]) -> bool:
    """Whether the factors of a product are expressions of its root, just one of them with a squashing function."""
    if len(terms) != 2 or not all(term == "x" or isinstance(term, tuple) for term in terms):
        return False
    return _has_kernel(terms[0]) != _has_kernel(terms[1])


def _has_kernel(node: Any) -> bool:
    """Whether there is a squashing function in an expression."""
    if not isinstance(node, tuple):
        return False
    name, *operands = cast("tuple[Any, ...]", node)
    return name in _KERNELS or any(_has_kernel(operand) for operand in operands)


def parts(node: Any) -> set[Node]:
    """All expressions inside an expression.

    Args:
        node: the expression.

    Returns:
        Its proper sub-expressions.
    """
    found: set[Node] = set()
    for operand in cast("tuple[Any, ...]", node)[1:]:
        if isinstance(operand, tuple):
            part = cast(Node, operand)
            found |= {part, *parts(part)}
    return found
