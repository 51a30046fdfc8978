"""A graph network of torch_geometric, and node classification on graphs that torch_geometric generates."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.blocks import make_activation
from eafo_dynamic.experiments.data import SplitData, split_indices

__all__ = ["BlockGraphs", "GraphNetwork"]

Layer = Literal["GCN", "GraphSAGE", "GIN", "GAT"]
Graph = tuple[Tensor, Tensor, Tensor]  # features [nodes, channels], edges [2, edges], classes [nodes]


class GraphNetwork(nn.Module):
    """A network of `torch_geometric.nn.models`, whose layers share one activation module.

    Args:
        in_channels: features of a node.
        num_classes: logits of a node.
        hidden: features between layers.
        depth: number of layers; the last one has no activation.
        layer: "GCN", "GraphSAGE", "GIN" or "GAT".
        activation: by name ("relu", "gelu", ...).
        dropout: probability of dropping an entry after an activation.
        norm: normalisation between layers by torch_geometric's name ("batch", "layer", ...); None for none.

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
        build = getattr(_geometric("nn.models", "layer", layer), layer)
        act = make_activation(activation)
        self.network = build(in_channels, hidden, depth, num_classes, dropout=dropout, act=act, norm=norm)

    def forward(self, graph: tuple[Tensor, Tensor]) -> Tensor:
        """Features [nodes, in_channels] and edges [2, edges] of one or several graphs side by side, to logits.

        Returns:
            Logits, shape [nodes, num_classes].
        """
        features, edges = graph
        return self.network(features, edges)


class BlockGraphs(SplitData):
    """Graphs of the stochastic block model: nodes of a class are linked more often than nodes of different classes.

    A node's features are the mean of its class, standard normal in each channel, times `signal`, plus standard normal
    noise; the means are the same in all graphs. A batch is ((features, edges), classes) of `batch_size` graphs side by
    side. Graphs depend on `split_seed` alone.

    Args:
        graphs: number of graphs.
        nodes: nodes of a class and graph.
        classes: number of classes.
        channels: features of a node.
        inside: probability of an edge inside a class.
        between: probability of an edge between classes.
        signal: length of a class's mean in units of the noise, in each channel.
        batch_size: graphs of a batch; see `SplitData`, as the others.
        seed: order of the training batches.
        split_seed: the graphs, and their cut into the three parts.
        val_fraction: part for validation.
        test_fraction: part for testing.
        num_workers: loader processes.

    Raises:
        ConfigError: for numbers below 1, probabilities outside [0, 1], or without torch_geometric.
    """

    def __init__(
        self,
        graphs: int = 60,
        nodes: int = 20,
        classes: int = 4,
        channels: int = 16,
        inside: float = 0.15,
        between: float = 0.05,
        signal: float = 0.5,
        batch_size: int = 4,
        seed: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, split_seed, val_fraction, test_fraction, num_workers)
        for option, count in {"graphs": graphs, "nodes": nodes, "classes": classes, "channels": channels}.items():
            if count < 1:
                raise ConfigError(option, count, "must be at least 1", "Choose 1 or more.")
        for option, chance in {"inside": inside, "between": between}.items():
            if not 0 <= chance <= 1:
                raise ConfigError(option, chance, "is no probability", "Choose a number from 0 to 1.")
        self._generate = _geometric("utils", "graphs", graphs).stochastic_blockmodel_graph
        self.graphs = graphs
        self.nodes = nodes
        self.classes = classes
        self.channels = channels
        self.inside = inside
        self.between = between
        self.signal = signal
        self.collate = _side_by_side

    def setup(self, stage: str) -> None:
        """Generate and cut; the same for every stage.

        Args:
            stage: what Lightning is about to do; not used.
        """
        with torch.random.fork_rng(devices=[]):  # torch_geometric draws from the global stream
            torch.manual_seed(self.split_seed)
            means = self.signal * torch.randn(self.classes, self.channels)
            graphs = [self._graph(means) for _ in range(self.graphs)]
        split = split_indices(torch.zeros(self.graphs), self.val_fraction, self.test_fraction, self.split_seed)
        self.train_data, self.val_data, self.test_data = (
            _Graphs([graphs[index] for index in part.tolist()]) for part in split
        )

    def _graph(self, means: Tensor) -> Graph:
        chances = torch.full((self.classes, self.classes), self.between).fill_diagonal_(self.inside)
        edges = self._generate([self.nodes] * self.classes, chances)
        classes = torch.arange(self.classes).repeat_interleave(self.nodes)
        features = means[classes] + torch.randn(len(classes), self.channels)
        return features, edges, classes


class _Graphs(Dataset[Graph]):
    def __init__(self, graphs: Sequence[Graph]) -> None:
        self._graphs = graphs

    def __len__(self) -> int:
        return len(self._graphs)

    def __getitem__(self, index: int) -> Graph:
        return self._graphs[index]


def _side_by_side(graphs: Sequence[Graph]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Several graphs as one, without edges between them."""
    features, edges, classes = zip(*graphs, strict=True)
    first = torch.tensor([0, *map(len, features[:-1])]).cumsum(0)
    moved = [each + start for each, start in zip(edges, first, strict=True)]
    return (torch.cat(features), torch.cat(moved, dim=1)), torch.cat(classes)


def _geometric(part: str, option: str, value: object) -> Any:
    try:
        return importlib.import_module(f"torch_geometric.{part}")
    except ImportError as error:
        raise ConfigError(
            option, value, "needs torch_geometric", "Install it: pip install 'eafo-dynamic[graphs]'."
        ) from error
