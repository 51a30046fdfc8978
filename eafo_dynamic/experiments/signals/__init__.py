"""Classification of short signals, and the convolutional network for them."""

from eafo_dynamic.experiments.signals.mnist1d import Mnist1D
from eafo_dynamic.experiments.signals.network import SignalNet

__all__ = ["Mnist1D", "SignalNet"]
