"""Fabric, accelerate and the Hugging Face Trainer on two real processes: equal to one process on the whole batch."""

from __future__ import annotations

from pathlib import Path

import hosts
import pytest
import settings
import torch
from test_ranks import assert_as_alone, start

pytestmark = pytest.mark.slow


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


def test_accelerate_is_one_process(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    found = start(hosts.accelerate, tmp_path)
    assert isinstance(found[0], dict), found
    for name in hosts.OPTIMIZERS:
        assert_as_alone([each[name] for each in found], settings.alone(name, parts=2, clips=True))
