"""Small random models and prompts for the engine's tests."""

import jax
import jax.numpy as jnp

from jaxdecode.config import ModelConfig, RopeConfig
from jaxdecode.models import init_params

OPT = dict(
    model_type="opt", norm="layer", gated_mlp=False, activation="relu", qkv_bias=True, out_bias=True, mlp_bias=True,
    num_kv_heads=4, rope=None, position_offset=2, tied_embeddings=True,
)  # fmt: skip
OPT_350M = OPT | dict(post_norm=True, final_norm=False, token_dim=16)
CHATGLM = dict(model_type="chatglm", qkv_bias=True, num_kv_heads=1, rope=RopeConfig(rotary_dim=4))
GLM = CHATGLM | dict(model_type="glm")
GPT_NEOX = dict(
    model_type="gpt_neox", norm="layer", parallel=True, gated_mlp=False, activation="gelu", qkv_bias=True,
    out_bias=True, mlp_bias=True, num_kv_heads=4, rope=RopeConfig(rotary_dim=4),
)  # fmt: skip
_FACTORS = dict(short_factors=(1.0, 1.5, 2.0, 2.5), long_factors=(1.5, 4.0, 7.0, 9.0))
# beyond 300 tokens, which no test of all families reaches one by one
PHI3 = dict(model_type="phi3", rope=RopeConfig(kind="longrope", original_max_len=300, attention_factor=1.2, **_FACTORS))
# embeddings scaled as Gemma's would outshine what the layers add, and a tied head would repeat the last token
GEMMA2 = dict(
    model_type="gemma2", norm_offset=1.0, activation="gelu_tanh", embed_scale=0.6, scale_dim=48, norm_eps=1e-6,
    attention_soft_cap=2.0, logit_soft_cap=3.0, layer_windows=(8, None),
)  # fmt: skip
GEMMA3 = GEMMA2 | dict(
    model_type="gemma3_text", qk_norm=True, attention_soft_cap=None,
    rope=RopeConfig(kind="linear", theta=1000.0, factor=3.0), local_rope=RopeConfig(theta=10.0),
)  # fmt: skip
FAMILIES = {
    "opt": OPT, "opt-350m": OPT_350M, "chatglm": CHATGLM, "gpt-neox": GPT_NEOX, "phi3": PHI3, "gemma2": GEMMA2,
    "gemma3": GEMMA3,
}  # fmt: skip


def tiny_config(**changes) -> ModelConfig:
    fields = dict(
        model_type="llama",
        vocab_size=96,
        embed_dim=32,
        mlp_dim=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=256,
    )
    return ModelConfig(**(fields | changes))


def tiny_model(seed: int = 0, dtype=jnp.float32, **changes):
    config = tiny_config(**changes)
    return lively_params(config, jax.random.key(seed), dtype), config


def lively_params(config: ModelConfig, key, dtype=jnp.float32):
    """Random parameters whose norms and biases are none of the ones and zeros that hide where they go."""

    def stir(leaf):
        noise = jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape)
        return leaf + (0.3 * noise).astype(dtype) if leaf.ndim == 1 else leaf

    return jax.jit(lambda: jax.tree.map(stir, init_params(config, key, dtype)))()


def prompts(lengths, prompt_len: int | None = None, vocab_size: int = 96, seed: int = 1):
    """Random tokens [batch, prompt_len] with random padding too, and lengths [batch]."""
    shape = (len(lengths), prompt_len or max(lengths))
    tokens = jax.random.randint(jax.random.key(seed), shape, 0, vocab_size, jnp.int32)
    return tokens, jnp.asarray(lengths, jnp.int32)
