"""LightningModules that train a given network. They know nothing of corrections."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import R2Score
from torchmetrics.classification import MulticlassAccuracy

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.schedule import adamw_with_schedule
from eafo_dynamic.experiments.weights import load_weights

__all__ = ["Autoencoder", "Classifier", "LanguageModel", "Regressor", "Stage", "Task"]

Stage = Literal["train", "val", "test"]
Batch = tuple[Tensor, Tensor]


class Task(LightningModule, ABC):
    """A network, a loss, AdamW, and a cosine schedule with warm-up.

    Args:
        model: the network to train.
        lr: largest learning rate.
        weight_decay: of AdamW, on every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.
        weights: file with weights to start from, the checkpoint of another run or a state dict; see `load_weights`.
        fresh: regular expressions over names of parameters; parameters that match keep their initial values, as those
            of a new head must.
        activation_lr_multiple: learning rate of learnable activations, in units of `lr`, without weight decay; None:
            they train as all other parameters do.

    Raises:
        ConfigError: for a rate, a multiple of it, weight decay or warm-up that cannot work, or weights that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 50,
        weights: str | None = None,
        fresh: Sequence[str] = (),
        activation_lr_multiple: float | None = None,
    ) -> None:
        super().__init__()
        # A checkpoint holds all weights and must load without the file of `weights`, which config.yaml names.
        self.save_hyperparameters(ignore=["model", "weights", "fresh"])
        for option, value in {"weight_decay": weight_decay, "warmup_steps": warmup_steps}.items():
            if value < 0:
                raise ConfigError(option, value, "must not be negative", "Choose 0 or more.")
        if lr <= 0:
            raise ConfigError("lr", lr, "must be positive", "Choose a number above 0.")
        if activation_lr_multiple is not None and activation_lr_multiple <= 0:
            mend = "Choose a number above 0, or leave it out."
            raise ConfigError("activation_lr_multiple", activation_lr_multiple, "must be positive", mend)
        if fresh and weights is None:
            raise ConfigError("fresh", list(fresh), "no weights to start from", "Set weights, or leave fresh out.")
        if weights is not None:
            load_weights(model, weights, fresh)  # here, before a callback changes the names of the parameters
        self.model = model
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.activation_lr_multiple = activation_lr_multiple

    @abstractmethod
    def evaluate(self, batch: Batch, stage: Stage) -> Tensor:
        """Computes the loss and logs what the task measures.

        Args:
            batch: (inputs, targets).
            stage: "train", "val" or "test"; the prefix of what is logged.

        Returns:
            The loss, 0-dim.
        """

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's outputs.

        Args:
            inputs: inputs of the network.

        Returns:
            Its outputs.
        """
        return self.model(inputs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a training batch.

        Returns:
            The loss, 0-dim.
        """
        return self.evaluate(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs a validation batch."""
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs a test batch."""
        self.evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Outputs for a batch; its targets are not used.

        Returns:
            The network's outputs.
        """
        return self(batch[0])

    def log_loss(self, loss: Tensor, stage: Stage, examples: int) -> None:
        """Logs train_loss at every step, and val_loss or test_loss as the mean of the epoch.

        Args:
            loss: 0-dim.
            stage: prefix of the name.
            examples: weight of this batch in the mean.
        """
        self.log(f"{stage}_loss", loss, prog_bar=stage != "test", batch_size=examples)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its schedule, stepped with the optimiser.

        Returns:
            The optimiser and the scheduler, in Lightning's form.
        """
        return adamw_with_schedule(self, self.lr, self.weight_decay, self.warmup_steps, self.activation_lr_multiple)


class Classifier(Task):
    """Cross-entropy of classes (nats) and accuracy.

    Args:
        model: network from inputs to logits, shape [batch, num_classes].
        num_classes: number of classes.
        lr: largest learning rate.
        weight_decay: of AdamW, on every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.
        label_smoothing: probability that is spread evenly over all classes, in training only.
        weights: file with weights to start from.
        fresh: names of parameters that are not taken from the file.
        activation_lr_multiple: learning rate of learnable activations, in units of `lr`.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 50,
        label_smoothing: float = 0.0,
        weights: str | None = None,
        fresh: Sequence[str] = (),
        activation_lr_multiple: float | None = None,
    ) -> None:
        super().__init__(model, lr, weight_decay, warmup_steps, weights, fresh, activation_lr_multiple)
        self.label_smoothing = label_smoothing
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def evaluate(self, batch: Batch, stage: Stage) -> Tensor:
        """Logs loss and accuracy.

        Args:
            batch: (inputs, classes as int64).
            stage: prefix of the names.

        Returns:
            Cross-entropy, nats.
        """
        inputs, classes = batch
        logits = self(inputs)
        label_smoothing = self.label_smoothing if stage == "train" else 0.0
        loss = F.cross_entropy(logits, classes, label_smoothing=label_smoothing)
        accuracy: MulticlassAccuracy = getattr(self, f"{stage}_accuracy")
        accuracy(logits, classes)
        self.log_loss(loss, stage, len(classes))
        self.log(f"{stage}_accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return loss


class Regressor(Task):
    """Mean squared error in units of the target's variance, and R^2 in validation and test.

    Args:
        model: network from inputs to one number per example, shape [batch] or [batch, 1].
        lr: largest learning rate.
        weight_decay: of AdamW, on every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.
        weights: file with weights to start from.
        fresh: names of parameters that are not taken from the file.
        activation_lr_multiple: learning rate of learnable activations, in units of `lr`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 50,
        weights: str | None = None,
        fresh: Sequence[str] = (),
        activation_lr_multiple: float | None = None,
    ) -> None:
        super().__init__(model, lr, weight_decay, warmup_steps, weights, fresh, activation_lr_multiple)
        self.val_r2 = R2Score()
        self.test_r2 = R2Score()

    def evaluate(self, batch: Batch, stage: Stage) -> Tensor:
        """Logs the loss and, in validation and test, R^2.

        Args:
            batch: (inputs, standardised targets of shape [batch]).
            stage: prefix of the names.

        Returns:
            Mean squared error.

        Raises:
            ConfigError: when the network does not give one output per target.
        """
        inputs, targets = batch
        predictions = self(inputs)
        if predictions.numel() != targets.numel():
            outputs = predictions.numel() // len(inputs)
            wanted = targets.numel() // len(inputs)
            raise ConfigError(
                "model", type(self.model).__name__, f"gives {outputs} numbers per example", f"The task needs {wanted}."
            )
        predictions = predictions.reshape(targets.shape)
        loss = F.mse_loss(predictions, targets)
        self.log_loss(loss, stage, len(inputs))
        if stage != "train":
            r2: R2Score = getattr(self, f"{stage}_r2")
            r2(predictions, targets)
            self.log(f"{stage}_r2", r2, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return loss


class Autoencoder(Regressor):
    """Regression of the input on itself: mean squared error per entry, and R^2 over all entries of all inputs.

    The targets of the data are not used.

    Args:
        model: network from inputs to outputs with as many entries, in any shape.
        lr: largest learning rate.
        weight_decay: of AdamW, on every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.
        weights: file with weights to start from.
        fresh: names of parameters that are not taken from the file.
        activation_lr_multiple: learning rate of learnable activations, in units of `lr`.
    """

    def evaluate(self, batch: Batch, stage: Stage) -> Tensor:
        """Logs the loss and, in validation and test, R^2.

        Args:
            batch: (inputs, ignored).
            stage: prefix of the names.

        Returns:
            Mean squared error.
        """
        inputs, _ = batch
        return super().evaluate((inputs, inputs.flatten()), stage)


class LanguageModel(Task):
    """Cross-entropy of the next byte, in nats per byte and in bits per byte.

    Args:
        model: network from tokens, shape [batch, length], to logits, shape [batch, length, vocabulary].
        lr: largest learning rate.
        weight_decay: of AdamW, on every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.
        weights: file with weights to start from.
        fresh: names of parameters that are not taken from the file.
        activation_lr_multiple: learning rate of learnable activations, in units of `lr`.
    """

    def evaluate(self, batch: Batch, stage: Stage) -> Tensor:
        """Logs the loss and, in validation and test, the loss in bits.

        Args:
            batch: (bytes, the byte after each of them), both int64, shape [batch, length].
            stage: prefix of the names.

        Returns:
            Cross-entropy, nats per byte.
        """
        tokens, following = batch
        loss = F.cross_entropy(self(tokens).flatten(0, 1), following.flatten())
        self.log_loss(loss, stage, len(tokens))
        if stage != "train":
            self.log(f"{stage}_bits_per_byte", loss / math.log(2), batch_size=len(tokens))
        return loss
