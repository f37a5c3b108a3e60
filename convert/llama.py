"""Llama's table, and the names that the other families share with it."""

from __future__ import annotations

from typing import Any

from convert.family import Family, Fields
from jaxdecode.config import ModelConfig

MODEL = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
LAYER = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
IGNORED = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


def _features(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": fields.flag("mlp_bias")}


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    model=MODEL,
    layer=LAYER,
    ignored=IGNORED,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    features=_features,
    to_hf=_to_hf,
)
