"""The product on tensor cores: weights are the left operand, so the few rows of x are padded to 8, not to 16 or 64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flat_gemm.config import stage_width
from pallas_kernels.flat_gemm.plan import ROWS, Plan


def result_types(plan: Plan) -> tuple[tuple[tuple[int, ...], Any], ...]:
    """Shape and layout of what is summed over k: the product, and perhaps the squares of each row of x."""
    product = (plan.config.block_n, plan.m), plan.layout("ACC")
    return (product, ((plan.m,), plan.layout("RHS").reduce(0))) if plan.squares else (product,)


def zeros(plan: Plan) -> tuple[Array, ...]:
    return tuple(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout) for shape, layout in result_types(plan))


def load_ahead(plan: Plan, refs: SimpleNamespace, step) -> list[list[Array]]:
    """The norm's weight, and its bias, for one step: each in pieces [chunk], in the lanes that hold the same k of x."""
    layout, start = plan.layout("RHS").reduce(1), step * plan.config.block_k
    pieces = [pl.ds(start + at, plan.chunk) for at in range(0, plan.config.block_k, plan.chunk)]
    operands = [ref for ref in (refs.gain, refs.shift) if ref is not None]
    return [[plgpu.load(ref.at[piece], layout=layout, optimized=False) for piece in pieces] for ref in operands]


def load_statistics(plan: Plan, refs: SimpleNamespace) -> list[Array]:
    """Reciprocal size, and mean if x is centered, of the rows of x, in the lanes that hold those."""
    if plan.norm is None or not plan.statistics:
        return []
    layout = plan.layout("RHS").reduce(0)
    parts = range(2 if plan.norm.centered else 1)
    return [plgpu.load(refs.statistics.at[i], layout=layout, optimized=False) for i in parts]


def multiply(
    plan: Plan, refs: SimpleNamespace, slot, ahead: list[list[Array]], statistics: list[Array], sums: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Adds the product of one slot of the ring."""
    total, *squares = sums
    for i in range(plan.config.block_k // plan.chunk):
        columns = pl.ds(i * plan.chunk, plan.chunk)
        left = plgpu.load(refs.weight_ring.at[slot, :, columns], layout=plan.layout("LHS"))
        right = plgpu.load(refs.x_ring.at[slot, :, columns].T, layout=plan.layout("RHS"))
        if plan.norm is not None:
            wide = right.astype(jnp.float32)
            squares = [part + jnp.sum(wide * wide, axis=0) for part in squares]
            right = _normed(plan, wide, [part[i] for part in ahead], statistics).astype(plan.dtype)
        total = plgpu.mma(total, left, right)
    return total, *squares


def _normed(plan: Plan, wide: Array, norm: list[Array], statistics: list[Array]) -> Array:
    """x [chunk, m] after the norm; without statistics it is not divided by its size yet."""
    gain, *shift = (part.astype(jnp.float32) for part in norm)
    gain = gain + plan.norm.offset if plan.norm is not None and plan.norm.offset else gain
    if not statistics:
        return wide * lax.broadcast_in_dim(gain, wide.shape, (0,))
    factor, *mean = (lax.broadcast_in_dim(part, wide.shape, (1,)) for part in statistics)
    y = (wide - mean[0] if mean else wide) * factor * lax.broadcast_in_dim(gain, wide.shape, (0,))
    return y + lax.broadcast_in_dim(shift[0], wide.shape, (0,)) if shift else y


def close(plan: Plan, sums: tuple[Array, ...]) -> tuple[Array, ...]:
    """What is left to add once the steps are over: nothing."""
    return sums


def stage_shape(plan: Plan) -> tuple[int, int]:
    return plan.config.block_n, stage_width(plan.m)


def stage(plan: Plan, refs: SimpleNamespace, results: tuple[Array, ...]) -> Array | None:
    """Leaves the product [block_n, m] in shared memory; returns what the rows are to be multiplied by, if anything."""
    refs.stage.at[:, pl.ds(0, plan.m)][...] = results[0]
    if plan.norm is None or not plan.squares:
        return None
    plgpu.store(refs.squares, results[1], optimized=False)
    mean = plgpu.load(refs.squares, layout=ROWS.reduce(1), optimized=False) / plan.k
    return lax.rsqrt(mean + plan.norm.eps)


def staged(plan: Plan, refs: SimpleNamespace, start: int, size: int) -> Any:
    """A piece of the block's rows as [live, size] in shared memory."""
    return refs.stage.at[pl.ds(start, size), pl.ds(0, plan.m)].T
