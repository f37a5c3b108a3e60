"""Published models as configurations, for planning and for tests; a conversion reads the model's own."""

from __future__ import annotations

import math

import jax

from jaxdecode.config import ModelConfig, RopeConfig
from jaxdecode.models import abstract_params

KNOWN: dict[str, ModelConfig] = {
    # meta-llama/Llama-2-7b-hf and -13b-hf, config.json (arXiv 2307.09288)
    "llama2-7b": ModelConfig(
        model_type="llama", vocab_size=32_000, embed_dim=4096, mlp_dim=11_008, num_layers=32, num_heads=32,
        num_kv_heads=32, head_dim=128, max_position=4096,
    ),
    "llama2-13b": ModelConfig(
        model_type="llama", vocab_size=32_000, embed_dim=5120, mlp_dim=13_824, num_layers=40, num_heads=40,
        num_kv_heads=40, head_dim=128, max_position=4096,
    ),
    # facebook/opt-6.7b, config.json (arXiv 2205.01068)
    "opt-6.7b": ModelConfig(
        model_type="opt", vocab_size=50_272, embed_dim=4096, mlp_dim=16_384, num_layers=32, num_heads=32,
        num_kv_heads=32, head_dim=128, max_position=2048, rope=None, position_offset=2, norm="layer",
        gated_mlp=False, activation="relu", qkv_bias=True, out_bias=True, mlp_bias=True, tied_embeddings=True,
    ),
    # THUDM/chatglm2-6b, config.json
    "chatglm2-6b": ModelConfig(
        model_type="chatglm", vocab_size=65_024, embed_dim=4096, mlp_dim=13_696, num_layers=28, num_heads=32,
        num_kv_heads=2, head_dim=128, max_position=32_768, rope=RopeConfig(rotary_dim=64), qkv_bias=True,
    ),
    # HuggingFaceTB/SmolLM2-135M, config.json
    "smollm2-135m": ModelConfig(
        model_type="llama", vocab_size=49_152, embed_dim=576, mlp_dim=1536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, max_position=8192, rope=RopeConfig(theta=100_000.0), tied_embeddings=True,
    ),
    # Qwen/Qwen2.5-7B, config.json (arXiv 2412.15115)
    "qwen2.5-7b": ModelConfig(
        model_type="qwen2", vocab_size=152_064, embed_dim=3584, mlp_dim=18_944, num_layers=28, num_heads=28,
        num_kv_heads=4, head_dim=128, max_position=131_072, norm_eps=1e-6, rope=RopeConfig(theta=1e6), qkv_bias=True,
    ),
    # mistralai/Mistral-7B-v0.1, config.json (arXiv 2310.06825)
    "mistral-7b": ModelConfig(
        model_type="mistral", vocab_size=32_000, embed_dim=4096, mlp_dim=14_336, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128, max_position=32_768, layer_windows=(4096,) * 32,
    ),
}  # fmt: skip


def parameters(config: ModelConfig) -> int:
    """How many numbers a model's weights hold; tied embeddings count once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))
