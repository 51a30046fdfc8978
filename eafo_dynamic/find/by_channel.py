"""Activations written out with a weight for each channel: snake, ``x + torch.sin(a * x) ** 2 / a`` with a vector a.

Each channel has a function of its own there, so one correction cannot serve them; they are listed, with that reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from eafo_dynamic.correction.kernels import is_correctable
from eafo_dynamic.find.written import Made, Tracker, acts, bends

__all__ = ["WeightedExpressions"]


class WeightedExpressions:
    """Follows the expressions of one tensor and weights in one frame; the mean of a weight stands for it."""

    def __init__(self) -> None:
        self._tracker = Tracker()
        # by id; the weights are kept, so that no number is given twice
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}
        self._found: dict[int, Made] = {}

    def step(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        out: Tensor,
        is_weight: Callable[[Tensor], bool],
    ) -> None:
        """Takes in one function.

        Args:
            func: the torch function.
            args: its positional arguments.
            kwargs: its keyword arguments.
            out: its result.
            is_weight: whether a tensor is a parameter, or made of parameters alone.
        """
        given = tuple(self._standing_for(arg, is_weight) for arg in args)
        inner = [self._tracker.find(arg) for arg in given]
        complete = self._tracker.step(func, given, kwargs, out)
        made = complete or self._tracker.find(out)
        if made is None or made.out is not out or not self._has_weights(made):
            return
        for part in inner:
            if part is not None:
                self._found.pop(id(part.out), None)
        if complete is not None or bends(made.node):
            self._found[id(out)] = made

    def activations(self) -> Iterator[Tensor]:
        """The arguments of those expressions that behave like activations, and are no part of another.

        Yields:
            Pre-activations.
        """
        for made in self._found.values():
            means = tuple(float(scalar.detach()) for scalar in made.scalars)
            if is_correctable(made.root) and acts(made.node, means):
                yield made.root

    def _standing_for(self, arg: Any, is_weight: Callable[[Tensor], bool]) -> Any:
        if not isinstance(arg, Tensor) or is_lazy(arg) or not arg.dim() or arg.is_meta or not is_weight(arg):
            return arg
        if id(arg) not in self._weights:
            self._weights[id(arg)] = (arg, arg.detach().float().mean())
        return self._weights[id(arg)][1]

    def _has_weights(self, made: Made) -> bool:
        return any(scalar is mean for scalar in made.scalars for _, mean in self._weights.values())
