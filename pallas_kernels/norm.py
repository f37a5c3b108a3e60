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
      offset: added to the gain, which then stands in the checkpoint as its distance from it.
    """

    weight: Any
    bias: Any = None
    eps: float = dataclasses.field(default=1e-6, metadata={"static": True})
    centered: bool = dataclasses.field(default=False, metadata={"static": True})
    offset: float = dataclasses.field(default=0.0, metadata={"static": True})


def normalize(x: Array, norm: Norm | None) -> Array:
    """x [..., k] normed in float32 and rounded to the type of x, as checkpoints' own code does.

        x = x - mean(x)                               (if the norm is centered)
        y = x / sqrt(mean(x * x) + eps) * (weight + offset) + bias
    """
    if norm is None:
        return x
    wide = x.astype(jnp.float32)
    if norm.centered:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + norm.eps)
    if norm.bias is None and not norm.offset:
        return wide.astype(x.dtype) * norm.weight
    gain = norm.weight.astype(jnp.float32)
    wide = wide * (gain + norm.offset if norm.offset else gain)
    return (wide if norm.bias is None else wide + norm.bias.astype(jnp.float32)).astype(x.dtype)
