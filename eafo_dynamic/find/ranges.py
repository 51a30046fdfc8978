"""Functions of torch that need their argument in a certain range, and what keeps a value in one.

A root needs what is not negative, a logarithm and a division what is positive. A correction may push the result of an
activation out of that range, and then the model computes NaN. A square, an absolute value or an exponential is never
negative, whatever it is made of, so a root of it is safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from torch import Tensor

from eafo_dynamic.internals.torch_internals import callers, code_of, current_frame

__all__ = ["Sign", "asks_for_values", "inside_distribution", "name_of", "needing", "sign_after"]


class Sign(IntEnum):
    """What is certain about a value, whatever its activation computes."""

    ANY = 0
    NOT_NEGATIVE = 1
    CLAMPED = 2


_ROOTS_AND_LOGS = {
    "sqrt", "rsqrt", "log", "log2", "log10", "log1p", "reciprocal", "acos", "arccos", "asin", "arcsin", "acosh",
    "arccosh", "atanh", "arctanh", "erfinv", "logit", "lgamma", "digamma", "multinomial", "bernoulli",
    "binary_cross_entropy", "float_power",
}  # fmt: skip
_DIVISIONS = {"div", "divide", "true_divide", "truediv", "itruediv", "idiv", "floor_divide", "remainder", "fmod"}
_DIVISIONS_FROM_THE_RIGHT = {"rdiv", "rtruediv"}
_NOT_NEGATIVE = {
    "square", "abs", "absolute", "exp", "exp2", "cosh", "norm", "vector_norm", "linalg_norm", "linalg_vector_norm",
    "matrix_norm", "var", "std", "var_mean", "std_mean", "softmax", "sigmoid", "softplus", "cdist", "mse_loss",
    "l1_loss", "smooth_l1_loss", "huber_loss",
}  # fmt: skip
_CLAMPS = {"clamp", "clip", "clamp_min", "maximum", "clamp_max", "minimum"}
_TURNS = {"sub", "subtract", "rsub", "isub", "neg", "negative"}
_COMPARISONS = {
    "gt", "greater", "lt", "less", "ge", "greater_equal", "le", "less_equal", "eq", "ne", "not_equal", "isclose",
}  # fmt: skip
_ROUNDINGS = {"floor", "ceil", "round", "trunc", "long", "int", "short", "byte", "bucketize", "searchsorted"}
_DISTRIBUTIONS = "torch/distributions/"


def name_of(func: Any) -> str:
    """The bare name of a torch function: ``div`` for ``x.__div__``, ``x.div_`` and ``torch.div``.

    Args:
        func: the function; None for a module.

    Returns:
        The name.
    """
    return getattr(func, "__name__", "").strip("_")


def needing(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Those arguments of a torch function that must lie in a range, lest it gives NaN, infinity or an error.

    Args:
        func: the function.
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        The arguments; most functions have none.
    """
    name = name_of(func)
    if not args:
        return []
    if name in _ROOTS_AND_LOGS:
        return [args[0]]
    if name in _DIVISIONS:
        return list(args[1:2]) or [kwargs.get("other")]
    if name in _DIVISIONS_FROM_THE_RIGHT:
        return [args[0]]
    if name in ("pow", "ipow"):
        exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
        if isinstance(exponent, (int, float)) and exponent >= 0 and float(exponent).is_integer():
            return []
        return [args[0]]
    if name == "addcdiv":
        return list(args[2:3])
    if name == "xlogy":
        return list(args[1:2])
    if name == "gaussian_nll_loss":
        return [*args[2:3], kwargs.get("var")]
    return []


def sign_after(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], before: Sign) -> Sign:
    """What is certain about the result of a torch function.

    Args:
        func: the function.
        args: positional arguments.
        kwargs: keyword arguments.
        before: what is certain about its argument.

    Returns:
        What is certain afterwards.
    """
    name = name_of(func)
    if name in _NOT_NEGATIVE:
        return max(before, Sign.NOT_NEGATIVE)
    if name in _CLAMPS:
        return max(before, _sign_after_clamp(name, args, kwargs))
    if name == "pow" and len(args) > 1 and isinstance(args[1], (int, float)) and args[1] % 2 == 0:
        return max(before, Sign.NOT_NEGATIVE)
    if name == "mul" and len(args) > 1 and args[0] is args[1]:
        return max(before, Sign.NOT_NEGATIVE)
    if name in _TURNS and before is Sign.NOT_NEGATIVE:
        return Sign.ANY
    return before


def _sign_after_clamp(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sign:
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    if name in ("clamp_max", "minimum"):
        return Sign.ANY
    if low is not None and high is not None:
        return Sign.CLAMPED
    if isinstance(low, Tensor):
        known = low.numel() == 1 and not low.is_meta
        return Sign.NOT_NEGATIVE if known and float(low.detach()) >= 0 else Sign.ANY
    return Sign.NOT_NEGATIVE if isinstance(low, (int, float)) and low >= 0 else Sign.ANY


def asks_for_values(func: Any, args: Sequence[Any], out: Any) -> str:
    """Whether a function looks at values as such: compares them or rounds them.

    Args:
        func: the torch function.
        args: positional arguments.
        out: its result.

    Returns:
        What it does, in words; empty if it does not.
    """
    name = name_of(func)
    if name in _COMPARISONS:
        return "a comparison"
    if name in _ROUNDINGS:
        return "a rounding"
    if name in ("to", "type") and isinstance(out, Tensor) and not (out.is_floating_point() or out.is_complex()):
        return "a rounding"
    if name == "grid_sample":
        return "coordinates"
    return ""


def inside_distribution() -> bool:
    """Whether code of ``torch.distributions`` makes the call that is running, without user code in between."""
    for frame in callers(current_frame(1)):
        file = code_of(frame).co_filename.replace("\\", "/")
        if _DISTRIBUTIONS in file:
            return True
        if "/torch/" not in file and "/eafo_dynamic/find/" not in file:
            return False
    return False
