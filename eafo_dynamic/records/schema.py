"""What a correction log holds: file names, schema version and every column with its unit and meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "AMPLITUDES",
    "COLUMNS",
    "CORRECTIONS",
    "FIT_END",
    "FORMAT",
    "MANIFEST",
    "SCHEMA_VERSION",
    "SHAPES",
    "Column",
    "Record",
]

FORMAT = "eafo-correction-log"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CORRECTIONS = "corrections.jsonl"
SHAPES = "shapes.jsonl"
FIT_END = "fit_end"  # only the rows and snapshots of the end of a fit have this key

AMPLITUDES = ("eps", "lift", "gain", "slope")
"""Columns of the terms' amplitudes; a log has those of the terms that its run had."""

Record = dict[str, object]
"""One row of the correction log: one site at one update round, or at the end of a fit."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the correction log.

    Args:
        name: key of the column in a row.
        kind: `int`, `float` or `text`; every kind may be missing (null) but in `step` and `site`.
        unit: unit of the value; `1` for a pure number, empty for text.
        meaning: what the value is, in one line.
        of: how an update round computes it: a function of a ``policy.diagnostics.RoundFindings`` that gives a tensor,
            shape [sites], or None where this run has no such value; None for columns that a round does not compute.
    """

    name: str
    kind: Literal["int", "float", "text"]
    unit: str
    meaning: str
    of: Callable[[Any], Any] | None = None


def _term_columns(name: str, meaning: str) -> tuple[Column, ...]:
    """What a row says of one term; missing where corrections do not have it."""
    return (
        Column(name, "float", "1", meaning, lambda found: found.of_term(name, found.new.amplitudes)),
        Column(
            f"delta_{name}",
            "float",
            "1",
            f"change of {name} since the site's previous update",
            lambda found: found.of_term(name, found.delta),
        ),
        Column(
            f"d_entropy_d_{name}",
            "float",
            "nats",
            f"predicted change of entropy for each unit of {name}, before the update",
            lambda found: found.of_term(name, found.gradient),
        ),
    )


_Z = "pre-activation"
_COLUMNS = (
    Column("step", "int", "optimiser steps", "optimiser steps taken when the update was made"),
    Column("epoch", "int", "epochs", "epoch in which the update was made, counted from 0"),
    Column("site", "text", "", "name of the site: one call of one activation in one layer"),
    *_term_columns("eps", "amplitude of the correction after the update; 0 is the base function"),
    *_term_columns("lift", "amplitude of the second local term after the update"),
    *_term_columns("gain", "amplitude of base(z) after the update"),
    *_term_columns("slope", "amplitude of z after the update"),
    Column(
        "entropy",
        "float",
        "nats",
        "resolution-r entropy of the standardised output before the update; largest for a Gaussian",
        lambda found: found.mixed.entropy,
    ),
    Column(
        "entropy_predicted",
        "float",
        "nats",
        "entropy after the update, predicted to first order",
        lambda found: found.entropy_predicted,
    ),
    Column(
        "entropy_after",
        "float",
        "nats",
        "entropy after the update, measured on the same samples",
        lambda found: found.entropy_after,
    ),
    Column(
        "entropy_drift",
        "float",
        "nats",
        "d_entropy_d_eps x delta_eps: what the move of eps was worth",
        lambda found: found.of_term("eps", found.gradient * found.delta),
    ),
    Column(
        "continuous_entropy",
        "float",
        "nats",
        "differential entropy of the outputs that are not repeated values",
        lambda found: found.mixed.continuous_entropy,
    ),
    Column(
        "atom_mass",
        "float",
        "probability",
        "share of the outputs that are repeated values",
        lambda found: found.mixed.atom_mass,
    ),
    Column(
        "mean",
        "float",
        _Z,
        "mean of the sampled pre-activations",
        lambda found: found.moments.mean,
    ),
    Column(
        "std",
        "float",
        _Z,
        "standard deviation of the sampled pre-activations",
        lambda found: found.moments.std,
    ),
    Column(
        "skew",
        "float",
        "1",
        "skewness of the sampled pre-activations; 0 for a Gaussian",
        lambda found: found.moments.skew,
    ),
    Column(
        "kurtosis",
        "float",
        "1",
        "excess kurtosis of the sampled pre-activations; 0 for a Gaussian",
        lambda found: found.moments.kurtosis,
    ),
    Column(
        "negentropy",
        "float",
        "nats",
        "a Gaussian's entropy less that of the pre-activations: how far from one",
        lambda found: found.entropy_of_gaussian - found.entropy_of_samples,
    ),
    Column(
        "n",
        "int",
        "samples",
        "finite pre-activations behind this row",
        lambda found: found.moments.n,
    ),
    Column(
        "mu",
        "float",
        _Z,
        "centre of the correction after the update",
        lambda found: found.new.shape[:, 0],
    ),
    Column(
        "sigma",
        "float",
        _Z,
        "width of the correction after the update",
        lambda found: found.new.shape[:, 1],
    ),
    Column(
        "dead_fraction",
        "float",
        "probability",
        "share of the units that no sample drove above zero",
        lambda found: found.dead,
    ),
    Column(
        "loss",
        "float",
        "units of the loss",
        "mean training loss since the last update, the same for all sites; missing where nobody shows it",
    ),
    Column("low", "float", _Z, "smallest sampled pre-activation; of watched models only"),
    Column("high", "float", _Z, "largest sampled pre-activation; of watched models only"),
    Column(
        "flat_fraction",
        "float",
        "probability",
        "share of the samples at which the function's slope is below 0.01; of watched models only",
    ),
    Column(
        "n_nonfinite",
        "int",
        "samples",
        "NaN and infinite pre-activations, left out",
        lambda found: found.nonfinite,
    ),
    Column("policy", "text", "", "policy that moved eps"),
    Column("event", "text", "", "what was out of the ordinary at this update; missing where nothing was"),
    Column(
        FIT_END,
        "text",
        "",
        "how the fit ended: completed, interrupted or failed; only in rows that say where it left the model",
    ),
)

COLUMNS: dict[str, Column] = {column.name: column for column in _COLUMNS}
