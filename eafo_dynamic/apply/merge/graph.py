"""A merged model as a graph, for activations that are called as functions in somebody's own code."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from eafo_dynamic.apply.surgery import hosted_sites
from eafo_dynamic.errors import SiteError
from eafo_dynamic.internals.torch_internals import forget, own_buffers, own_parameters, share_tables, tree_map

__all__ = ["MergedGraph", "export", "graph_of"]

_OURS, _THEIRS = "eafo_", "corrected_"


class MergedGraph(nn.Module):
    """A model as the graph that ``torch.export`` made of it, the corrections among its operations.

    Parameters and buffers have the names that they have in the model. The graph holds for one mode, training or
    evaluation, and for the shapes that its guards allow, which torch checks in every call.

    Args:
        program: the exported graph.
        training: the mode in which it was exported.
    """

    def __init__(self, program: ExportedProgram, training: bool) -> None:
        super().__init__()
        graph = program.module()
        self.program = program
        # the same tables, so that moving and loading act on the graph; it is no child, so that names stay
        share_tables(self, graph)
        vars(self)["graph"] = graph
        self.training = training

    def __prepare_scriptable__(self) -> Any:
        raise SiteError(
            "torch.jit.script cannot read a graph of torch.export. "
            "Take torch.jit.trace(model, x), or the graph itself: save_merged(model, 'model.pt2')."
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph.

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
        return _loaded, (file.getvalue(), self.training)


def _loaded(data: bytes, training: bool) -> MergedGraph:
    return MergedGraph(torch.export.load(io.BytesIO(data)), training)


def export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """``torch.export`` of a model in its present mode, with every size of the example free where the model allows.

    Args:
        model: any.
        args: example; its sizes must not be 0 or 1 where they are to be free.
        kwargs: example.

    Returns:
        The program; that of a ``MergedGraph`` is the one it has.

    Raises:
        SiteError: if torch cannot export the model.
    """
    if isinstance(model, MergedGraph):
        return model.program
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about its own code
            program = torch.export.export(model, args, dict(kwargs), dynamic_shapes=_free_sizes(model, args, kwargs))
            return program.run_decompositions({})
    except Exception as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise SiteError(
            f"torch.export cannot follow {type(model).__name__} ({type(error).__name__}: {reason[:300]}). "
            "Call activations as modules (self.act = nn.ReLU()) to merge them in place."
        ) from error


def _free_sizes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """For ``dynamic_shapes``: every size of every tensor; None, all fixed, where torch cannot be told."""

    def free(value: object) -> Any:
        return dict.fromkeys(range(value.dim()), Dim.AUTO) if isinstance(value, Tensor) else None

    signature = inspect.signature(model.forward)
    given = signature.bind(*args, **kwargs).arguments
    if any(signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD for name in given):
        return None
    return {name: tree_map(free, value) for name, value in given.items()}


def graph_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MergedGraph:
    """A wrapped model as a graph, its amplitudes as buffers and under other names.

    Args:
        model: wrapped; it stays so.
        args: example.
        kwargs: example.

    Returns:
        The graph, which shares the model's weights.
    """
    switches = {id(site.switch): site.switch for _, site in hosted_sites(model)}.values()
    before = [switch.collecting for switch in switches]
    for switch in switches:
        switch.collecting = False
    try:
        graph = export(model, args, kwargs).module()
    finally:
        for switch, collecting in zip(switches, before, strict=True):
            switch.collecting = collecting
    _rename(graph)
    return MergedGraph(export(graph, args, kwargs), model.training)


def _rename(graph: GraphModule) -> None:
    """Turns the sites' parameters and buffers ``eafo_<index>_...`` into buffers ``corrected_<index>_...``."""
    for node in graph.graph.nodes:
        owner, _, key = str(node.target).rpartition(".")
        if node.op == "get_attr" and key.startswith(_OURS):
            node.target = f"{owner}.{_THEIRS}{key.removeprefix(_OURS)}".lstrip(".")
    for module in graph.modules():
        for key, value in {**own_parameters(module), **own_buffers(module)}.items():
            if key.startswith(_OURS):
                forget(module, key)
                module.register_buffer(_THEIRS + key.removeprefix(_OURS), cast(Tensor, value).detach().clone())
    graph.recompile()
