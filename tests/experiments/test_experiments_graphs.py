"""Graphs and graph networks: batches as torch_geometric makes them, graphs apart, nothing drawn from our streams."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from eafo_dynamic import find_sites
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments import BlockGraphs, GraphNetwork


def ready(**options: Any) -> BlockGraphs:
    data = BlockGraphs(**{"graphs": 10, "nodes": 6, "channels": 5, **options})
    data.setup("fit")
    return data


def graphs(data: Dataset[Any]) -> list[Any]:
    return [data[index] for index in range(len(data))]  # type: ignore[arg-type]


def test_batches_are_those_of_torch_geometric() -> None:
    from torch_geometric.data import Batch, Data

    data = ready(batch_size=4)
    (features, edges), classes = next(iter(data.val_dataloader()))
    expected = Batch.from_data_list([Data(x=x, edge_index=edge, y=y) for x, edge, y in graphs(data.val_data)])
    assert torch.equal(features, expected.x)
    assert torch.equal(edges, expected.edge_index)
    assert torch.equal(classes, expected.y)


@pytest.mark.parametrize("layer", ["GCN", "GraphSAGE", "GIN", "GAT"])
def test_graphs_of_a_batch_do_not_see_each_other(layer: Any) -> None:
    torch.manual_seed(0)
    network = GraphNetwork(5, 4, hidden=8, layer=layer).eval()
    data = ready(batch_size=2)
    inputs, _ = next(iter(data.val_dataloader()))
    alone = torch.cat([network((x, edges)) for x, edges, _ in graphs(data.val_data)])
    torch.testing.assert_close(network(inputs), alone)


def test_every_call_of_the_shared_activation_is_a_site() -> None:
    data = ready()
    inputs, _ = next(iter(data.val_dataloader()))
    report = find_sites(GraphNetwork(5, 4, hidden=8, depth=4, activation="gelu"), inputs)
    assert [site.name for site in report.sites] == [f"network.act#{call}" for call in range(3)]


def test_graphs_depend_on_the_split_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ready(split_seed=3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = ready(split_seed=3, seed=1), ready(split_seed=4)
    for one, two, three in zip(*(graphs(each.test_data) for each in (first, same, other)), strict=True):
        assert all(map(torch.equal, one, two))
        assert not torch.equal(one[0], three[0])


def test_edges_are_where_the_model_puts_them() -> None:
    for _, edges, classes in graphs(ready(inside=1.0, between=0.0).train_data):
        assert edges.shape[1] == 4 * 6 * 5  # all of a class, and no other
        assert torch.equal(classes[edges[0]], classes[edges[1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"graphs": 0}, "graphs=0: must be at least 1"),
        ({"between": 1.5}, r"between=1\.5: is not a probability"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_data_that_cannot_work(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlockGraphs(**options)


def test_networks_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="depth=0"):
        GraphNetwork(4, 2, depth=0)
    with pytest.raises(ConfigError, match=r"layer='GCNN'.*GCN, GraphSAGE"):
        GraphNetwork(4, 2, layer="GCNN")  # type: ignore[arg-type]


def test_without_torch_geometric(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("nn.models", "utils"):
        monkeypatch.setitem(sys.modules, f"torch_geometric.{part}", None)
    for make in (BlockGraphs, lambda: GraphNetwork(4, 2)):
        with pytest.raises(ConfigError, match=r"needs torch_geometric.*pip install 'eafo-dynamic\[graphs\]'"):
            make()
