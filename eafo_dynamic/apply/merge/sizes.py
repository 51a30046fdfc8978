"""Which sizes of its inputs an exported model leaves free."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from eafo_dynamic.find.probe import forked_random_states
from eafo_dynamic.internals.torch_internals import tree_map

__all__ = ["batch_of_two", "free_sizes", "shapes", "sizes_that_do_not_change", "without", "without_trace"]

_CHANGES = ((1, 1), (2, 0))  # factor and summand of a size: some models need even ones

Place = tuple[int, int]
"""Which tensor of an example, and which of its dimensions."""


def free_sizes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """For ``dynamic_shapes``: every size of every tensor, but for 0 and 1, which torch fixes.

    Args:
        model: any.
        args: example.
        kwargs: example.

    Returns:
        The sizes by parameter; None, all fixed, where torch cannot be told.
    """

    def free(value: object) -> Any:
        if not isinstance(value, Tensor):
            return None
        return {dim: Dim.AUTO for dim, size in enumerate(value.shape) if size > 1}

    signature = inspect.signature(model.forward)
    given = signature.bind(*args, **kwargs).arguments
    if any(signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD for name in given):
        return None
    return {name: tree_map(free, value) for name, value in given.items()}


def without(free: Mapping[str, Any], fixed: set[Place]) -> dict[str, Any]:
    """The same without some sizes.

    Args:
        free: from ``free_sizes``.
        fixed: those that are not free.

    Returns:
        For ``dynamic_shapes``.
    """
    number = -1

    def left(value: object) -> Any:
        nonlocal number
        if not isinstance(value, dict):
            return value
        number += 1
        return {dim: size for dim, size in value.items() if (number, dim) not in fixed}

    return {name: tree_map(left, value, _is_sizes) for name, value in free.items()}


def _is_sizes(node: Any) -> bool:
    return isinstance(node, dict) and all(isinstance(key, int) for key in node)


def sizes_that_do_not_change(
    program: ExportedProgram, graph: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> set[Place]:
    """Sizes that torch took for free and that a model fixes, as a linear layer behind a flattened image does.

    Torch notes there that the product of height and width is a constant. The graph is run with each size enlarged by
    one and doubled; one with which it fails both times is fixed. The first dimension, the batch, is not asked about.

    Args:
        program: exported with all sizes free.
        graph: the module that runs it.
        args: the example.
        kwargs: the example, in the order of the forward.

    Returns:
        The places of such sizes.
    """
    places_by_symbol = _symbols(program, _tensors((args, dict(kwargs))))
    batch = {symbol for symbol, places in places_by_symbol.items() if any(dim == 0 for _, dim in places)}
    asked = {symbol: places for symbol, places in places_by_symbol.items() if symbol not in batch}
    if not asked:
        return set()
    fixed: set[Place] = set()
    with without_trace(graph):
        for places in asked.values():
            if not any(_runs(graph, args, kwargs, places, *change) for change in _CHANGES):
                fixed |= places
    return fixed


@contextmanager
def without_trace(model: nn.Module) -> Generator[None]:
    """Lets a model run without gradient, and restores its buffers and the random states afterwards.

    Args:
        model: any.

    Yields:
        Nothing.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with forked_random_states(), torch.no_grad():
        yield
        for buffer, before in buffers:
            buffer.copy_(before)


def batch_of_two(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """An example with a batch that torch does not take for fixed, in place of a batch of one.

    Args:
        args: example.
        kwargs: example.

    Returns:
        Arguments and named ones with every tensor twice along its first dimension; None unless all have one there.
    """
    tensors = _tensors((args, dict(kwargs)))
    if not tensors or any(value.dim() == 0 or value.shape[0] != 1 for value in tensors):
        return None
    return tree_map(
        lambda value: torch.cat([value, value]) if isinstance(value, Tensor) else value, (args, dict(kwargs))
    )


def shapes(tree: Any) -> list[torch.Size]:
    """Shapes of the tensors in what a model returns.

    Args:
        tree: it.

    Returns:
        The shapes.
    """
    return [value.shape for value in _tensors(tree)]


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda value: found.append(value) if isinstance(value, Tensor) else None, tree)
    return found


def _symbols(program: ExportedProgram, tensors: list[Tensor]) -> dict[str, set[Place]]:
    """Where each free size stands in the example; sizes that have to be equal are one."""
    names = set(program.graph_signature.user_inputs)
    inputs = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shown = [value for value in inputs if isinstance(value, Tensor)]
    found: dict[str, set[Place]] = {}
    if [each.dim() for each in shown] != [each.dim() for each in tensors]:
        return found  # the program takes other tensors than the example has, such as one of them twice
    for number, value in enumerate(shown):
        for dim, size in enumerate(value.shape):
            if not str(size).isdecimal():  # a symbol; torch may write a size that it has fixed as one, too
                found.setdefault(str(size), set()).add((number, dim))
    return found


def _runs(graph: Any, args: Any, kwargs: Any, places: set[Place], factor: int, more: int) -> bool:
    number = -1

    def other(value: object) -> object:
        nonlocal number
        if not isinstance(value, Tensor):
            return value
        number += 1
        changed = value.detach().clone()
        for dim in range(value.dim()):
            if (number, dim) in places:
                wanted = factor * value.shape[dim] + more
                index = torch.arange(wanted, device=value.device) % value.shape[dim]
                changed = changed.index_select(dim, index)
        return changed

    other_args, other_kwargs = tree_map(other, (args, dict(kwargs)))
    try:
        graph(*other_args, **other_kwargs)
    except Exception:
        return False  # whatever it says: with this size the model does not run
    return True
