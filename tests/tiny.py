"""Small random models and prompts for the engine's tests."""

import jax
import jax.numpy as jnp

from jaxdecode.config import ModelConfig
from jaxdecode.models import init_params


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
    return init_params(config, jax.random.key(seed), dtype), config


def prompts(lengths, prompt_len: int | None = None, vocab_size: int = 96, seed: int = 1):
    """Random tokens [batch, prompt_len] with random padding too, and lengths [batch]."""
    shape = (len(lengths), prompt_len or max(lengths))
    tokens = jax.random.randint(jax.random.key(seed), shape, 0, vocab_size, jnp.int32)
    return tokens, jnp.asarray(lengths, jnp.int32)
