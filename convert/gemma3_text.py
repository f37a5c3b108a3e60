"""Gemma 3's table (text only): Gemma 2's, with norms of heads, and other positions on the layers with a window."""

from __future__ import annotations

from typing import Any

from convert.family import Family, Fields
from convert.gemma2 import DEFAULTS, LAYER, NAMES, features, to_hf
from convert.llama import IGNORED, MODEL
from convert.rope import parse_rope, rope_to_hf
from jaxdecode.config import ModelConfig, RopeConfig

_GLOBAL_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0


def _features(fields: Fields) -> dict[str, Any]:
    values = features(fields, full_every=fields.integer("sliding_window_pattern"))
    rope, local = _ropes(fields)
    differs = any(values["layer_windows"]) and local != rope
    return values | {"qk_norm": True, "rope": rope, "local_rope": local if differs else None}


def _ropes(fields: Fields) -> tuple[RopeConfig, RopeConfig]:
    """Of the layers without a window, which `rope_scaling` stretches, and of those with one."""
    nested = fields.config.get("rope_parameters") or {}
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(nested, dict) or any(not isinstance(value, dict | None) for value in nested.values()):
        said = f"rope_parameters must hold an object or null for each of {' and '.join(kinds)}"
        fields.problems.append(f"config.json: {said}")
        nested = {}
    scaling, (whole, local) = fields.config.get("rope_scaling") or {}, (nested.get(kind) or {} for kind in kinds)
    if not isinstance(scaling, dict):
        fields.problems.append(f"config.json: rope_scaling must be an object or null; it is {scaling!r:.80}")
        scaling = {}
    return (
        _rope(fields, whole | scaling, fields.get("rope_theta")),
        _rope(fields, local, fields.get("rope_local_base_freq")),
    )


def _rope(fields: Fields, parameters: dict[str, Any], theta: Any) -> RopeConfig:
    own = Fields({"rope_theta": theta, "rope_parameters": parameters}, {}, fields.problems)
    return parse_rope(own, FAMILY, fields.integer("max_position_embeddings"), fields.integer("head_dim"))


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    rope, local = rope_to_hf(config), config.local_rope
    if local is not None and local.kind != "default":
        raise ValueError(f"gemma3_text stretches no positions of layers with a window; got {local}")
    theta = rope["rope_theta"] if local is None else local.theta
    return to_hf(config) | rope | {"rope_local_base_freq": theta}


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    model=MODEL,
    layer=LAYER | {"attention.q_norm": ("self_attn.q_norm",), "attention.k_norm": ("self_attn.k_norm",)},
    ignored=IGNORED,
    names=NAMES,
    defaults=DEFAULTS | {
        "max_position_embeddings": 131072, "final_logit_softcapping": None, "attn_logit_softcapping": None,
        "sliding_window_pattern": 6, "rope_theta": _GLOBAL_THETA, "rope_local_base_freq": _LOCAL_THETA,
    },
    rope_keys=False,
    rope_kinds={"default": "default", "linear": "linear"},
    features=_features,
    to_hf=_to_hf,
)  # fmt: skip
