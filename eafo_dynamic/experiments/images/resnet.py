"""Residual network for small images (He et al., 2016, section 4.2), with batch norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from eafo_dynamic.experiments.activations import make_activation

__all__ = ["BasicBlock", "ResNet"]


class BasicBlock(nn.Module):
    """act(bn(conv(act(bn(conv(x))))) + shortcut(x)).

    As in torchvision, one in-place activation module is called twice.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
        activation: activation by name; in place if torch has an in-place form of it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.activation = make_activation(activation, inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps, shape [batch, in_channels, height, width].

        Returns:
            Feature maps, shape [batch, out_channels, height / stride, width / stride].
        """
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.activation(out)


class ResNet(nn.Module):
    """Stem, stages of `BasicBlock`s that halve the image and double the channels, mean pooling, head.

    ResNet-20 for 32 x 32 images is `width=16, depths=[3, 3, 3]`.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.
        width: channels of the stem and of the first stage.
        depths: blocks in each stage; every stage but the first halves height and width.
        activation: activation by name ("relu", "gelu", "silu", ...).
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        width: int = 16,
        depths: Sequence[int] = (3, 3, 3),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            make_activation(activation, inplace=True),
        )
        blocks: list[BasicBlock] = []
        channels = width
        for stage, depth in enumerate(depths):
            stage_channels = width * 2**stage
            for index in range(depth):
                halves = stage > 0 and index == 0
                blocks.append(BasicBlock(channels, stage_channels, 2 if halves else 1, activation))
                channels = stage_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images, shape [batch, in_channels, height, width], to logits.

        Returns:
            Logits, shape [batch, num_classes].
        """
        features = self.blocks(self.stem(images))
        return self.head(features.mean(dim=(2, 3)))
