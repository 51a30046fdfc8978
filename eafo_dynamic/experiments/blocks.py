"""What the example networks share: activations by name and the pre-norm transformer block."""

from __future__ import annotations

import inspect

import torch.nn.functional as F
from torch import Tensor, nn

from eafo_dynamic.errors import ConfigError

__all__ = ["ACTIVATIONS", "FeedForward", "SelfAttention", "TransformerBlock", "make_activation"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def make_activation(name: str, *, inplace: bool = False) -> nn.Module:
    """A new activation module with torch's default hyper-parameters.

    Args:
        name: a key of `ACTIVATIONS`.
        inplace: overwrite the input, where torch has such a form of the activation.

    Returns:
        The module.

    Raises:
        ConfigError: for a name that is not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise ConfigError("activation", name, "no such activation", f"Use one of {', '.join(ACTIVATIONS)}.")
    cls = ACTIVATIONS[name]
    if inplace and "inplace" in inspect.signature(cls).parameters:
        return cls(inplace=True)
    return cls()


class SelfAttention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(d)) V (Vaswani et al., 2017).

    Args:
        dim: features of a token, a multiple of `heads`.
        heads: number of heads.
        causal: a token sees itself and what stands before it.

    Raises:
        ConfigError: when `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ConfigError("heads", heads, f"does not divide dim={dim}", "Choose a divisor of dim.")
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
    """fc2(activation(fc1(x))), applied to every token.

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


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        dim: features of a token.
        heads: attention heads.
        mlp_ratio: hidden features of the feed-forward part, in units of `dim`.
        activation: a key of `ACTIVATIONS`.
        dropout: probability of dropping an entry of a residual update.
        causal: a token sees itself and what stands before it.
    """

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, activation: str, dropout: float, *, causal: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads, causal=causal)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, int(mlp_ratio * dim), activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens, shape [batch, tokens, dim].

        Returns:
            Shape [batch, tokens, dim].
        """
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))
