"""`decode_attention` through the blocked `prefill_attention` with one query per sequence."""

from __future__ import annotations

from jax import Array

from pallas_kernels.prefill_attention.xla import prefill_attention


def decode_attention(
    query: Array, keys: Array, values: Array, lengths: Array, *, scale: float, window: int | None
) -> Array:
    positions = lengths[:, None] - 1
    return prefill_attention(query[:, None], keys, values, positions, scale=scale, window=window)[:, 0]
