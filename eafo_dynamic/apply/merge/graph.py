"""A merged model as a graph, for activations that are called as functions in somebody's own code."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from eafo_dynamic.apply.merge.signature import Call, call_of, forward_of, in_order
from eafo_dynamic.apply.merge.sizes import (
    batch_of_two,
    free_sizes,
    shapes,
    sizes_that_do_not_change,
    without,
    without_trace,
)
from eafo_dynamic.apply.site import Site, register
from eafo_dynamic.apply.surgery import hosted_sites
from eafo_dynamic.errors import SiteError
from eafo_dynamic.find.probe import structural_copy
from eafo_dynamic.internals.torch_internals import forget, share_tables

__all__ = ["MergedGraph", "export", "graph_of"]

_OURS, _THEIRS = "eafo_", "corrected_"


class MergedGraph(nn.Module):
    """A model as the graph that ``torch.export`` made of it, the corrections among its operations.

    Parameters and buffers have the names that they have in the model. The graph holds for one mode, training or
    evaluation, and for the shapes that its guards allow, which torch checks in every call.

    Args:
        program: the exported graph.
        training: the mode in which it was exported.
        call: how the model's forward is called; None where it is not known.
        graph: what ``program.module()`` has given; None if it has not been called.
    """

    def __init__(
        self, program: ExportedProgram, training: bool, call: Call | None = None, graph: nn.Module | None = None
    ) -> None:
        super().__init__()
        if graph is None:
            graph = program.module()
        self.program = program
        # the same tables, so that moving and loading act on the graph; it is no child, so that names stay
        share_tables(self, graph)
        vars(self)["graph"] = graph
        self.training = training
        self.call = call
        if call is not None:
            vars(self)["forward"] = MethodType(forward_of(call), self)

    def __prepare_scriptable__(self) -> Any:
        raise SiteError(
            "torch.jit.script cannot read a graph of torch.export. "
            "Take torch.jit.trace(model, x), or the graph itself: save_merged(model, 'model.pt2')."
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph; it has the signature of the model's forward.

        Args:
            *args: as the model takes them.
            **kwargs: as the model takes them.

        Returns:
            What the model returns.
        """
        return vars(self)["graph"](*args, **kwargs)

    def train(self, mode: bool = True) -> MergedGraph:
        """Does nothing: the graph holds for one mode.

        Args:
            mode: the one it was made in.

        Returns:
            The module itself.

        Raises:
            SiteError: for the other mode.
        """
        if mode != self.training:
            modes = ("evaluation", "training")
            raise SiteError(
                f"this graph was merged in {modes[self.training]} mode and has no other. "
                f"Call model.{'train' if mode else 'eval'}() before merge(model, example) for the other."
            )
        return self

    def __reduce__(self) -> Any:
        program = self.program
        program.state_dict.update(dict(self.named_parameters()))
        program.state_dict.update({key: value for key, value in self.named_buffers() if key in program.state_dict})
        file = io.BytesIO()
        torch.export.save(program, file)
        return _loaded, (file.getvalue(), self.training, self.call)


def _loaded(data: bytes, training: bool, call: Call | None = None) -> MergedGraph:
    return MergedGraph(torch.export.load(io.BytesIO(data)), training, call)


def export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """``torch.export`` of a model in its present mode.

    The first dimension of every tensor, its batch, is free, and every other one that the model does not fix.

    Args:
        model: any.
        args: example; but for its batch, its sizes must not be 0 or 1 where they are to be free.
        kwargs: example.

    Returns:
        The program; that of a ``MergedGraph`` is the one it has.

    Raises:
        SiteError: if torch cannot export the model.
    """
    if isinstance(model, MergedGraph):
        return model.program
    return _exported(model, args, kwargs)[0]


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[ExportedProgram, nn.Module]:
    """The program, and a module that runs it."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about its own code
            return _of_larger_batch(model, args, kwargs) or _of_example(model, args, kwargs)
    except Exception as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise SiteError(
            f"torch.export cannot follow {type(model).__name__} ({type(error).__name__}: {reason[:300]}). "
            "Call activations as modules (self.act = nn.ReLU()) to merge them in place."
        ) from error


def _of_example(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[ExportedProgram, nn.Module]:
    free = free_sizes(model, args, kwargs)
    program = torch.export.export(model, args, dict(kwargs), dynamic_shapes=free)
    graph = program.module()
    fixed = sizes_that_do_not_change(program, graph, args, kwargs)
    if free is not None and fixed:
        free = without(free, fixed)
        program = torch.export.export(model, args, dict(kwargs), dynamic_shapes=free)
        graph = program.module()
    return program, graph


def _of_larger_batch(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[ExportedProgram, nn.Module] | None:
    """The same for an example with a batch of one, which would fix the batch; None where it is no batch."""
    larger = batch_of_two(args, kwargs)
    if larger is None:
        return None
    try:
        program, graph = _of_example(model, *larger)
        with without_trace(graph):
            fits = shapes(graph(*args, **kwargs)) == shapes(model(*args, **kwargs))
    except Exception:
        return None  # the example itself then says what is wrong, if anything is
    return (program, graph) if fits else None


def graph_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MergedGraph:
    """A wrapped model as a graph, its amplitudes as buffers and under other names.

    Args:
        model: wrapped; it stays so.
        args: example.
        kwargs: example.

    Returns:
        The graph, which shares the model's weights.
    """
    kwargs = in_order(model, kwargs)
    weights = {id(each): each for each in (*model.parameters(), *model.buffers())}
    with structural_copy(model, weights) as twin:
        for host, site in hosted_sites(twin):
            site.switch.collecting = False
            _rename(host, site)
        program, graph = _exported(twin, args, kwargs)
    return MergedGraph(program, model.training, call_of(model, args, kwargs), graph)


def _rename(host: nn.Module, site: Site) -> None:
    """Turns a site's parameters and buffers ``eafo_<index>_...`` into buffers ``corrected_<index>_...``."""
    keys = tuple(_THEIRS + key.removeprefix(_OURS) for key in site.keys)
    for key, now in zip(site.keys, keys, strict=True):
        value: Tensor | None = getattr(host, key, None)
        forget(host, key)
        register(host, now, None if value is None else value.detach().clone())
    vars(site)["keys"] = keys
