"""The density of outputs at resolution r, on a grid; entropy, score and gradient come from one smoothing."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from eafo_dynamic.entropy.grids import SPLINE_VARIANCE, Splines, Standardised, fourier_size, smooth, transform
from eafo_dynamic.entropy.spacings import atoms_and_rest
from eafo_dynamic.errors import ConfigError

__all__ = ["MixedEntropy", "SmoothedOutput"]

_PER_BANDWIDTH = 4  # grid steps per bandwidth r
_MARGIN = 8  # bandwidths of empty grid beyond the outermost samples
_NEGLIGIBLE = 1e-13  # densities per standard deviation below this are rounding noise of the transform


class MixedEntropy(NamedTuple):
    """Atoms, continuous part and resolution-r entropy of an output, one value per site (Theory, section 2).

    Args:
        atom_mass: probability on repeated values, in [0, 1].
        continuous_entropy: differential entropy of the rest, nats, in units of the output; minus infinity
            where the rest has fewer than two distinct values.
        entropy: resolution-r entropy, nats, of the output divided by its standard deviation.
    """

    atom_mass: Tensor
    continuous_entropy: Tensor
    entropy: Tensor


class SmoothedOutput:
    """q_r, the density of standardised outputs plus r N, on one grid per site.

        H_r = -int q_r log q_r,   J = int q_r'^2 / q_r,   sbar_r = K_r * (log q_r)'

    Each is computed when it is asked for; they share q_r.

    Args:
        outputs: activation outputs a, shape [..., n]; non-finite ones are missing.
        resolution: r, in standard deviations of the output.
        weights: nonnegative weights that broadcast against the outputs; None for 1 each.
        sampled: whether the points are random draws, weights being how often each was drawn. If not they
            are a quadrature of a known distribution, and the entropy has no sampling bias to correct.
            None: yes without weights, no with them.

    Raises:
        ConfigError: resolution is not in [0.001, 1].
    """

    def __init__(
        self,
        outputs: Tensor,
        resolution: float = 0.1,
        weights: Tensor | None = None,
        *,
        sampled: bool | None = None,
    ) -> None:
        if not 1e-3 <= resolution <= 1:
            raise ConfigError("resolution", resolution, "is outside [0.001, 1]", "The default is 0.1.")
        self.resolution = resolution
        self._outputs = outputs.detach()
        self._weighted = weights is not None
        if sampled is None:
            sampled = weights is None
        self._sampled = sampled
        self._standard = Standardised.of(outputs, weights)

    @functools.cached_property
    def _scale(self) -> Tensor:
        """Grid steps per unit range; 0 for a constant."""
        std = self._standard.std
        return torch.where(std > 0, self._standard.span / (std * self._step), 0.0)

    @property
    def _step(self) -> float:
        """Grid step in standard deviations."""
        return self.resolution / _PER_BANDWIDTH

    @functools.cached_property
    def _splines(self) -> Splines:
        position = self._standard.unit * self._scale.to(self._standard.unit)
        return Splines(position.add_(_MARGIN * _PER_BANDWIDTH))

    @functools.cached_property
    def _size(self) -> int:
        widest = 0
        if self._scale.numel():
            widest = int(self._scale.max())  # waits for the device
        return fourier_size(widest + 2 * _MARGIN * _PER_BANDWIDTH + 2)

    @functools.cached_property
    def _spectrum(self) -> Tensor:
        mass = self._splines.deposit(self._standard.weight, self._size)
        return transform(mass / self._standard.total, self._size)

    def _filtered(self, variance: float, order: int = 0) -> Tensor:
        """Return the sample distribution convolved with a Gaussian of that variance in squared bandwidths."""
        steps = variance * _PER_BANDWIDTH**2 - SPLINE_VARIANCE
        return smooth(self._spectrum, steps, self._size, order) / self._step ** (order + 1)

    @functools.cached_property
    def _density(self) -> Tensor:
        return self._filtered(1.0).clamp(min=_NEGLIGIBLE)

    @functools.cached_property
    def _log_density(self) -> Tensor:
        return self._density.log()

    def _integral(self, integrand: Tensor) -> Tensor:
        known = self._density > 10 * _NEGLIGIBLE
        return torch.where(known, integrand, 0.0).sum(1, keepdim=True) * self._step

    def _out(self, value: Tensor, constant: float) -> Tensor:
        """A result per site in the caller's shape and dtype, with the value for a constant output."""
        value = torch.where(self._standard.std > 0, value, constant)
        value = torch.where(self._standard.count > 0, value, math.nan)
        return self._as_given(value.reshape(self._outputs.shape[:-1]))

    def _as_given(self, value: Tensor) -> Tensor:
        dtype = torch.float64 if self._outputs.dtype == torch.float64 else torch.float32
        return value.to(self._outputs.device, dtype)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the outputs, shape [sites]; 0 for a constant, NaN without samples."""
        return self._out(self._standard.std, 0.0)

    @functools.cached_property
    def entropy(self) -> Tensor:
        """H_r = h((a - E a) / sd(a) + r N), nats, shape [sites]; see :func:`resolution_entropy`."""
        q = self._density
        value = self._integral(-q * self._log_density)
        if self._sampled:
            # First-order bias of a plug-in: the sampling variance of q_r over 2 q_r. The squared kernel
            # is a Gaussian of half the variance, times 1 / (2 r sqrt(pi)).
            square = self._filtered(0.5) / (2 * self.resolution * math.sqrt(math.pi))
            value = value + (self._integral(square / q) - 1) / (2 * self._standard.total)
        return self._out(value, 0.5 * math.log(2 * math.pi * math.e * self.resolution**2))

    @functools.cached_property
    def mixed(self) -> MixedEntropy:
        """Atom mass, entropy of the rest, resolution entropy; see :func:`mixed_entropy`.

        Raises:
            ConfigError: the outputs are weighted: atoms and spacings are counted, not weighed.
        """
        if self._weighted:
            problem = "cannot be used for atoms and spacings"
            raise ConfigError("weights", "given", problem, "Repeat the samples instead, or ask for entropy alone.")
        if self._outputs.shape[-1] == 0:
            return MixedEntropy(self.entropy, self.entropy, self.entropy)
        sites = self._outputs.shape[:-1]
        rows = self._outputs.reshape(-1, self._outputs.shape[-1])
        mass, rest = atoms_and_rest(rows, complete=self._standard.weight is None, sampled=self._sampled)
        mass = self._as_given(mass.reshape(sites))
        rest = self._as_given(rest.reshape(sites))
        return MixedEntropy(mass, rest, self.entropy)

    @property
    def curve(self) -> tuple[Tensor, Tensor]:
        """Grid of outputs and the density there at resolution r, per unit of a; both [sites, nodes].

        A constant has no scale to draw it on: its density is NaN.
        """
        std = self._standard.std
        nodes = torch.arange(self._size, device=std.device) - _MARGIN * _PER_BANDWIDTH
        outputs = self._standard.low + nodes * (self._step * std)
        density = torch.where(std > 0, self._density / std, math.nan)
        return outputs, density

    @functools.cached_property
    def _fisher(self) -> Tensor:
        return self._integral(self._filtered(1.0, 1).square() / self._density)

    @property
    def fisher(self) -> Tensor:
        """J = E[s_r^2] of the standardised output plus noise, shape [sites]."""
        return self._out(self._fisher, self.resolution**-2)

    @functools.cached_property
    def _score(self) -> Tensor:
        """sbar_r = K_r * (log q_r)' at every output, per standard deviation, [sites, n]."""
        steps = _PER_BANDWIDTH**2 - SPLINE_VARIANCE
        slope = smooth(transform(self._log_density, self._size), steps, self._size, 1) / self._step
        return self._splines.read(slope)

    @property
    def score(self) -> Tensor:
        """sbar_r(a) at every output, per unit of a, shape [..., n]; 0 where missing or constant."""
        std = self._standard.std
        value = self._score * torch.where(std > 0, 1 / std, 0.0)
        if self._standard.weight is not None:
            value = torch.where(self._standard.weight > 0, value, 0.0)
        return self._as_given(value[:, : self._outputs.shape[-1]].reshape(self._outputs.shape))

    def gradient(self, direction: Tensor) -> Tensor:
        """dH_r / d eps when the outputs move by eps * direction; see :func:`entropy_gradient`.

        Args:
            direction: g, shape of the outputs, finite wherever they are.

        Returns:
            Gradient in nats per unit of eps, shape [sites].
        """
        standard = self._standard
        if self._outputs.shape[-1] == 0:
            return self._out(standard.std, 0.0)
        g = direction.detach().to(standard.unit).reshape(standard.unit.shape)
        if standard.weight is not None:
            g = torch.where(standard.weight > 0, g, 0.0)
        inverse = torch.where(standard.std > 0, 1 / standard.std, 0.0)
        middle = ((standard.mean - standard.low) / torch.where(standard.span > 0, standard.span, 1.0)).to(g)
        covariance = standard.mean_of((standard.unit - middle) * g) * standard.span * inverse
        slope = standard.mean_of(self._score * g) + (1 - self.resolution**2 * self._fisher) * covariance
        return self._out(-slope * inverse, 0.0)
