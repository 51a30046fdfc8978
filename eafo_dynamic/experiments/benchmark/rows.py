"""What a measurement is written down as, and the three comparisons that most of them are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.standalone import CorrectedActivation
from eafo_dynamic.correction.kernels import Terms, corrected, known_module
from eafo_dynamic.experiments.benchmark.timing import time_in_pairs

__all__ = ["Eager", "Row", "above_floor", "both_ways", "compare", "row"]

_MOVED = 5  # numbers an element: z in, f out; z and the gradient in, the gradient out

Row = dict[str, Any]
"""One measurement: group, case, beside, value (a ratio unless the unit says otherwise), low, high, ms, beside_ms, unit,
target (what the value should not exceed)."""


def row(case: str, beside: str, value: float, target: float | None = None, unit: str = "x", **more: float) -> Row:
    """One measurement.

    Args:
        case: what was measured.
        beside: what it is held against; empty where it stands for itself.
        value: the result.
        target: what it should not exceed.
        unit: of the result; "x" for a ratio.
        **more: further columns.

    Returns:
        The row.
    """
    return {"case": case, "beside": beside, "value": value, "unit": unit, "target": target, **more}


def compare(
    case: str,
    beside: str,
    first: Callable[[], object],
    second: Callable[[], object],
    pairs: int,
    target: float | None,
    *,
    cpu: bool = False,
) -> Row:
    """The ratio of two times, measured in alternation; see :func:`time_in_pairs`.

    Args:
        case: name of the first.
        beside: name of the second.
        first: what is measured.
        second: what it is held against.
        pairs: number of pairs.
        target: what the ratio should not exceed.
        cpu: see :func:`time_in_pairs`.

    Returns:
        The row.
    """
    found = time_in_pairs(first, second, pairs, cpu=cpu)
    more = {"low": found.low, "high": found.high, "ms": found.ms, "beside_ms": found.beside_ms}
    return row(case, beside, found.ratio, target, "x", **more)


def above_floor(case: str, run: Callable[[], object], copy: Callable[[], object], pairs: int, repeats: int = 1) -> Row:
    """The time of a forward and a backward over that of copies which move as many bytes; see :func:`time_in_pairs`.

    Args:
        case: name of what is measured.
        run: one forward and one backward.
        copy: copies a tensor of the size and dtype of the pre-activations.
        pairs: number of pairs.
        repeats: how many of each a call of ``run`` and one of ``copy`` stand for.

    Returns:
        The row, times those of one.
    """
    found = time_in_pairs(run, copy, pairs)
    floor = _MOVED / 2  # a copy moves two numbers an element
    times = {"ms": found.ms / repeats, "beside_ms": floor * found.beside_ms / repeats}
    more = {"low": found.low / floor, "high": found.high / floor, **times}
    return row(case, "floor", found.ratio / floor, None, "x", **more)


def both_ways(module: Callable[[Tensor], Tensor], z: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward of a module, its parameters included.

    Args:
        module: what is run.
        z: its input, which requires a gradient.
        grad: gradient by its output.

    Returns:
        A function that runs both.
    """
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []

    def run() -> None:
        torch.autograd.grad(module(z), [z, *parameters], grad)

    return run


class Eager(nn.Module):
    """A corrected activation that must not use the compiled kernel.

    Args:
        inner: the activation.
    """

    def __init__(self, inner: CorrectedActivation) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> Tensor:
        """f(z), by torch's operations."""
        inner = self.inner
        terms = Terms(inner.eps, inner.shape, inner.table, 8.0)
        return corrected(z, inner.base, terms, known_module(inner.base), "eager")
