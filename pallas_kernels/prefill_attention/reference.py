"""The definition of `prefill_attention`: plain jnp, float32 inside, all scores at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def prefill_attention(
    query: Array, keys: Array, values: Array, positions: Array, *, scale: float, window: int | None
) -> Array:
    q_per_kv = query.shape[2] // keys.shape[1]
    keys = jnp.repeat(keys.astype(jnp.float32), q_per_kv, axis=1)  # [batch, num_heads, max_len, head_dim]
    values = jnp.repeat(values.astype(jnp.float32), q_per_kv, axis=1)

    slots = jnp.arange(keys.shape[2])
    visible = slots <= positions[..., None]  # [batch, q_len, max_len]
    if window is not None:
        visible &= slots > positions[..., None] - window

    scores = scale * jnp.einsum("bqhd,bhsd->bhqs", query.astype(jnp.float32), keys)
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), axis=-1)
    weights = jnp.where(visible[:, None], weights, 0.0)
    seen = visible.any(axis=1)[:, None, :, None]  # [batch, 1, max_len, 1]
    out = jnp.einsum("bhqs,bhsd->bqhd", weights, jnp.where(seen, values, 0.0))
    return out.astype(query.dtype)
