"""Gemma 2's table: four norms a layer with gains around one, scaled embeddings, soft caps, windows on some layers."""

from __future__ import annotations

from typing import Any

from convert.family import Family, Fields
from convert.llama import IGNORED, MODEL
from convert.llama import LAYER as LLAMA_LAYER
from convert.qwen2 import typed_windows, windows_to_hf
from jaxdecode.config import ModelConfig

LAYER = LLAMA_LAYER | {
    "attention_out_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "mlp_out_norm": ("post_feedforward_layernorm",),
}
NAMES = {"hidden_act": "hidden_activation"}
DEFAULTS = {
    "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip


def features(fields: Fields, full_every: int = 2) -> dict[str, Any]:
    """What both Gemmas say; without `layer_types` every `full_every`-th layer has no window."""
    if fields.flag("use_bidirectional_attention"):
        fields.problems.append("config.json: use_bidirectional_attention is not supported: a decoder looks back only")
    bias, types = fields.flag("attention_bias"), fields.config.get("layer_types")
    if types is None:
        layers = range(1, fields.integer("num_hidden_layers") + 1)
        types = ["sliding_attention" if layer % full_every else "full_attention" for layer in layers]
    return {
        "norm_offset": 1.0,
        "qkv_bias": bias,
        "out_bias": bias,
        "embed_scale": fields.integer("hidden_size") ** 0.5,
        "scale_dim": fields.integer("query_pre_attn_scalar"),
        "attention_soft_cap": fields.optional_number("attn_logit_softcapping"),
        "logit_soft_cap": fields.optional_number("final_logit_softcapping"),
        "layer_windows": typed_windows(fields, types, fields.optional_integer("sliding_window")),
    }


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `features`."""
    windows = windows_to_hf(config)
    return {
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": config.scale_dim,
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.logit_soft_cap,
        "sliding_window": windows["sliding_window"],
        "layer_types": windows["layer_types"],
    }


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    model=MODEL,
    layer=LAYER,
    ignored=IGNORED,
    names=NAMES,
    defaults=DEFAULTS,
    features=features,
    to_hf=to_hf,
)
