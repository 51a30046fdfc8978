"""Vision transformer (Dosovitskiy et al., 2021), sized by its arguments: ViT-Tiny and smaller."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.blocks import TransformerBlock, check_divides

__all__ = ["VisionTransformer"]

_EXTRA_TOKENS = {"mean": 0, "cls": 1, "distilled": 2}
"""By pooling: the number of tokens beside the patches."""


class VisionTransformer(nn.Module):
    """An image cut into patches, read as a sequence of tokens by pre-norm transformer blocks.

    ViT-Tiny is `dim=192, depth=12, heads=3`; DeiT-Tiny is the same with `pool="distilled"` (Touvron et al., 2021),
    which here learns from the labels alone, without a teacher.

    Args:
        image_size: height and width of the square images, in pixels.
        patch_size: height and width of a patch; divides `image_size`.
        in_channels: channels of the images.
        num_classes: number of logits.
        dim: features of a token.
        depth: number of blocks.
        heads: attention heads; divides `dim`.
        mlp_ratio: hidden features of the feed-forward parts, in units of `dim`.
        activation: activation of the feed-forward parts, by name ("gelu", "relu", "silu", ...).
        dropout: probability of dropping an entry of the embedded tokens and of each residual update.
        pool: "cls" computes the logits from a class token, "mean" from the mean of the patches; "distilled" takes the
            mean of two heads' logits, one on a class token and one on a distillation token.

    Raises:
        ConfigError: when `patch_size` does not divide `image_size`, or `heads` does not divide `dim`.
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        in_channels: int = 3,
        num_classes: int = 10,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        dropout: float = 0.0,
        pool: Literal["cls", "mean", "distilled"] = "cls",
    ) -> None:
        super().__init__()
        check_divides("patch_size", patch_size, "image_size", image_size)
        if pool not in _EXTRA_TOKENS:
            raise ConfigError("pool", pool, "no such pooling", "Use cls, mean or distilled.")
        patches = (image_size // patch_size) ** 2
        extra_tokens = _EXTRA_TOKENS[pool]
        self.patch_embedding = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.class_token: nn.Parameter | None = None  # the class token and, with "distilled", the distillation token
        if extra_tokens > 0:
            self.class_token = nn.Parameter(torch.zeros(1, extra_tokens, dim))
        self.position_embedding = nn.Parameter(torch.zeros(1, extra_tokens + patches, dim))
        self.dropout = nn.Dropout(dropout)
        blocks = [TransformerBlock(dim, heads, mlp_ratio, activation, dropout) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self.distilled_head: nn.Linear | None = None
        if pool == "distilled":
            self.distilled_head = nn.Linear(dim, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.position_embedding, std=0.02)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images, shape [batch, in_channels, image_size, image_size], to logits.

        Returns:
            Logits, shape [batch, num_classes].
        """
        tokens = self.patch_embedding(images).flatten(2).transpose(1, 2)  # [batch, patches, dim]
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = self.dropout(tokens + self.position_embedding)
        tokens = self.norm(self.blocks(tokens))
        if self.class_token is None:
            return self.head(tokens.mean(dim=1))
        logits = self.head(tokens[:, 0])
        if self.distilled_head is not None:
            logits = (logits + self.distilled_head(tokens[:, 1])) / 2
        return logits
