"""`decode_attention`: the newest query of each sequence over that sequence's cache."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.dataflow import device_of, resolve_attention
from pallas_kernels.decode_attention import reference, xla
from pallas_kernels.fold import fold_batch
from pallas_kernels.interpret import interpreter
from pallas_kernels.safe_range import check_range

_PLAIN = {"reference": reference.decode_attention, "xla": xla.decode_attention}


def decode_attention(
    query: Float[Array, "m num_heads head_dim"],
    keys: Float[Array, "batch num_kv_heads max_len head_dim"],
    values: Float[Array, "batch num_kv_heads max_len head_dim"],
    lengths: Int[Array, " batch"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    unified_max: float | None = None,
    safe_range: tuple[float, float] | None = None,
    implementation: str | None = None,
    counters: Any = None,
) -> tuple[Float[Array, "m num_heads head_dim"], Int[Array, "batch num_kv_heads"]]:
    """Attention over the first `lengths` slots of each sequence, or the last `window` of those.

        scores = soft_cap * tanh(scale * query @ keysᵀ / soft_cap), -inf where not visible
        weights = exp(scores - unified_max)
        out = weights @ values / weights.sum()

    Slots past the length may hold anything, NaN included. A sequence of length 0 gets zeros, and so do queries past
    the batch. The unified maximum (FlashDecoding++, section 3) is the same for all scores, so that shares of a long
    sequence need not agree on one; None for the largest score of each row, the online softmax. Under `vmap` the mapped
    axis becomes more sequences.

    Args:
      query: m ≥ batch rows; those past the batch are padding.
      lengths: valid slots of each sequence.
      scale: multiplier of the scores, usually head_dim ** -0.5.
      window: sliding-window length in tokens; None for all slots.
      safe_range: of the scores, needed with unified_max. A row (a query head of a sequence) with a score above its
        upper end, or whose denominator vanished, is computed again with the online softmax, on the device and alone.
        Its lower end is not looked at: lower scores only vanish.
      implementation: "reference", "xla" (always the online softmax) or "mosaic_gpu" (float16 or bfloat16), another
        of `dataflow.BACKENDS`, or None for `choose_attention`.
      counters: a `jax.new_ref` of int32 zeros, as for `linear`, with an entry for each KV head of each sequence.

    Returns:
      The output, and how many rows of a KV head had to be computed again.

    Raises:
      ValueError: shapes that do not belong together, or unified_max without a safe_range that float32 can hold.
      NotImplementedError: unknown implementation, or one that does not take these types or sizes.
    """
    batch = keys.shape[0]
    _check(query, keys, values, lengths)
    check_range(unified_max, safe_range)
    name = resolve_attention("decode_attention", implementation, query, keys)
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    options |= {"unified_max": unified_max, "safe_range": safe_range}
    if name in _PLAIN:
        out, recomputed = _PLAIN[name](query[:batch], keys, values, lengths, **options)
        return jnp.pad(out, ((0, query.shape[0] - batch), (0, 0), (0, 0))), recomputed

    from pallas_kernels.decode_attention import mosaic_gpu  # needs Mosaic, which costs a second to import

    where = {"target": device_of(implementation), "interpret": interpreter(implementation)}
    run = functools.partial(mosaic_gpu.decode_attention, **options, **where)
    if counters is None and query.shape[0] == batch:
        return fold_batch(run, rows=4)(query, keys, values, lengths)
    return run(query, keys, values, lengths, counters=counters)


def _check(query: Array, keys: Array, values: Array, lengths: Array) -> None:
    batch, head_dim = keys.shape[0], query.shape[2]
    if keys.shape != values.shape or query.shape[0] < batch or keys.shape[3] != head_dim:
        raise ValueError(
            f"keys and values must be [batch ≤ {query.shape[0]}, num_kv_heads, max_len, {head_dim=}]; got {keys.shape} "
            f"and {values.shape}"
        )
    if query.shape[1] % keys.shape[1]:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads; got {query.shape[1]} and {keys.shape[1]}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must be [{batch=}]; got {lengths.shape}")
