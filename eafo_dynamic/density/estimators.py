"""Pre-activation densities in standardised coordinates u = (z - mean) / std (Theory, section 1).

Samples stand in the last dimension, all leading dimensions are sites. A non-finite sample is missing.
float16 and bfloat16 are read as float32; samples are handled in float32, or float64 if they are given so,
moments and grids in float64.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eafo_dynamic.entropy.grids import SPLINE_VARIANCE, Splines, Standardised, hermite, smooth, to_double, transform
from eafo_dynamic.errors import ConfigError

__all__ = [
    "ESTIMATORS",
    "KINDS",
    "Density",
    "Estimator",
    "Gaussian",
    "Histogram",
    "Moments",
    "gaussian",
    "histogram",
    "make_estimator",
    "moments",
]

HISTOGRAM_HALF_WIDTH = 10.0
_STEP = 1 / 32  # of the histogram's grid, in standard deviations
_FOURIER = 1024  # nodes: 641 of the grid, the rest keeps the periodic images 12 deviations away


@dataclass(frozen=True, eq=False)
class Moments:
    """First moments of each site, float64, shape of the leading dimensions.

    Args:
        count: number of samples that are not missing, or the sum of their weights.
        mean: mean; NaN without samples.
        std: population standard deviation; exactly 0 for a constant, NaN without samples.
    """

    count: Tensor
    mean: Tensor
    std: Tensor


def moments(samples: Tensor, weights: Tensor | None = None) -> Moments:
    """Count, mean and standard deviation of every site, without overflow.

    Args:
        samples: samples, shape [..., n]; non-finite ones are missing.
        weights: nonnegative weights that broadcast against the samples; None for 1 each.

    Returns:
        Moments, shape [...].

    Example:
        >>> found = moments(torch.tensor([1.0, 3.0, math.nan]))
        >>> found.count.item(), found.mean.item(), found.std.item()
        (2.0, 2.0, 1.0)
    """
    standard = Standardised.of(samples, weights)
    sites = samples.shape[:-1]
    return Moments(standard.count.reshape(sites), standard.mean.reshape(sites), standard.std.reshape(sites))


class Density(ABC):
    """Density p_u of u = (z - mean) / std, one per site.

    Args:
        mean: location of z, shape [sites] (any leading shape), units of z; NaN for a site without samples.
        std: scale of z, same shape; 0 for a constant pre-activation.
        count: number of samples behind the estimate; None for a density that is known exactly.
    """

    def __init__(self, mean: Tensor, std: Tensor, count: Tensor | None = None) -> None:
        self.mean = to_double(mean)
        self.std = to_double(std).expand_as(self.mean)
        if count is None:
            self.count = torch.full_like(self.mean, math.inf)
        else:
            self.count = to_double(count).expand_as(self.mean)

    @abstractmethod
    def pdf(self, u: Tensor) -> Tensor:
        """p_u(u).

        Args:
            u: standardised points, shape [m] or [sites, m].

        Returns:
            Density per unit of u, float64, shape [sites, m].
        """

    @abstractmethod
    def dpdf(self, u: Tensor) -> Tensor:
        """p_u'(u), the derivative of :meth:`pdf`.

        Args:
            u: standardised points, shape [m] or [sites, m].

        Returns:
            Slope of the density, per squared unit of u, float64, shape [sites, m].
        """

    @abstractmethod
    def derivative_noise(self) -> Tensor:
        """Standard error of p_u' that comes from the finite number of samples, as an L2 norm over u.

        Returns:
            Noise, shape [sites], to be held against the L2 norm of p_u' (0.376 for a Gaussian).
        """

    @abstractmethod
    def select(self, index: Tensor | list[int]) -> Density:
        """The densities of some sites.

        Args:
            index: positions or mask along the first dimension.

        Returns:
            A density of the same kind.
        """

    @abstractmethod
    def blend(self, new: Density, weight: float | Tensor) -> Density:
        """Exponential moving average of location, variance and standardised shape.

        A site that is missing on one side takes the other side whole.

        Args:
            new: the newer estimate, of the same kind.
            weight: weight of the new one in [0, 1]; a number, or one per site.

        Returns:
            A density of the same kind; ``count`` is the effective number of samples behind it.
        """

    def _mix_share(self, new: Density, weight: float | Tensor) -> Tensor:
        share = torch.as_tensor(weight, dtype=self.mean.dtype, device=self.mean.device)
        share = torch.where(new.mean.isfinite(), share.expand_as(self.mean), 0.0)
        return torch.where(self.mean.isfinite() | new.mean.isnan(), share, 1.0)

    def _mix_moments(self, new: Density, share: Tensor) -> Moments:
        variance = _mix(self.std.square(), new.std.square(), share)
        # Var of a weighted mean of two independent estimates, as one over the effective count.
        spread = _mix((1 - share) / self.count, share / new.count, share)
        return Moments(1 / spread, _mix(self.mean, new.mean, share), variance.sqrt())


def _mix(old: Tensor, new: Tensor, share: Tensor) -> Tensor:
    # where, not a bare sum: 0 * NaN of a missing side would spoil the other
    return torch.where(share == 1, new, torch.where(share == 0, old, (1 - share) * old + share * new))


class Gaussian(Density):
    """p_u(u) = exp(-u^2 / 2) / sqrt(2 pi): what the paper assumes; ``Gaussian(mean, std)`` makes one."""

    def pdf(self, u: Tensor) -> Tensor:
        """Return p_u(u); see :meth:`Density.pdf`."""
        value = torch.exp(-0.5 * to_double(u).square()) / math.sqrt(2 * math.pi)
        return value.expand(*self.mean.shape, u.shape[-1])

    def dpdf(self, u: Tensor) -> Tensor:
        """Return p_u'(u); see :meth:`Density.dpdf`."""
        return -to_double(u) * self.pdf(u)

    def derivative_noise(self) -> Tensor:
        """Return 0.69 / sqrt(count), from mean and std; see :meth:`Density.derivative_noise`."""
        # || p'' || / sqrt(n) from the mean, || 2 p' + u p'' || / sqrt(2 n) from the scale
        return 0.69 * self.count.rsqrt()

    def select(self, index: Tensor | list[int]) -> Gaussian:
        """Return the densities of some sites; see :meth:`Density.select`."""
        return Gaussian(self.mean[index], self.std[index], self.count[index])

    def blend(self, new: Density, weight: float | Tensor) -> Gaussian:
        """Return the moving average; see :meth:`Density.blend`."""
        share = self._mix_share(new, weight)
        mixed = self._mix_moments(new, share)
        return Gaussian(mixed.mean, mixed.std, mixed.count)


class Histogram(Density):
    """p_u(u) = sum_k w_k N(u; g_k, b^2): masses on a fixed grid, smoothed with a Gaussian kernel [beyond].

    Evaluated on the grid by Fourier transform and between its nodes by cubic Hermite interpolation with
    exact slopes; p_u' likewise from p_u''. The interpolation is off by (h / b)^4 / 384 of p_u'''', h = 1/32:
    below 2e-5 of the peak for b >= 1/8.

    Args:
        mean: see :class:`Density`.
        std: see :class:`Density`.
        mass: w_k, shape [sites, 641], at g_k = -10, -10 + 1/32, ..., 10; sums to 1 - out_of_range.
        bandwidth: b, in standard deviations, shape [sites].
        out_of_range: share of the samples beyond 10 standard deviations, shape [sites]; at most 1/100
            (Chebyshev). It is left out of p_u, not piled up at the ends.
        count: see :class:`Density`.
    """

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        mass: Tensor,
        bandwidth: Tensor,
        out_of_range: Tensor,
        count: Tensor | None = None,
    ) -> None:
        super().__init__(mean, std, count)
        self.mass = to_double(mass)
        self.bandwidth = to_double(bandwidth)
        self.out_of_range = to_double(out_of_range)

    @functools.cached_property
    def _nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return p_u, p_u' and p_u'' at the nodes, per unit of u."""
        mass = self.mass.reshape(-1, self.mass.shape[-1])
        spectrum = transform(mass, _FOURIER)
        variance = (self.bandwidth.reshape(-1, 1) / _STEP).square() - SPLINE_VARIANCE
        p, dp, ddp = (smooth(spectrum, variance, _FOURIER, k) / _STEP ** (k + 1) for k in range(3))
        nodes = mass.shape[-1]
        return p[:, :nodes].clamp(min=0.0), dp[:, :nodes], ddp[:, :nodes]

    def _at(self, u: Tensor, order: int) -> Tensor:
        values = self._nodes[order]
        slopes = self._nodes[order + 1] * _STEP
        position = (to_double(u).expand(*self.mean.shape, u.shape[-1]) + HISTOGRAM_HALF_WIDTH) / _STEP
        flat = hermite(values, slopes, position.reshape(-1, u.shape[-1]))
        return flat.reshape(position.shape)

    def pdf(self, u: Tensor) -> Tensor:
        """Return p_u(u); see :meth:`Density.pdf`."""
        return self._at(u, 0)

    def dpdf(self, u: Tensor) -> Tensor:
        """Return p_u'(u); see :meth:`Density.dpdf`."""
        return self._at(u, 1)

    def derivative_noise(self) -> Tensor:
        """Return sqrt(R(K') / (count b^3)), K the kernel; see :meth:`Density.derivative_noise`."""
        roughness = 1 / (4 * math.sqrt(math.pi))
        return (roughness / (self.count * self.bandwidth**3)).sqrt()

    def select(self, index: Tensor | list[int]) -> Histogram:
        """Return the densities of some sites; see :meth:`Density.select`."""
        parts = (self.mean, self.std, self.mass, self.bandwidth, self.out_of_range, self.count)
        return Histogram(*(part[index] for part in parts))

    def blend(self, new: Density, weight: float | Tensor) -> Histogram:
        """Return the moving average; see :meth:`Density.blend`.

        Args:
            new: the newer estimate.
            weight: its weight.

        Raises:
            ConfigError: new is no histogram.
        """
        if not isinstance(new, Histogram):
            raise ConfigError("new", type(new).__name__, "is another kind of density", "Blend like with like.")
        share = self._mix_share(new, weight)
        mixed = self._mix_moments(new, share)
        mass = _mix(self.mass, new.mass, share[..., None])
        bandwidth = _mix(self.bandwidth, new.bandwidth, share)
        out = _mix(self.out_of_range, new.out_of_range, share)
        return Histogram(mixed.mean, mixed.std, mass, bandwidth, out, mixed.count)


def gaussian(samples: Tensor, weights: Tensor | None = None) -> Gaussian:
    """Mean and standard deviation of every site, and the Gaussian that has them.

    Args:
        samples: pre-activations, shape [..., n]; non-finite ones are missing.
        weights: nonnegative weights that broadcast against the samples; None for 1 each. Weighted points
            count as a quadrature of a known density: ``count`` is then infinite.

    Returns:
        The density, shape of the leading dimensions.

    Example:
        >>> density = gaussian(torch.tensor([[-1.0, 1.0, 3.0]]))
        >>> round(density.pdf(torch.zeros(1)).item(), 4)  # 1 / sqrt(2 pi)
        0.3989
    """
    found = moments(samples, weights)
    if weights is not None:
        return Gaussian(found.mean, found.std)
    return Gaussian(found.mean, found.std, found.count)


def histogram(samples: Tensor, weights: Tensor | None = None, bandwidth: float | Tensor | None = None) -> Histogram:
    """Smoothed histogram of the standardised samples, for tails, skew and several modes [beyond].

    The bandwidth rule is the normal-reference optimum for the derivative p_u', which is what the
    correction reads: b = s (4 / (5 n))^(1/7), s = min(1, IQR / 1.349), between 1/8 and 1 standard
    deviations (0.29 for 4096 normal samples). Bias of p_u': b^2 p_u''' / 2, falling as n^(-2/7) while b is above 1/8.

    The rule is that of a normal density: features narrower than b are smoothed away, and b follows the spread, which
    heavy tails and far modes widen. Error of p_u' (root mean square, as a share of its L2 norm) at n = 256 and 4096:
    normal 0.26, 0.13; Student's t with 3 degrees of freedom 0.43, 0.20; lognormal of spread 1/2 0.45, 0.26; two modes
    2.7 apart, 0.5 and 0.6 wide, 0.67, 0.42; lognormal of spread 1 0.91, 0.80. Give a smaller ``bandwidth`` there.

    Args:
        samples: pre-activations, shape [..., n]; non-finite ones are missing.
        weights: nonnegative weights that broadcast against the samples; None for 1 each. Weighted points
            count as a quadrature of a known density.
        bandwidth: b in standard deviations, a number or one per site, in [1/16, 1]; None for the rule (1/8
            for a quadrature).

    Returns:
        The density, shape of the leading dimensions.

    Raises:
        ConfigError: a bandwidth outside [1/16, 1].
    """
    standard = Standardised.of(samples, weights)
    mass, out = _grid_mass(standard)
    sites = samples.shape[:-1]
    if bandwidth is not None:
        chosen = to_double(torch.as_tensor(bandwidth, device=mass.device)).expand(sites)
        if not bool(((chosen >= 2 * _STEP) & (chosen <= 1)).all()):
            problem = "is not between 1/16 (what the grid resolves) and 1 standard deviation"
            raise ConfigError("bandwidth", bandwidth, problem, "Leave it out, or choose from [0.0625, 1].")
    elif weights is not None:
        chosen = mass.new_full(sites, 1 / 8)
    else:
        chosen = _bandwidth(mass, standard.count[:, 0])
    count = None
    if weights is None:
        count = standard.count.reshape(sites)
    return Histogram(
        standard.mean.reshape(sites),
        standard.std.reshape(sites),
        mass.reshape(*sites, mass.shape[1]),
        chosen.reshape(sites),
        out.reshape(sites),
        count,
    )


def _grid_mass(standard: Standardised) -> tuple[Tensor, Tensor]:
    """Return mass at the nodes, shape [sites, 641], and the share beyond them, shape [sites, 1]."""
    nodes = round(2 * HISTOGRAM_HALF_WIDTH / _STEP) + 1
    std = torch.where(standard.std > 0, standard.std, 1.0)
    # One node more on each side: the spline of a sample at the very end reaches past it.
    origin = torch.nan_to_num((standard.low - standard.mean) / std) + HISTOGRAM_HALF_WIDTH
    position = torch.addcmul(
        (origin / _STEP + 1).to(standard.unit),
        (standard.span / (std * _STEP)).to(standard.unit),
        standard.unit,
    )
    inside = (position >= 1) & (position <= nodes)
    weight = inside.to(position.dtype)
    if standard.weight is not None:
        weight = standard.weight * inside
    mass = Splines(position.clamp(1, nodes)).deposit(weight, nodes + 2)[:, 1:-1] / standard.total
    out = torch.where(standard.count > 0, 1 - weight.sum(1, keepdim=True) / standard.total, 0.0)
    return mass, out


def _bandwidth(mass: Tensor, count: Tensor) -> Tensor:
    """Return the normal-reference bandwidth for the derivative, in standard deviations, shape [sites]."""
    # In integers, whose running sum has a deterministic form on every device.
    cumulative = (mass * 2**40).long().cumsum(-1).contiguous()
    quartiles = torch.tensor([2**38, 3 * 2**38], device=mass.device).expand(mass.shape[0], 2)
    low, high = torch.searchsorted(cumulative, quartiles.contiguous()).unbind(-1)
    spread = ((high - low).to(mass.dtype) * (_STEP / 1.349)).clamp(max=1.0)
    return (spread * (4 / (5 * count.clamp(min=1.0))) ** (1 / 7)).clamp(4 * _STEP, 1.0)


Estimator = Callable[[Tensor], Density]
"""A function from samples, shape [sites, n], to a density."""

KINDS: dict[str, type[Any]] = {"Gaussian": Gaussian, "Histogram": Histogram}
"""Densities of this package, by the name of their class, under which a checkpoint has them."""

ESTIMATORS: dict[str, Estimator] = {"gaussian": gaussian, "histogram": histogram}
"""Estimators by the name that the option ``density`` takes."""


def make_estimator(density: str | Estimator) -> Estimator:
    """A density estimator from its name, or the estimator itself.

    Args:
        density: "gaussian", "histogram", or a function from samples [sites, n] to a Density.

    Returns:
        The estimator.

    Raises:
        ConfigError: if there is none of that name.
    """
    if isinstance(density, str) and density in ESTIMATORS:
        return ESTIMATORS[density]
    if isinstance(density, str) or not callable(density):
        mend = f"Choose one of {', '.join(ESTIMATORS)}, or give a function from samples to a Density."
        raise ConfigError("density", density, "no such density", mend)
    return density
