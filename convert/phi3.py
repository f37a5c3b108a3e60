"""Phi-3's table (also Phi-3.5 and Phi-4): Llama's names but two fused matrices, Mistral's window, a longrope."""

from __future__ import annotations

from typing import Any

from convert.family import Family
from convert.llama import IGNORED, LAYER, MODEL
from convert.mistral import window_everywhere, window_to_hf
from jaxdecode.config import ModelConfig


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    # null, since the token that transformers assumes need not be in the vocabulary
    return window_to_hf(config) | {"pad_token_id": None}


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    model=MODEL,
    layer=LAYER | {"attention.qkv": ("self_attn.qkv_proj",), "mlp.gate_up": ("mlp.gate_up_proj",)},
    ignored=IGNORED,
    defaults={
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    rope_kinds={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
    partial_rotary=1.0,
    features=window_everywhere,
    to_hf=_to_hf,
)  # fmt: skip
