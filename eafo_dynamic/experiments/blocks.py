"""The pre-norm transformer block that the vision transformers and the GPT are made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.activations import make_activation

__all__ = ["FeedForward", "GatedFeedForward", "SelfAttention", "TransformerBlock", "check_divides"]

_GATED = "swiglu"


def check_divides(option: str, value: int, whole_option: str, whole: int) -> None:
    """Raises unless one option divides another.

    Args:
        option: name of the option that must be a divisor.
        value: its value.
        whole_option: name of the option that it must divide.
        whole: the value of that option.

    Raises:
        ConfigError: when `value` is below 1 or does not divide `whole`.
    """
    if value < 1 or whole % value != 0:
        raise ConfigError(
            option, value, f"does not divide {whole_option}={whole}", f"Choose a divisor of {whole_option}."
        )


class SelfAttention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(d)) V (Vaswani et al., 2017).

    Args:
        dim: features of a token, a multiple of `heads`.
        heads: number of heads.
        causal: a token attends to itself and to the tokens before it, not to those after it.

    Raises:
        ConfigError: when `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        check_divides("heads", heads, "dim", dim)
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens, shape [batch, tokens, dim].

        Returns:
            The attended values, shape [batch, tokens, dim].
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [batch, tokens, 3, heads, dim / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """fc2(activation(fc1(x))), applied to each token separately.

    Args:
        dim: features of a token.
        hidden: features between the two layers.
        activation: a key of `ACTIVATIONS`.
    """

    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.activation = make_activation(activation)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens, shape [..., dim].

        Returns:
            Shape [..., dim].
        """
        return self.fc2(self.activation(self.fc1(x)))


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): fc2(silu(gate) * up), with (gate, up) = fc1(x), applied to each token separately.

    Args:
        dim: features of a token.
        hidden: features of gate and of up. Two thirds of those of a `FeedForward` give as many weights.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.activation = nn.SiLU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens, shape [..., dim].

        Returns:
            Shape [..., dim].
        """
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.activation(gate) * up)


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        dim: features of a token.
        heads: attention heads.
        mlp_ratio: hidden features of the feed-forward part, in units of `dim`.
        activation: a name for `make_activation`; "swiglu" for a gated part with as many weights.
        dropout: probability of dropping an entry of a residual update.
        causal: a token attends to itself and to the tokens before it, not to those after it.
    """

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, activation: str, dropout: float, *, causal: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads, causal=causal)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(mlp_ratio * dim)
        self.mlp: nn.Module
        if activation == _GATED:
            self.mlp = GatedFeedForward(dim, round(2 * hidden / 3))
        else:
            self.mlp = FeedForward(dim, hidden, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens, shape [batch, tokens, dim].

        Returns:
            Shape [batch, tokens, dim].
        """
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))
