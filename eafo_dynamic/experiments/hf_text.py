"""Fine-tuning a language model of `transformers` on texts or preferences that the user names."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import Dataset

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.data import SplitData, split_indices
from eafo_dynamic.experiments.tasks import Stage, adamw_with_schedule

__all__ = ["PreferenceData", "PreferenceTask", "causal_lm", "dpo_loss", "sequence_log_prob"]

_PAIR = ("prompt", "chosen", "rejected")
Pair = dict[str, Tensor]


def causal_lm(name: str | None = None, config: dict[str, Any] | None = None) -> nn.Module:
    """A GPT-2 of `transformers`: pretrained, by name or folder, or of random weights and the sizes in `config`.

    Args:
        name: what `AutoModelForCausalLM.from_pretrained` takes; a name is downloaded once.
        config: options of `GPT2Config`; only without a name.

    Returns:
        The model.

    Raises:
        ConfigError: without `transformers`, for a model that cannot be had, or unless one of the two is given.
    """
    if (name is None) == (config is None):
        raise ConfigError("name, config", (name, config), "not exactly one of them", "Name a model, or give its sizes.")
    transformers = _transformers()
    if config is not None:
        return cast(nn.Module, transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)))
    return cast(nn.Module, _pretrained(transformers.AutoModelForCausalLM, "name", str(name)))


class PreferenceData(SplitData):
    """Pairs of answers from a JSONL file, each line with the texts "prompt", "chosen" and "rejected".

    A batch holds, for chosen and rejected, `tokens` (int64, shape [batch, length], prompt and answer, padded) and
    `answer` (bool, same shape, true on the answer's tokens).

    Args:
        path: the file.
        tokenizer: name or folder of a pretrained tokenizer; "bytes" takes the UTF-8 bytes as tokens 0 ... 255.
        max_length: tokens of prompt and answer together: prompts lose their beginning, then answers their end.
        batch_size: see `SplitData`, as the others.
        seed: order of the training batches.
        split_seed: cut into the three parts.
        val_fraction: part for validation.
        test_fraction: part for testing.
        num_workers: loader processes.

    Raises:
        ConfigError: for a file that is missing, or a line that is not such a pair.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str = "gpt2",
        max_length: int = 512,
        batch_size: int = 8,
        seed: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, split_seed, val_fraction, test_fraction, num_workers)
        if max_length < 2:
            raise ConfigError("max_length", max_length, "no room for a prompt and an answer", "Choose 2 or more.")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pairs = _read_pairs(Path(path))

    def setup(self, stage: str) -> None:
        """Tokenise and cut; the same for every stage.

        Args:
            stage: what Lightning is about to do; not used.

        Raises:
            ConfigError: when a part has no pair.
        """
        encode = _encoder(self.tokenizer)
        encoded = [_encode_pair(pair, encode, self.max_length) for pair in self.pairs]
        split = split_indices(torch.zeros(len(encoded)), self.val_fraction, self.test_fraction, self.split_seed)
        if min(map(len, split)) == 0:
            raise ConfigError(
                "path", f"{len(encoded)} pairs", "too few for three parts", "Give a file with more pairs."
            )
        self.train_data, self.val_data, self.test_data = (
            _Pairs([encoded[index] for index in part.tolist()]) for part in split
        )


class PreferenceTask(LightningModule):
    """Direct preference optimisation (Rafailov et al., 2023), with the untrained model as reference.

    Logs the loss (nats), the margin of rewards and how often the chosen answer has the higher reward; a reward is
    beta log(p(answer | prompt) / p_reference(answer | prompt)).

    Args:
        model: a causal language model whose output has `logits`; see `causal_lm`.
        beta: weight of staying near the reference.
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
        self.options = (lr, weight_decay, warmup_steps)
        # In a list: no submodule, so that nobody trains, corrects or saves it.
        self._reference = [copy.deepcopy(model).eval().requires_grad_(False)]

    def evaluate(self, batch: dict[str, Pair], stage: Stage) -> Tensor:
        """Log loss, margin and accuracy.

        Args:
            batch: what `PreferenceData` gives.
            stage: prefix of the names.

        Returns:
            The loss, 0-dim.
        """
        rewards: list[Tensor] = []
        for side in ("chosen", "rejected"):
            tokens, answer = batch[side]["tokens"], batch[side]["answer"]
            with torch.no_grad():
                reference = sequence_log_prob(self._reference[0].to(tokens.device)(tokens).logits, tokens, answer)
            rewards.append(sequence_log_prob(self.model(tokens).logits, tokens, answer) - reference)
        margin = self.beta * (rewards[0] - rewards[1])
        loss = dpo_loss(margin)
        values = {"loss": loss, "margin": margin.mean(), "accuracy": (margin > 0).float().mean()}
        self.log_dict({f"{stage}_{name}": value for name, value in values.items()}, batch_size=len(margin))
        return loss

    def training_step(self, batch: dict[str, Pair], batch_idx: int) -> Tensor:
        """Loss of a training batch.

        Returns:
            The loss, 0-dim.
        """
        return self.evaluate(batch, "train")

    def validation_step(self, batch: dict[str, Pair], batch_idx: int) -> None:
        """Log a validation batch."""
        self.evaluate(batch, "val")

    def test_step(self, batch: dict[str, Pair], batch_idx: int) -> None:
        """Log a test batch."""
        self.evaluate(batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its schedule, stepped with the optimiser.

        Returns:
            The optimiser and the scheduler, in Lightning's form.
        """
        return adamw_with_schedule(self, *self.options)


def dpo_loss(margin: Tensor) -> Tensor:
    """Mean of -log sigmoid(margin), Rafailov et al., equation (7).

    Args:
        margin: reward of the chosen answer less that of the rejected one, shape [batch].

    Returns:
        The loss, nats, 0-dim; log 2 where the model is its reference.
    """
    # F.logsigmoid is an activation by name, which EAFOCallback would correct like any other.
    return F.binary_cross_entropy_with_logits(margin, torch.ones_like(margin))


def sequence_log_prob(logits: Tensor, tokens: Tensor, answer: Tensor) -> Tensor:
    """Sum over the answer's tokens of log p(token | everything before it).

    Args:
        logits: shape [batch, length, vocabulary]; those at a place predict the next token.
        tokens: int64, shape [batch, length].
        answer: bool, shape [batch, length]; the first place of a sequence is never part of an answer.

    Returns:
        Log probabilities, nats, shape [batch].
    """
    following = tokens[:, 1:, None]
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, following).squeeze(-1)
    return (log_p * answer[:, 1:]).sum(-1)


class _Pairs(Dataset[dict[str, Pair]]):
    def __init__(self, pairs: list[dict[str, Pair]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Pair]:
        return self.pairs[index]


def _read_pairs(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ConfigError("path", str(path), "no such file", "Name a JSONL file with prompt, chosen and rejected.")
    pairs: list[dict[str, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            pair: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError("path", str(path), f"line {number} is not JSON ({error})", "Mend the line.") from error
        if not isinstance(pair, dict) or not all(isinstance(pair.get(key), str) and pair[key] for key in _PAIR):
            raise ConfigError(
                "path", str(path), f"line {number} lacks a text prompt, chosen or rejected", "Mend the line."
            )
        pairs.append({key: pair[key] for key in _PAIR})
    return pairs


def _encoder(tokenizer: str) -> Any:
    if tokenizer == "bytes":
        return lambda text: list(text.encode())  # pyright: ignore[reportUnknownLambdaType]
    return _pretrained(_transformers().AutoTokenizer, "tokenizer", tokenizer).encode


def _encode_pair(pair: dict[str, str], encode: Any, length: int) -> dict[str, Pair]:
    prompt = encode(pair["prompt"])
    sides: dict[str, Pair] = {}
    for side in ("chosen", "rejected"):
        reply = encode(pair[side])[: length - 1]
        before = prompt[-(length - len(reply)) :]
        place = torch.arange(length)
        # Padded at the end with token 0: a causal model's answers do not see it.
        tokens = F.pad(torch.tensor(before + reply), (0, length - len(before) - len(reply)))
        sides[side] = {"tokens": tokens, "answer": (place >= len(before)) & (place < len(before) + len(reply))}
    return sides


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError("model", "transformers", "is not installed", "pip install transformers.") from error


def _pretrained(kind: Any, option: str, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        raise ConfigError(
            option, name, f"transformers cannot load it ({cause})", "Name a model or a folder, or download it first."
        ) from error
