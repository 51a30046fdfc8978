"""The figures that can be drawn from a log; importable without matplotlib."""

from __future__ import annotations

__all__ = ["FIGURE_NAMES"]

FIGURE_NAMES = ("heatmap", "trajectories", "functions", "densities", "prediction", "ranking")
