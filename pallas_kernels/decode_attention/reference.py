"""The definition of `decode_attention`: the newest position's row of `prefill_attention`."""

from __future__ import annotations

from jax import Array

from pallas_kernels.prefill_attention.reference import prefill_attention


def decode_attention(
    query: Array, keys: Array, values: Array, lengths: Array, *, scale: float, window: int | None
) -> Array:
    positions = lengths[:, None] - 1
    return prefill_attention(query[:, None], keys, values, positions, scale=scale, window=window)[:, 0]
