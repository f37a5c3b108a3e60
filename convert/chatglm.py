"""ChatGLM2's and ChatGLM3's table, in the words of their publisher's own code, which transformers does not hold."""

from __future__ import annotations

from typing import Any

from convert.chatglm_version import version_of_names
from convert.family import Family, Fields
from convert.rows import pairs_side_by_side
from jaxdecode.config import ModelConfig, RopeConfig

_THETA = 10_000.0
# What the publisher's code can also do, and no model that was published asks for.
_REQUIRED = {
    "rmsnorm": True,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,  # without it queries, keys and values alternate head by head in one tensor
    "original_rope": True,
    "quantization_bit": 0,
    "pre_seq_len": None,
}


def _features(fields: Fields) -> dict[str, Any]:
    for name, wanted in _REQUIRED.items():
        fields.require(name, wanted)
    bias = fields.flag("add_bias_linear")
    return {
        "qkv_bias": bias or fields.flag("add_qkv_bias"),
        "out_bias": bias,
        "mlp_bias": bias,
        "final_norm": fields.flag("post_layer_norm"),
        "rope": _rope(fields),
    }


def _rope(fields: Fields) -> RopeConfig:
    turned = max(fields.integer("head_dim") // 2, 1)
    try:
        return RopeConfig(rotary_dim=turned, **_stretched(fields))
    except ValueError as error:
        fields.problems.append(f"config.json: rope_ratio: {error}")
        return RopeConfig()


def _stretched(fields: Fields) -> dict[str, Any]:
    """What rope_ratio means: the code of ChatGLM2 divides positions by it, that of ChatGLM3 multiplies theta."""
    ratio, name = fields.number("rope_ratio"), fields.config.get("_name_or_path")
    version = version_of_names(fields.config)
    if ratio == 1 or version == 3:
        return {"theta": _THETA * ratio}
    if version == 2:
        return {"theta": _THETA, "kind": "linear", "factor": ratio}
    fields.problems.append(
        f"config.json: rope_ratio {ratio:g} divides positions in ChatGLM2 and multiplies the base of the frequencies "
        f"in ChatGLM3, and nothing says which this is; _name_or_path is {name!r:.80}: write a name there whose last "
        "part holds chatglm2 or chatglm3, for example THUDM/chatglm3-6b-32k"
    )
    return {"theta": _THETA}


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    if config.rope is None:
        raise ValueError("chatglm has rotary positions; got learned ones")
    linear = config.rope.kind == "linear"
    ratio = config.rope.factor if linear else config.rope.theta / _THETA
    name = {} if ratio == 1 else {"_name_or_path": f"chatglm{2 if linear else 3}"}
    return {
        **name,
        **_REQUIRED,
        "add_bias_linear": config.out_bias,
        "add_qkv_bias": config.qkv_bias,
        "post_layer_norm": config.final_norm,
        "rope_ratio": int(ratio) if ratio.is_integer() else ratio,
    }


FAMILY = Family(
    model_type="chatglm",
    architecture="ChatGLMModel",
    model={
        "embed": "transformer.embedding.word_embeddings",
        "norm": "transformer.encoder.final_layernorm",
        "head": "transformer.output_layer",
    },
    layers="transformer.encoder.layers",
    layer={
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("self_attention.query_key_value",),
        "attention.out": ("self_attention.dense",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp.gate_up": ("mlp.dense_h_to_4h",),
        "mlp.down": ("mlp.dense_4h_to_h",),
    },
    qkv_rows=pairs_side_by_side,
    ignored=(r"transformer\.rotary_pos_emb\.inv_freq",),
    names={
        "vocab_size": "padded_vocab_size", "num_hidden_layers": "num_layers", "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels", "num_key_value_heads": "multi_query_group_num", "hidden_act": None,
        "max_position_embeddings": "seq_length", "rms_norm_eps": "layernorm_epsilon",
    },
    defaults={
        "head_dim": 128, "num_key_value_heads": 1, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_ratio": 1, "rmsnorm": True, "apply_residual_connection_post_layernorm": False, "original_rope": True,
        "quantization_bit": 0, "post_layer_norm": True,
    },
    rope_keys=False,
    features=_features,
    to_hf=_to_hf,
)  # fmt: skip
