"""The correction of an activation: bases, shapes, and the kernels that compute it."""

from eafo_dynamic.correction.shape import (
    HALF_WIDTH,
    KNOTS,
    Route,
    Shape,
    choose_route,
    correction_shape,
    evaluate_table,
    is_closed_form,
    table_half_width,
    tabulate,
)

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
