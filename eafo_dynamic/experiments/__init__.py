"""Networks, tasks and data for the YAML files in `configs/`, and for experiments of your own.

Every name here can follow `class_path: eafo_dynamic.experiments.` in such a file. One folder holds one kind of data and
the networks for it: `images`, `text`, `tables`, `signals`, `graphs`, `preferences`. The files beside them serve several
kinds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eafo_dynamic.experiments.activations import ACTIVATIONS as ACTIVATIONS
    from eafo_dynamic.experiments.activations import make_activation as make_activation
    from eafo_dynamic.experiments.graphs import BlockGraphs as BlockGraphs
    from eafo_dynamic.experiments.graphs import GraphNetwork as GraphNetwork
    from eafo_dynamic.experiments.images import CifarData as CifarData
    from eafo_dynamic.experiments.images import ConvNet as ConvNet
    from eafo_dynamic.experiments.images import DigitsData as DigitsData
    from eafo_dynamic.experiments.images import FashionData as FashionData
    from eafo_dynamic.experiments.images import ResNet as ResNet
    from eafo_dynamic.experiments.images import TransformerInTransformer as TransformerInTransformer
    from eafo_dynamic.experiments.images import VisionTransformer as VisionTransformer
    from eafo_dynamic.experiments.preferences import PreferenceData as PreferenceData
    from eafo_dynamic.experiments.preferences import PreferenceTask as PreferenceTask
    from eafo_dynamic.experiments.preferences import causal_lm as causal_lm
    from eafo_dynamic.experiments.sampling import EpochSampler as EpochSampler
    from eafo_dynamic.experiments.search.swap import SwapActivations as SwapActivations
    from eafo_dynamic.experiments.search.swap import swap_activations as swap_activations
    from eafo_dynamic.experiments.signals import Mnist1D as Mnist1D
    from eafo_dynamic.experiments.signals import SignalNet as SignalNet
    from eafo_dynamic.experiments.splits import SplitData as SplitData
    from eafo_dynamic.experiments.tables import MLP as MLP
    from eafo_dynamic.experiments.tables import TabularData as TabularData
    from eafo_dynamic.experiments.tasks import Autoencoder as Autoencoder
    from eafo_dynamic.experiments.tasks import Classifier as Classifier
    from eafo_dynamic.experiments.tasks import LanguageModel as LanguageModel
    from eafo_dynamic.experiments.tasks import Regressor as Regressor
    from eafo_dynamic.experiments.tasks import Task as Task
    from eafo_dynamic.experiments.text import GPT as GPT
    from eafo_dynamic.experiments.text import StdlibText as StdlibText
    from eafo_dynamic.experiments.weights import load_weights as load_weights

_HOMES = {
    "ACTIVATIONS": "activations",
    "Autoencoder": "tasks",
    "BlockGraphs": "graphs",
    "CifarData": "images",
    "Classifier": "tasks",
    "ConvNet": "images",
    "DigitsData": "images",
    "EpochSampler": "sampling",
    "FashionData": "images",
    "GPT": "text",
    "GraphNetwork": "graphs",
    "LanguageModel": "tasks",
    "MLP": "tables",
    "Mnist1D": "signals",
    "PreferenceData": "preferences",
    "PreferenceTask": "preferences",
    "Regressor": "tasks",
    "ResNet": "images",
    "SignalNet": "signals",
    "SplitData": "splits",
    "StdlibText": "text",
    "SwapActivations": "search.swap",
    "TabularData": "tables",
    "Task": "tasks",
    "TransformerInTransformer": "images",
    "VisionTransformer": "images",
    "causal_lm": "preferences",
    "load_weights": "weights",
    "make_activation": "activations",
    "swap_activations": "search.swap",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # Lightning and torchmetrics are imported when one of the tasks or data sets is asked for, not before.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
