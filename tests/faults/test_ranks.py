"""Real processes in settings of torch's own: equal to one process on the whole batch, or stopped with one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import settings
import torch
from children import CONTEXT, free_port, serve
from settings import Setting

pytestmark = pytest.mark.slow


def start(setting: Setting, folder: Path, given: Any = None, ranks: int = 2) -> list[Any]:
    """Runs a setting in real processes.

    Returns:
        What each rank returned, or the text of its error.
    """
    serve()
    port = free_port()
    arguments = [(setting, folder, rank, ranks, port, given) for rank in range(ranks)]
    children = [CONTEXT.Process(target=settings.start, args=each) for each in arguments]
    for child in children:
        child.start()
    for child in children:
        child.join(240)
        child.kill()
    return [_of(folder, rank) for rank in range(ranks)]


def _of(folder: Path, rank: int) -> Any:
    told = folder / f"{rank}.txt"
    if told.exists():
        return told.read_text()
    return torch.load(folder / f"{rank}.pt", weights_only=False)


def assert_as_alone(found: list[Any], expected: dict[str, Any], rows: bool = True) -> None:
    for each in found:
        assert not isinstance(each, str), each
        torch.testing.assert_close(each["eps"], expected["eps"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(each["weights"], expected["weights"], rtol=1e-4, atol=1e-6)
        if rows:
            torch.testing.assert_close(each["rows"], expected["rows"], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(each["eps"], found[0]["eps"]) for each in found)


@pytest.mark.parametrize(
    "what, line",
    [
        ("options", "RankError: rank 1 has max_eps: 0.5, and rank 0 has max_eps: 1.0"),
        ("sites", "RankError: rank 1 has site 3: SiLU"),
        ("own models", "RankError: rank 1 has eps="),
        ("step", "RankError: rank 1 is at round 0, step 2, and rank 0 at round 0, step 1"),
        ("Join", "SiteError: Sequential runs in the context Join"),
        ("only one attached", "RankError: rank 1 has attached no corrections, and rank 0 would wait"),
    ],
)
def test_ranks_that_differ_stop_with_one_line(tmp_path: Path, what: str, line: str) -> None:
    found = start(settings.tripwire, tmp_path, what)
    assert found[0].startswith(line) and "\n" not in found[0]
    assert found[1] == (None if what == "only one attached" else found[0])


def test_ranks_in_groups_of_their_own_train_models_of_their_own(tmp_path: Path) -> None:
    one, two = start(settings.tripwire, tmp_path, "groups of one")
    assert not isinstance(one, str), one
    assert not torch.equal(one["eps"], two["eps"])


@pytest.mark.parametrize("what", ["DDP", "DDP inside", "FSDP2", "FSDP2 inside"])
def test_attaching_to_a_wrapped_model_is_refused(tmp_path: Path, what: str) -> None:
    for found in start(settings.attached_late, tmp_path, what):
        assert found.startswith("SiteError: ") and "Attach first, then wrap" in found and "\n" not in found


FSDP2: list[dict[str, Any]] = [
    {},
    {"asks": False},
    {"asks": False, "layers": False},
    {"per_channel": True},
    {"parts": 2, "clips": True},
    {"policy": "hybrid"},
    {"policy": "entropy"},
]


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("options", FSDP2, ids=str)
def test_fsdp2_is_one_process_on_the_whole_batch(tmp_path: Path, optimizer: str, options: dict[str, Any]) -> None:
    found = start(settings.sharded, tmp_path, (optimizer, options))
    given = {name: value for name, value in options.items() if name not in ("asks", "layers")}
    assert_as_alone(found, settings.alone(optimizer, **given))


def test_amplitudes_in_shards_are_refused(tmp_path: Path) -> None:
    for found in start(settings.whole_amplitudes_forgotten, tmp_path):
        assert isinstance(found, str) and "\n" not in found.strip(), found


def test_fully_sharded_data_parallel_is_refused_in_one_line(tmp_path: Path) -> None:
    for found in start(settings.flattened, tmp_path):
        assert isinstance(found, str) and "\n" not in found, found
        assert found.startswith("SiteError: FullyShardedDataParallel") and "Use fully_shard(model, **" in found


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_tensor_parallel_is_one_process(tmp_path: Path, optimizer: str) -> None:
    found = start(settings.tensor_parallel, tmp_path, (optimizer, {}))
    # samples of whole vectors are there twice, which moves the entropies of few samples
    assert_as_alone(found, settings.alone(optimizer), rows=False)


def test_tensor_parallel_that_is_not_told_is_refused(tmp_path: Path) -> None:
    for found in start(settings.tensor_parallel, tmp_path, ("SGD", {"tells": False})):
        assert isinstance(found, str) and "tensor_parallel=" in found


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_pipeline_stages_have_statistics_of_their_own(tmp_path: Path, optimizer: str) -> None:
    """Also with unequal numbers of sites; what infers the shapes of a stage leaves no sample."""
    found = start(settings.pipeline, tmp_path, (optimizer, {}))
    for each, expected in zip(found, settings.pipeline_alone(optimizer, {}), strict=True):
        assert_as_alone([each], expected)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_distributed_checkpoint_is_resharded(tmp_path: Path, optimizer: str) -> None:
    """From two ranks to four and to one, with the optimiser's state."""
    found: list[Any] = []
    for ranks, begin, end in ((2, 0, 2), (4, 2, 4), (1, 4, 6)):
        folder = tmp_path / f"{ranks}"
        folder.mkdir()
        found = start(settings.resharded, folder, (optimizer, begin, end), ranks)
    expected = settings.alone(optimizer, density="histogram")
    assert isinstance(found[0], dict), found
    torch.testing.assert_close(found[0]["eps"], expected["eps"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0]["weights"], expected["weights"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0]["rows"], expected["rows"][-len(found[0]["rows"]) :], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["fully_shard", "parallelize_module", "fully_shard clipped", "fully_shard meta"])
def test_lightning_shards_without_a_further_line(tmp_path: Path, way: str) -> None:
    expected = settings.lightning(tmp_path, 0, "auto clipped" if "clipped" in way else "auto")
    assert_as_alone(start(settings.lightning, tmp_path, way), expected, rows=way.startswith("fully_shard"))
