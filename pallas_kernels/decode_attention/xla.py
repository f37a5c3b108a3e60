"""`decode_attention` through the blocked `prefill_attention` with one query per sequence."""

from __future__ import annotations

from typing import Any

from jax import Array

from pallas_kernels.prefill_attention.xla import prefill_attention


def decode_attention(
    query: Array, keys: Array, values: Array, lengths: Array, **options: Any
) -> tuple[Array, Array]:
    out, recomputed = prefill_attention(query[:, None], keys, values, lengths[:, None] - 1, **options)
    return out[:, 0], recomputed
