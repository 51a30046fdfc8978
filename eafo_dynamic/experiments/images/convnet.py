"""Two convolutions with pooling and a wide hidden layer: the network of Fashion-MNIST's own benchmark."""

from __future__ import annotations

from torch import Tensor, nn

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.activations import make_activation

__all__ = ["ConvNet"]


class ConvNet(nn.Sequential):
    """Twice convolution of 5 x 5, activation and max pooling of 2 x 2; then linear, activation, dropout, linear.

    With its defaults it is `benchmark/convnet.py` of https://github.com/zalandoresearch/fashion-mnist.

    Args:
        image_size: height and width of the square images, a multiple of 4.
        in_channels: channels of the images.
        num_classes: number of logits.
        width: channels of the first convolution; the second one has twice as many.
        hidden: units of the hidden layer.
        activation: activation by name ("relu", "gelu", "silu", ...).
        dropout: probability of dropping a hidden unit.

    Raises:
        ConfigError: when 4 does not divide `image_size`.
    """

    def __init__(
        self,
        image_size: int = 28,
        in_channels: int = 1,
        num_classes: int = 10,
        width: int = 32,
        hidden: int = 1024,
        activation: str = "relu",
        dropout: float = 0.4,
    ) -> None:
        if image_size < 4 or image_size % 4 != 0:
            raise ConfigError("image_size", image_size, "is no multiple of 4", "Pooling halves the images twice.")
        features = 2 * width * (image_size // 4) ** 2
        super().__init__(
            nn.Conv2d(in_channels, width, 5, padding=2),
            make_activation(activation),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 5, padding=2),
            make_activation(activation),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(features, hidden),
            make_activation(activation),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, input: Tensor) -> Tensor:
        """Images, shape [batch, in_channels, image_size, image_size].

        Returns:
            Logits, shape [batch, num_classes].
        """
        return super().forward(input)
