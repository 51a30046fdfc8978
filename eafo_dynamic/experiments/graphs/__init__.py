"""Node classification on generated graphs with networks of torch_geometric (the extra `graphs`)."""

from eafo_dynamic.experiments.graphs.block_graphs import BlockGraphs
from eafo_dynamic.experiments.graphs.network import GraphNetwork

__all__ = ["BlockGraphs", "GraphNetwork"]
