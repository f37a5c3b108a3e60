"""`prefill_attention` in blocks of the cache with the online softmax: work and memory follow the valid length."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.fold import fold_batch

BLOCK_KV = 512  # long enough that the loop costs nothing, short enough that the scores of a chunk stay small


def prefill_attention(
    query: Array,
    keys: Array,
    values: Array,
    positions: Array,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    unified_max: float | None = None,
    safe_range: tuple[float, float] | None = None,
) -> tuple[Array, Array]:
    """As the API; always the online softmax, which has no range to leave."""
    run = functools.partial(_attend, scale=scale, window=window, soft_cap=soft_cap)
    out = fold_batch(run, rows=4)(query, keys, values, positions)
    return out, jnp.zeros(keys.shape[:2], jnp.int32)


def _attend(
    query: Array,
    keys: Array,
    values: Array,
    positions: Array,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Array:
    batch, q_len, num_heads, head_dim = query.shape
    num_kv_heads, max_len = keys.shape[1:3]
    block_kv = min(BLOCK_KV, max_len)
    rows = num_heads // num_kv_heads * q_len
    # One product per key head: its query heads and positions are the rows of a [rows, head_dim] matrix.
    queries = jnp.moveaxis(query.reshape(batch, q_len, num_kv_heads, -1, head_dim), 1, 3)
    queries = queries.reshape(batch, num_kv_heads, rows, head_dim) * jnp.asarray(scale, query.dtype)
    row_positions = jnp.tile(positions, (1, num_heads // num_kv_heads))[:, None, :, None]  # [batch, 1, rows, 1]

    def attend_block(index, carry):
        maximum, denominator, numerator = carry
        begin = jnp.minimum(index * block_kv, max_len - block_kv)  # the last block may reach back
        k = lax.dynamic_slice_in_dim(keys, begin, block_kv, axis=2)
        v = lax.dynamic_slice_in_dim(values, begin, block_kv, axis=2)
        slots = begin + jnp.arange(block_kv)
        visible = (slots <= row_positions) & (slots >= index * block_kv)  # [batch, 1, rows, block_kv]
        if window is not None:
            visible &= slots > row_positions - window

        scores = jnp.einsum("bhrd,bhsd->bhrs", queries, k, preferred_element_type=jnp.float32)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(visible, scores, -1e30)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1, keepdims=True))
        weights = jnp.where(visible, jnp.exp(scores - new_maximum), 0.0)
        rescale = jnp.exp(maximum - new_maximum)
        v = jnp.where(visible.any(axis=2)[..., None], v, jnp.zeros((), v.dtype))  # unused slots may hold NaN
        partial = jnp.einsum("bhrs,bhsd->bhrd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (
            new_maximum,
            denominator * rescale + weights.sum(axis=-1, keepdims=True),
            numerator * rescale + partial,
        )

    zeros = jnp.zeros_like(queries, jnp.float32)
    carry = (zeros[..., :1] - 1e30, zeros[..., :1], zeros)
    if block_kv == max_len:
        _, denominator, numerator = attend_block(0, carry)
    else:
        oldest = positions.min() - window + 1 if window is not None else jnp.zeros((), positions.dtype)
        first = jnp.maximum(oldest, 0) // block_kv
        last = positions.max() // block_kv + 1
        _, denominator, numerator = lax.fori_loop(first, last, attend_block, carry)
    out = (numerator / jnp.maximum(denominator, 1e-37)).astype(query.dtype)
    out = out.reshape(batch, num_kv_heads, -1, q_len, head_dim)
    return jnp.moveaxis(out, 3, 1).reshape(query.shape)
