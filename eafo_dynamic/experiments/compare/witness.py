"""Callbacks of a cell: they record what it was trained from and how long its steps took, and keep the best epoch."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.learnable import own_parameters

__all__ = ["BestEpoch", "Witness", "validated", "weights_hash"]


def validated(trainer: Trainer, option: str, metric: str) -> float:
    """A metric of the validation that has just ended.

    Args:
        trainer: the Trainer.
        option: which option names the metric, for the message.
        metric: its name.

    Returns:
        The value.

    Raises:
        ConfigError: if the metric is not logged.
    """
    if metric not in trainer.callback_metrics:
        known = ", ".join(name for name in trainer.callback_metrics if not name.startswith("eafo/"))
        raise ConfigError(option, metric, "is not logged in validation", f"There are: {known}.")
    return float(trainer.callback_metrics[metric])


def weights_hash(model: nn.Module) -> str:
    """A hash of a model's parameters and buffers, without those of corrections and of learnable activations.

    Args:
        model: the model.

    Returns:
        Sixteen hexadecimal digits; equal if and only if all names and bytes are equal.
    """
    digest = hashlib.sha256()
    of_activations = {name for name, _ in own_parameters(model)}
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor) and not _is_correction(name) and name not in of_activations:
            digest.update(name.encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _is_correction(name: str) -> bool:
    """Whether a parameter or buffer of this name belongs to a correction."""
    return name.rpartition(".")[2].startswith("eafo_")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key in sorted(batch):
            yield from _tensors(batch[key])
    elif isinstance(batch, (list, tuple)):
        for each in batch:
            yield from _tensors(each)


class BestEpoch(Callback):
    """Keeps the weights, corrections included, of the epoch in which a metric was best.

    Args:
        metric: name of a metric that is logged in validation.
        higher_is_better: the metric's direction.

    Attributes:
        epoch: the best epoch so far; None before the first validation.
    """

    def __init__(self, metric: str, higher_is_better: bool) -> None:
        self.metric = metric
        self.sign = 1.0 if higher_is_better else -1.0
        self.epoch: int | None = None
        self._best = -float("inf")
        self._weights: dict[str, Any] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps a copy of the weights if the metric is the best so far.

        Raises:
            ConfigError: if the metric is not logged.
        """
        if trainer.sanity_checking:
            return
        value = self.sign * validated(trainer, "select", self.metric)
        if value > self._best:
            self._best = value
            self.epoch = trainer.current_epoch
            self._weights = copy.deepcopy(pl_module.state_dict())

    def restore(self, pl_module: LightningModule) -> None:
        """Gives the model the weights of its best epoch; after a training without a finite metric it is left alone.

        Args:
            pl_module: the model that was trained.
        """
        if self._weights:
            pl_module.load_state_dict(self._weights)


class Witness(Callback):
    """Hashes the initial weights and every training batch, and times the steps.

    It must be the last callback: a step is timed from the end of the other callbacks' `on_train_batch_start` to the
    end of their `on_train_batch_end`, in CPU time of this process, which does not depend on other processes.

    Args:
        followed: name of a metric that is logged in validation.

    Attributes:
        weights: hash of the weights that training starts from.
        parameters: number of the model's parameters, without those of corrections.
        steps: number of training batches seen.
        step_seconds: CPU time of all of them [s], update rounds included.
        curve: by "step" (optimiser steps), "seconds" (`step_seconds`) and the name of the followed metric, one number
            for each validation.
    """

    def __init__(self, followed: str) -> None:
        self.followed = followed
        self.curve: dict[str, list[float]] = {"step": [], "seconds": [], followed: []}
        self.weights = ""
        self.parameters = 0
        self.steps = 0
        self.step_seconds = 0.0
        self._batches = hashlib.sha256()
        self._start = 0.0

    @property
    def batches(self) -> str:
        """Hash of all training batches, in their order."""
        return self._batches.hexdigest()[:16]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hashes the weights, after every other callback has had the chance to change them."""
        self.parameters = sum(
            parameter.numel() for name, parameter in pl_module.named_parameters() if not _is_correction(name)
        )
        self.weights = weights_hash(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hashes the batch and starts the clock."""
        for tensor in _tensors(batch):
            self._batches.update(_bytes(tensor))
        self._start = time.process_time()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds a point to the curve."""
        if trainer.sanity_checking or self.followed not in trainer.callback_metrics:
            return
        self.curve["step"].append(trainer.global_step)
        self.curve["seconds"].append(self.step_seconds)
        self.curve[self.followed].append(float(trainer.callback_metrics[self.followed]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops the clock."""
        self.step_seconds += time.process_time() - self._start
        self.steps += 1
