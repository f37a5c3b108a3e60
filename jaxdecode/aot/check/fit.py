"""Whether a model's weights, caches and the compiler's temporary bytes fit a card."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from jaxdecode.aot.program import MemoryUse
from jaxdecode.config import ModelConfig
from jaxdecode.models import abstract_params
from pallas_kernels.targets import Target

JAX_SHARE = 0.75  # of a card's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
_SLOTS = 32  # a cache has a multiple of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """Bytes on the card.

    Attributes:
      weights: of the parameters.
      caches: keys and values of all layers and rows.
      temporaries: the rest that the compiled program needs; None if it was not compiled.
      memory: of the card.
      largest_batch: rows that fit with this context, 0 if none; temporaries are taken to grow with the rows.
      largest_context: tokens a row, a multiple of 32, that fit with this batch, 0 if none; the model may know fewer
        positions.
    """

    weights: int
    caches: int
    temporaries: int | None
    memory: int
    largest_batch: int
    largest_context: int

    @property
    def total(self) -> int:
        """Bytes needed; without a compiled program the least that can be."""
        return self.weights + self.caches + (self.temporaries or 0)

    @property
    def fits(self) -> bool:
        return self.total <= self.memory

    @property
    def memory_fraction(self) -> float | None:
        """XLA_PYTHON_CLIENT_MEM_FRACTION that the program needs; None if JAX's own does or nothing would."""
        share = math.ceil(100 * self.total / self.memory) / 100
        return share if JAX_SHARE < share <= 1 else None


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all parameters."""
    params = abstract_params(config, dtype)
    per_layer = sum(_sizes(params["layers"][0]))
    others = {name: part for name, part in params.items() if name != "layers"}
    return per_layer * config.num_layers + sum(_sizes(others))


def slot_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values that one token of one row takes in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def find_fit(
    config: ModelConfig, dtype: str, *, batch: int, context: int, target: Target, compiled: MemoryUse | None = None
) -> Fit:
    """Bytes of a cell; `compiled` is what its program uses, its caches among the temporaries."""
    weights, slot = weight_bytes(config, dtype), slot_bytes(config, dtype)
    caches = batch * _round_up(context) * slot
    temporaries = None
    if compiled is not None:
        everything = compiled.arguments + compiled.outputs - compiled.aliased + compiled.temporaries
        temporaries = max(0, everything - weights - caches)
    left, row = target.memory_bytes - weights, (temporaries or 0) / batch
    return Fit(
        weights=weights,
        caches=caches,
        temporaries=temporaries,
        memory=target.memory_bytes,
        largest_batch=max(0, int(left // (_round_up(context) * slot + row))),
        largest_context=max(0, int((left - (temporaries or 0)) // (batch * slot)) // _SLOTS * _SLOTS),
    )


def _round_up(context: int) -> int:
    return -(-context // _SLOTS) * _SLOTS


def _sizes(params: object) -> list[int]:
    import jax

    return [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)]
