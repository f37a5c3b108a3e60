"""The product on CUDA cores, for up to four rows of x: float32 multiply-adds, no padding is multiplied.

A lane takes 16 bytes of a weight row at a time from the ring. It takes x from global memory, where the caches have it
for all blocks. Its sums stay its own until k is over; then the lanes of a row add up.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flat_gemm.plan import Plan


def result_types(plan: Plan) -> tuple[tuple[tuple[int, ...], Any], ...]:
    """Shape and layout of the results: the block's rows, for each valid row of x."""
    return (((plan.config.block_n,), plan.lanes.reduce(1)),) * plan.valid


def zeros(plan: Plan) -> tuple[Array, ...]:
    shape = plan.config.block_n, 8 * plan.k_lanes
    return tuple(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plan.lanes) for _ in range(plan.valid))


def load_ahead(plan: Plan, refs: SimpleNamespace, step) -> tuple[list[Array], list[Array]]:
    """The valid rows of x, and the norm's weight and bias, for one step, in the lanes that hold the same k."""
    columns = pl.ds(step * plan.config.block_k, plan.config.block_k)

    def load(ref: Any) -> Array:
        return plgpu.load(ref, layout=plan.lanes.reduce(0), optimized=False)

    norm = [load(ref.at[columns]) for ref in (refs.gain, refs.shift) if ref is not None]
    return [load(refs.x.at[row, columns]) for row in range(plan.valid)], norm


def load_statistics(plan: Plan, refs: SimpleNamespace) -> list[list[Array]]:
    """Reciprocal size, and mean if x is centered, of each valid row of x."""
    if plan.norm is None:
        return []
    return [[refs.statistics[i, row] for i in range(2 if plan.norm.centered else 1)] for row in range(plan.valid)]


def multiply(
    plan: Plan,
    refs: SimpleNamespace,
    slot,
    ahead: tuple[list[Array], list[Array]],
    statistics: list[list[Array]],
    sums: Any,
) -> tuple[Array, ...]:
    """Adds the product of one slot of the ring."""
    weights = plgpu.load(refs.weight_ring.at[slot], layout=plan.lanes, optimized=False)
    x, norm = ahead
    width = 8 * plan.k_lanes
    for start in range(0, plan.config.block_k, width):
        columns = slice(start, start + width)
        wide = weights[:, columns].astype(jnp.float32)
        parts = [part[columns].astype(jnp.float32) for part in norm]
        added = []
        for row, total in enumerate(sums):
            y = x[row][columns].astype(jnp.float32)
            y = _normed(plan, y, parts, *statistics[row]) if norm else y
            added.append(total + wide * lax.broadcast_in_dim(y, wide.shape, (1,)))
        sums = tuple(added)
    return sums


def _normed(plan: Plan, y: Array, norm: list[Array], factor: Array, mean: Array | None = None) -> Array:
    gain, *shift = norm
    gain = gain + plan.norm.offset if plan.norm is not None and plan.norm.offset else gain
    y = (y if mean is None else y - mean) * (gain * factor)
    return y + shift[0] if shift else y


def close(plan: Plan, sums: tuple[Array, ...]) -> tuple[Array, ...]:
    """Adds up the lanes of each weight row."""
    return tuple(jnp.sum(total, axis=1) for total in sums)


def stage_shape(plan: Plan) -> tuple[int, int]:
    return plan.live, plan.config.block_n


def stage(plan: Plan, refs: SimpleNamespace, results: tuple[Array, ...]) -> None:
    """Leaves the product [live, block_n] in shared memory, zeros for padding in the last group of rows."""
    nothing = plgpu.layout_cast(jnp.zeros(plan.config.block_n, jnp.float32), plan.lanes.reduce(1))
    for row in range(plan.live):
        plgpu.store(refs.stage.at[row], results[row] if row < plan.valid else nothing, optimized=False)


def staged(plan: Plan, refs: SimpleNamespace, start: int, size: int) -> Any:
    """A piece of the block's rows as [live, size] in shared memory."""
    return refs.stage.at[:, pl.ds(start, size)]
