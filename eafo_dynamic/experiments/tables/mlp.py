"""Multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.activations import make_activation

__all__ = ["MLP"]

_NORMALISATIONS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class MLP(nn.Sequential):
    """Linear layers; all but the last are followed by an activation.

    On request, a normalisation comes before each activation, and a dropout after it.

    Args:
        in_features: entries of one input, after flattening.
        out_features: number of outputs.
        hidden: width of each hidden layer.
        activation: activation by name ("relu", "gelu", "silu", ...).
        dropout: probability of dropping a hidden unit.
        normalisation: "none", "batch" or "layer", between each hidden layer and its activation.

    Raises:
        ConfigError: for an unknown activation or normalisation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        dropout: float = 0.0,
        normalisation: Literal["none", "batch", "layer"] = "none",
    ) -> None:
        if normalisation != "none" and normalisation not in _NORMALISATIONS:
            raise ConfigError("normalisation", normalisation, "no such normalisation", "Use none, batch or layer.")
        layers: list[nn.Module] = [nn.Flatten()]
        width = in_features
        for units in hidden:
            layers.append(nn.Linear(width, units))
            if normalisation != "none":
                layers.append(_NORMALISATIONS[normalisation](units))
            layers.append(make_activation(activation))
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            width = units
        super().__init__(*layers, nn.Linear(width, out_features))

    def forward(self, input: Tensor) -> Tensor:
        """Inputs, shape [batch, ...] with in_features entries per example.

        Returns:
            Outputs, shape [batch, out_features].
        """
        return super().forward(input)
