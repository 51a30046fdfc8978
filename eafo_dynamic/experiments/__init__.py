"""Networks, tasks and data for the YAML files in `configs/`, and for experiments of your own.

Every name here can stand behind a `class_path` in such a file.
"""

from eafo_dynamic.experiments.blocks import ACTIVATIONS, make_activation
from eafo_dynamic.experiments.cifar import CifarData
from eafo_dynamic.experiments.data import DigitsData, SplitData, TabularData
from eafo_dynamic.experiments.gpt import GPT
from eafo_dynamic.experiments.graphs import BlockGraphs, GraphNetwork
from eafo_dynamic.experiments.hf_text import PreferenceData, PreferenceTask, causal_lm
from eafo_dynamic.experiments.mlp import MLP
from eafo_dynamic.experiments.resnet import ResNet
from eafo_dynamic.experiments.sampling import EpochSampler
from eafo_dynamic.experiments.tasks import Autoencoder, Classifier, LanguageModel, Regressor, Task
from eafo_dynamic.experiments.text import StdlibText
from eafo_dynamic.experiments.tnt import TransformerInTransformer
from eafo_dynamic.experiments.vit import VisionTransformer
from eafo_dynamic.experiments.weights import load_weights

__all__ = [
    "ACTIVATIONS",
    "GPT",
    "MLP",
    "Autoencoder",
    "BlockGraphs",
    "CifarData",
    "Classifier",
    "DigitsData",
    "EpochSampler",
    "GraphNetwork",
    "LanguageModel",
    "PreferenceData",
    "PreferenceTask",
    "Regressor",
    "ResNet",
    "SplitData",
    "StdlibText",
    "TabularData",
    "Task",
    "TransformerInTransformer",
    "VisionTransformer",
    "causal_lm",
    "load_weights",
    "make_activation",
]
