"""The definition of `linear` and `gated_linear`: plain jnp, float32 inside."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def linear(x: Array, weight: Array, bias: Array | None, *, residual: Array | None, out_dtype) -> Array:
    y = jnp.einsum("...k,nk->...n", x.astype(jnp.float32), weight.astype(jnp.float32))
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def gated_linear(x: Array, weight: Array, bias: Array | None, *, activation: str) -> Array:
    return gate(linear(x, weight, bias, residual=None, out_dtype=jnp.float32), activation).astype(x.dtype)


def gate(y: Array, activation: str) -> Array:
    """Splits y [..., 2 * n] into gate and up: activation(gate) * up."""
    gates, up = jnp.split(y, 2, axis=-1)
    return ACTIVATIONS[activation](gates) * up
