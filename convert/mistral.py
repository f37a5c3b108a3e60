"""Mistral's table: Llama's names, no biases, one sliding window for all layers."""

from __future__ import annotations

from typing import Any

from convert.family import Family, Fields
from convert.llama import IGNORED, LAYER, MODEL
from jaxdecode.config import ModelConfig


def window_everywhere(fields: Fields) -> dict[str, Any]:
    """One sliding window for all layers, if any."""
    window = fields.optional_integer("sliding_window")
    return {"layer_windows": (window,) * fields.integer("num_hidden_layers") if window else ()}


def window_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `window_everywhere`."""
    return {"sliding_window": config.window(0)}


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    model=MODEL,
    layer=LAYER,
    ignored=IGNORED,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    features=window_everywhere,
    to_hf=window_to_hf,
)
