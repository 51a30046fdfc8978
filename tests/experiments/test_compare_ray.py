"""A comparison on a cluster of Ray: two nodes, one of whose workers dies in the middle of a cell."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import yaml

from eafo_dynamic.errors import EAFOError
from eafo_dynamic.experiments.compare.cell import result_path
from eafo_dynamic.experiments.compare.plan import Plan, read_plan, read_yaml
from eafo_dynamic.experiments.compare.runner import cells, run

ROOT = Path(__file__).parents[2]


def plan_of(folder: Path, model: dict[str, Any] | None = None) -> Plan:
    config = read_yaml(ROOT / "configs" / "wine_mlp.yaml", "task")
    if model is not None:
        config["model"]["init_args"]["model"] = model
    (folder / "task.yaml").write_text(yaml.safe_dump(config))
    plan = {
        "task": "task.yaml",
        "seeds": 1,
        "metric": "test_loss",
        "settings": {"trainer.max_epochs": 2},
        "arms": {"relu": {}, "elu": {"activation": "elu"}, "nonsense": {"set": {"trainer.gradient_clip_val": "x"}}},
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    return read_plan(path, folder / "out")


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Generator[Any]:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    paths = [str(ROOT), str(Path(__file__).parent), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", ":".join(paths))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield ray
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_worker_that_dies_has_its_cell_run_again(two_nodes: Any, tmp_path: Path) -> None:
    assert len(two_nodes.nodes()) == 2
    mark = tmp_path / "mark"
    model = {
        "class_path": "ray_task.Mortal",
        "init_args": {"mark": str(mark), "in_features": 13, "out_features": 3, "activation": "relu"},
    }
    plan = plan_of(tmp_path, model)
    failures = run(plan, cells(plan), jobs=2, backend="ray")
    assert mark.exists(), "a worker has died"
    assert [failure.what for failure in failures] == ["nonsense, seed 0"], "and only what cannot work has failed"
    for arm in ("relu", "elu"):
        assert json.loads(result_path(plan, plan.arm(arm), 0).read_text())["steps"] == 6
    assert run(plan, cells(plan, ["relu", "elu"]), jobs=1) == [], "finished cells are kept, whatever ran them"


def test_without_ray_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    plan = plan_of(tmp_path)
    with pytest.raises(EAFOError, match=r"--backend ray needs ray: pip install 'eafo-dynamic\[ray\]'"):
        run(plan, cells(plan), jobs=1, backend="ray")
