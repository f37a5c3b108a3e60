"""Weights and x on their way through shared memory, and the statistics of x for a norm: all that feeds a product.

Each weight byte is requested once, by cp.async before sm_90 and by TMA from there on.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flat_gemm import cuda_cores, tensor_cores
from pallas_kernels.flat_gemm.plan import Plan

_IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
_LOADS = 8  # of 16 bytes that a thread has under way for the statistics


def product_of(plan: Plan) -> ModuleType:
    return tensor_cores if plan.tensor_cores else cuda_cores


def scratch(plan: Plan) -> dict[str, Any]:
    """The ring, its barriers, and the statistics."""
    config = plan.config

    def ring(rows: int, swizzle: int) -> Any:
        tiling = plgpu.TilingTransform((8, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
        tiles = (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM((config.num_stages, rows, config.block_k), plan.dtype, transforms=tiles)

    types = {
        "weight_ring": ring(config.block_n, min(128, 2 * config.block_k)),
    }
    if plan.tensor_cores:  # a cp.async copy is a multiple of four tiles
        types["x_ring"] = ring(plan.m, max(32, config.block_k // 2))
    if plan.statistics:
        types["statistics"] = plgpu.SMEM((2, plan.m), jnp.float32)
    if plan.tma:
        types["arrived"] = plgpu.Barrier(num_arrivals=plan.copies, num_barriers=config.num_stages)
    return types


def accumulate(plan: Plan, refs: SimpleNamespace) -> tuple[Array, ...]:
    """The product over this block's share of k."""
    config, product = plan.config, product_of(plan)
    num_steps, split = plan.k // config.block_k, lax.axis_index("split")
    first, last = split * num_steps // config.split_k, (split + 1) * num_steps // config.split_k
    count = last - first if config.split_k > 1 else num_steps
    ahead = config.num_stages - 1

    for i in range(ahead):
        _fetch(plan, refs, first + i, i)
    if plan.statistics:
        _find_statistics(plan, refs)
    statistics = product.load_statistics(plan, refs)

    def step(i, sums, *, newer: int, fetch: bool):
        slot = lax.rem(i, config.num_stages)
        loaded = product.load_ahead(plan, refs, first + i)  # on its way while the copies are awaited
        if plan.tma:
            plgpu.barrier_wait(refs.arrived.at[slot])
            plgpu.commit_smem()  # all have left the slot that is filled next, and TMA may know it
        else:
            # ends in a barrier: every thread's copies are here, and all have left the slot that is filled next
            plgpu.wait_gmem_to_smem(plan.copies * newer)
        if fetch:
            _fetch(plan, refs, first + i + ahead, lax.rem(i + ahead, config.num_stages))
        return product.multiply(plan, refs, slot, loaded, statistics, sums)

    def body(i, sums):
        return step(i, sums, newer=ahead - 1, fetch=True)

    sums = lax.fori_loop(0, count - ahead, body, product.zeros(plan))
    # a copy cannot be switched off, so the steps with nothing left to fetch stand apart
    for left in reversed(range(ahead)):
        sums = step(count - 1 - left, sums, newer=left, fetch=False)
    return product.close(plan, sums)


def _fetch(plan: Plan, refs: SimpleNamespace, step, slot) -> None:
    """Starts the copies of one step: weights [block_n, block_k] in segments, and x [m, block_k]."""
    columns = pl.ds(step * plan.config.block_k, plan.config.block_k)
    options: dict[str, Any] = {"barrier": refs.arrived.at[slot]} if plan.tma else {"oob_mode": _IN_BOUNDS}
    for segment in range(plan.segments):
        rows = pl.ds(plan.weight_row(segment, lax.axis_index("n")), plan.rows)
        into = refs.weight_ring.at[slot, pl.ds(segment * plan.rows, plan.rows)]
        plgpu.copy_gmem_to_smem(refs.weight.at[rows, columns], into, **options)
    if plan.tensor_cores:
        plgpu.copy_gmem_to_smem(refs.x.at[:, columns], refs.x_ring.at[slot], **options)


def _find_statistics(plan: Plan, refs: SimpleNamespace) -> None:
    """Reciprocal size of each row of x over all of k, and its mean if x is centered, left in shared memory.

    A warp takes a row. The sums are of x less its first element, so a large mean takes nothing off their precision.
    """
    assert plan.norm is not None
    vector = next(size for size in (8, 4, 2, 1) if plan.k % (32 * size) == 0)
    width = 32 * vector
    layout = plgpu.Layout.TILED(plgpu.Tiling(((4, width), (vector,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    num_loads, centered, eps = plan.k // width, plan.norm.centered, plan.norm.eps
    start = plgpu.layout_cast(jnp.zeros((4, width), jnp.float32), layout)

    def find(group, _):
        rows = pl.ds(group * 4, 4)
        first = plgpu.load(refs.x.at[rows, 0], layout=layout.reduce(1), optimized=False).astype(jnp.float32)

        def add(at, sums, loads: int):
            x = plgpu.load(refs.x.at[rows, pl.ds(at * width, loads * width)], layout=layout, optimized=False)
            for i in range(loads):
                y = x[:, i * width : (i + 1) * width].astype(jnp.float32)
                y = y - lax.broadcast_in_dim(first, y.shape, (0,)) if centered else y
                sums = sums[0] + y, sums[1] + y * y
            return sums

        sums = lax.fori_loop(0, num_loads // _LOADS, lambda i, sums: add(i * _LOADS, sums, _LOADS), (start, start))
        if left := num_loads % _LOADS:
            sums = add(num_loads - left, sums, left)
        mean, variance = (jnp.sum(part, axis=1) / plan.k for part in sums)
        if centered:
            variance = variance - mean * mean
            plgpu.store(refs.statistics.at[1, rows], mean + first, optimized=False)
        plgpu.store(refs.statistics.at[0, rows], lax.rsqrt(variance + eps), optimized=False)

    lax.fori_loop(0, -(-plan.valid // 4), find, None)
