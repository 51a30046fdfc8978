"""Fabric, accelerate and the Hugging Face Trainer on two real processes: equal to one process on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hosts
import pytest
import settings
import torch
from children import CONTEXT, free_port, serve
from test_ranks import assert_as_alone, start

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_fabric_is_one_process_and_resumes_equal(tmp_path: Path) -> None:
    """Also where the checkpoint lies between two rounds."""
    found = start(hosts.fabric, tmp_path, "ddp")
    assert isinstance(found[0], dict), found
    for name in hosts.OPTIMIZERS:
        assert_as_alone([each[name] for each in found], settings.alone(name, parts=2, clips=True))
        for each in found:
            whole, resumed = each[name], each[f"{name} resumed"]
            assert torch.equal(whole["eps"], resumed["eps"])
            assert torch.equal(whole["weights"], resumed["weights"])
            assert torch.equal(whole["rows"][-len(resumed["rows"]) :], resumed["rows"])


@pytest.mark.parametrize("shards", [False, True])
def test_accelerate_is_one_process(tmp_path: Path, shards: bool) -> None:
    pytest.importorskip("accelerate")
    found = start(hosts.accelerate, tmp_path, shards)
    assert isinstance(found[0], dict), found
    for name in hosts.OPTIMIZERS:
        assert_as_alone([each[name] for each in found], settings.alone(name, parts=2, clips=True))


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_the_hugging_face_trainer_shards_and_resumes_equal(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("accelerate")
    for name in ("alone", "sharded"):
        (tmp_path / name).mkdir()
    (expected,) = start(hosts.trainer, tmp_path / "alone", (kind, False), ranks=1)
    found = start(hosts.trainer, tmp_path / "sharded", (kind, True))
    assert isinstance(found[0], dict), found
    assert_as_alone([each["whole"] for each in found], expected)
    for each in found:
        if kind == "Adam":
            assert torch.equal(each["whole"]["eps"], each["resumed"]["eps"])
            assert torch.equal(each["whole"]["weights"], each["resumed"]["weights"])


def launch(path: Path, folder: Path, ranks: int, *arguments: Any) -> list[str]:
    """What each rank of a script prints."""
    serve()
    port = free_port()
    children = [
        CONTEXT.Process(target=hosts.script, args=(str(path), folder, rank, ranks, port, list(arguments)))
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(240)
        child.kill()
    return [(folder / f"out{rank}.txt").read_text() for rank in range(ranks)]


def test_the_recipe_for_gpt2_trains_resumes_merges_and_exports(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    recipe = EXAMPLES / "recipes" / "gpt2_fsdp2.py"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said: dict[Path, list[str]] = {}
    for folder, steps in ((whole, 8), (parts, 4), (parts, 8)):
        folder.mkdir(exist_ok=True)
        said[folder] = launch(recipe, folder, 2, "tiny", steps, 4)
    assert "rank 1 of 2: steps 5 to 8, eps [" in said[parts][1], said
    assert "largest difference to the trained model" in said[parts][0], said
    ends = [lines.split(", eps ")[1].splitlines()[0] for lines in (*said[whole], *said[parts])]
    assert len(set(ends)) == 1, ends
    one, two = (torch.load(folder / "weights.pt", weights_only=True) for folder in (whole, parts))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_the_example_for_fabric_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    said = [launch(EXAMPLES / "fabric_loop.py", tmp_path, 2, 2, 1) for _ in range(2)]
    assert "rank 0 of 2: step 16, {" in said[0][0], said
    assert "rank 1 of 2: step 32, {" in said[1][1], said
    assert said[1][0].split("step")[1] == said[1][1].split("step")[1]
