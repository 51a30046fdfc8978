"""Finished cells of a comparison, as files, without a training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def result(arm: str, seed: int, metrics: Mapping[str, float | None], /, **other: Any) -> dict[str, Any]:
    """Returns what the result file of a cell holds."""
    return {
        "schema": 1,
        "task": "a task",
        "arm": arm,
        "seed": seed,
        "fingerprint": "f",
        "metrics": dict(metrics),
        "seconds": 10.0,
        "step_ms": 2.0,
        "steps": 100,
        "parameters": 1000,
        "weights": f"w{seed}",
        "batches": f"b{seed}",
        "entropy_first": None,
        "entropy_last": None,
        "eps_last": None,
        "entropy_steps": [],
        "entropy_mean": [],
        "finished": "2030-01-01T00:00:00+00:00",
        **other,
    }


def write_cell(folder: Path, cell: Mapping[str, Any]) -> Path:
    slug = str(cell["arm"]).lower().replace(" ", "-")
    path = folder / "cells" / slug / f"seed-{cell['seed']}" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(cell), encoding="utf-8")
    return path


def write_comparison(folder: Path, effects: Mapping[str, float], seeds: int = 10, seed: int = 0) -> Path:
    """Writes cells whose test loss is the seed's, an arm's effect and some noise; all but the first have a log."""
    draw = np.random.default_rng(seed)
    shared = draw.normal(2.0, 0.1, seeds)
    for number, (arm, effect) in enumerate(effects.items()):
        for place in range(seeds):
            loss = float(shared[place] + effect + draw.normal(0, 0.01))
            steps = list(range(0, 101, 10))
            fall = float(draw.normal(0.1 * number, 0.03))
            entropy = [1.0 + 0.02 * number - fall * step / 100 for step in steps]
            log = {"entropy_steps": steps, "entropy_mean": entropy, "eps_last": {"net.1": -0.1}}
            ends = {"entropy_first": entropy[0], "entropy_last": entropy[-1]}
            metrics = {"test_loss": loss, "test_accuracy": 1 - loss / 10}
            step_ms = 2.0 * (1 + 0.03 * number) * float(draw.normal(1, 0.01))
            extra = {} if number == 0 else {**log, **ends}
            write_cell(folder, result(arm, place, metrics, step_ms=step_ms, **extra))
    return folder
