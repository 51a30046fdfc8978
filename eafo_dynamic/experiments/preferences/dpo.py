"""Direct preference optimisation (DPO) of a causal language model."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.preferences.pairs import Pair
from eafo_dynamic.experiments.schedule import adamw_with_schedule
from eafo_dynamic.experiments.tasks import Stage

__all__ = ["PreferenceTask", "dpo_loss", "sequence_log_prob"]


class PreferenceTask(LightningModule):
    """Direct preference optimisation (Rafailov et al., 2023), with the model before training as reference.

    The reward of an answer is beta log(p(answer | prompt) / p_reference(answer | prompt)). Logs the loss (nats), the
    margin (reward of the chosen answer less that of the rejected one) and the accuracy (how often the margin is
    positive).

    Args:
        model: a causal language model whose output has `logits`; see `causal_lm`.
        beta: strength with which the model is kept near the reference.
        lr: largest learning rate.
        weight_decay: of AdamW, on every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.

    Raises:
        ConfigError: for a beta that is not positive.
    """

    def __init__(
        self, model: nn.Module, beta: float = 0.1, lr: float = 1e-5, weight_decay: float = 0.0, warmup_steps: int = 50
    ) -> None:
        super().__init__()
        if beta <= 0:
            raise ConfigError("beta", beta, "must be positive", "Choose a number above 0.")
        self.model = model
        self.beta = beta
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        # Inside a list it is not a submodule: it is not trained, not corrected and not saved.
        self._reference = [copy.deepcopy(model).eval().requires_grad_(False)]

    def evaluate(self, batch: Pair, stage: Stage) -> Tensor:
        """Logs loss, margin and accuracy.

        Args:
            batch: what `PreferenceData` gives.
            stage: prefix of the names.

        Returns:
            The loss, 0-dim.
        """
        margin = self._reward(batch["chosen"]) - self._reward(batch["rejected"])
        loss = dpo_loss(margin)
        values = {
            f"{stage}_loss": loss,
            f"{stage}_margin": margin.mean(),
            f"{stage}_accuracy": (margin > 0).float().mean(),
        }
        self.log_dict(values, batch_size=len(margin))
        return loss

    def _reward(self, side: dict[str, Tensor]) -> Tensor:
        """Reward of one answer to each prompt, shape [batch]."""
        tokens, answer = side["tokens"], side["answer"]
        log_p = sequence_log_prob(self.model(tokens).logits, tokens, answer)
        reference = self._reference[0].to(tokens.device)
        with torch.no_grad():
            log_p_reference = sequence_log_prob(reference(tokens).logits, tokens, answer)
        return self.beta * (log_p - log_p_reference)

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """Loss of a training batch.

        Returns:
            The loss, 0-dim.
        """
        return self.evaluate(batch, "train")

    def validation_step(self, batch: Pair, batch_idx: int) -> None:
        """Logs a validation batch."""
        self.evaluate(batch, "val")

    def test_step(self, batch: Pair, batch_idx: int) -> None:
        """Logs a test batch."""
        self.evaluate(batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its schedule, stepped with the optimiser.

        Returns:
            The optimiser and the scheduler, in Lightning's form.
        """
        return adamw_with_schedule(self, self.lr, self.weight_decay, self.warmup_steps)


def dpo_loss(margin: Tensor) -> Tensor:
    """Mean of -log sigmoid(margin), Rafailov et al., equation (7).

    Args:
        margin: reward of the chosen answer less that of the rejected one, shape [batch].

    Returns:
        The loss, nats, 0-dim; log 2 where the model is its reference.
    """
    # Not F.logsigmoid: it is an activation function, and EAFOCallback might correct it.
    return F.binary_cross_entropy_with_logits(margin, torch.ones_like(margin))


def sequence_log_prob(logits: Tensor, tokens: Tensor, answer: Tensor) -> Tensor:
    """Sum over the tokens of the answer of log p(token | all tokens before it).

    Args:
        logits: shape [batch, length, vocabulary]; the logits at a position predict the next token.
        tokens: int64, shape [batch, length].
        answer: bool, shape [batch, length]; the first token of a sequence is never part of an answer.

    Returns:
        Log probabilities, nats, shape [batch].
    """
    following = tokens[:, 1:]
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, following[..., None]).squeeze(-1)
    return (log_p * answer[:, 1:]).sum(-1)
