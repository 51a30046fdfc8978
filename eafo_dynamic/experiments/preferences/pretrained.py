"""Models and tokenizers of `transformers`, pretrained or new."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from eafo_dynamic.errors import ConfigError

__all__ = ["causal_lm", "token_encoder"]


def causal_lm(name: str | None = None, config: dict[str, Any] | None = None) -> nn.Module:
    """A causal language model of `transformers`: a pretrained one, or a GPT-2 with random weights.

    Args:
        name: what `AutoModelForCausalLM.from_pretrained` takes: a folder, or a name that is downloaded once.
        config: options of `GPT2Config`, for random weights; only without a name.

    Returns:
        The model.

    Raises:
        ConfigError: without `transformers`, for a model that cannot be loaded, or unless exactly one of the two is
            given.
    """
    if (name is None) == (config is None):
        raise ConfigError("name, config", (name, config), "not exactly one of them", "Name a model, or give its sizes.")
    transformers = _transformers()
    if config is not None:
        return cast(nn.Module, transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)))
    return cast(nn.Module, _from_pretrained(transformers.AutoModelForCausalLM, "name", str(name)))


def token_encoder(tokenizer: str) -> Callable[[str], list[int]]:
    """A function from a text to its tokens.

    Args:
        tokenizer: name or folder of a pretrained tokenizer; "bytes" takes the UTF-8 bytes as tokens 0 ... 255.

    Returns:
        The function.

    Raises:
        ConfigError: without `transformers`, or for a tokenizer that cannot be loaded.
    """
    if tokenizer == "bytes":
        return _utf8_bytes
    return _from_pretrained(_transformers().AutoTokenizer, "tokenizer", tokenizer).encode


def _utf8_bytes(text: str) -> list[int]:
    return list(text.encode())


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError("model", "transformers", "is not installed", "pip install transformers.") from error


def _from_pretrained(kind: Any, option: str, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        raise ConfigError(
            option, name, f"transformers cannot load it ({cause})", "Name a model or a folder, or download it first."
        ) from error
