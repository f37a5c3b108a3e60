"""GPT-NeoX's table (Pythia): LayerNorms and biases, a plain MLP, query, key and value of a head side by side."""

from __future__ import annotations

from typing import Any

from convert.family import Family, Fields
from convert.rows import head_by_head
from jaxdecode.config import ModelConfig


def _features(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias")
    return {
        "norm": "layer",
        "parallel": fields.flag("use_parallel_residual"),
        "gated_mlp": False,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": True,
    }


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return {"use_parallel_residual": config.parallel, "attention_bias": config.qkv_bias}


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    model={"embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
    layers="gpt_neox.layers",
    layer={
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("attention.query_key_value",),
        "attention.out": ("attention.dense",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp.up": ("mlp.dense_h_to_4h",),
        "mlp.down": ("mlp.dense_4h_to_h",),
    },
    renamed=("lm_head.", "embed_out."),
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    names={
        "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": "layer_norm_eps",
        "rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct",
    },
    defaults={
        "max_position_embeddings": 2048, "hidden_act": "gelu", "rms_norm_eps": 1e-5, "use_parallel_residual": True,
        "attention_bias": True,
    },
    partial_rotary=0.25,
    qkv_rows=head_by_head,
    features=_features,
    to_hf=_to_hf,
)  # fmt: skip
