"""Tiny random models of transformers families, built from their configurations alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# what a configuration calls its sizes; nested configurations are shrunk too
_SMALL: dict[str, object] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "encoder_hidden_size", "emb_dim"), 32),
    **dict.fromkeys(("embedding_size", "projection_dim", "decoder_hidden_size", "d_embed", "hidden_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "mlp_dim", "d_inner", "ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "decoder_num_layers", "num_encoder_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "decoder_num_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "kv_channels", "d_kv"), 8),
    **dict.fromkeys(("vocab_size", "entity_vocab_size", "decoder_vocab_size"), 99),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("pad_token_id",), 1),
    **dict.fromkeys(("num_queries", "num_query_tokens"), 8),
}
_IMAGE_SIDE = 64


def make_family(model_type: str) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """A tiny model of one family with random weights, and a function that runs it on a fixed input."""
    from transformers import AutoConfig, AutoModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModel.from_config(_shrunk(AutoConfig.for_model(model_type)), attn_implementation="eager").float()
    torch.manual_seed(1)
    example = _example(model)

    def run(model: nn.Module) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model(**example)

    return model, run


def _shrunk(config: Any, depth: int = 0) -> Any:
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_diff_dict") and depth < 3:
            _shrunk(value, depth + 1)
        elif key in _SMALL and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, key, _SMALL[key])
        elif key == "image_size":
            setattr(config, key, _IMAGE_SIDE if isinstance(value, int) else type(value)([_IMAGE_SIDE] * 2))
        elif key == "layer_types" and isinstance(value, list):
            setattr(config, key, value[: getattr(config, "num_hidden_layers", 2)])
    names = {name: getattr(config, name) for name in getattr(config, "attribute_map", {})}
    for name, value in names.items():
        if name in _SMALL and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, name, _SMALL[name])
    return config


def _example(model: Any) -> dict[str, Tensor]:
    config, name = model.config, model.main_input_name
    tokens = torch.randint(5, 90, (2, 9))
    if name == "input_ids":
        example = {"input_ids": tokens}
        if config.is_encoder_decoder:
            example["decoder_input_ids"] = tokens[:, :5]
        return example
    if name == "pixel_values":
        channels = getattr(config, "num_channels", 3)
        side = config.image_size if hasattr(config, "image_size") else _IMAGE_SIDE
        side = side if isinstance(side, int) else side[0]
        return {"pixel_values": torch.randn(2, channels, side, side)}
    if name == "input_values":
        return {"input_values": torch.randn(2, 4000)}
    if name == "input_features":
        return {"input_features": torch.randn(2, getattr(config, "num_mel_bins", 80), 60)}
    raise NotImplementedError(name)
