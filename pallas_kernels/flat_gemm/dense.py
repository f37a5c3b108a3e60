"""The linear operations as XLA's own dot between XLA's own code: in the storage type, accumulated in float32."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.flat_gemm.reference import finish, gate
from pallas_kernels.heads import store_heads
from pallas_kernels.norm import Norm, normalize
from pallas_kernels.weights import Weight, dequantize


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
    contract_k = (((x.ndim - 1,), (1,)), ((), ()))
    # A weight that depends on nothing in a loop would be widened before it, and kept: 4 bytes a number, all at once.
    x, weight = lax.optimization_barrier((x, weight))
    y = lax.dot_general(normalize(x, norm), dequantize(weight, x.dtype), contract_k, preferred_element_type=jnp.float32)
    return finish(y, bias, activation, residual).astype(out_dtype)


def gated_linear(x: Array, weight: Weight, bias: Array | None, *, norm: Norm | None, activation: str) -> Array:
    return gate(linear(x, weight, bias, norm=norm, out_dtype=jnp.float32), activation).astype(x.dtype)


def qkv_linear(
    x: Array, weight: Weight, bias: Array | None, *, norm: Norm | None, **storing: Any
) -> tuple[Array, Array, Array]:
    return store_heads(linear(x, weight, bias, norm=norm, out_dtype=x.dtype), x.dtype, **storing)
