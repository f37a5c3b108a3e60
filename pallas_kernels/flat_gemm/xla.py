"""`linear` and `gated_linear` as XLA's own dot, in the storage type, accumulated in float32."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.flat_gemm.reference import gate


def linear(x: Array, weight: Array, bias: Array | None, *, residual: Array | None, out_dtype) -> Array:
    contract_k = (((x.ndim - 1,), (1,)), ((), ()))
    y = lax.dot_general(x, weight, contract_k, preferred_element_type=jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def gated_linear(x: Array, weight: Array, bias: Array | None, *, activation: str) -> Array:
    return gate(linear(x, weight, bias, residual=None, out_dtype=jnp.float32), activation).astype(x.dtype)
