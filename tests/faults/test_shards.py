"""FSDP2 on two real processes in many settings: equal to one process that has the batches of both ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import settings
import shards
import torch
from shards import CASES, Case
from test_ranks import assert_as_alone, start

from eafo_dynamic.policy import estimates

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["SGD", "Adam"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    return request.param, start(shards.all_cases, tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(found: tuple[str, list[Any]], name: str) -> None:
    kind, of_ranks = found
    assert isinstance(of_ranks[0], dict), of_ranks
    expected = shards.trained(Case(kind, **CASES[name]))
    each = [of_rank[name] for of_rank in of_ranks]
    if name != "bfloat16":
        assert_as_alone(each, expected)
        return
    assert torch.equal(each[0]["eps"], each[1]["eps"])
    torch.testing.assert_close(each[0]["eps"], expected["eps"], rtol=0.1, atol=2e-3)
    torch.testing.assert_close(each[0]["weights"], expected["weights"], rtol=0.1, atol=2e-2)


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_two_dimensions_are_one_process(tmp_path: Path, kind: str) -> None:
    found = start(shards.two_dimensional, tmp_path, kind, ranks=4)
    assert_as_alone(found, settings.alone(kind), rows=False)


def test_a_step_sends_the_gradients_of_the_amplitudes_and_nothing_else(tmp_path: Path) -> None:
    """Two sites with two amplitudes each; rounds after the steps 1, 2 and 4, with 64 samples a site, 32 a rank."""
    found = start(shards.counted, tmp_path, ["DDP", "FSDP2"])
    assert isinstance(found[0], dict), found
    a_row = 32 + 3 + estimates._LETTERS + 2 + 2  # samples or their units, faults and losses, round and step, amplitudes
    of_round = {1: 4 * 4 * a_row + 8, 2: 4 * 4 * a_row, 4: 4 * 4 * a_row}  # four rows of float32; once a hash
    for each in found:
        for way, of_step in (("DDP", 0), ("FSDP2", 4 * 4)):
            steps = zip(each[way], each[f"plain {way}"], strict=True)
            for step, ((names, sent), (plain, _)) in enumerate(steps, 1):
                further = ["allreduce_"] * (of_step > 0) + ["allgather_"] * ((step in of_round) + (step == 1))
                assert names == sorted(plain + further), (way, step)
                assert sent == of_step + of_round.get(step, 0), (way, step)
