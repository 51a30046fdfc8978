"""A correction shape as piecewise cubics: evaluated in float64, and tabulated for the kernels that read it.

On interval i of [-L, L], with t in [0, 1] from its left end,

    ghat(u) = a0 + t (a1 + t (a2 + t a3))

"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from eafo_dynamic.entropy.grids import to_double
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.internals.torch_internals import constant_result

__all__ = [
    "GRID_HALF_WIDTH",
    "GRID_STEP",
    "HALF_WIDTH",
    "KNOTS",
    "Shape",
    "cubic_pieces",
    "evaluate_table",
    "faded",
    "steepest_slope",
    "table_half_width",
    "tabulate",
]

HALF_WIDTH = 8.0  # L of the tables, in standard deviations of the pre-activation
KNOTS = 257  # of the tables: 16 intervals per standard deviation

GRID_HALF_WIDTH = 8.0  # L of the cubics of a Shape
GRID_STEP = 1 / 32  # length of their intervals

_TAPER = 1.0  # standard deviations over which shapes and tables fade out at their ends


@constant_result
def table_half_width() -> float:
    """HALF_WIDTH; torch.compile with dynamic=True takes any other global number for one that may change.

    Returns:
        The same.
    """
    return HALF_WIDTH


class Shape:
    """A correction shape ghat, one per site, in standardised coordinates.

    ``shape(u)`` is continuous with a continuous slope, has no unit, its largest |slope| is ``gain`` and
    it is 0 beyond 8 standard deviations.

    Args:
        pieces: cubics on the 512 intervals of [-8, 8], shape [sites, 4, 512]; None for u exp(-u^2 / 2).
        gain: largest |slope|, shape [sites]: 1 where the correction is clear, falling smoothly to 0
            where it cannot be told from none; 0 for a site whose density is missing.
        route: which route made it.
    """

    def __init__(self, pieces: Tensor | None, gain: Tensor, route: Literal["analytic", "score"]) -> None:
        self._pieces = pieces
        self.gain = gain
        self.route = route

    @property
    def closed_form(self) -> bool:
        """Whether the shape is exactly u exp(-u^2 / 2)."""
        return self._pieces is None

    def __call__(self, u: Tensor) -> Tensor:
        """ghat(u).

        Args:
            u: standardised pre-activations, shape [m] or [sites, m].

        Returns:
            Shape, float64, [sites, m].
        """
        u = self._points(u)
        if self._pieces is None:
            return self.gain[..., None] * (u * torch.exp(-0.5 * u.square()))
        return _evaluate(self._pieces, u, GRID_HALF_WIDTH, order=0)

    def slope(self, u: Tensor) -> Tensor:
        """The slope d ghat / du.

        Args:
            u: standardised pre-activations, shape [m] or [sites, m].

        Returns:
            Slope, float64, [sites, m]; at most 1 in magnitude.
        """
        u = self._points(u)
        if self._pieces is None:
            return self.gain[..., None] * ((1 - u.square()) * torch.exp(-0.5 * u.square()))
        return _evaluate(self._pieces, u, GRID_HALF_WIDTH, order=1)

    def at_nodes(self, count: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Values and slopes at equally spaced points of [-8, 8], if these are nodes of the pieces; 0 at the last.

        Args:
            count: number of points, ends included.

        Returns:
            Both float64, shape [sites, count]; None for both where a point lies inside a piece, or there are no pieces.
        """
        if self._pieces is None or self._pieces.shape[-1] % (count - 1):
            return None, None
        nodes = self._pieces[..., :2, :: self._pieces.shape[-1] // (count - 1)]
        values, slopes = torch.nn.functional.pad(nodes, (0, 1)).unbind(-2)
        return values, slopes / GRID_STEP

    def _points(self, u: Tensor) -> Tensor:
        return to_double(u).to(self.gain.device).expand(*self.gain.shape, u.shape[-1])


def tabulate(shape: Shape, half_width: float = HALF_WIDTH, knots: int = KNOTS) -> Tensor:
    """Piecewise cubic coefficients of a shape, with value and slope 0 at both ends.

    On interval i of [-L, L], with t in [0, 1] from its left end, ghat = a0 + t (a1 + t (a2 + t a3)). The
    table is continuous with a continuous slope; its largest |slope| is that of the shape, and never
    above 1. A taper over the outermost standard deviation brings it to 0.

    Args:
        shape: the shape.
        half_width: L, in standard deviations.
        knots: number of knots K, ends included.

    Returns:
        Coefficients, float64, shape [sites, 4, K - 1].

    Raises:
        ConfigError: half_width or knots cannot carry a shape.
    """
    if knots < 9:
        raise ConfigError("knots", knots, "is too few for a shape", f"Use 9 or more; the default is {KNOTS}.")
    if not half_width > _TAPER:
        raise ConfigError("half_width", half_width, "leaves no room for the taper", "The default is 8.")
    step = 2 * half_width / (knots - 1)
    u = torch.linspace(-half_width, half_width, knots, dtype=torch.float64, device=shape.gain.device)
    values = None
    slopes = None
    if half_width == GRID_HALF_WIDTH:
        values, slopes = shape.at_nodes(knots)
    if values is None or slopes is None:
        values = shape(u)
        slopes = shape.slope(u)
    table = cubic_pieces(*faded(values, slopes * step, u, half_width, step))
    return table / (steepest_slope(table) / step).clamp(min=1.0)[..., None, None]


def faded(values: Tensor, slopes: Tensor, u: Tensor, half_width: float, step: float) -> tuple[Tensor, Tensor]:
    """Values and slopes per step, brought smoothly to 0 over the outermost standard deviation."""
    t = ((half_width - u.abs()) / _TAPER).clamp(0, 1)
    fade = t * t * (3 - 2 * t)
    fall = -u.sign() * 6 * t * (1 - t) * (step / _TAPER)  # its slope
    return values * fade, slopes * fade + values * fall


def cubic_pieces(values: Tensor, slopes: Tensor) -> Tensor:
    """Cubics with these values and slopes (per interval) at the knots, shape [..., 4, knots - 1]."""
    v0, v1, d0, d1 = values[..., :-1], values[..., 1:], slopes[..., :-1], slopes[..., 1:]
    rise = v1 - v0
    return torch.stack([v0, d0, 3 * rise - 2 * d0 - d1, d0 + d1 - 2 * rise], dim=-2)


def steepest_slope(table: Tensor) -> Tensor:
    """Largest |slope| of tables [sites, 4, intervals], per interval length, shape [sites]."""
    _, a1, a2, a3 = table.unbind(-2)
    # The slope is a parabola in t: its extremes are at the ends and at its vertex. A vertex at infinity is an end.
    vertex = (a2 / (-3 * a3)).clamp_(0, 1).nan_to_num_(nan=0.0)
    inner = a1 + vertex * (2 * a2 + vertex * 3 * a3)
    first, last, between = (part.abs().amax(-1) for part in (a1, a1 + 2 * a2 + 3 * a3, inner))
    return torch.maximum(torch.maximum(first, last), between)


def evaluate_table(table: Tensor, u: Tensor, half_width: float = HALF_WIDTH) -> Tensor:
    """ghat(u) read off a table; 0 outside [-L, L] and for NaN.

    The plain reference that the fused kernels are held against.

    Args:
        table: coefficients, shape [sites, 4, K - 1] or [4, K - 1].
        u: standardised pre-activations, shape [sites, m] or [m], accordingly.
        half_width: L of the table.

    Returns:
        Shape, [sites, m] or [m], dtype of the table.
    """
    return _evaluate(table, u, half_width, order=0)


def _evaluate(table: Tensor, u: Tensor, half_width: float, order: Literal[0, 1]) -> Tensor:
    """The value or the slope of piecewise cubics, 0 outside [-half_width, half_width]."""
    intervals = table.shape[-1]
    per_unit = intervals / (2 * half_width)
    position = (u.to(table.dtype) + half_width) * per_unit
    within = position.clamp(0, intervals)
    index = within.nan_to_num(nan=0.0).int().clamp(max=intervals - 1)  # by way of int32, which is vectorised
    t = within - index
    index = index.long().expand(*table.shape[:-2], u.shape[-1])
    if table.dim() > 2:
        site = torch.arange(math.prod(table.shape[:-2]), device=u.device)
        index = index + intervals * site.view(*table.shape[:-2], 1)
    # from one row of all sites: a lookup along one dimension is several times faster than a gather along the last
    a0, a1, a2, a3 = (row.reshape(-1).index_select(0, index.reshape(-1)).view(index.shape) for row in table.unbind(-2))
    inside = position == within  # false for NaN too
    if order == 0:
        return torch.where(inside, a0 + t * (a1 + t * (a2 + t * a3)), 0.0)
    return torch.where(inside, (a1 + t * (2 * a2 + t * 3 * a3)) * per_unit, 0.0)
