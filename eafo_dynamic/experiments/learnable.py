"""Learnable activations that corrections are compared with: a few numbers a module, learned by the loss alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LEARNABLE", "XIELU", "GainSlope", "Pade", "SquaredReLU", "SwishBeta", "own_parameters"]


class SquaredReLU(nn.Module):
    """f(z) = max(z, 0)^2 (So et al., 2021)."""

    def forward(self, z: Tensor) -> Tensor:
        """Pre-activations, any shape.

        Returns:
            Activations, same shape.
        """
        return F.relu(z).square()


class SwishBeta(nn.Module):
    """f(z) = z sigmoid(beta z), with a learnable beta (Ramachandran et al., 2017). At beta = 1 it is SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        """Pre-activations, any shape.

        Returns:
            Activations, same shape.
        """
        return z * torch.sigmoid(self.beta * z)


class GainSlope(nn.Module):
    """f(z) = (1 + gain) base(z) + slope z, with learnable gain and slope that start at 0.

    Args:
        base: a pointwise activation.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.gain = nn.Parameter(torch.zeros(()))
        self.slope = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        """Pre-activations, any shape; they are not overwritten, also where the base would.

        Returns:
            Activations, same shape.
        """
        return (1 + self.gain) * self.base(z) + self.slope * z


class XIELU(nn.Module):
    """Expanded integral of the ELU (Huang, 2024).

        f(z) = a_p z^2 + z / 2                        for z > 0
        f(z) = a_n (exp(z) - 1) - a_n z + z / 2       for z <= 0

    with learnable a_p = softplus(p) and a_n = 1/2 + softplus(n), both 0.8 at the start as in the paper.
    """

    beta = 0.5

    def __init__(self) -> None:
        super().__init__()
        start = torch.tensor([0.8, 0.8 - self.beta])
        raw_p, raw_n = torch.log(torch.expm1(start))  # softplus(raw) = start
        self.raw_p = nn.Parameter(raw_p.clone())
        self.raw_n = nn.Parameter(raw_n.clone())

    def forward(self, z: Tensor) -> Tensor:
        """Pre-activations, any shape.

        Returns:
            Activations, same shape.
        """
        a_p = F.softplus(self.raw_p)
        a_n = self.beta + F.softplus(self.raw_n)
        below = z.clamp(max=0)  # also in the branch not taken exp must not overflow: its gradient would be NaN
        bent = torch.where(z > 0, a_p * z.square(), a_n * (torch.expm1(below) - z))
        return bent + self.beta * z


class Pade(nn.Module):
    """Pade activation unit of order 5/4 (Molina et al., 2020), one for each module.

        f(z) = (a_0 + a_1 z + ... + a_5 z^5) / (1 + |b_1 z| + |b_2 z^2| + |b_3 z^3| + |b_4 z^4|)

    All ten coefficients are learnable. They start as a fit of LeakyReLU(0.01) on [-3, 3].
    """

    def __init__(self) -> None:
        super().__init__()
        above = [0.02996348, 0.61690165, 2.37539147, 3.06608078, 1.52474449, 0.25281987]
        below = [1.19160814, 4.40811795, 0.91111034, 0.34885983]
        self.numerator = nn.Parameter(torch.tensor(above))
        self.denominator = nn.Parameter(torch.tensor(below))

    def forward(self, z: Tensor) -> Tensor:
        """Pre-activations, any shape.

        Returns:
            Activations, same shape.
        """
        above = torch.zeros_like(z)
        for coefficient in self.numerator.flip(0):  # Horner's rule
            above = above * z + coefficient
        distance = z.abs()
        below = torch.zeros_like(z)
        for coefficient in self.denominator.abs().flip(0):
            below = (below + coefficient) * distance
        return above / (1 + below)


LEARNABLE: tuple[type[nn.Module], ...] = (nn.PReLU, SwishBeta, GainSlope, XIELU, Pade)
"""Activations with parameters of their own."""


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that belong to learnable activations, those of corrections left out.

    Args:
        model: a network.

    Yields:
        Name in the model, and parameter.
    """
    for path, module in model.named_modules():
        if not isinstance(module, LEARNABLE):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if not name.startswith("eafo_"):
                yield f"{path}.{name}".lstrip("."), parameter
