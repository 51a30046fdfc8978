"""Sums and filters on uniform grids, one row a site: what the density and entropy estimators share.

Sites stand in the first dimension, grid nodes in the second; positions are counted in grid steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["deposit", "fourier_size", "frequencies", "hermite", "present", "read", "smooth", "to_double"]

# Variance, in squared steps, that a quadratic spline adds wherever the sample lies between the nodes. A
# linear one would add between 0 and 1/4, which shows in the entropy of an atom.
SPLINE_VARIANCE = 0.25


def to_double(values: Tensor) -> Tensor:
    """The values in float64, on the CPU where the device has no float64.

    Args:
        values: any tensor.

    Returns:
        The same values, detached.
    """
    values = values.detach()
    return (values.cpu() if values.device.type == "mps" else values).double()


def present(samples: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weights of the samples, 0 for those that are missing.

    Args:
        samples: samples, shape [..., n]; a non-finite one is missing.
        weights: nonnegative weights that broadcast against the samples; None for 1 each.

    Returns:
        Weights, float64, shape of the samples.
    """
    known = samples.isfinite().double()
    return known if weights is None else known * to_double(weights).to(samples.device)


def fourier_size(count: int) -> int:
    """The next length that the fast Fourier transform likes: 2^k or 3 2^k.

    Args:
        count: least length.

    Returns:
        Length, at least 16.
    """
    power = 1 << max(4, math.ceil(math.log2(max(count, 1))))
    return power * 3 // 4 if power * 3 // 4 >= count else power


def _spline(position: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Left neighbour of the nearest node, and the quadratic spline weights of the three nodes from there."""
    nearest = position.round()
    d = position - nearest
    return nearest.long() - 1, (0.5 * (0.5 - d).square(), 0.75 - d.square(), 0.5 * (0.5 + d).square())


def deposit(position: Tensor, weight: Tensor, size: int) -> Tensor:
    """Mass of weighted points on the nodes 0 ... size - 1, by quadratic splines.

    Keeps the mass and the mean of every point and adds exactly 1/4 squared step to its variance.

    Args:
        position: positions in steps, shape [sites, n], between 1 and size - 2.
        weight: weights, same shape.
        size: number of nodes.

    Returns:
        Mass, shape [sites, size].
    """
    left, parts = _spline(position)
    grid = position.new_zeros(position.shape[0], size)
    for offset, part in enumerate(parts):
        grid.scatter_add_(1, left + offset, part * weight)
    return grid


def read(grid: Tensor, position: Tensor) -> Tensor:
    """Values of a grid between its nodes, by quadratic splines: the transpose of :func:`deposit`.

    Args:
        grid: node values, shape [sites, size].
        position: positions in steps, shape [sites, n].

    Returns:
        Values, shape [sites, n].
    """
    left, parts = _spline(position)
    return sum((part * grid.gather(1, left + i) for i, part in enumerate(parts)), position.new_zeros(()))


def frequencies(size: int, like: Tensor) -> Tensor:
    """Angular frequencies of a real transform, in radians per step.

    Args:
        size: length of the grid.
        like: tensor that gives dtype and device.

    Returns:
        Frequencies, shape [size // 2 + 1].
    """
    return 2 * math.pi * torch.fft.rfftfreq(size, dtype=like.dtype, device=like.device)


def smooth(spectrum: Tensor, variance: float | Tensor, size: int, order: int = 0) -> Tensor:
    """A grid convolved with a Gaussian, and differentiated.

    Args:
        spectrum: real Fourier transform of the grid, shape [sites, size // 2 + 1].
        variance: variance of the Gaussian in squared steps; a number or [sites, 1].
        size: length of the grid.
        order: order of the derivative with respect to the position in steps.

    Returns:
        Grid, shape [sites, size].
    """
    omega = frequencies(size, spectrum.real)
    kernel = torch.exp(-0.5 * variance * omega.square())
    factor = kernel if order == 0 else kernel * (1j * omega) ** order
    return torch.fft.irfft(spectrum * factor, n=size)


def hermite(values: Tensor, slopes: Tensor, position: Tensor) -> Tensor:
    """Cubic Hermite interpolation; outside the nodes the result is 0.

    Args:
        values: node values, shape [sites, size].
        slopes: derivatives at the nodes, per step, same shape.
        position: positions in steps, shape [sites, n].

    Returns:
        Values, shape [sites, n].
    """
    last = values.shape[1] - 1
    inside = (position >= 0) & (position <= last)  # False for NaN
    safe = torch.where(inside, position, 0.0)
    left = safe.floor().clamp(max=last - 1)
    t = safe - left
    index = left.long()
    v0, v1 = values.gather(1, index), values.gather(1, index + 1)
    d0, d1 = slopes.gather(1, index), slopes.gather(1, index + 1)
    rise = v1 - v0
    cubic = v0 + t * (d0 + t * (3 * rise - 2 * d0 - d1 + t * (d0 + d1 - 2 * rise)))
    return torch.where(inside, cubic, 0.0)
