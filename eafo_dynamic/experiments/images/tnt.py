"""Transformer in transformer (Han et al., 2021), sized by its arguments: TNT-S and smaller."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eafo_dynamic.experiments.blocks import TransformerBlock, check_divides

__all__ = ["TransformerInTransformer"]


class NestedBlock(nn.Module):
    """A block among the words of each patch, then a block among the patches.

    In between, the words of a patch are projected and added to the token of that patch.

    Args:
        words: number of words in a patch.
        word_dim: features of a word.
        word_heads: attention heads among the words of a patch.
        dim: features of a patch.
        heads: attention heads among the patches.
        mlp_ratio: hidden features of the feed-forward parts, in units of their input.
        activation: a key of `ACTIVATIONS`.
        dropout: probability of dropping an entry of a residual update.
    """

    def __init__(
        self,
        words: int,
        word_dim: int,
        word_heads: int,
        dim: int,
        heads: int,
        mlp_ratio: float,
        activation: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.inner = TransformerBlock(word_dim, word_heads, mlp_ratio, activation, dropout)
        self.norm = nn.LayerNorm(word_dim)
        self.join = nn.Linear(words * word_dim, dim)
        self.outer = TransformerBlock(dim, heads, mlp_ratio, activation, dropout)

    def forward(self, words: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Words, shape [batch * patches, words, word_dim], and tokens, shape [batch, 1 + patches, dim].

        Returns:
            Both, of the same shapes.
        """
        words = self.inner(words)
        patches = tokens.shape[1] - 1
        joined = self.join(self.norm(words).view(len(tokens), patches, -1))
        joined = F.pad(joined, (0, 0, 1, 0))  # zeros for the class token, which has no words
        return words, self.outer(tokens + joined)


class TransformerInTransformer(nn.Module):
    """An image cut into patches, and each patch into words. Words attend inside their patch, patches to one another.

    TNT-S on 224 pixels is `image_size=224, patch_size=16, word_size=4, dim=384, word_dim=24, heads=6`.

    Args:
        image_size: height and width of the square images, in pixels.
        patch_size: height and width of a patch; divides `image_size`.
        word_size: height and width of a word; divides `patch_size`.
        in_channels: channels of the images.
        num_classes: number of logits.
        dim: features of a patch.
        word_dim: features of a word.
        depth: number of nested blocks.
        heads: attention heads among patches; divides `dim`.
        word_heads: attention heads among words; divides `word_dim`.
        mlp_ratio: hidden features of the feed-forward parts, in units of their input.
        activation: activation of the feed-forward parts, by name ("gelu", "relu", "silu", ...).
        dropout: probability of dropping an entry of the embedded patches and of each residual update.

    Raises:
        ConfigError: when `patch_size` does not divide `image_size`, `word_size` does not divide `patch_size`, or a
            number of heads does not divide its features.
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        word_size: int = 2,
        in_channels: int = 3,
        num_classes: int = 10,
        dim: int = 192,
        word_dim: int = 12,
        depth: int = 12,
        heads: int = 3,
        word_heads: int = 2,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_divides("patch_size", patch_size, "image_size", image_size)
        check_divides("word_size", word_size, "patch_size", patch_size)
        self.words_per_side = patch_size // word_size
        words = self.words_per_side**2
        patches = (image_size // patch_size) ** 2
        self.word_embedding = nn.Conv2d(in_channels, word_dim, kernel_size=word_size, stride=word_size)
        self.word_position = nn.Parameter(torch.zeros(1, words, word_dim))
        self.patch_embedding = nn.Sequential(
            nn.LayerNorm(words * word_dim), nn.Linear(words * word_dim, dim), nn.LayerNorm(dim)
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + patches, dim))
        self.dropout = nn.Dropout(dropout)
        blocks = [
            NestedBlock(words, word_dim, word_heads, dim, heads, mlp_ratio, activation, dropout) for _ in range(depth)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for parameter in (self.word_position, self.class_token, self.position_embedding):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def _words(self, images: Tensor) -> Tensor:
        """Embedded words of every patch, shape [batch, patches, words, word_dim]."""
        side = self.words_per_side
        grid = self.word_embedding(images)  # [batch, word_dim, rows of words, columns of words]
        patches = grid.unfold(2, side, side).unfold(3, side, side)  # [batch, word_dim, rows, columns, side, side]
        words = patches.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(1, 2)
        return words + self.word_position

    def forward(self, images: Tensor) -> Tensor:
        """Images, shape [batch, in_channels, image_size, image_size], to logits.

        Returns:
            Logits, shape [batch, num_classes].
        """
        words = self._words(images)
        patches = self.patch_embedding(words.flatten(2))
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        tokens = self.dropout(tokens + self.position_embedding)
        words = words.flatten(0, 1)
        for block in self.blocks:
            words, tokens = block(words, tokens)
        return self.head(self.norm(tokens)[:, 0])
