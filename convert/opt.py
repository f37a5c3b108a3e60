"""OPT's table: two LayerNorms a layer, a plain MLP, and learned positions of which the first two rows mean none."""

from __future__ import annotations

from typing import Any

from convert.family import Family, Fields
from jaxdecode.config import ModelConfig


def _features(fields: Fields) -> dict[str, Any]:
    fields.require("layer_norm_elementwise_affine", True)
    bias, norm_before = fields.flag("enable_bias"), fields.flag("do_layer_norm_before")
    token_dim = fields.optional_integer("word_embed_proj_dim")
    return {
        "norm": "layer",
        "post_norm": not norm_before,
        "final_norm": norm_before and not fields.flag("_remove_final_layer_norm"),
        "gated_mlp": False,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
        "rope": None,
        "position_offset": 2,
        "token_dim": None if token_dim == fields.integer("hidden_size") else token_dim,
    }


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "do_layer_norm_before": not config.post_norm,
        "_remove_final_layer_norm": not config.post_norm and not config.final_norm,
        "enable_bias": config.qkv_bias,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": config.token_dim or config.embed_dim,
    }


FAMILY = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    model={
        "embed": "model.decoder.embed_tokens",
        "positions": "model.decoder.embed_positions",
        "token_in": "model.decoder.project_in",
        "token_out": "model.decoder.project_out",
        "norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
    },
    layers="model.decoder.layers",
    layer={
        "attention_norm": ("self_attn_layer_norm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.out_proj",),
        "mlp_norm": ("final_layer_norm",),
        "mlp.up": ("fc1",),
        "mlp.down": ("fc2",),
    },
    renamed=("decoder.", "model.decoder."),
    ignored=(r"model\.decoder\.version",),
    names={
        "intermediate_size": "ffn_dim", "hidden_act": "activation_function", "num_key_value_heads": None,
        "head_dim": None, "rms_norm_eps": None,
    },
    defaults={
        "max_position_embeddings": 2048, "hidden_act": "relu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True,
    },
    rope_keys=False,
    features=_features,
    to_hf=_to_hf,
)  # fmt: skip
