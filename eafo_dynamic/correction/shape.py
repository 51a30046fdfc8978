"""The EAFO correction shape ghat(u), by the analytic or the score route, and its table (Theory, section 4).

A shape belongs to a base and a density; c(z) = eps * sigma * ghat((z - mu) / sigma) corrects the base.
Shapes carry the sign of (3): with a ReLU and a Gaussian density ghat(u) = u exp(-u^2 / 2), which is
CRReLU's, and the output's differential entropy at fixed bandwidth falls for eps < 0.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from eafo_dynamic.correction.bases import Base, as_base, derivatives
from eafo_dynamic.correction.kernels import RoundKernel
from eafo_dynamic.density.estimators import Density, Gaussian
from eafo_dynamic.entropy.grids import fourier_size, smooth, to_double, transform
from eafo_dynamic.entropy.output import SmoothedOutput
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.internals.torch_internals import constant_result

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

Route = Literal["auto", "analytic", "score"]

HALF_WIDTH = 8.0  # L, in standard deviations of the pre-activation
KNOTS = 257  # of the table: 16 intervals per standard deviation

_GRID_STEP = 1 / 32  # of the grid on which a shape is computed
_GRID_HALF_WIDTH = 8.0
_SCORE_REFINEMENT = 2  # the score route transports mass on a grid this much finer
_TAPER = 1.0  # standard deviations over which shapes and tables fade out at their ends
_SQRT_2PI = math.sqrt(2 * math.pi)


@constant_result
def table_half_width() -> float:
    """HALF_WIDTH; torch.compile with dynamic=True takes any other global number for one that may change.

    Returns:
        The same.
    """
    return HALF_WIDTH


class Shape:
    """A correction shape ghat, one a site, in standardised coordinates.

    ``shape(u)`` is continuous with a continuous slope, has no unit, its largest |slope| is ``gain`` and
    it is 0 beyond 8 standard deviations.

    Args:
        pieces: cubics on the 512 intervals of [-8, 8], shape [sites, 4, 512]; None for u exp(-u^2 / 2).
        gain: largest |slope|, shape [sites]: 1 where the correction is clear, falling smoothly to 0
            where it is not told apart from none; 0 for a site whose density is missing.
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
        return _evaluate(self._pieces, u, _GRID_HALF_WIDTH, order=0)

    def slope(self, u: Tensor) -> Tensor:
        """D ghat / d u.

        Args:
            u: standardised pre-activations, shape [m] or [sites, m].

        Returns:
            Slope, float64, [sites, m]; at most 1 in magnitude.
        """
        u = self._points(u)
        if self._pieces is None:
            return self.gain[..., None] * ((1 - u.square()) * torch.exp(-0.5 * u.square()))
        return _evaluate(self._pieces, u, _GRID_HALF_WIDTH, order=1)

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
        return values, slopes / _GRID_STEP

    def _points(self, u: Tensor) -> Tensor:
        return to_double(u).to(self.gain.device).expand(*self.gain.shape, u.shape[-1])


def is_closed_form(base: Base, density: Density) -> bool:
    """Whether the shape is exactly u exp(-u^2 / 2): piecewise linear base, Gaussian density.

    Args:
        base: the base activation.
        density: density of the pre-activation.

    Returns:
        True if no table is needed.
    """
    return isinstance(density, Gaussian) and base.traits.piecewise_linear and base.traits.monotone


def choose_route(base: Base) -> Literal["analytic", "score"]:
    """The one rule that picks a route: analytic for monotone bases, score for all others.

    Args:
        base: the base activation.

    Returns:
        The route.

    Example:
        >>> choose_route(as_base("relu")), choose_route(as_base("gelu"))
        ('analytic', 'score')
    """
    return "analytic" if base.traits.monotone else "score"


def correction_shape(
    base: Base | str,
    density: Density,
    route: Route = "auto",
    resolution: float = 0.1,
    *,
    kernel: RoundKernel | None = None,
) -> Shape:
    """The correction shape ghat of (3), normalised to largest |slope| 1.

    Analytic: ghat = -sqrt(2 pi) [p_u' - p_u sigma f'' f' / (f'^2 + delta^2)], delta = r sigma |f''| / 2,
    so that f' counts as known up to its change over half a resolution length, and the ratio is at most
    1 / r. Score: ghat = -sqrt(2 pi) sigma |f'| p_u sbar_r(f(z)), which tends to the analytic one as r
    falls, for monotone f. Both are then smoothed with a Gaussian of width r, except where f is piecewise
    linear and the route analytic (there ghat is -sqrt(2 pi) p_u').

    Where the two parts of ghat cancel to less than their noise, at the worst activation of section 3,
    normalising would blow up estimation noise: the ratio rho of their sum to their size (L2 over u) is
    compared with a floor, and the gain rises smoothly from 0 at rho = floor to 1 at rho = 3 floor; floor
    = 0.02 + 1.5 times the density's relative noise.

    Args:
        base: the base activation, or its name.
        density: density of the pre-activation of each site.
        route: "auto" (see :func:`choose_route`), "analytic" or "score".
        resolution: r, in standard deviations of the output (score) or of the pre-activation (smoothing).
        kernel: what smooths outputs on the CPU; None for torch's operations.

    Returns:
        The shape; 0 for a site whose density is missing.

    Raises:
        ConfigError: unknown route, or a resolution outside [0.001, 1].

    Example:
        >>> density = Gaussian(torch.zeros(1), torch.ones(1))
        >>> ghat = correction_shape("relu", density)  # u exp(-u^2 / 2), the paper's CRReLU
        >>> round(ghat(torch.ones(1)).item(), 4)
        0.6065
    """
    base = as_base(base)
    if route not in ("auto", "analytic", "score"):
        raise ConfigError("route", route, "is not a route", "Use 'auto', 'analytic' or 'score'.")
    if not 1e-3 <= resolution <= 1:
        raise ConfigError("resolution", resolution, "is outside [0.001, 1]", "The default is 0.1.")
    chosen = choose_route(base) if route == "auto" else route
    if chosen == "analytic" and is_closed_form(base, density):
        return Shape(None, density.mean.isfinite().double(), "analytic")
    u = _grid(1, density.mean)
    if chosen == "analytic":
        raw, size = _analytic(base, density, u, resolution)
    else:
        raw, size = _score(base, density, u, resolution, kernel)
    smoothed = not (chosen == "analytic" and base.traits.piecewise_linear)
    return _normalise(raw, size, density, resolution if smoothed else 0.0, chosen)


def _grid(refinement: int, like: Tensor) -> Tensor:
    count = round(2 * _GRID_HALF_WIDTH / _GRID_STEP) * refinement + 1
    return torch.linspace(-_GRID_HALF_WIDTH, _GRID_HALF_WIDTH, count, dtype=like.dtype, device=like.device)


def _known(density: Density) -> tuple[Tensor, Tensor]:
    """Return mean and std of every site as columns, 0 where missing."""
    return torch.nan_to_num(density.mean)[..., None], torch.nan_to_num(density.std)[..., None]


def _analytic(base: Base, density: Density, u: Tensor, resolution: float) -> tuple[Tensor, Tensor]:
    """Return raw ghat, and the size that its two parts have before they cancel."""
    mean, std = _known(density)
    _, first, second = derivatives(base, mean + std * u)
    second = second * std
    bound = first.square() + (0.5 * resolution * second).square()
    ratio = torch.where(bound > 0, second * first / bound.clamp(min=1e-300), 0.0)
    p, dp = density.pdf(u), density.dpdf(u)
    return -_SQRT_2PI * (dp - p * ratio), _SQRT_2PI * (_norm(dp) + _norm(p * ratio))


def _score(
    base: Base, density: Density, u: Tensor, resolution: float, kernel: RoundKernel | None
) -> tuple[Tensor, Tensor]:
    """Return raw ghat, and the size that it would have with the score of a unit Gaussian's scale."""
    mean, std = _known(density)
    fine = _grid(_SCORE_REFINEMENT, u)
    output, slope = derivatives(base, mean + std * fine, order=1)[:2]
    # float32 is ample for positions on a grid and twice as fast
    spread, score = _spread_and_score(output.float(), density.pdf(fine), resolution, kernel)
    coarse = slice(None, None, _SCORE_REFINEMENT)
    weight = std * slope[..., coarse].abs() * density.pdf(u)
    size = _norm(torch.where(spread > 0, weight / torch.where(spread > 0, spread, 1.0), 0.0))
    return -_SQRT_2PI * weight * score[..., coarse], _SQRT_2PI * size


def _spread_and_score(
    output: Tensor, weight: Tensor, resolution: float, kernel: RoundKernel | None
) -> tuple[Tensor, Tensor]:
    """Standard deviation of outputs, float64, [sites, 1], and their score per unit of the output, [sites, n]."""
    if kernel is not None and kernel.takes(output):
        found = kernel.smooth(output, resolution, weight.to(output).contiguous(), sampled=False, score=True)
        if found is not None and found.score is not None:
            spread = found.column("std")[:, None]
            return spread, found.score * torch.where(spread > 0, 1 / spread, 0.0)
    smoothed = SmoothedOutput(output, resolution, weights=weight)
    return smoothed.std.double()[..., None], smoothed.score


def _norm(values: Tensor) -> Tensor:
    return (values.square().sum(-1) * _GRID_STEP).sqrt()


def _normalise(raw: Tensor, size: Tensor, density: Density, width: float, route: Literal["analytic", "score"]) -> Shape:
    """Return the shape smoothed, scaled to slope 1 and faded out below its floor."""
    nodes = raw.shape[-1]
    length = fourier_size(nodes + 64)
    spectrum = transform(torch.nan_to_num(raw).reshape(-1, nodes), length)
    variance = (width / _GRID_STEP) ** 2
    values = smooth(spectrum, variance, length)[:, :nodes].reshape(raw.shape)
    slopes = smooth(spectrum, variance, length, 1)[:, :nodes].reshape(raw.shape)  # per step
    pieces = _pieces(*_faded(values, slopes, _grid(1, raw), _GRID_HALF_WIDTH, _GRID_STEP))
    steepest = _steepest_slope(pieces) / _GRID_STEP
    floor = 0.02 + 1.5 * torch.nan_to_num(density.derivative_noise(), nan=math.inf) / 0.376
    ratio = _norm(values) / size.clamp(min=1e-300)
    t = ((ratio / floor - 1) / 2).clamp(0, 1)
    gain = torch.where(steepest > 1e-12, t * t * (3 - 2 * t), 0.0)
    return Shape(pieces * (gain / steepest.clamp(min=1e-12))[..., None, None], gain, route)


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
    values, slopes = shape.at_nodes(knots) if half_width == _GRID_HALF_WIDTH else (None, None)
    u = torch.linspace(-half_width, half_width, knots, dtype=torch.float64, device=shape.gain.device)
    if values is None or slopes is None:
        values, slopes = shape(u), shape.slope(u)
    table = _pieces(*_faded(values, slopes * step, u, half_width, step))
    return table / (_steepest_slope(table) / step).clamp(min=1.0)[..., None, None]


def _faded(values: Tensor, slopes: Tensor, u: Tensor, half_width: float, step: float) -> tuple[Tensor, Tensor]:
    """Return values and slopes per step, brought smoothly to 0 over the outermost standard deviation."""
    t = ((half_width - u.abs()) / _TAPER).clamp(0, 1)
    fade, fall = t * t * (3 - 2 * t), -u.sign() * 6 * t * (1 - t) * (step / _TAPER)
    return values * fade, slopes * fade + values * fall


def _pieces(values: Tensor, slopes: Tensor) -> Tensor:
    """Return cubics with these values and slopes (per interval) at the knots, shape [..., 4, knots - 1]."""
    v0, v1, d0, d1 = values[..., :-1], values[..., 1:], slopes[..., :-1], slopes[..., 1:]
    rise = v1 - v0
    return torch.stack([v0, d0, 3 * rise - 2 * d0 - d1, d0 + d1 - 2 * rise], dim=-2)


def _steepest_slope(table: Tensor) -> Tensor:
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
    """Return the value or the slope of piecewise cubics, 0 outside [-half_width, half_width]."""
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
    value = a0 + t * (a1 + t * (a2 + t * a3)) if order == 0 else (a1 + t * (2 * a2 + t * 3 * a3)) * per_unit
    return torch.where(position == within, value, 0.0)  # false for NaN too
