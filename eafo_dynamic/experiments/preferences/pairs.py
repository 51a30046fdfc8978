"""Pairs of answers to a prompt, one preferred over the other, from a file that the user brings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.preferences.pretrained import token_encoder
from eafo_dynamic.experiments.splits import SplitData, split_indices

__all__ = ["Pair", "PreferenceData"]

_KEYS = ("prompt", "chosen", "rejected")
Pair = dict[str, dict[str, Tensor]]
"""For "chosen" and for "rejected": `tokens`, int64, and `answer`, bool, both of shape [max_length]."""


class PreferenceData(SplitData):
    """Pairs of answers from a JSONL file, each line with the texts "prompt", "chosen" and "rejected".

    A batch holds, for chosen and for rejected, `tokens` (int64, shape [batch, max_length]: prompt and answer, padded)
    and `answer` (bool, same shape: True on the tokens of the answer).

    Args:
        path: the file.
        tokenizer: name or folder of a pretrained tokenizer; "bytes" takes the UTF-8 bytes as tokens 0 ... 255.
        max_length: tokens of prompt and answer together. Of longer pairs, first the beginning of the prompt is left
            out, then the end of the answer.
        batch_size: see `SplitData`, as for the other arguments.
        seed: order of the training batches.
        split_seed: cut into the three parts.
        val_fraction: fraction for validation.
        test_fraction: fraction for testing.
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
        """Tokenises and cuts the data; the same for every stage.

        Args:
            stage: what Lightning is about to do; not used.

        Raises:
            ConfigError: when a part has no pair.
        """
        encode = token_encoder(self.tokenizer)
        encoded = [_encode_pair(pair, encode, self.max_length) for pair in self.pairs]
        split = split_indices(torch.zeros(len(encoded)), self.val_fraction, self.test_fraction, self.split_seed)
        if min(map(len, split)) == 0:
            raise ConfigError(
                "path", f"{len(encoded)} pairs", "too few for three parts", "Give a file with more pairs."
            )
        self.train_data = _Pairs([encoded[index] for index in split.train.tolist()])
        self.val_data = _Pairs([encoded[index] for index in split.val.tolist()])
        self.test_data = _Pairs([encoded[index] for index in split.test.tolist()])


class _Pairs(Dataset[Pair]):
    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]


def _read_pairs(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ConfigError("path", str(path), "no such file", "Name a JSONL file with prompt, chosen and rejected.")
    pairs: list[dict[str, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            pair: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError("path", str(path), f"line {number} is not JSON ({error})", "Correct the line.") from error
        if not _is_pair(pair):
            raise ConfigError(
                "path", str(path), f"line {number} lacks a text prompt, chosen or rejected", "Correct the line."
            )
        pairs.append({key: pair[key] for key in _KEYS})
    return pairs


def _is_pair(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(value.get(key), str) and value[key] != "" for key in _KEYS)


def _encode_pair(pair: dict[str, str], encode: Callable[[str], list[int]], max_length: int) -> Pair:
    prompt = encode(pair["prompt"])
    sides: Pair = {}
    for side in ("chosen", "rejected"):
        answer = encode(pair[side])[: max_length - 1]
        room = max_length - len(answer)
        before = prompt[-room:]
        end = len(before) + len(answer)
        # The padding, token 0, is at the end: in a causal model no token of the answer attends to it.
        tokens = F.pad(torch.tensor(before + answer), (0, max_length - end))
        position = torch.arange(max_length)
        sides[side] = {"tokens": tokens, "answer": (position >= len(before)) & (position < end)}
    return sides
