"""Classification and regression on small tables, and the perceptron for them."""

from eafo_dynamic.experiments.tables.data import TabularData
from eafo_dynamic.experiments.tables.mlp import MLP

__all__ = ["MLP", "TabularData"]
