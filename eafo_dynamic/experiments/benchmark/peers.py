"""The alternatives: CRReLU in three lines, learnable activations, other collectors of statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Pade", "ThreeLineCRReLU", "hook_statistics", "observer"]


class ThreeLineCRReLU(nn.Module):
    """CRReLU as the paper's appendix has it: every step left to autograd."""

    def __init__(self, eps: float = 0.01) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.tensor(eps))

    def forward(self, x: Tensor) -> Tensor:
        """relu(x) + eps x exp(-x^2 / 2)."""
        return torch.relu(x) + self.eps * x * torch.exp(-(x**2) / 2)


class Pade(nn.Module):
    """Padé activation unit, safe form: P(x) / (1 + |Q(x)|), degrees 5 and 4 (Molina et al., 2020).

    The coefficients are those of a leaky ReLU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.0298, 0.6124, 2.3725, 3.0511, 1.4855, 0.2510]))
        self.q = nn.Parameter(torch.tensor([1.1915, 4.4080, 0.9111, 0.3464]))

    def forward(self, x: Tensor) -> Tensor:
        """Both polynomials by Horner's rule."""
        numerator = self.p[5]
        for coefficient in self.p[:5].flip(0):
            numerator = numerator * x + coefficient
        denominator = self.q[3]
        for coefficient in self.q[:3].flip(0):
            denominator = denominator * x + coefficient
        return numerator / (1 + (denominator * x).abs())


def hook_statistics(z: Tensor) -> list[float]:
    """The statistics of a typical forward hook from a tutorial: mean, standard deviation and a histogram.

    Args:
        z: pre-activations.

    Returns:
        Mean, standard deviation, counts of 40 bins.
    """
    z = z.detach()
    return [z.mean().item(), z.std().item(), *z.float().histc(40, -7, 7).tolist()]


def observer() -> nn.Module | None:
    """Torch's own histogram observer, where this torch still has it.

    Returns:
        An observer; None where this torch has none.
    """
    try:
        from torch.ao.quantization import HistogramObserver
    except ImportError:
        return None
    return HistogramObserver()
