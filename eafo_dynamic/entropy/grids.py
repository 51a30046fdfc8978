"""Standardising samples, and sums and filters on uniform grids: what the estimators of this package share.

Sites stand in the first dimension; positions on a grid are counted in its steps.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SPLINE_VARIANCE", "Splines", "Standardised", "fourier_size", "hermite", "smooth", "to_double", "transform"]

# Variance, in squared steps, that a quadratic spline adds wherever the sample lies between the nodes. A
# linear one would add between 0 and 1/4, which shows in the entropy of an atom.
SPLINE_VARIANCE = 0.25

_LARGE = 1 << 20  # samples per site above which sums need float64
_REACH = {torch.float32: 1e30, torch.float64: 1e300}  # ranges up to this, and down to its inverse, are safe


def to_double(values: Tensor) -> Tensor:
    """The values in float64, on the CPU where the device has no float64.

    Args:
        values: any tensor.

    Returns:
        The same values, detached.
    """
    return _where_float64_is(values.detach()).double()


def _where_float64_is(values: Tensor) -> Tensor:
    if values.device.type == "mps":
        return values.cpu()
    return values


@dataclass(frozen=True, eq=False)
class Standardised:
    """Samples of every site mapped onto [0, 1], and their moments in the samples' own units.

    Args:
        unit: (x - low) / span, 0 where missing and for a constant, float32 or float64, shape [sites, n].
        weight: weights, 0 where missing, same shape and dtype; None if every sample counts once.
        low: smallest sample, float64, shape [sites, 1]; 0 without samples.
        span: largest less smallest sample, float64, shape [sites, 1].
        count: number of samples, or sum of weights, float64, shape [sites, 1].
        mean: mean, float64, shape [sites, 1]; NaN without samples.
        std: population standard deviation, float64, shape [sites, 1]; exactly 0 for a constant.
    """

    unit: Tensor
    weight: Tensor | None
    low: Tensor
    span: Tensor
    count: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, samples: Tensor, weights: Tensor | None = None) -> Standardised:
        """Standardise samples; a constant gets std 0 exactly, no finite input overflows.

        Args:
            samples: samples, shape [..., n]; non-finite ones are missing.
            weights: nonnegative weights that broadcast against the samples; None for 1 each.

        Returns:
            The standardised samples.
        """
        rows = _rows(samples)
        low = rows.amin(1, keepdim=True).double()
        high = rows.amax(1, keepdim=True).double()
        # The only waits for the device: whether anything is missing, and whether a range is out of reach.
        weight = None
        if weights is not None or not bool((low.isfinite() & high.isfinite()).all()):
            weight, low, high = _present(rows, samples, weights)
            rows = torch.where(weight > 0, rows, low.to(rows.dtype))
        span = high - low
        reach = _REACH[rows.dtype]
        if bool(((span > reach) | ((span > 0) & (span < 1 / reach))).any()):
            if rows.dtype == torch.float32:
                if weight is not None:
                    weight = weight.double()
                return cls.of(rows.double(), weight)
            if bool((span > reach).any()):
                return _shrunk(cls, rows, weight)
            span = torch.where(span < 1 / reach, 0.0, span)  # closer than any float64 arithmetic resolves
        inverse = torch.where(span > 0, 1 / span, 0.0)
        unit = (rows - low.to(rows.dtype)) * inverse.to(rows.dtype)
        count, mean, variance = _unit_moments(unit, weight)
        return cls(unit, weight, low, span, count, low + span * mean, span * variance.sqrt())

    @functools.cached_property
    def total(self) -> Tensor:
        """The count, 1 where there is no sample, for dividing."""
        return torch.where(self.count > 0, self.count, 1.0)

    def mean_of(self, values: Tensor) -> Tensor:
        """Weighted mean over the samples.

        Args:
            values: one value per sample, shape [sites, n].

        Returns:
            Mean, float64, shape [sites, 1]; 0 without samples.
        """
        if self.weight is not None:
            values = values * self.weight
        return values.sum(1, keepdim=True).double() / self.total


def _shrunk(cls: type[Standardised], rows: Tensor, weight: Tensor | None) -> Standardised:
    """Return samples of a range that overflows, standardised at a fraction of their size."""
    factor = 2.0**-40
    small = cls.of(rows.clamp(-8e307, 8e307) * factor, weight)
    low, span, mean, std = (part / factor for part in (small.low, small.span, small.mean, small.std))
    return cls(small.unit, small.weight, low, span, small.count, mean, std)


def _rows(samples: Tensor) -> Tensor:
    """Return samples as [sites, n >= 1] in float32 or float64, on a device that has float64."""
    x = _where_float64_is(samples.detach())
    n = x.shape[-1]
    wide = x.dtype == torch.float64 or n > _LARGE
    x = x.double() if wide else x.float()
    sites = math.prod(x.shape[:-1])
    if n == 0:  # one missing sample stands for none, so that every site has a row to reduce over
        return x.new_full((sites, 1), math.nan)
    return x.reshape(sites, n)


def _present(rows: Tensor, samples: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights with the missing samples at 0, and the range of the others."""
    known = rows.isfinite()
    weight = known.to(rows.dtype)
    if weights is not None and samples.shape[-1]:
        given = weights.detach().to(rows.device, rows.dtype).expand(samples.shape).reshape(-1, samples.shape[-1])
        weight = torch.where(known, given, 0.0)
        known = weight > 0
    low = torch.where(known, rows, math.inf).amin(1, keepdim=True).double()
    high = torch.where(known, rows, -math.inf).amax(1, keepdim=True).double()
    empty = low > high
    return weight, torch.where(empty, 0.0, low), torch.where(empty, 0.0, high)


def _unit_moments(unit: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if weight is None:
        mean = unit.mean(1, keepdim=True)
        variance = torch.linalg.vector_norm(unit - mean, dim=1, keepdim=True).double().square() / unit.shape[1]
        return torch.full_like(variance, unit.shape[1]), mean.double(), variance
    count = weight.sum(1, keepdim=True).double()
    mean = (unit * weight).sum(1, keepdim=True).double() / count
    variance = ((unit - mean.to(unit.dtype)).square() * weight).sum(1, keepdim=True).double() / count
    return count, mean, variance


def fourier_size(count: int) -> int:
    """The next length that the fast Fourier transform likes: 2^k or 3 2^k.

    Args:
        count: least length.

    Returns:
        Length, at least 16.
    """
    power = 1 << max(4, math.ceil(math.log2(max(count, 1))))
    three_quarters = power * 3 // 4
    if three_quarters >= count:
        return three_quarters
    return power


class Splines:
    """Quadratic splines that carry points to a grid and grid values to the points.

    Args:
        position: positions in steps, shape [sites, n]; between 1 and size - 2 of any grid used.
    """

    def __init__(self, position: Tensor) -> None:
        nearest = position.round()
        self.offset = position - nearest
        self.index = nearest.int().long()  # by way of int32: a float has no vectorised way to int64

    def deposit(self, weight: Tensor | None, size: int) -> Tensor:
        """Mass of weighted points on the nodes 0 ... size - 1.

        Keeps the mass and the mean of every point and adds exactly 1/4 squared step to its variance.

        Args:
            weight: weights, shape [sites, n]; None for 1 each.
            size: number of nodes.

        Returns:
            Mass, float64, shape [sites, size].
        """
        if weight is None:
            weight = torch.ones_like(self.offset)

        # A point at offset t from its nearest node leaves 3/4 - t^2 there and (1/2 -+ t)^2 / 2 on its neighbours:
        # three power sums of t make them all.
        def summed(mass: Tensor) -> Tensor:
            return mass.new_zeros(mass.shape[0], size).scatter_add_(1, self.index, mass).double()

        moved = weight * self.offset
        total = summed(weight)
        first = summed(moved)
        second = summed(moved * self.offset)
        even = 0.125 * total + 0.5 * second
        odd = 0.5 * first
        result = 0.75 * total - second
        result[:, :-1] += (even - odd)[:, 1:]
        result[:, 1:] += (even + odd)[:, :-1]
        return result

    def read(self, grid: Tensor) -> Tensor:
        """Grid values between the nodes: the transpose of :meth:`deposit`.

        Args:
            grid: node values, shape [sites, size].

        Returns:
            Values, dtype of the positions, shape [sites, n].
        """
        left = grid.roll(1, 1)
        right = grid.roll(-1, 1)
        parts = (0.125 * (left + 6 * grid + right), 0.5 * (right - left), 0.5 * (left - 2 * grid + right))
        constant, linear, square = (part.to(self.offset.dtype).gather(1, self.index) for part in parts)
        return torch.addcmul(constant, self.offset, torch.addcmul(linear, self.offset, square))


def transform(grid: Tensor, size: int) -> Tensor:
    """Real Fourier transform of a grid, also of no sites.

    Args:
        grid: node values, shape [..., up to size].
        size: length after filling with 0.

    Returns:
        Spectrum, shape [..., size // 2 + 1].
    """
    if grid.numel() == 0:  # the libraries behind torch.fft refuse an empty batch
        return grid.new_zeros(*grid.shape[:-1], size // 2 + 1, dtype=torch.complex128)
    return torch.fft.rfft(grid, n=size)


def smooth(spectrum: Tensor, variance: float | Tensor, size: int, order: int = 0) -> Tensor:
    """A grid convolved with a Gaussian, and differentiated.

    Args:
        spectrum: real Fourier transform of the grid, shape [..., size // 2 + 1].
        variance: variance of the Gaussian in squared steps; a number or [..., 1].
        size: length of the grid.
        order: order of the derivative with respect to the position in steps.

    Returns:
        Grid, shape [..., size].
    """
    if spectrum.numel() == 0:
        return spectrum.real.new_zeros(*spectrum.shape[:-1], size)
    if isinstance(variance, Tensor):
        factor = _response(size, variance, order, spectrum.dtype, spectrum.device)
    else:
        factor = _kept_response(size, variance, order, spectrum.dtype, spectrum.device)
    return torch.fft.irfft(spectrum * factor, n=size)


def _response(size: int, variance: float | Tensor, order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what convolving with a Gaussian and differentiating does to every frequency."""
    omega = 2 * math.pi * torch.fft.rfftfreq(size, dtype=dtype.to_real(), device=device)
    kernel = torch.exp(-0.5 * variance * omega.square())
    if order == 0:
        return kernel
    return kernel * (1j * omega) ** order


_kept_response = functools.lru_cache(maxsize=64)(_response)


def hermite(values: Tensor, slopes: Tensor, position: Tensor) -> Tensor:
    """Cubic Hermite interpolation; outside the nodes, and for NaN, the result is 0.

    Args:
        values: node values, shape [sites, size].
        slopes: derivatives at the nodes, per step, same shape.
        position: positions in steps, shape [sites, n].

    Returns:
        Values, shape [sites, n].
    """
    last = values.shape[1] - 1
    inside = (position >= 0) & (position <= last)
    safe = torch.where(inside, position, 0.0)
    left = safe.floor().clamp(max=last - 1)
    t = safe - left
    index = left.long()
    v0 = values.gather(1, index)
    v1 = values.gather(1, index + 1)
    d0 = slopes.gather(1, index)
    d1 = slopes.gather(1, index + 1)
    rise = v1 - v0
    cubic = v0 + t * (d0 + t * (3 * rise - 2 * d0 - d1 + t * (d0 + d1 - 2 * rise)))
    return torch.where(inside, cubic, 0.0)
