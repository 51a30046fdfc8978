"""The EAFO correction shape ghat(u) of a base and a density, by the analytic or the score route (Theory, section 4).

    c(z) = eps * sigma * ghat((z - mu) / sigma)                                                              (3)

corrects the base. Shapes carry the sign of (3): with a ReLU and a Gaussian density ghat(u) = u exp(-u^2 / 2), which is
CRReLU's, and the output's differential entropy at fixed bandwidth falls for eps < 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from eafo_dynamic.correction.bases import Base, as_base, derivatives
from eafo_dynamic.correction.kernels import RoundKernel
from eafo_dynamic.correction.table import GRID_HALF_WIDTH, GRID_STEP, Shape, cubic_pieces, faded, steepest_slope
from eafo_dynamic.density.estimators import Density, Gaussian
from eafo_dynamic.entropy.grids import fourier_size, smooth, transform
from eafo_dynamic.entropy.output import SmoothedOutput
from eafo_dynamic.errors import ConfigError

__all__ = ["Route", "choose_route", "correction_shape", "is_closed_form"]

Route = Literal["auto", "analytic", "score"]

# How many points per GRID_STEP each route works with. The analytic one resolves how f''/f' turns where f saturates
# within a few hundredths of a standard deviation; the score route moves mass from point to point.
_ANALYTIC_REFINEMENT = 4
_SCORE_REFINEMENT = 2
_SQRT_2PI = math.sqrt(2 * math.pi)
_GAUSSIAN_SLOPE_NORM = 0.376  # L2 norm of p_u' of a Gaussian


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
    if base.traits.monotone:
        return "analytic"
    return "score"


def correction_shape(
    base: Base | str,
    density: Density,
    route: Route = "auto",
    resolution: float = 0.1,
    *,
    kernel: RoundKernel | None = None,
) -> Shape:
    """The correction shape ghat of (3), normalised to largest |slope| 1.

    Analytic route, with L = sigma f''/f' the slope of log f' per standard deviation:

        ghat = -sqrt(2 pi) [p_u' - p_u L / (1 + (r L / 2)^2)]

    which is f'' f' / (f'^2 + delta^2) with delta = r sigma |f''| / 2: f' counts as known up to its change over half
    a resolution length, and the ratio is at most 1 / r. L is in closed form for torch's own activations, so that it
    holds where they saturate and f' is 0 in floating point, and is averaged over the cells of the grid; the shape
    is then exact to 0.5 % of its peak up to sigma = 1e6, the largest that was tried. For other functions L is made
    of f' and f'' by automatic differentiation, and is 0 where f' is: one that saturates within the data (tanh does
    so at |z| = 19) has a wrong shape there. Give it the score route.

    Score route:

        ghat = -sqrt(2 pi) sigma |f'| p_u sbar_r(f(z))

    which tends to the analytic one as r falls, for monotone f. Both are then smoothed with a Gaussian of width r,
    except where f is piecewise linear and the route analytic: there ghat is -sqrt(2 pi) p_u'.

    Where the two parts of ghat cancel to less than their noise, at the worst activation of section 3, normalising
    would blow up estimation noise. With rho the ratio of their sum to their size (L2 over u), the gain rises smoothly
    from 0 at rho = floor to 1 at rho = 3 floor; floor = 0.02 + 1.5 times the density's relative noise.

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
    if chosen == "score":
        raw, size = _score(base, density, resolution, kernel)
        return _normalised(raw, size, density, resolution, chosen)
    if is_closed_form(base, density):
        return Shape(None, density.mean.isfinite().double(), chosen)
    if base.traits.piecewise_linear:  # p_u' is smooth already
        raw, size = _analytic(base, density, resolution, refinement=1)
        return _normalised(raw, size, density, 0.0, chosen)
    raw, size = _analytic(base, density, resolution, _ANALYTIC_REFINEMENT)
    return _normalised(raw, size, density, resolution, chosen, _ANALYTIC_REFINEMENT)


def _grid(refinement: int, density: Density) -> Tensor:
    """Points of [-8, 8], ``refinement`` per GRID_STEP."""
    count = round(2 * GRID_HALF_WIDTH / GRID_STEP) * refinement + 1
    like = density.mean
    return torch.linspace(-GRID_HALF_WIDTH, GRID_HALF_WIDTH, count, dtype=like.dtype, device=like.device)


def _known(density: Density) -> tuple[Tensor, Tensor]:
    """Mean and std of every site as columns, 0 where missing."""
    return torch.nan_to_num(density.mean)[..., None], torch.nan_to_num(density.std)[..., None]


def _norm(values: Tensor, step: float = GRID_STEP) -> Tensor:
    """L2 norm over u of values on a grid of that step."""
    return (values.square().sum(-1) * step).sqrt()


def _analytic(base: Base, density: Density, resolution: float, refinement: int) -> tuple[Tensor, Tensor]:
    """Raw ghat on the refined grid, and the size that its two parts have before they cancel."""
    u = _grid(refinement, density)
    step = GRID_STEP / refinement
    p = density.pdf(u)
    dp = density.dpdf(u)
    saturating = p * _bounded_log_slope(base, density, u, step, resolution)
    return -_SQRT_2PI * (dp - saturating), _SQRT_2PI * (_norm(dp, step) + _norm(saturating, step))


def _bounded_log_slope(base: Base, density: Density, u: Tensor, step: float, resolution: float) -> Tensor:
    """L / (1 + (r L / 2)^2), L = sigma f''/f', at points that lie a step apart."""
    mean, std = _known(density)
    z = mean + std * u
    if base.log_slope is None:
        _, first, second = derivatives(base, z)
        second = second * std
        bound = first.square() + (0.5 * resolution * second).square()
        return torch.where(bound > 0, second * first / bound.clamp(min=1e-300), 0.0)

    if base.log_slope.integral is not None:
        return _mean_over_cells(base.log_slope.integral, z, std, step, resolution)

    def bounded(log_slope: Tensor) -> Tensor:
        return log_slope / (1 + (0.5 * resolution * log_slope).square())

    below, above, _ = base.log_slope
    if below is above:
        return bounded(std * below(z))
    # f''/f' jumps at z = 0: each point stands for the cell around it, of which this share lies above 0
    share = (z / (std * step).clamp(min=1e-300) + 0.5).clamp(0, 1)
    return torch.lerp(bounded(std * below(z.clamp(max=0))), bounded(std * above(z.clamp(min=0))), share)


def _mean_over_cells(
    integral: Callable[[Tensor, Tensor], Tensor], z: Tensor, std: Tensor, step: float, resolution: float
) -> Tensor:
    """L / (1 + (r L / 2)^2) as its mean over the cell around each point, from its antiderivative.

    At sigma = 1000 tanh turns within a thousandth of a standard deviation, which no grid of points sees.

    Returns:
        The means, of the shape of z.
    """
    safe = std.clamp(min=1e-30)
    b = (0.5 * resolution * safe).square()
    half = 0.5 * step * safe
    return (integral(z + half, b) - integral(z - half, b)) / step


def _score(base: Base, density: Density, resolution: float, kernel: RoundKernel | None) -> tuple[Tensor, Tensor]:
    """Raw ghat, and the size that it would have with the score of a unit Gaussian's scale."""
    mean, std = _known(density)
    u = _grid(1, density)
    fine = _grid(_SCORE_REFINEMENT, density)
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


def _normalised(
    raw: Tensor,
    size: Tensor,
    density: Density,
    width: float,
    route: Literal["analytic", "score"],
    refinement: int = 1,
) -> Shape:
    """The shape smoothed with a Gaussian of that width, scaled to slope 1 and faded out below its floor."""
    values, slopes = _smoothed(raw, width, refinement)
    pieces = cubic_pieces(*faded(values, slopes, _grid(1, density), GRID_HALF_WIDTH, GRID_STEP))
    steepest = steepest_slope(pieces) / GRID_STEP
    floor = 0.02 + 1.5 * torch.nan_to_num(density.derivative_noise(), nan=math.inf) / _GAUSSIAN_SLOPE_NORM
    ratio = _norm(values) / size.clamp(min=1e-300)
    t = ((ratio / floor - 1) / 2).clamp(0, 1)
    gain = torch.where(steepest > 1e-12, t * t * (3 - 2 * t), 0.0)
    return Shape(pieces * (gain / steepest.clamp(min=1e-12))[..., None, None], gain, route)


def _smoothed(raw: Tensor, width: float, refinement: int) -> tuple[Tensor, Tensor]:
    """Values and slopes (per GRID_STEP) on the grid, of raw values on a finer one, smoothed by a Gaussian."""
    nodes = raw.shape[-1]
    length = fourier_size(nodes + 64 * refinement)
    spectrum = transform(torch.nan_to_num(raw).reshape(-1, nodes), length)
    variance = (width * refinement / GRID_STEP) ** 2
    coarse = slice(None, nodes, refinement)
    values = smooth(spectrum, variance, length)[:, coarse]
    slopes = smooth(spectrum, variance, length, 1)[:, coarse] * refinement
    sites = raw.shape[:-1]
    return values.reshape(*sites, -1), slopes.reshape(*sites, -1)
