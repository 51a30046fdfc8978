"""Node classification on random graphs that torch_geometric generates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.graphs.geometric import geometric_module
from eafo_dynamic.experiments.splits import SplitData, split_indices

__all__ = ["BlockGraphs"]

Graph = tuple[Tensor, Tensor, Tensor]
"""Features, shape [nodes, channels]; edges, shape [2, edges]; classes, shape [nodes]."""


class BlockGraphs(SplitData):
    """Graphs of the stochastic block model: nodes of a class are linked more often than nodes of different classes.

    The features of a node are `signal` times the mean of its class, plus standard normal noise. The means are drawn
    from the standard normal distribution, once for all graphs. A batch is ((features, edges), classes) of `batch_size`
    graphs, joined as one graph without edges between them. Graphs depend on `split_seed` alone.

    Args:
        graphs: number of graphs.
        nodes: nodes per class and graph.
        classes: number of classes.
        channels: features per node.
        inside: probability of an edge between two nodes of the same class.
        between: probability of an edge between two nodes of different classes.
        signal: standard deviation of the class means in each channel, in units of the noise.
        batch_size: graphs per batch; see `SplitData`, as for the other arguments.
        seed: order of the training batches.
        split_seed: the graphs, and their cut into the three parts.
        val_fraction: fraction of the graphs for validation.
        test_fraction: fraction of the graphs for testing.
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
        for option, probability in {"inside": inside, "between": between}.items():
            if not 0 <= probability <= 1:
                raise ConfigError(option, probability, "is not a probability", "Choose a number from 0 to 1.")
        self._generate_edges = geometric_module("utils", "graphs", graphs).stochastic_blockmodel_graph
        self.graphs = graphs
        self.nodes = nodes
        self.classes = classes
        self.channels = channels
        self.inside = inside
        self.between = between
        self.signal = signal
        self.collate = _join

    def setup(self, stage: str) -> None:
        """Generates the graphs and cuts them into three parts; the same for every stage.

        Args:
            stage: what Lightning is about to do; not used.
        """
        with torch.random.fork_rng(devices=[]):  # torch_geometric draws from the global random state
            torch.manual_seed(self.split_seed)
            means = self.signal * torch.randn(self.classes, self.channels)
            graphs = [self._draw_graph(means) for _ in range(self.graphs)]
        train, val, test = split_indices(
            torch.zeros(self.graphs), self.val_fraction, self.test_fraction, self.split_seed
        )
        self.train_data = _Graphs([graphs[index] for index in train.tolist()])
        self.val_data = _Graphs([graphs[index] for index in val.tolist()])
        self.test_data = _Graphs([graphs[index] for index in test.tolist()])

    def _draw_graph(self, means: Tensor) -> Graph:
        edge_probabilities = torch.full((self.classes, self.classes), self.between).fill_diagonal_(self.inside)
        edges = self._generate_edges([self.nodes] * self.classes, edge_probabilities)
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


def _join(graphs: Sequence[Graph]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Several graphs as one, without edges between them."""
    features, edges, classes = zip(*graphs, strict=True)
    shifted: list[Tensor] = []
    nodes_before = 0
    for graph_features, graph_edges in zip(features, edges, strict=True):
        shifted.append(graph_edges + nodes_before)
        nodes_before += len(graph_features)
    return (torch.cat(features), torch.cat(shifted, dim=1)), torch.cat(classes)
