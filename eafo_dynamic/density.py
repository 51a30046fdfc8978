"""Estimates of the pre-activation density, in standardised coordinates u = (z - mean) / std (theory, section 1).

Samples stand in the last dimension, all leading dimensions are sites. A non-finite sample is missing.
float16 and bfloat16 are taken as they are; all arithmetic is done in float64.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.grids import SPLINE_VARIANCE, deposit, hermite, present, smooth, to_double

__all__ = ["Density", "Gaussian", "Histogram", "Moments", "gaussian", "histogram", "moments"]

HISTOGRAM_HALF_WIDTH = 10.0
_STEP = 1 / 32  # of the histogram's grid, in standard deviations
_FOURIER = 1024  # nodes: 641 of the grid, the rest keeps the periodic images 12 deviations away


class Moments(NamedTuple):
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
    """Count, mean and standard deviation of every site, in one pass over the memory and without overflow.

    Args:
        samples: samples, shape [..., n]; non-finite ones are missing.
        weights: nonnegative weights that broadcast against the samples; None for 1 each.

    Returns:
        Moments, shape [...].
    """
    x = to_double(samples)
    weight = present(x, weights)
    count = weight.sum(-1)
    if x.shape[-1] == 0:
        return Moments(count, count / 0.0, count / 0.0)
    # An anchor inside the data makes the moments of a constant exact and spares the cancellation of a
    # large mean; the scale keeps squares finite.
    known = weight > 0
    low = torch.where(known, x, math.inf).amin(-1, keepdim=True)
    shifted = torch.where(known, x - low, 0.0)
    scale = shifted.amax(-1, keepdim=True)
    unit = shifted / torch.where(scale > 0, scale, 1.0)
    mean = (unit * weight).sum(-1) / count
    variance = ((unit - mean[..., None]).square() * weight).sum(-1) / count
    return Moments(count, low[..., 0] + mean * scale[..., 0], variance.sqrt() * scale[..., 0])


class Density(ABC):
    """Density p_u of u = (z - mean) / std, one a site.

    Args:
        mean: location of z, shape [sites] (any leading shape), units of z; NaN for a site without samples.
        std: scale of z, same shape; 0 for a constant pre-activation.
        count: number of samples behind the estimate; None for a density that is known exactly.
    """

    def __init__(self, mean: Tensor, std: Tensor, count: Tensor | None = None) -> None:
        self.mean = to_double(mean)
        self.std = to_double(std).expand_as(self.mean)
        known = torch.full_like(self.mean, math.inf)
        self.count = known if count is None else to_double(count).expand_as(self.mean)

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
            weight: weight of the new one in [0, 1]; a number or one a site.

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
        """See :meth:`Density.pdf`."""  # noqa: DOC201
        value = torch.exp(-0.5 * to_double(u).square()) / math.sqrt(2 * math.pi)
        return value.expand(*self.mean.shape, u.shape[-1])

    def dpdf(self, u: Tensor) -> Tensor:
        """See :meth:`Density.dpdf`."""  # noqa: DOC201
        return -to_double(u) * self.pdf(u)

    def derivative_noise(self) -> Tensor:
        """See :meth:`Density.derivative_noise`; 0.69 / sqrt(count), from the errors of mean and std."""  # noqa: DOC201
        # || p'' || / sqrt(n) from the mean, || 2 p' + u p'' || / sqrt(2 n) from the scale
        return 0.69 * self.count.rsqrt()

    def select(self, index: Tensor | list[int]) -> Gaussian:
        """See :meth:`Density.select`."""  # noqa: DOC201
        return Gaussian(self.mean[index], self.std[index], self.count[index])

    def blend(self, new: Density, weight: float | Tensor) -> Gaussian:
        """See :meth:`Density.blend`."""  # noqa: DOC201
        share = self._mix_share(new, weight)
        count, mean, std = self._mix_moments(new, share)
        return Gaussian(mean, std, count)


class Histogram(Density):
    """p_u(u) = sum_k w_k N(u; g_k, b^2): masses on a fixed grid, smoothed with a Gaussian kernel [beyond].

    Evaluated on the grid by Fourier transform and between its nodes by cubic Hermite interpolation with
    exact slopes; p_u' likewise from p_u''. Relative error of the interpolation below 1e-5.

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
        """p_u, p_u' and p_u'' at the nodes, per unit of u."""
        mass = self.mass.reshape(-1, self.mass.shape[-1])
        spectrum = torch.fft.rfft(mass, n=_FOURIER)
        variance = (self.bandwidth.reshape(-1, 1) / _STEP).square() - SPLINE_VARIANCE
        p, dp, ddp = (smooth(spectrum, variance, _FOURIER, k) / _STEP ** (k + 1) for k in range(3))
        nodes = mass.shape[-1]
        return p[:, :nodes].clamp(min=0.0), dp[:, :nodes], ddp[:, :nodes]

    def _at(self, u: Tensor, order: int) -> Tensor:
        values, slopes = self._nodes[order], self._nodes[order + 1] * _STEP
        position = (to_double(u).expand(*self.mean.shape, u.shape[-1]) + HISTOGRAM_HALF_WIDTH) / _STEP
        flat = hermite(values, slopes, position.reshape(-1, u.shape[-1]))
        return flat.reshape(position.shape)

    def pdf(self, u: Tensor) -> Tensor:
        """See :meth:`Density.pdf`."""  # noqa: DOC201
        return self._at(u, 0)

    def dpdf(self, u: Tensor) -> Tensor:
        """See :meth:`Density.dpdf`."""  # noqa: DOC201
        return self._at(u, 1)

    def derivative_noise(self) -> Tensor:
        """See :meth:`Density.derivative_noise`; sqrt(R(K') / (count b^3)) of a kernel estimate."""  # noqa: DOC201
        roughness = 1 / (4 * math.sqrt(math.pi))
        return (roughness / (self.count * self.bandwidth**3)).sqrt()

    def select(self, index: Tensor | list[int]) -> Histogram:
        """See :meth:`Density.select`."""  # noqa: DOC201
        parts = (self.mean, self.std, self.mass, self.bandwidth, self.out_of_range, self.count)
        return Histogram(*(part[index] for part in parts))

    def blend(self, new: Density, weight: float | Tensor) -> Histogram:
        """See :meth:`Density.blend`."""  # noqa: DOC201, DOC501
        if not isinstance(new, Histogram):
            raise ConfigError("new", type(new).__name__, "is another kind of density", "Blend like with like.")
        share = self._mix_share(new, weight)
        count, mean, std = self._mix_moments(new, share)
        mass = _mix(self.mass, new.mass, share[..., None])
        bandwidth = _mix(self.bandwidth, new.bandwidth, share)
        out = _mix(self.out_of_range, new.out_of_range, share)
        return Histogram(mean, std, mass, bandwidth, out, count)


def gaussian(samples: Tensor, weights: Tensor | None = None) -> Gaussian:
    """Mean and standard deviation of every site, and the Gaussian that has them.

    Args:
        samples: pre-activations, shape [..., n]; non-finite ones are missing.
        weights: nonnegative weights that broadcast against the samples; None for 1 each. Weighted points
            count as a quadrature of a known density: ``count`` is then infinite.

    Returns:
        The density, shape of the leading dimensions.
    """
    count, mean, std = moments(samples, weights)
    return Gaussian(mean, std, count if weights is None else None)


def histogram(
    samples: Tensor, weights: Tensor | None = None, bandwidth: float | Tensor | None = None
) -> Histogram:
    """Smoothed histogram of the standardised samples, for tails, skew and several modes [beyond].

    The bandwidth rule is the normal-reference optimum for the derivative p_u', which is what the
    correction reads: b = s (4 / (5 n))^(1/7), s = min(1, IQR / 1.349), between 1/16 and 1 standard
    deviations (0.29 for 4096 normal samples). Bias of p_u': b^2 p_u''' / 2, falling as n^(-2/7).

    Args:
        samples: pre-activations, shape [..., n]; non-finite ones are missing.
        weights: nonnegative weights that broadcast against the samples; None for 1 each. Weighted points
            count as a quadrature of a known density.
        bandwidth: b in standard deviations, a number or one a site; None for the rule (1/8 for a
            quadrature).

    Returns:
        The density, shape of the leading dimensions.
    """
    count, mean, std = moments(samples, weights)
    sites = mean.shape
    x = to_double(samples).reshape(-1, samples.shape[-1])
    weight = present(to_double(samples), weights).reshape(x.shape) / count.reshape(-1, 1).clamp(min=1e-300)
    flat_std = std.reshape(-1, 1)
    u = torch.where(weight > 0, (x - mean.reshape(-1, 1)) / torch.where(flat_std > 0, flat_std, 1.0), 0.0)
    inside = u.abs() <= HISTOGRAM_HALF_WIDTH
    nodes = round(2 * HISTOGRAM_HALF_WIDTH / _STEP) + 1
    position = torch.where(inside, u + HISTOGRAM_HALF_WIDTH, HISTOGRAM_HALF_WIDTH) / _STEP
    # One node more on each side: the spline of a sample at the very end reaches past it.
    mass = deposit(position + 1, torch.where(inside, weight, 0.0), nodes + 2)[:, 1:-1]
    out = (weight * ~inside).sum(-1)
    if bandwidth is None:
        known = torch.full_like(count, 1 / 8)
        chosen = known if weights is not None else _bandwidth(mass, count.reshape(-1)).reshape(sites)
    else:
        chosen = to_double(torch.as_tensor(bandwidth, device=mean.device)).expand(sites)
    return Histogram(
        mean, std, mass.reshape(*sites, nodes), chosen, out.reshape(sites), None if weights is not None else count
    )


def _bandwidth(mass: Tensor, count: Tensor) -> Tensor:
    """Normal-reference bandwidth for the derivative, in standard deviations, shape [sites]."""
    cumulative = mass.cumsum(-1).contiguous()
    quartiles = torch.tensor([0.25, 0.75], dtype=mass.dtype, device=mass.device).expand(mass.shape[0], 2)
    low, high = torch.searchsorted(cumulative, quartiles.contiguous()).unbind(-1)
    spread = ((high - low) * (_STEP / 1.349)).clamp(max=1.0)
    return (spread * (4 / (5 * count.clamp(min=1.0))) ** (1 / 7)).clamp(2 * _STEP, 1.0)
