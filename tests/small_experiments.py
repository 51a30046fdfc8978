"""The included networks and data, as small as tests want them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from eafo_dynamic.experiments import (
    GPT,
    MLP,
    DigitsData,
    ResNet,
    StdlibText,
    TabularData,
    TransformerInTransformer,
    VisionTransformer,
)


def vit(activation: str = "gelu", **options: Any) -> VisionTransformer:
    defaults = {"image_size": 8, "patch_size": 2, "in_channels": 1, "dim": 16, "depth": 2, "heads": 2}
    return VisionTransformer(**{**defaults, **options}, activation=activation)


def tnt(activation: str = "gelu", **options: Any) -> TransformerInTransformer:
    defaults = {"image_size": 8, "patch_size": 4, "in_channels": 1, "dim": 16, "word_dim": 8, "depth": 2, "heads": 2}
    return TransformerInTransformer(**{**defaults, **options}, activation=activation)


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


CONFIGS = Path(__file__).parents[1] / "configs"
FILE_OPTIONS = {"root", "path", "weights"}
"""Options that name a file or folder which does not come with the package: from the user, or from another run."""


def named_files(config: Any) -> dict[str, str]:
    """What a configuration asks for with `FILE_OPTIONS`, at any depth."""
    found: dict[str, str] = {}
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if key in FILE_OPTIONS and value is not None:
            found[key] = value
        elif isinstance(value, (dict, list)):
            found |= named_files(value)
    return found


def training_configs(*, files: bool, corrected: bool = True) -> list[Path]:
    """Configurations of one training run, in the order of their names.

    Args:
        files: those that need a file from elsewhere, or those that do not.
        corrected: those with the callback, or those without, which others start from.
    """
    chosen: list[Path] = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        attached = "eafo_dynamic.EAFOCallback" in path.read_text()
        if "trainer" in config and bool(named_files(config)) is files and attached is corrected:
            chosen.append(path)
    return chosen
