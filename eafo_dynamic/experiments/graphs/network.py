"""A graph network of torch_geometric."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.activations import make_activation
from eafo_dynamic.experiments.graphs.geometric import geometric_module

__all__ = ["GraphNetwork", "Layer"]

Layer = Literal["GCN", "GraphSAGE", "GIN", "GAT"]


class GraphNetwork(nn.Module):
    """A network of `torch_geometric.nn.models`, whose layers share one activation module.

    Args:
        in_channels: features per node.
        num_classes: logits per node.
        hidden: features between layers.
        depth: number of layers; the last one has no activation.
        layer: "GCN", "GraphSAGE", "GIN" or "GAT".
        activation: by name ("relu", "gelu", ...).
        dropout: probability of dropping an entry after an activation.
        norm: normalisation between layers, by its name in torch_geometric ("batch", "layer", ...); None for none.

    Raises:
        ConfigError: for a depth below 1, an unknown layer, or without torch_geometric.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        hidden: int = 32,
        depth: int = 3,
        layer: Layer = "GCN",
        activation: str = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ConfigError("depth", depth, "must be at least 1", "Choose 1 or more.")
        if layer not in get_args(Layer):
            raise ConfigError("layer", layer, "no such layer", f"Use one of {', '.join(get_args(Layer))}.")
        build_network = getattr(geometric_module("nn.models", "layer", layer), layer)
        self.network = build_network(
            in_channels, hidden, depth, num_classes, dropout=dropout, act=make_activation(activation), norm=norm
        )

    def forward(self, graph: tuple[Tensor, Tensor]) -> Tensor:
        """Features, shape [nodes, in_channels], and edges, shape [2, edges], of one or several graphs, to logits.

        Returns:
            Logits, shape [nodes, num_classes].
        """
        features, edges = graph
        return self.network(features, edges)
