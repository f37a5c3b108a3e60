"""What a model must read and compute, whatever runs it: the yardstick of the compiled programs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxdecode.config import ModelConfig
from jaxdecode.models import abstract_params
from jaxdecode.models.known import parameters


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all parameters."""
    return parameters(config) * jnp.dtype(dtype).itemsize


def slot_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values that one token of one row takes in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def layer_matrices(config: ModelConfig) -> int:
    """Weights of all layers that multiply a token: norms, biases, tables and the output head are none."""
    params = abstract_params(config)
    outer = [params[name] for name in ("token_in", "token_out") if name in params]
    return config.num_layers * _matrices(params["layers"][0]) + _matrices(outer)


def head_matrix(config: ModelConfig) -> int:
    """Weights of the output head, which may be the embedding table."""
    return config.vocab_size * (config.token_dim or config.embed_dim)


def seen(config: ModelConfig, context: int) -> int:
    """Slots that a token with `context` tokens up to it looks at, over all layers."""
    return sum(min(context, config.window(layer) or context) for layer in range(config.num_layers))


def step_bytes(config: ModelConfig, dtype: str, batch: int, context: int) -> int:
    """Bytes of weights, keys and values that a decode step must read: each once."""
    itemsize = jnp.dtype(dtype).itemsize
    caches = 2 * batch * seen(config, context) * config.num_kv_heads * config.head_dim
    return itemsize * (layer_matrices(config) + head_matrix(config) + caches)


def step_operations(config: ModelConfig, batch: int, context: int) -> int:
    """Multiplications and additions of a decode step's products and attention."""
    products = batch * (layer_matrices(config) + head_matrix(config))
    return 2 * products + 4 * batch * seen(config, context) * config.num_heads * config.head_dim


def _matrices(params: object) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params) if len(leaf.shape) == 2)
