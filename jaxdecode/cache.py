"""The key-value cache and its layout, written down once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxdecode.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, one buffer a layer so that an update never copies the others.

    Attributes:
      keys, values: num_layers arrays [batch, num_kv_heads, max_len, head_dim]; slot s holds position s.
      lengths: [batch] int32, valid slots of each sequence; the slots behind may hold anything.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    lengths: Array


def cache_slots(tokens: int) -> int:
    """Slots that a cache has for that many tokens: a multiple of 32, so that attention reads whole blocks."""
    return -(-tokens // 32) * 32


def init_cache(config: ModelConfig, batch: int, max_len: int, dtype: DTypeLike) -> KVCache:
    """An empty cache of `max_len` slots a sequence."""
    shape = (batch, config.num_kv_heads, max_len, config.head_dim)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        lengths=jnp.zeros(batch, jnp.int32),
    )


def append_chunk(
    buffer: Float[Array, "batch num_kv_heads max_len head_dim"],
    chunk: Float[Array, "batch q_len num_kv_heads head_dim"],
    start: Int[Array, ""],
) -> Float[Array, "batch num_kv_heads max_len head_dim"]:
    """Writes a chunk into the slots start … start + q_len of every row."""
    return lax.dynamic_update_slice_in_dim(buffer, jnp.swapaxes(chunk, 1, 2), start, axis=2)
