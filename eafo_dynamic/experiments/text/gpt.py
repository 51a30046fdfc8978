"""Byte-level GPT (Radford et al., 2019): a causal, pre-norm transformer over the 256 bytes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.blocks import TransformerBlock

__all__ = ["GPT"]


class GPT(nn.Module):
    """A causal transformer: for each token of a sequence, the logits of the token that follows it.

    Args:
        vocabulary: number of tokens; 256 for bytes.
        block_size: longest sequence, in tokens.
        dim: features of a token.
        depth: number of blocks.
        heads: attention heads; divides `dim`.
        mlp_ratio: hidden features of the feed-forward parts, in units of `dim`.
        activation: activation of the feed-forward parts, by name ("gelu", "relu", "silu", ...).
        dropout: probability of dropping an entry of the embedded tokens and of each residual update.
        tie_weights: whether the head shares its weight with the token embedding.

    Raises:
        ConfigError: when `heads` does not divide `dim`.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        block_size: int = 128,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        dropout: float = 0.0,
        tie_weights: bool = True,
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocabulary, dim)
        self.position_embedding = nn.Embedding(block_size, dim)
        self.dropout = nn.Dropout(dropout)
        blocks = [TransformerBlock(dim, heads, mlp_ratio, activation, dropout, causal=True) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        if tie_weights:
            self.head.weight = self.token_embedding.weight
        self._initialise(depth)

    def _initialise(self, depth: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "fc2.weight")):
                # Each block adds two updates to the residual stream: its variance must not grow with depth.
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth))
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens, int64, shape [batch, length] with length <= block_size, to logits.

        Returns:
            Logits of the next token at every position, shape [batch, length, vocabulary].

        Raises:
            ConfigError: for a sequence longer than `block_size`.
        """
        length = tokens.shape[-1]
        if length > self.block_size:
            raise ConfigError(
                "block_size",
                self.block_size,
                f"the data has sequences of {length} tokens",
                "Give the model and the data the same block_size.",
            )
        positions = torch.arange(length, device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        return self.head(self.norm(self.blocks(x)))
