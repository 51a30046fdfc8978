"""The networks and data on board, as small as tests want them."""

from __future__ import annotations

from typing import Any

from eafo_dynamic.experiments import (
    GPT,
    MLP,
    DigitsData,
    ResNet,
    StdlibText,
    TabularData,
    VisionTransformer,
)


def vit(activation: str = "gelu", **options: Any) -> VisionTransformer:
    defaults = {"image_size": 8, "patch_size": 2, "in_channels": 1, "dim": 16, "depth": 2, "heads": 2}
    return VisionTransformer(**{**defaults, **options}, activation=activation)


def resnet(activation: str = "relu") -> ResNet:
    return ResNet(in_channels=1, width=4, depths=[2, 1], activation=activation)


def mlp(activation: str = "relu") -> MLP:
    return MLP(64, 10, hidden=[16, 16], activation=activation)


def gpt(activation: str = "gelu", **options: Any) -> GPT:
    defaults = {"block_size": 16, "dim": 16, "depth": 2, "heads": 2}
    return GPT(**{**defaults, **options}, activation=activation)


SMALL_TEXT = {"block_size": 16, "batch_size": 4, "windows_per_epoch": 40, "max_megabytes": 0.3}
DATA: dict[str, Any] = {
    "digits": DigitsData,
    "wine": lambda **options: TabularData("wine", **options),
    "breast_cancer": lambda **options: TabularData("breast_cancer", **options),
    "diabetes": lambda **options: TabularData("diabetes", **options),
    "text": lambda **options: StdlibText(**SMALL_TEXT, **options),
}
