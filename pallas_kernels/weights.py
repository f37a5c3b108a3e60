"""What a product takes as its weight: an array, or int8 numbers with their scales."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight [n, k] as values [n, k] times a scale for each group of k / num_groups neighbours in a row.

    Attributes:
      values: int8 [n, k]; like the scales an array, or what stands for one in a transformed tree.
      scales: [n, num_groups], of a floating type; num_groups divides k.
    """

    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Weight = Array | QuantizedWeight


def weight_format(weight: Weight) -> str:
    """How the numbers are kept: "array" or "int8"."""
    return "int8" if isinstance(weight, QuantizedWeight) else "array"


def dequantize(weight: Weight, dtype: DTypeLike) -> Array:
    """The weight [n, k] as an array; one that is an array already stays as it is."""
    if not isinstance(weight, QuantizedWeight):
        return weight
    n, k = weight.shape
    grouped = weight.values.astype(jnp.float32).reshape(n, weight.scales.shape[1], -1)
    return (grouped * weight.scales.astype(jnp.float32)[..., None]).reshape(n, k).astype(dtype)
