"""A correction log as a small vision transformer writes it, made by the real writer from plain formulas."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

from eafo_dynamic.records import LogWriter

SITES = [(f"blocks.{block}.mlp.act", "gelu") for block in range(4)] + [("head.act", "relu")]
UPDATE_EVERY = 50
GRID = [-4.0 + 8.0 * knot / 64 for knot in range(65)]
EVENTS = {(200, "blocks.2.mlp.act"): "eps held at max_eps", (350, "head.act"): "3 samples not finite"}


def fabricate_run(
    run: Path, updates: int = 12, sites: list[tuple[str, str]] = SITES, policy: str = "entropy", seed: int = 0
) -> Path:
    """Writes <run>/eafo; the same arguments give the same rows."""
    manifest = {
        "versions": {"eafo_dynamic": "0.1.0", "torch": "2.13.0", "lightning": "2.6.6"},
        "options": {"policy": policy, "density": "gaussian", "update_every_n_steps": UPDATE_EVERY},
        "sites": [
            {"name": name, "base": base, "class_name": base.upper(), "call": 0, "shape": [32, 17, 128]}
            for name, base in sites
        ],
    }
    writer = LogWriter(run / "eafo", manifest)
    histories = [site_rows(number, name, base, updates, policy, seed) for number, (name, base) in enumerate(sites)]
    for update in range(updates):
        rows = [history[update] for history in histories]
        writer.write(rows)
        if update in (0, 1, 3, 7, 15, 31, 63, updates - 1):
            writer.write_shapes(rows[0]["step"], [shape_row(row, dict(sites)[row["site"]]) for row in rows])
    writer.close()
    return run


def site_rows(number: int, name: str, base: str, updates: int, policy: str, seed: int) -> list[dict[str, Any]]:
    noise = random.Random(f"{seed} {name}")
    eps, entropy = 0.01, 1.02 - 0.09 * number
    rows: list[dict[str, Any]] = []
    for update in range(updates):
        age = 1 - math.exp(-update / 5)
        slope = (0.9 - 0.12 * number) * (1 - 0.3 * age) + noise.gauss(0, 0.02)
        delta = -0.02 * slope / (1 + abs(slope))
        mean, std = -0.35 * age + 0.02 * number, 0.8 + 0.6 * age + 0.05 * number
        step = UPDATE_EVERY * (update + 1)
        rows.append(
            {
                "step": step,
                "epoch": update // 5,
                "site": name,
                "eps": eps + delta,
                "delta_eps": delta,
                "d_entropy_d_eps": slope,
                "entropy": entropy,
                "entropy_predicted": entropy + slope * delta,
                "entropy_after": entropy + slope * delta * (1 + noise.gauss(0, 0.05)),
                "entropy_drift": slope * delta,
                "continuous_entropy": entropy - 1.1,
                "atom_mass": 0.5 + 0.1 * age if base == "relu" else 0.0,
                "mean": mean,
                "std": std,
                "skew": 0.1 + 0.2 * age,
                "kurtosis": 0.4 * age,
                "negentropy": 0.01 + 0.03 * age,
                "n": 4096,
                "mu": mean,
                "sigma": std,
                "dead_fraction": 0.04 * age * number,
                "loss": 1.0 / (1 + age),
                "policy": policy,
                "event": EVENTS.get((step, name)),
            }
        )
        eps += delta
        entropy += slope * delta + noise.gauss(0, 0.002)
    return rows


def shape_row(row: dict[str, Any], base: str) -> dict[str, Any]:
    normal = NormalDist(row["mu"], row["sigma"])
    z = [row["mu"] + row["sigma"] * u for u in GRID]
    plain = [base_value(base, value) for value in z]
    bumps = [row["eps"] * row["sigma"] * u * math.exp(-u * u / 2) for u in GRID]
    edges = z[::4]
    shares = [normal.cdf(right) - normal.cdf(left) for left, right in pairwise(edges)]
    noise = random.Random(f"{row['site']} {row['step']}")
    return {
        "site": row["site"],
        "z": z,
        "base": plain,
        "function": [value + bump for value, bump in zip(plain, bumps, strict=True)],
        "eps": row["eps"],
        "mu": row["mu"],
        "sigma": row["sigma"],
        "u": GRID,
        "pdf": [NormalDist().pdf(u) for u in GRID],
        "edges": edges,
        "counts": [max(0, round(4096 * share * (1 + noise.gauss(0, 0.1)))) for share in shares],
    }


def base_value(base: str, z: float) -> float:
    return max(z, 0.0) if base == "relu" else z * NormalDist().cdf(z)
