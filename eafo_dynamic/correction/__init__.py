"""The correction of an activation: bases, shapes, and the kernels that compute it."""

from eafo_dynamic.correction.shape import Route, choose_route, correction_shape, is_closed_form
from eafo_dynamic.correction.table import HALF_WIDTH, KNOTS, Shape, evaluate_table, table_half_width, tabulate

__all__ = [
    "HALF_WIDTH",
    "KNOTS",
    "Route",
    "Shape",
    "choose_route",
    "correction_shape",
    "evaluate_table",
    "is_closed_form",
    "table_half_width",
    "tabulate",
]
