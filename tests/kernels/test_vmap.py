"""Kernels under `vmap`: a mapped activation axis becomes more rows of one launch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dataflow import INTERPRET
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flat_gemm import gated_linear, linear, qkv_linear
from pallas_kernels.norm import Norm
from pallas_kernels.prefill_attention import prefill_attention


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def check(function, *arguments, in_axes) -> None:
    """`vmap` of a kernel gives what the definition gives, each group by itself."""
    mapped = jax.vmap(functools.partial(function, implementation=INTERPRET), in_axes)(*arguments)
    expected = jax.vmap(functools.partial(function, implementation="reference"), in_axes)(*arguments)
    for ours, theirs in zip(jax.tree.leaves(mapped), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=0.06, rtol=0.02)


def test_interpreted_products_under_vmap():
    x, weight, residual = normal(0, 2, 3, 128), normal(1, 64, 128) / 12, normal(2, 2, 3, 64)
    norm = Norm(weight=1 + normal(3, 128) / 8)

    def product(x, weight, residual, **how):
        return linear(x, weight, norm=norm, residual=residual, **how)

    check(product, x, weight, residual, in_axes=(0, None, 0))
    check(product, x, jnp.stack([weight, -weight]), residual[0], in_axes=(0, 0, None))  # one after the other
    # the rule sees the rows after the fold: more than gemv takes, more than any kernel takes
    check(product, normal(5, 8, 1, 128), weight, normal(6, 8, 1, 64), in_axes=(0, None, 0))
    check(product, normal(7, 3, 32, 128), weight, normal(8, 3, 32, 64), in_axes=(0, None, 0))
    check(gated_linear, x, normal(4, 128, 128) / 12, in_axes=(0, None))


def test_interpreted_qkv_under_vmap():
    caches, weight = normal(0, 2, 2, 2, 1, 32, 64), normal(1, 4 * 64, 128) / 12
    angles, lengths = jax.random.normal(jax.random.key(2), (2, 2, 32)), jnp.asarray([[0, 5], [31, 7]])

    def product(x, keys, values, angles, lengths, **how):
        rope = jnp.cos(angles), jnp.sin(angles)
        return qkv_linear(x, weight, rope=rope, keys=keys, values=values, lengths=lengths, **how)

    check(product, normal(3, 2, 2, 128), *caches, angles, lengths, in_axes=0)


def test_interpreted_attention_under_vmap():
    keys, values = normal(0, 2, 2, 1, 64, 64), normal(1, 2, 2, 1, 64, 64)
    lengths = jnp.asarray([[0, 5], [64, 33]])

    def newest(query, keys, values, lengths, **how):
        return decode_attention(query, keys, values, lengths, scale=0.125, **how)

    def chunk(query, keys, values, positions, **how):
        return prefill_attention(query, keys, values, positions, scale=0.125, **how)

    check(newest, normal(2, 2, 2, 2, 64), keys, values, lengths, in_axes=0)
    check(newest, normal(2, 2, 2, 2, 64), keys[0], values[0], lengths, in_axes=(0, None, None, 0))
    positions = lengths[..., None] + jnp.arange(-1, 3)
    check(chunk, normal(3, 2, 2, 4, 2, 64), keys, values, jnp.minimum(positions, 63), in_axes=0)
