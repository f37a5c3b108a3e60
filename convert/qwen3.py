"""Qwen3's table: Qwen2's windows, a norm on each head's q and k, biases on all of the attention or none."""

from __future__ import annotations

from typing import Any

from convert.family import Family, Fields
from convert.llama import IGNORED, LAYER, MODEL
from convert.qwen2 import DEFAULTS, layer_windows, windows_to_hf
from jaxdecode.config import ModelConfig


def _features(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias, "qk_norm": True, "layer_windows": layer_windows(fields)}


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, **windows_to_hf(config)}


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    model=MODEL,
    layer=LAYER | {"attention.q_norm": ("self_attn.q_norm",), "attention.k_norm": ("self_attn.k_norm",)},
    ignored=IGNORED,
    defaults=DEFAULTS | {"head_dim": 128},
    features=_features,
    to_hf=_to_hf,
)
