"""Image classification: handwritten digits, Fashion-MNIST, CIFAR, and the networks for them."""

from eafo_dynamic.experiments.images.cifar import CifarData
from eafo_dynamic.experiments.images.convnet import ConvNet
from eafo_dynamic.experiments.images.digits import DigitsData
from eafo_dynamic.experiments.images.fashion import FashionData
from eafo_dynamic.experiments.images.resnet import ResNet
from eafo_dynamic.experiments.images.tnt import TransformerInTransformer
from eafo_dynamic.experiments.images.vit import VisionTransformer

__all__ = [
    "CifarData",
    "ConvNet",
    "DigitsData",
    "FashionData",
    "ResNet",
    "TransformerInTransformer",
    "VisionTransformer",
]
