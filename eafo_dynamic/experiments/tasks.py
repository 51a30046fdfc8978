"""LightningModules that train a given network; they know nothing of activations or their correction."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import R2Score
from torchmetrics.classification import MulticlassAccuracy

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.weights import load_weights

__all__ = ["Autoencoder", "Classifier", "LanguageModel", "Regressor", "Task", "adamw_with_schedule", "warmup_cosine"]

Stage = Literal["train", "val", "test"]
Batch = tuple[Tensor, Tensor]


def warmup_cosine(step: int, warmup_steps: int, total_steps: float) -> float:
    """Factor of the learning rate: a line from 0 to 1, then half a cosine from 1 to 0.

    Args:
        step: optimiser steps done.
        warmup_steps: length of the line.
        total_steps: end of the cosine; infinity leaves the factor at 1.

    Returns:
        A number in [0, 1]; above 0 at the first step.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress))


def adamw_with_schedule(
    module: LightningModule, lr: float, weight_decay: float, warmup_steps: int
) -> OptimizerLRScheduler:
    """AdamW over all parameters, and `warmup_cosine` over the steps of the module's trainer.

    Args:
        module: the module to train, attached to a trainer.
        lr: largest learning rate.
        weight_decay: of every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.

    Returns:
        The optimiser and the scheduler, in Lightning's form.
    """
    optimizer = AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    total = module.trainer.estimated_stepping_batches
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Task(LightningModule, ABC):
    """A network, a loss, AdamW, and a cosine schedule with warm-up.

    Args:
        model: the network to train.
        lr: largest learning rate.
        weight_decay: of AdamW, on every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.
        weights: file with weights to start from, the checkpoint of another run or a state dict; see `load_weights`.
        fresh: regular expressions; parts of the network that they match start afresh instead, as a new head does.

    Raises:
        ConfigError: for a learning rate, weight decay or warm-up that cannot work, or weights that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 50,
        weights: str | None = None,
        fresh: Sequence[str] = (),
    ) -> None:
        super().__init__()
        # Where a run started is in its config.yaml; a checkpoint has all its weights and loads without that file.
        self.save_hyperparameters(ignore=["model", "weights", "fresh"])
        for option, value in {"weight_decay": weight_decay, "warmup_steps": warmup_steps}.items():
            if value < 0:
                raise ConfigError(option, value, "must not be negative", "Choose 0 or more.")
        if lr <= 0:
            raise ConfigError("lr", lr, "must be positive", "Choose a number above 0.")
        if fresh and weights is None:
            raise ConfigError("fresh", list(fresh), "no weights to start from", "Set weights, or leave fresh out.")
        if weights is not None:  # before any callback sees the network
            load_weights(model, weights, fresh)
        self.model = model
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps

    @abstractmethod
    def evaluate(self, batch: Batch, stage: Stage) -> Tensor:
        """Compute and log what the task measures.

        Args:
            batch: (inputs, targets).
            stage: "train", "val" or "test"; the prefix of what is logged.

        Returns:
            The loss, 0-dim.
        """

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's outputs.

        Args:
            inputs: whatever the network takes.

        Returns:
            What it gives.
        """
        return self.model(inputs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a training batch.

        Returns:
            The loss, 0-dim.
        """
        return self.evaluate(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log a validation batch."""
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log a test batch."""
        self.evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Outputs for a batch, its targets unseen.

        Returns:
            The network's outputs.
        """
        return self(batch[0])

    def log_loss(self, loss: Tensor, stage: Stage, examples: int) -> None:
        """Log as train_loss, val_loss or test_loss; of training every step, else the mean of the epoch.

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
        return adamw_with_schedule(self, self.lr, self.weight_decay, self.warmup_steps)


class Classifier(Task):
    """Cross-entropy of classes (nats) and accuracy.

    Args:
        model: network from inputs to logits, one row a class of the batch, shape [batch, num_classes].
        num_classes: number of classes.
        lr: largest learning rate.
        weight_decay: of AdamW, on every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.
        label_smoothing: probability spread evenly over all classes; in training only.
        weights: file with weights to start from.
        fresh: parts that start afresh nevertheless.
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
    ) -> None:
        super().__init__(model, lr, weight_decay, warmup_steps, weights, fresh)
        self.label_smoothing = label_smoothing
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def evaluate(self, batch: Batch, stage: Stage) -> Tensor:
        """Log loss and accuracy.

        Args:
            batch: (inputs, classes as int64).
            stage: prefix of the names.

        Returns:
            Cross-entropy, nats.
        """
        inputs, classes = batch
        logits = self(inputs)
        smoothing = self.label_smoothing if stage == "train" else 0.0
        loss = F.cross_entropy(logits, classes, label_smoothing=smoothing)
        accuracy: MulticlassAccuracy = getattr(self, f"{stage}_accuracy")
        accuracy(logits, classes)
        self.log_loss(loss, stage, len(classes))
        self.log(f"{stage}_accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return loss


class Regressor(Task):
    """Mean squared error in units of the target's variance, and R^2 in validation and test.

    Args:
        model: network from inputs to one number each, shape [batch] or [batch, 1].
        lr: largest learning rate.
        weight_decay: of AdamW, on every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.
        weights: file with weights to start from.
        fresh: parts that start afresh nevertheless.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 50,
        weights: str | None = None,
        fresh: Sequence[str] = (),
    ) -> None:
        super().__init__(model, lr, weight_decay, warmup_steps, weights, fresh)
        self.val_r2 = R2Score()
        self.test_r2 = R2Score()

    def evaluate(self, batch: Batch, stage: Stage) -> Tensor:
        """Log loss and, but for training, R^2.

        Args:
            batch: (inputs, standardised targets of shape [batch]).
            stage: prefix of the names.

        Returns:
            Mean squared error.

        Raises:
            ConfigError: when the network gives another number of outputs.
        """
        inputs, targets = batch
        predictions = self(inputs)
        if predictions.numel() != targets.numel():
            outputs, wanted = predictions.numel() // len(inputs), targets.numel() // len(inputs)
            raise ConfigError(
                "model", type(self.model).__name__, f"gives {outputs} numbers an example", f"The task needs {wanted}."
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
    """The input is the target: mean squared error of an entry, and R^2 over all entries of all inputs.

    Targets of the data are not used.

    Args:
        model: network from inputs to as many numbers, in any shape.
        lr: largest learning rate.
        weight_decay: of AdamW, on every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.
        weights: file with weights to start from.
        fresh: parts that start afresh nevertheless.
    """

    def evaluate(self, batch: Batch, stage: Stage) -> Tensor:
        """Log loss and, but for training, R^2.

        Args:
            batch: (inputs, ignored).
            stage: prefix of the names.

        Returns:
            Mean squared error.
        """
        inputs, _ = batch
        return super().evaluate((inputs, inputs.flatten()), stage)


class LanguageModel(Task):
    """Cross-entropy of the next byte: nats a byte, and the same in bits.

    Args:
        model: network from tokens [batch, length] to logits [batch, length, vocabulary].
        lr: largest learning rate.
        weight_decay: of AdamW, on every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.
        weights: file with weights to start from.
        fresh: parts that start afresh nevertheless.
    """

    def evaluate(self, batch: Batch, stage: Stage) -> Tensor:
        """Log loss and, but for training, bits per byte.

        Args:
            batch: (bytes, the byte after each of them), int64, shape [batch, length] both.
            stage: prefix of the names.

        Returns:
            Cross-entropy, nats a byte.
        """
        tokens, following = batch
        loss = F.cross_entropy(self(tokens).flatten(0, 1), following.flatten())
        self.log_loss(loss, stage, len(tokens))
        if stage != "train":
            self.log(f"{stage}_bits_per_byte", loss / math.log(2), batch_size=len(tokens))
        return loss
