"""A small convolutional network for signals."""

from __future__ import annotations

from torch import Tensor, nn

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.activations import make_activation

__all__ = ["SignalNet"]


class SignalNet(nn.Module):
    """Three convolutions that halve the signal, each followed by an activation, and a linear layer on all that is left.

    With its defaults it has the sizes of the convolutional network of MNIST-1D's paper (Greydanus and Kobak, 2024).

    Args:
        length: numbers of a signal, at least 8.
        num_classes: number of logits.
        channels: of each convolution.
        activation: activation by name ("relu", "gelu", "silu", ...).

    Raises:
        ConfigError: for a signal that is too short.
    """

    def __init__(self, length: int = 40, num_classes: int = 10, channels: int = 25, activation: str = "relu") -> None:
        super().__init__()
        if length < 8:
            raise ConfigError("length", length, "must be at least 8", "The network halves the signal three times.")
        self.features = nn.Sequential(
            nn.Conv1d(1, channels, 5, stride=2, padding=1),
            make_activation(activation),
            nn.Conv1d(channels, channels, 3, stride=2, padding=1),
            make_activation(activation),
            nn.Conv1d(channels, channels, 3, stride=2, padding=1),
            make_activation(activation),
            nn.Flatten(),
        )
        left = (length - 3) // 2 + 1
        for _ in range(2):
            left = (left - 1) // 2 + 1
        self.head = nn.Linear(channels * left, num_classes)

    def forward(self, signals: Tensor) -> Tensor:
        """Signals, shape [batch, length], to logits.

        Returns:
            Logits, shape [batch, num_classes].
        """
        return self.head(self.features(signals.unsqueeze(1)))
