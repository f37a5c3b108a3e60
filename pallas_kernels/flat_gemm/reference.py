"""The definition of `linear`, `gated_linear` and `qkv_linear`: plain jnp, float32 inside."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.heads import store_heads
from pallas_kernels.norm import Norm, normalize
from pallas_kernels.weights import Weight, dequantize

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def linear(
    x: Array,
    weight: Weight,
    bias: Array | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Array | None = None,
    out_dtype: DTypeLike,
) -> Array:
    wide = normalize(x.astype(jnp.float32), norm)
    y = jnp.einsum("...k,nk->...n", wide, dequantize(weight, jnp.float32).astype(jnp.float32))
    return finish(y, bias, activation, residual).astype(out_dtype)


def gated_linear(x: Array, weight: Weight, bias: Array | None, *, norm: Norm | None, activation: str) -> Array:
    return gate(linear(x, weight, bias, norm=norm, out_dtype=jnp.float32), activation).astype(x.dtype)


def qkv_linear(
    x: Array, weight: Weight, bias: Array | None, *, norm: Norm | None, **storing: Any
) -> tuple[Array, Array, Array]:
    return store_heads(linear(x, weight, bias, norm=norm, out_dtype=jnp.float32), x.dtype, **storing)


def finish(y: Array, bias: Array | None, activation: str | None, residual: Array | None) -> Array:
    """What follows a product, float32."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y


def gate(y: Array, activation: str) -> Array:
    """Splits y [..., 2 * n] into gate and up: activation(gate) * up."""
    gates, up = jnp.split(y, 2, axis=-1)
    return ACTIVATIONS[activation](gates) * up
