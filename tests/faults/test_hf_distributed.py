"""The Hugging Face Trainer on two real processes: agreement, skipped sites, a resume between two rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_ranks
import pytest
import torch
from children import succeed

from eafo_dynamic.records import CorrectionLog

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


def finals(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"final{rank}.pt", weights_only=True) for rank in range(ranks)]


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


def test_ranks_resume_between_two_rounds_to_the_last_bit(tmp_path: Path) -> None:
    """Each rank goes on with the sample and the losses that it had itself; a step may skip a site."""
    succeed(tmp_path / "whole", 2, prepare=hf_ranks.train)
    succeed(tmp_path / "parts", 2, prepare=hf_ranks.train, stops_at=3)
    saved = torch.load(tmp_path / "parts" / "checkpoint-3" / "eafo_state.pt", weights_only=True)
    assert len(saved["ranks"]) == 2
    assert all(each["losses"]["count"] == 1 for each in saved["ranks"]), "of step 3"
    succeed(tmp_path / "parts", 2, prepare=hf_ranks.train, resume=True)
    whole, parts = finals(tmp_path / "whole", 2), finals(tmp_path / "parts", 2)
    assert_same(whole[0], whole[1])
    assert_same(whole[0], parts[0])
    assert_same(whole[1], parts[1])
    logs = [CorrectionLog.load(tmp_path / name) for name in ("whole", "parts")]
    assert logs[0].update_steps == [1, 2, 4, 5]
    assert logs[0].rows == logs[1].rows
