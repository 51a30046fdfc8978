"""What a correction log holds: file names, schema version and every column with its unit and meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["COLUMNS", "CORRECTIONS", "FORMAT", "MANIFEST", "SCHEMA_VERSION", "SHAPES", "Column"]

FORMAT = "eafo-correction-log"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CORRECTIONS = "corrections.jsonl"
SHAPES = "shapes.jsonl"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the correction log.

    Args:
        name: key of the column in a row.
        kind: `int`, `float` or `text`; every kind may be missing (null) but in `step` and `site`.
        unit: unit of the value; `1` for a pure number, empty for text.
        meaning: what the value is, in one line.
    """

    name: str
    kind: Literal["int", "float", "text"]
    unit: str
    meaning: str


_COLUMNS = (
    Column("step", "int", "optimiser steps", "optimiser steps taken when the update was made"),
    Column("epoch", "int", "epochs", "epoch in which the update was made, counted from 0"),
    Column("site", "text", "", "name of the site: one call of one activation in one layer"),
    Column("eps", "float", "1", "amplitude of the correction after the update; 0 is the base function"),
    Column("delta_eps", "float", "1", "change of eps since the site's previous row"),
    Column(
        "d_entropy_d_eps",
        "float",
        "nats",
        "predicted change of entropy for each unit of eps, at the eps before the update",
    ),
    Column(
        "entropy",
        "float",
        "nats",
        "resolution-r entropy of the output divided by its standard deviation; largest for a Gaussian",
    ),
    Column(
        "continuous_entropy",
        "float",
        "nats",
        "differential entropy of the output without its repeated values",
    ),
    Column("atom_mass", "float", "probability", "share of the outputs that are repeated values"),
    Column(
        "dead_fraction",
        "float",
        "probability",
        "share of the units that no sample drove above zero",
    ),
    Column("mean", "float", "pre-activation", "mean of the sampled pre-activations"),
    Column("std", "float", "pre-activation", "standard deviation of the sampled pre-activations"),
    Column("skew", "float", "1", "skewness of the sampled pre-activations; 0 for a Gaussian"),
    Column("kurtosis", "float", "1", "excess kurtosis of the sampled pre-activations; 0 for a Gaussian"),
    Column("n", "int", "samples", "pre-activations behind this row"),
    Column("mu", "float", "pre-activation", "centre of the correction after the update"),
    Column("sigma", "float", "pre-activation", "width of the correction after the update"),
    Column("policy", "text", "", "policy that moved eps"),
    Column("event", "text", "", "what was out of the ordinary at this update; missing where nothing was"),
)

COLUMNS: dict[str, Column] = {column.name: column for column in _COLUMNS}
