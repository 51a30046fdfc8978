"""What is unusual about activations that are watched, in plain words."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eafo_dynamic.correction.bases import Base
from eafo_dynamic.correction.bases.descriptor import derivatives
from eafo_dynamic.correction.stacked import Functions
from eafo_dynamic.errors import printable
from eafo_dynamic.records.schema import Record

__all__ = ["Alerts", "ranges"]

DEAD = 0.25  # of the units
FLAT = 0.9  # of the samples
SATURATED = 0.5  # likewise, where the function is flat at both ends
FLAT_SLOPE = 0.01
MOVED = 1.0  # standard deviations of the round before
WIDENED = 4.0  # times
FAR = 30.0  # standard deviations from the mean
CONSTANT = 0.2  # nats above the entropy of a constant

_COMPARED = ("step", "mean", "std")

_LOG = logging.getLogger("eafo_dynamic")


def ranges(samples: Tensor, functions: Functions) -> dict[str, Tensor]:
    """Columns that only watched sites have, each of shape [S].

    Args:
        samples: pre-activations, shape [S, n], NaN where missing.
        functions: of all sites.

    Returns:
        ``low`` and ``high``, the smallest and largest sample, NaN without any, and ``flat_fraction``, the share of the
        samples at which the base's slope is below 0.01 either way.
    """
    if not samples.shape[-1]:
        nothing = torch.full(samples.shape[:1], math.nan, device=samples.device)
        return {"low": nothing, "high": nothing, "flat_fraction": nothing}
    finite = samples.isfinite()
    low = samples.where(finite, math.inf).amin(-1)
    high = samples.where(finite, -math.inf).amax(-1)
    flat = torch.zeros_like(samples, dtype=torch.bool)
    for base, rows in functions.groups().items():
        flat[rows] = derivatives(base, samples[rows].nan_to_num(), order=1).first.abs() < FLAT_SLOPE
    n = finite.sum(-1)
    share = (flat & finite).sum(-1) / n  # NaN without samples
    empty = n == 0
    return {"low": low.masked_fill(empty, math.nan), "high": high.masked_fill(empty, math.nan), "flat_fraction": share}


class Alerts:
    """Compares each round with the one before it, site by site.

    An alert is part of the row's ``event`` as long as it lasts, and goes to Python's logger ``eafo_dynamic`` when it
    begins.

    Args:
        bases: function of each site.
        resolution: r of the entropies.
        speaks: whether to log; one process of several should.
    """

    def __init__(self, bases: Sequence[Base], resolution: float, speaks: bool = True) -> None:
        far_below = torch.tensor([-60.0, -30.0])
        far_above = torch.tensor([30.0, 60.0])
        self._can_die = [bool((base(far_below).abs() < 1e-3).all()) for base in bases]
        self._most_flat: list[float] = []
        for base in bases:
            is_saturating = _is_flat(base, far_below) and _is_flat(base, far_above)
            self._most_flat.append(SATURATED if is_saturating else FLAT)
        self._least_entropy = 0.5 * math.log(2 * math.pi * math.e * resolution**2)
        self._speaks = speaks
        self._before: dict[str, Record] = {}  # of each site, with samples
        self._since: dict[str, dict[str, object]] = {}  # steps at which what lasts has begun, by site and kind

    def add_to(self, rows: Sequence[Record]) -> None:
        """Writes what is unusual into the column ``event``.

        Args:
            rows: of one round, in the order of the bases.
        """
        for place, row in enumerate(rows):
            site = str(row["site"])
            lasting = self._lasting(row, place)
            earlier = self._since.get(site, {})
            self._since[site] = {kind: earlier.get(kind, row["step"]) for kind in lasting}
            texts = [text for kind, text in lasting.items() if kind not in earlier]
            texts += _changes(row, self._before.get(site))
            for text in texts:
                if self._speaks:
                    _LOG.warning("EAFO: step %s: %s: %s", row["step"], printable(site), text)
            texts += [f"{text}, since step {earlier[kind]}" for kind, text in lasting.items() if kind in earlier]
            if row["event"]:
                texts.insert(0, str(row["event"]))
            row["event"] = "; ".join(texts) or None
            if row["n"]:
                self._before[site] = row

    def state_dict(self) -> dict[str, Any]:
        """What the next round is compared with; primitives only.

        Returns:
            The state.
        """
        before = {site: {name: row[name] for name in _COMPARED} for site, row in self._before.items()}
        return {"before": before, "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave.

        Args:
            state: of the same sites.
        """
        self._before = {str(site): dict(row) for site, row in state["before"].items()}
        self._since = {str(site): dict(steps) for site, steps in state["since"].items()}

    def _lasting(self, row: Record, place: int) -> dict[str, str]:
        """What may last, by kind; comparisons with NaN, where samples did not suffice, are False."""
        found: dict[str, str] = {}
        dead = _number(row, "dead_fraction")
        flat = _number(row, "flat_fraction")
        entropy = _number(row, "entropy")
        mean = _number(row, "mean")
        std = _number(row, "std")
        if self._can_die[place] and dead >= DEAD:
            found["dead"] = f"{100 * dead:.0f} % of the units did not fire"
        if flat >= self._most_flat[place]:
            found["flat"] = f"{100 * flat:.0f} % of the inputs lie where the function is flat"
        if std > 0 and entropy < self._least_entropy + CONSTANT:
            found["constant"] = f"the output is nearly constant, entropy {entropy:.2f} nats"
        farthest = max(_number(row, "high") - mean, mean - _number(row, "low"))
        if std > 0 and farthest > FAR * std:
            found["far"] = f"an input lies {farthest / std:.0f} standard deviations from the mean"
        return found


def _changes(row: Record, before: Record | None) -> list[str]:
    """What has changed since the last round that had samples."""
    if before is None or not _number(before, "std") > 0:
        return []
    mean = _number(row, "mean")
    std = _number(row, "std")
    step = before["step"]
    old_mean = _number(before, "mean")
    old_std = _number(before, "std")
    found: list[str] = []
    moved = abs(mean - old_mean) / old_std
    if moved > MOVED:
        found.append(f"the mean input has moved by {moved:.1f} standard deviations since step {step}")
    if std > WIDENED * old_std or std * WIDENED < old_std:
        found.append(f"the inputs are {std / old_std:.2g} times as wide as at step {step}")
    return found


def _is_flat(base: Base, far: Tensor) -> bool:
    first, last = base(far).tolist()
    return abs(last - first) < 1e-3


def _number(row: Mapping[str, object], column: str) -> float:
    value = row.get(column)
    if isinstance(value, (int, float)):
        return float(value)
    return math.nan
