"""The definition of `prefill_attention`: plain jnp, float32 inside, all scores at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.safe_range import is_unsafe


def prefill_attention(
    query: Array,
    keys: Array,
    values: Array,
    positions: Array,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    unified_max: float | None,
    safe_range: tuple[float, float] | None,
) -> tuple[Array, Array]:
    batch, num_kv_heads, max_len, _ = keys.shape
    q_per_kv = query.shape[2] // num_kv_heads
    keys = jnp.repeat(keys.astype(jnp.float32), q_per_kv, axis=1)  # [batch, num_heads, max_len, head_dim]
    values = jnp.repeat(values.astype(jnp.float32), q_per_kv, axis=1)

    slots = jnp.arange(max_len)
    visible = slots <= positions[..., None]  # [batch, q_len, max_len]
    if window is not None:
        visible &= slots > positions[..., None] - window
    seen = visible.any(axis=1)[:, None, :, None]  # [batch, 1, max_len, 1]
    visible = visible[:, None]  # [batch, 1, q_len, max_len]

    scores = scale * jnp.einsum("bqhd,bhsd->bhqs", query.astype(jnp.float32), keys)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    weights = jnp.where(visible, weights, 0.0)
    out = jnp.einsum("bhqs,bhsd->bqhd", weights, jnp.where(seen, values, 0.0)).astype(query.dtype)

    if unified_max is None or safe_range is None:
        return out, jnp.zeros((batch, num_kv_heads), jnp.int32)
    unsafe = is_unsafe(scores, visible, unified_max, safe_range)  # [batch, num_heads, q_len]
    return out, unsafe.reshape(batch, num_kv_heads, -1).sum(axis=2, dtype=jnp.int32)
