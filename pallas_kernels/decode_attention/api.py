"""`decode_attention`: the newest query of each sequence over that sequence's cache."""

from __future__ import annotations

from typing import Any

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.dataflow import find_implementation, import_when_called
from pallas_kernels.decode_attention import reference, xla


def decode_attention(
    query: Float[Array, "batch num_heads head_dim"],
    keys: Float[Array, "batch num_kv_heads max_len head_dim"],
    values: Float[Array, "batch num_kv_heads max_len head_dim"],
    lengths: Int[Array, " batch"],
    *,
    scale: float,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch num_heads head_dim"]:
    """Attention over the first `lengths` slots of each sequence, or the last `window` of those.

        scores = where(visible, scale * query @ keysᵀ, -inf)
        out = softmax(scores) @ values

    Slots past the length may hold anything, NaN included. A sequence of length 0 gets zeros.

    Args:
      lengths: valid slots of each sequence.
      scale: multiplier of the scores, usually head_dim ** -0.5.
      window: sliding-window length in tokens; None for all slots.
      implementation: "reference", "xla", "mosaic_gpu" (float16 or bfloat16, online softmax here; `mosaic_gpu.py` also
        takes a unified maximum), or None for `choose_implementation`.

    Raises:
      ValueError: shapes that do not belong together.
      NotImplementedError: unknown implementation.
    """
    batch, num_heads, head_dim = query.shape
    if keys.shape != values.shape or keys.shape[0] != batch or keys.shape[3] != head_dim:
        raise ValueError(
            f"keys and values must be [{batch=}, num_kv_heads, max_len, {head_dim=}]; got {keys.shape} "
            f"and {values.shape}"
        )
    if num_heads % keys.shape[1]:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads; got {num_heads} and {keys.shape[1]}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must be [{batch=}]; got {lengths.shape}")
    table = {"reference": reference.decode_attention, "xla": xla.decode_attention, "mosaic_gpu": _mosaic_gpu}
    run = find_implementation("decode_attention", implementation, table)
    return run(query, keys, values, lengths, scale=scale, window=window)


def _mosaic_gpu(*args: Array, **options: Any) -> Array:
    out, _ = import_when_called("pallas_kernels.decode_attention.mosaic_gpu", "decode_attention")(*args, **options)
    return out
