"""The kernel of a product: a block of weight rows a program, k shared between blocks, the last of which adds up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flat_gemm import epilogue, ring
from pallas_kernels.flat_gemm.plan import Plan
from pallas_kernels.kernel_names import kernel_name
from pallas_kernels.last_arriver import arrive

# operands that a launch may lack
_OPTIONAL = ("bias", "residual", "gain", "shift", "query_gain", "key_gain")


def launch_product(
    plan: Plan, inputs: dict[str, Any], out: jax.ShapeDtypeStruct, counters: Any, interpret: Any
) -> Array:
    """The result [m, width], padded rows included."""
    if plan.config.split_k == 1:
        return _call(plan, _product_kernel, inputs, {"out": out}, interpret)[0]
    lead = (plan.config.split_k, plan.num_blocks)
    partials = {
        f"partial_{i}": jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)
        for i, (shape, _) in enumerate(ring.product_of(plan).result_types(plan))
    }
    if interpret:  # the interpreter has no atomics: the same two parts, one kernel after the other
        operands = {name: inputs.pop(name) for name in ("x", "weight", "gain", "shift") if name in inputs}
        sums = _call(plan, _partial_kernel, operands, partials, interpret)
        return _call(plan, _combine_kernel, inputs | dict(zip(partials, sums, strict=True)), {"out": out}, interpret)[0]
    if counters is None:
        counters = jax.new_ref(jnp.zeros(plan.num_blocks, jnp.int32))
    elif counters.shape[0] < plan.num_blocks:
        raise ValueError(f"{plan.num_blocks} blocks need a counter each; got {counters.shape[0]}")
    return _call(plan, _product_kernel, {**inputs, "counters": counters}, {"out": out, **partials}, interpret)[0]


def _call(plan: Plan, body: Any, inputs: dict[str, Any], outputs: dict[str, Any], interpret: Any) -> tuple[Array, ...]:
    """Runs `body(plan, refs)` over the grid; `refs` holds inputs, outputs and scratch by name, None for the others."""
    names = (*inputs, *outputs)

    def product(*refs, **scratch):
        body(plan, SimpleNamespace(**dict.fromkeys(_OPTIONAL) | dict(zip(names, refs, strict=True)) | scratch))

    op, config = "flat_gemm" if plan.tensor_cores else "gemv", plan.config
    product.__name__ = kernel_name(op, n=config.block_n, k=config.block_k, stages=config.num_stages)
    scratch = ring.scratch(plan) | epilogue.scratch(plan)
    if plan.config.split_k > 1:
        scratch["told"] = plgpu.SMEM((1,), jnp.int32)
    call = plgpu.kernel(
        product,
        out_type=tuple(outputs.values()),
        grid=(1 if body is _combine_kernel else plan.config.split_k, plan.num_blocks),
        grid_names=("split", "n"),
        scratch_types=scratch,
        interpret=interpret,
    )
    return call(*inputs.values())


def _product_kernel(plan: Plan, refs: SimpleNamespace) -> None:
    """One block: `rows` columns of the result over one share of k. Grid: split, n."""
    if plan.config.split_k == 1:
        epilogue.finish(plan, refs, ring.accumulate(plan, refs))
        return
    _partial_kernel(plan, refs)
    block = lax.axis_index("n")

    before = arrive(refs.counters.at[block], refs.told)

    @pl.when(before == plan.config.split_k - 1)
    def _():
        _combine_kernel(plan, refs)
        refs.counters[block] = jnp.int32(0)


def _partial_kernel(plan: Plan, refs: SimpleNamespace) -> None:
    """A block's sums over its share of k, left in device memory."""
    block, split = lax.axis_index("n"), lax.axis_index("split")
    for ref, values in zip(_partials(plan, refs), ring.accumulate(plan, refs), strict=True):
        plgpu.store(ref.at[split, block], values, optimized=False)


def _combine_kernel(plan: Plan, refs: SimpleNamespace) -> None:
    """Adds up a block's shares in the order of k: the same bits whoever comes last."""
    block, types = lax.axis_index("n"), ring.product_of(plan).result_types(plan)
    partials = [(ref, layout) for ref, (_, layout) in zip(_partials(plan, refs), types, strict=True)]

    def add(split, sums):
        return tuple(
            total + plgpu.load(ref.at[split, block], layout=layout, optimized=False)
            for total, (ref, layout) in zip(sums, partials, strict=True)
        )

    zeros = tuple(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout) for shape, layout in types)
    epilogue.finish(plan, refs, lax.fori_loop(0, plan.config.split_k, add, zeros))


def _partials(plan: Plan, refs: SimpleNamespace) -> list[Any]:
    return [getattr(refs, f"partial_{i}") for i in range(len(ring.product_of(plan).result_types(plan)))]
