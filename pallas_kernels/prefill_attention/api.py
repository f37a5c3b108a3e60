"""`prefill_attention`: several queries per sequence, each at its own position, over that sequence's cache."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.dataflow import find_implementation
from pallas_kernels.prefill_attention import reference, xla


def prefill_attention(
    query: Float[Array, "batch q_len num_heads head_dim"],
    keys: Float[Array, "batch num_kv_heads max_len head_dim"],
    values: Float[Array, "batch num_kv_heads max_len head_dim"],
    positions: Int[Array, "batch q_len"],
    *,
    scale: float,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch q_len num_heads head_dim"]:
    """Causal attention: a query at position p sees the cache slots p - window < s <= p.

        scores = where(visible, scale * query @ keysᵀ, -inf)
        out = softmax(scores) @ values

    Query heads share key heads in order: head h reads key head h // (num_heads // num_kv_heads). Slots that no query
    sees may hold anything, NaN included. A query that sees nothing (position -1) gets zeros.

    Args:
      positions: where each query stands in its sequence.
      scale: multiplier of the scores, usually head_dim ** -0.5.
      window: sliding-window length in tokens; None for all earlier slots.
      implementation: "reference", "xla", or None for `choose_implementation`.

    Raises:
      ValueError: shapes that do not belong together.
      NotImplementedError: unknown implementation.
    """
    batch, q_len, num_heads, head_dim = query.shape
    if keys.shape != values.shape or keys.shape[0] != batch or keys.shape[3] != head_dim:
        raise ValueError(
            f"keys and values must be [{batch=}, num_kv_heads, max_len, {head_dim=}]; got {keys.shape} "
            f"and {values.shape}"
        )
    if num_heads % keys.shape[1]:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads; got {num_heads} and {keys.shape[1]}")
    if positions.shape != (batch, q_len):
        raise ValueError(f"positions must be [{batch=}, {q_len=}]; got {positions.shape}")
    table = {"reference": reference.prefill_attention, "xla": xla.prefill_attention}
    run = find_implementation("prefill_attention", implementation, table)
    return run(query, keys, values, positions, scale=scale, window=window)
