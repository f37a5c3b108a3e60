"""ChatGLM2's and ChatGLM3's table, in the words of their publisher's own code, which transformers does not hold."""

from __future__ import annotations

from typing import Any

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
    try:
        return RopeConfig(theta=_THETA * _rope_ratio(fields), rotary_dim=max(fields.integer("head_dim") // 2, 1))
    except ValueError as error:
        fields.problems.append(f"config.json: rope_ratio: {error}")
        return RopeConfig()


def _rope_ratio(fields: Fields) -> float:
    """What theta is multiplied with, by the code of ChatGLM3; that of ChatGLM2-6B-32k divided positions by it."""
    ratio, name = fields.number("rope_ratio"), fields.config.get("_name_or_path")
    if ratio != 1 and "chatglm2" in str(name).lower():
        fields.problems.append(
            f"config.json: rope_ratio {ratio:g} of {name!r:.80} divides positions, which is not supported; that of "
            "ChatGLM3, which multiplies the base of the frequencies, is"
        )
    return ratio


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    if config.rope is None:
        raise ValueError("chatglm has rotary positions; got learned ones")
    ratio = config.rope.theta / _THETA
    return {
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
