"""The norm in front of a product: its parameters, and its definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm, or LayerNorm if it is centered, over the last axis.

    Attributes:
      weight: [k] gain; like the bias an array, or what stands for one in a transformed tree.
      bias: [k], None for none.
      eps: added to the mean of squares.
      centered: whether the mean is taken off first, as LayerNorm does.
    """

    weight: Any
    bias: Any = None
    eps: float = dataclasses.field(default=1e-6, metadata={"static": True})
    centered: bool = dataclasses.field(default=False, metadata={"static": True})


def normalize(x: Array, norm: Norm | None) -> Array:
    """x [..., k] normed in float32 and rounded to the type of x, as checkpoints' own code does.

        x = x - mean(x)                               (if the norm is centered)
        y = x / sqrt(mean(x * x) + eps) * weight + bias
    """
    if norm is None:
        return x
    wide = x.astype(jnp.float32)
    if norm.centered:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + norm.eps)
    if norm.bias is None:
        return wide.astype(x.dtype) * norm.weight
    return (wide * norm.weight.astype(jnp.float32) + norm.bias.astype(jnp.float32)).astype(x.dtype)
