"""Activations that torch does not have: pointwise functions with fixed hyper-parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["normal_cdf", "quick_gelu", "squared_leaky_relu", "squared_relu", "swish_beta", "xielu"]


def normal_cdf(z: Tensor) -> Tensor:
    """The distribution function of the standard normal distribution.

    Args:
        z: pre-activations, any shape.

    Returns:
        Activations, same shape.
    """
    # The erfc form keeps its relative precision in the left tail, where 1 + erf rounds to 0.
    return 0.5 * torch.erfc(z * -(0.5**0.5))


def quick_gelu(z: Tensor) -> Tensor:
    """Z sigmoid(1.702 z), an approximation of GELU.

    Args:
        z: pre-activations, any shape.

    Returns:
        Activations, same shape.
    """
    return z * torch.sigmoid(1.702 * z)


def swish_beta(z: Tensor, beta: float = 1.0) -> Tensor:
    """Z sigmoid(beta z) (Ramachandran, Zoph, Le, arXiv 1710.05941): SiLU for beta = 1, close to ReLU for a large one.

    Args:
        z: pre-activations, any shape.
        beta: how steep the gate is.

    Returns:
        Activations, same shape.
    """
    return z * torch.sigmoid(beta * z)


def squared_relu(z: Tensor) -> Tensor:
    """relu(z)^2 (So et al., arXiv 2109.08668).

    Args:
        z: pre-activations, any shape.

    Returns:
        Activations, same shape.
    """
    return F.relu(z).square()


def squared_leaky_relu(z: Tensor, negative_slope: float = 0.5) -> Tensor:
    """leaky_relu(z)^2.

    Args:
        z: pre-activations, any shape.
        negative_slope: slope of the leaky ReLU for z < 0.

    Returns:
        Activations, same shape.
    """
    return F.leaky_relu(z, negative_slope).square()


def xielu(z: Tensor, alpha_p: float = 0.8, alpha_n: float = 0.8, beta: float = 0.5, eps: float = -1e-6) -> Tensor:
    """XIELU (Huang, Schlag, arXiv 2411.13010) with fixed parameters: the integral of an ELU-like slope.

        alpha_p z^2 + beta z                                                z > 0
        alpha_n (exp(min(z, eps)) - 1) - alpha_n z + beta z                 z <= 0

    Args:
        z: pre-activations, any shape.
        alpha_p: curvature for z > 0.
        alpha_n: curvature for z <= 0; the paper starts at beta + 0.3.
        beta: slope at 0.
        eps: keeps exp from rounding to 1 just below 0.

    Returns:
        Activations, same shape.
    """
    below = alpha_n * (torch.expm1(z.clamp(max=eps)) - z) + beta * z
    return torch.where(z > 0, z * (alpha_p * z + beta), below)
