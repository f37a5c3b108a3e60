"""GLM-4's table: Llama's names, gate and up in one matrix, and heads that turn in part, by pairs side by side."""

from __future__ import annotations

from typing import Any

from convert.family import Family, Fields
from convert.llama import IGNORED, LAYER, MODEL
from convert.rows import pairs_side_by_side
from jaxdecode.config import ModelConfig


def _features(fields: Fields) -> dict[str, Any]:
    return {"qkv_bias": fields.flag("attention_bias")}


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    # null, since the token that transformers assumes need not be in the vocabulary
    return {"attention_bias": config.qkv_bias, "pad_token_id": None}


FAMILY = Family(
    model_type="glm",
    architecture="GlmForCausalLM",
    model=MODEL,
    layer=LAYER | {"mlp.gate_up": ("mlp.gate_up_proj",)},
    ignored=IGNORED,
    defaults={
        "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07,
        "attention_bias": True,
    },
    partial_rotary=0.5,
    qkv_rows=pairs_side_by_side,
    features=_features,
    to_hf=_to_hf,
)  # fmt: skip
