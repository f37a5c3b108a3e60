"""`prefill_attention`: several queries per sequence, each at its own position, over that sequence's cache."""

from __future__ import annotations

import functools

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.dataflow import device_of, resolve_attention
from pallas_kernels.fold import fold_batch
from pallas_kernels.interpret import interpreter
from pallas_kernels.prefill_attention import reference, xla
from pallas_kernels.safe_range import check_range

_PLAIN = {"reference": reference.prefill_attention, "xla": xla.prefill_attention}


def prefill_attention(
    query: Float[Array, "batch q_len num_heads head_dim"],
    keys: Float[Array, "batch num_kv_heads max_len head_dim"],
    values: Float[Array, "batch num_kv_heads max_len head_dim"],
    positions: Int[Array, "batch q_len"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    unified_max: float | None = None,
    safe_range: tuple[float, float] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch q_len num_heads head_dim"], Int[Array, "batch num_kv_heads"]]:
    """Causal attention: a query at position p sees the cache slots p - window < s <= p.

        scores = soft_cap * tanh(scale * query @ keysᵀ / soft_cap), -inf where not visible
        weights = exp(scores - unified_max)
        out = weights @ values / weights.sum()

    Query heads share key heads in order: head h reads key head h // (num_heads // num_kv_heads). Slots before
    the first and behind the last that a query of the sequence sees may hold anything, NaN included. A query that sees
    nothing (position -1) gets zeros.

    Args:
      positions: where each query stands in its sequence.
      others: as for `decode_attention`; a row is a query head of one position.

    Returns:
      The output, and how many rows of a KV head had to be computed again.

    Raises:
      ValueError: shapes that do not belong together, or unified_max without a safe_range that float32 can hold.
      NotImplementedError: unknown implementation, or one that does not take these types or sizes.
    """
    _check(query, keys, values, positions)
    check_range(unified_max, safe_range)
    name = resolve_attention("prefill_attention", implementation, query, keys)
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    options |= {"unified_max": unified_max, "safe_range": safe_range}
    if name in _PLAIN:
        return _PLAIN[name](query, keys, values, positions, **options)

    from pallas_kernels.prefill_attention import mosaic_gpu  # needs Mosaic, which costs a second to import

    where = {"target": device_of(implementation), "interpret": interpreter(implementation)}
    run = functools.partial(mosaic_gpu.prefill_attention, **options, **where)
    return fold_batch(run, rows=4)(query, keys, values, positions)


def _check(query: Array, keys: Array, values: Array, positions: Array) -> None:
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
