"""From a product for queries, keys and values to heads in a cache: split, normed, rotated, stored. Plain jnp."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from pallas_kernels.norm import Norm, normalize

Rope = tuple[Array, Array]  # cos and sin, each [..., rotary_dim // 2] float32


def split_heads(
    qkv: Float[Array, "*batch n"],
    *,
    num_kv_heads: int,
    head_dim: int,
    rope: Rope | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> tuple[Array, Array, Array]:
    """qkv [..., (num_heads + 2 * num_kv_heads) * head_dim] -> query, key, value [..., heads, head_dim].

    Args:
      rope: turns queries and keys after their norms; None for positions that are not rotations.
      q_norm, k_norm: norms over head_dim.
    """
    heads = qkv.reshape(*qkv.shape[:-1], -1, head_dim)
    num_heads = heads.shape[-2] - 2 * num_kv_heads
    query, key, value = jnp.split(heads, [num_heads, num_heads + num_kv_heads], axis=-2)
    query, key = normalize(query, q_norm), normalize(key, k_norm)
    if rope is not None:
        query, key = apply_rope(query, *rope), apply_rope(key, *rope)
    return query, key, value


def store_heads(
    qkv: Float[Array, "m n"],
    dtype: DTypeLike,
    *,
    keys: Float[Array, "batch num_kv_heads max_len head_dim"],
    values: Float[Array, "batch num_kv_heads max_len head_dim"],
    lengths: Int[Array, " batch"],
    rope: Rope | None,
    q_norm: Norm | None,
    k_norm: Norm | None,
) -> tuple[Array, Array, Array]:
    """`split_heads`; the first batch rows' keys and values go to slot `lengths`. Queries of `dtype`, and the cache."""
    batch, num_kv_heads, _, head_dim = keys.shape
    options = {"rope": rope, "q_norm": q_norm, "k_norm": k_norm}
    query, key, value = split_heads(qkv, num_kv_heads=num_kv_heads, head_dim=head_dim, **options)
    keys = append_token(keys, key[:batch].astype(keys.dtype), lengths)
    return query.astype(dtype), keys, append_token(values, value[:batch].astype(values.dtype), lengths)


def apply_rope(
    x: Float[Array, "*batch heads head_dim"], cos: Float[Array, "*batch half"], sin: Float[Array, "*batch half"]
) -> Float[Array, "*batch heads head_dim"]:
    """Rotates the pairs (i, i + rotary_dim // 2) of x; what is past rotary_dim = 2 * half stays as it is."""
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], axis=-1)


def append_token(
    cache: Float[Array, "batch num_kv_heads max_len head_dim"],
    token: Float[Array, "batch num_kv_heads head_dim"],
    lengths: Int[Array, " batch"],
) -> Float[Array, "batch num_kv_heads max_len head_dim"]:
    """Writes a token a row into its slot `lengths`."""
    return cache.at[jnp.arange(cache.shape[0]), :, lengths].set(token, mode="promise_in_bounds")
