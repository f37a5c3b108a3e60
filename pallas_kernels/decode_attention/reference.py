"""The definition of `decode_attention`: the newest position's row of `prefill_attention`."""

from __future__ import annotations

from typing import Any

from jax import Array

from pallas_kernels.prefill_attention.reference import prefill_attention


def decode_attention(
    query: Array, keys: Array, values: Array, lengths: Array, **options: Any
) -> tuple[Array, Array]:
    out, recomputed = prefill_attention(query[:, None], keys, values, lengths[:, None] - 1, **options)
    return out[:, 0], recomputed
