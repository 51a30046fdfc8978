"""Networks, tasks and data for the YAML files in `configs/`, and for experiments of your own.

Every name here can stand behind a `class_path` in such a file.
"""

from eafo_dynamic.experiments.blocks import ACTIVATIONS, make_activation
from eafo_dynamic.experiments.data import DigitsData, SplitData, TabularData
from eafo_dynamic.experiments.gpt import GPT
from eafo_dynamic.experiments.mlp import MLP
from eafo_dynamic.experiments.resnet import ResNet
from eafo_dynamic.experiments.sampling import EpochSampler
from eafo_dynamic.experiments.tasks import Classifier, LanguageModel, Regressor, Task
from eafo_dynamic.experiments.text import StdlibText
from eafo_dynamic.experiments.vit import VisionTransformer

__all__ = [
    "ACTIVATIONS",
    "GPT",
    "MLP",
    "Classifier",
    "DigitsData",
    "EpochSampler",
    "LanguageModel",
    "Regressor",
    "ResNet",
    "SplitData",
    "StdlibText",
    "TabularData",
    "Task",
    "VisionTransformer",
    "make_activation",
]
