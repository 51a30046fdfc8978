"""What is unusual about activations that are watched, in plain words."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eafo_dynamic.correction.bases import Base
from eafo_dynamic.correction.bases.descriptor import derivatives
from eafo_dynamic.correction.stacked import Functions
from eafo_dynamic.records.schema import Record

__all__ = ["Alerts", "ranges"]

DEAD = 0.25  # of the units
FLAT = 0.9  # of the samples
FLAT_SLOPE = 0.01
MOVED = 1.0  # standard deviations of the round before
WIDENED = 4.0  # times
FAR = 30.0  # standard deviations from the mean
CONSTANT = 0.2  # nats above the entropy of a constant

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
        self._can_die = [abs(float(base(torch.tensor(-30.0)))) < 1e-3 for base in bases]
        self._least_entropy = 0.5 * math.log(2 * math.pi * math.e * resolution**2)
        self._speaks = speaks
        self._before: dict[object, Record] = {}
        self._since: dict[tuple[object, str], object] = {}

    def add_to(self, rows: Sequence[Record]) -> None:
        """Writes what is unusual into the column ``event``.

        Args:
            rows: of one round, in the order of the bases.
        """
        for row, can_die in zip(rows, self._can_die, strict=True):
            found = self._found(row, self._before.get(row["site"]), can_die)
            for kind in ("dead", "flat", "constant", "far"):
                if kind not in found:
                    self._since.pop((row["site"], kind), None)
            texts: list[str] = []
            for kind, text in found.items():
                begins = (row["site"], kind) not in self._since
                since = self._since.setdefault((row["site"], kind), row["step"])
                if kind in ("moved", "widened"):  # over as soon as they are said
                    del self._since[row["site"], kind]
                elif not begins:
                    text = f"{text}, since step {since}"
                texts.append(text)
                if begins and self._speaks:
                    _LOG.warning("EAFO: step %s: %s: %s", row["step"], row["site"], text)
            if row.get("n"):
                self._before[row["site"]] = row
            row["event"] = "; ".join([*filter(None, [row.get("event")]), *texts]) or None  # pyright: ignore[reportCallIssue, reportArgumentType]

    def _found(self, row: Record, before: Record | None, can_die: bool) -> dict[str, str]:
        """Alerts by kind; comparisons with NaN, where samples did not suffice, are False."""
        found: dict[str, str] = {}
        dead, flat, entropy = (_number(row, name) for name in ("dead_fraction", "flat_fraction", "entropy"))
        mean, std = _number(row, "mean"), _number(row, "std")
        if can_die and dead >= DEAD:
            found["dead"] = f"{100 * dead:.0f} % of the units did not fire"
        if flat >= FLAT:
            found["flat"] = f"{100 * flat:.0f} % of the inputs lie where the function is flat"
        if std > 0 and entropy < self._least_entropy + CONSTANT:
            found["constant"] = f"the output is nearly constant, entropy {entropy:.2f} nats"
        farthest = max(_number(row, "high") - mean, mean - _number(row, "low"))
        if std > 0 and farthest > FAR * std:
            found["far"] = f"an input lies {farthest / std:.0f} standard deviations from the mean"
        if before is None:
            return found
        step, old_mean, old_std = before["step"], _number(before, "mean"), _number(before, "std")
        if old_std > 0 and abs(mean - old_mean) > MOVED * old_std:
            far = abs(mean - old_mean) / old_std
            found["moved"] = f"the mean input has moved by {far:.1f} standard deviations since step {step}"
        if old_std > 0 and (std > WIDENED * old_std or std * WIDENED < old_std):
            found["widened"] = f"the inputs are {std / old_std:.2g} times as wide as at step {step}"
        return found


def _number(row: Mapping[str, object], column: str) -> float:
    value = row.get(column)
    return float(value) if isinstance(value, (int, float)) else math.nan
