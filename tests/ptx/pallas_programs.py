"""Two small Pallas Mosaic GPU kernels, written for the emulator's tests; Ampere's copies, no TMA."""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.aot import Program
from pallas_kernels.last_arriver import arrive

IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS


@plgpu.inline_mgpu()
def warpgroup_barrier(_) -> None:
    mgpu.utils.warpgroup_barrier()


def flat_product(n: int, k: int, dtype: str, block_n: int = 64, block_k: int = 128, num_stages: int = 4) -> Program:
    """x [8, k], w [n, k] -> w · xᵀ [n, 8] in float32: the weights as left operand, through a cp.async ring."""
    num_steps = k // block_k
    ahead = num_stages - 1

    def flat_product_kernel(x, w, out, w_ring, x_ring):
        rows = pl.ds(lax.axis_index("n") * block_n, block_n)

        def fetch(step, slot):
            columns = pl.ds(step * block_k, block_k)
            plgpu.copy_gmem_to_smem(w.at[rows, columns], w_ring.at[slot], oob_mode=IN_BOUNDS)
            plgpu.copy_gmem_to_smem(x.at[:, columns], x_ring.at[slot], oob_mode=IN_BOUNDS)

        def product(slot, acc):
            left = plgpu.load(w_ring.at[slot], layout=plgpu.Layout.MMA_LHS(dtype))
            right = plgpu.load(x_ring.at[slot].T, layout=plgpu.Layout.MMA_RHS(dtype))
            return plgpu.mma(acc, left, right)

        def step_and_fetch(step, acc):
            plgpu.wait_gmem_to_smem(2 * (ahead - 1))  # two copies a step
            warpgroup_barrier()  # all have left the slot that is filled next
            fetch(step + ahead, lax.rem(step + ahead, num_stages))
            return product(lax.rem(step, num_stages), acc)

        for step in range(ahead):
            fetch(step, step)
        acc = plgpu.layout_cast(jnp.zeros((block_n, 8), jnp.float32), plgpu.Layout.MMA_ACC(dtype))
        acc = lax.fori_loop(0, num_steps - ahead, step_and_fetch, acc)
        for left in reversed(range(ahead)):
            plgpu.wait_gmem_to_smem(2 * left)
            warpgroup_barrier()
            acc = product((num_steps - 1 - left) % num_stages, acc)
        out.at[rows, :][...] = acc

    def ring(rows, swizzle):
        tiles = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
        return plgpu.SMEM((num_stages, rows, block_k), dtype, transforms=tiles)

    call = plgpu.kernel(
        flat_product_kernel,
        out_type=jax.ShapeDtypeStruct((n, 8), jnp.float32),
        grid=(n // block_n,),
        grid_names=("n",),
        scratch_types=[ring(block_n, 128), ring(8, block_k // 2)],  # a copy needs a multiple of four tiles
    )
    return Program(function=call, args=(jax.ShapeDtypeStruct((8, k), dtype), jax.ShapeDtypeStruct((n, k), dtype)))


def split_softmax_sum(rows: int, kv_len: int, split_kv: int, maximum: float = 2.0, head_dim: int = 128) -> Program:
    """scores [rows, kv_len], values [kv_len, head_dim], counters [rows] of zeros -> softmax(scores) · values.

    Each split sums exp(score − maximum) for itself; the last to arrive adds the splits up in their order.
    """
    length = kv_len // split_kv
    layout = plgpu.Layout.WG_STRIDED((head_dim,), 1)

    def split_softmax_sum_kernel(scores, values, counters, out, numerators, denominators, told):
        row, split = lax.axis_index("row"), lax.axis_index("split")
        zero = plgpu.layout_cast(jnp.zeros((head_dim,), jnp.float32), layout)

        def add_value(i, sums):
            at = split * length + i
            weight = jnp.exp(scores[row, at] - maximum)
            return sums[0] + weight * plgpu.load(values.at[at], layout=layout), sums[1] + weight

        def add_split(i, sums):
            return sums[0] + plgpu.load(numerators.at[row, i], layout=layout), sums[1] + denominators[row, i]

        numerator, denominator = lax.fori_loop(0, length, add_value, (zero, jnp.float32(0)))
        numerators.at[row, split][...] = numerator
        denominators[row, split] = denominator

        @pl.when(arrive(counters.at[row], told) == split_kv - 1)
        def _():
            numerator, denominator = lax.fori_loop(0, split_kv, add_split, (zero, jnp.float32(0)))
            out.at[row][...] = numerator / denominator
            counters[row] = jnp.int32(0)

    call = plgpu.kernel(
        split_softmax_sum_kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((rows, split_kv, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((rows, split_kv), jnp.float32),
        ),
        grid=(rows, split_kv),
        grid_names=("row", "split"),
        scratch_types=[plgpu.SMEM((1,), jnp.int32)],
    )

    def run(scores, values, counters):
        ref = jax.new_ref(counters)
        return call(scores, values, ref)[0], jax.freeze(ref)

    abstract = [((rows, kv_len), jnp.float32), ((kv_len, head_dim), jnp.float32), ((rows,), jnp.int32)]
    args = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in abstract)
    return Program(function=run, args=args, jit_options={"donate_argnums": 2})
