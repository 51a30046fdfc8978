"""The row of a measurement, and the comparisons that most measurements are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.standalone import CorrectedActivation
from eafo_dynamic.correction.kernels import Terms, corrected, known_module
from eafo_dynamic.experiments.benchmark.timing import time_in_pairs

__all__ = ["Eager", "Row", "above_floor", "both_ways", "compare", "row"]

_MOVED = 5  # numbers moved per element: z read, f written; z and a gradient read, a gradient written

Row = dict[str, Any]
"""One measurement: group, case, beside, value (a ratio unless the unit says otherwise), low, high, ms, beside_ms, unit,
target (what the value should not exceed)."""


def row(case: str, beside: str, value: float, target: float | None = None, unit: str = "x", **more: float) -> Row:
    """One measurement.

    Args:
        case: what was measured.
        beside: what it is compared with; empty if nothing.
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
        second: what it is compared with.
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
    """The time of a forward and a backward relative to copies that move as many bytes; see :func:`time_in_pairs`.

    Args:
        case: name of what is measured.
        run: one forward and one backward.
        copy: copies a tensor of the size and dtype of the pre-activations.
        pairs: number of pairs.
        repeats: how often one call of ``run`` repeats the forward and backward, and one of ``copy`` the copy.

    Returns:
        The row; its times are those of one repetition.
    """
    found = time_in_pairs(run, copy, pairs)
    copies = _MOVED / 2  # a copy moves two numbers per element
    more = {
        "low": found.low / copies,
        "high": found.high / copies,
        "ms": found.ms / repeats,
        "beside_ms": copies * found.beside_ms / repeats,
    }
    return row(case, "floor", found.ratio / copies, None, "x", **more)


def both_ways(module: Callable[[Tensor], Tensor], z: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward of a module, with the gradients of its parameters.

    Args:
        module: the module.
        z: its input, which requires a gradient.
        grad: gradient with respect to its output.

    Returns:
        A function that runs both.
    """
    inputs = [z]
    if isinstance(module, nn.Module):
        inputs += module.parameters()

    def run() -> None:
        torch.autograd.grad(module(z), inputs, grad)

    return run


class Eager(nn.Module):
    """A corrected activation computed by torch's operations, without the compiled kernel.

    Args:
        inner: the activation.
    """

    def __init__(self, inner: CorrectedActivation) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> Tensor:
        """f(z), by torch's operations."""
        inner = self.inner
        terms = Terms(inner.amplitudes(), inner.shape, inner.table, 8.0, tuple(inner.names))
        return corrected(z, inner.base, terms, known_module(inner.base), "eager")
