"""Small programs to compile; imported by the compiling process, so at the top of a module of their own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.aot import Program
from jaxdecode.aot.check.program import generation
from jaxdecode.config import ModelConfig

CONSTANT = np.random.default_rng(0).standard_normal((8, 1024)).astype(np.float32)


def of(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def softmax() -> Program:
    """XLA only; the second argument is not used."""

    def function(x, unused):
        return jax.nn.softmax(x, axis=-1), jnp.argmax(x, axis=-1)

    return Program(function=function, args=(of(8, 256), of(3)))


def weighted_sum(weights, x):
    """o[i * 8 + r, c] = sum over blocks s of weights[i * 8 + r, s * 256 + c] * x[r, s * 256 + c]."""
    n, k = weights.shape

    def kernel(weights_ref, x_ref, o_ref):
        i = jax.lax.axis_index("i")  # 8 rows of the weights

        def step(_, weights_block, x_block, total):  # each [8, 256]
            return total + weights_block[...] * x_block[...]

        zeros = plgpu.layout_cast(jnp.zeros((8, 256), jnp.float32), plgpu.Layout.WG_STRIDED((8, 256), vec_size=2))
        blocks = [
            plgpu.BlockSpec((8, 256), lambda s: (i, s)),
            plgpu.BlockSpec((8, 256), lambda s: (0, s)),
        ]
        pipeline = plgpu.emit_pipeline(
            step, grid=(k // 256,), in_specs=blocks, max_concurrent_steps=2, init_carry=zeros
        )
        o_ref[pl.ds(i * 8, 8), :] = pipeline(weights_ref, x_ref)

    call = plgpu.kernel(kernel, out_type=of(n, 256), grid=(n // 8,), grid_names=("i",))
    return call(weights, x)


def loop() -> Program:
    """A `while_loop` with Mosaic kernels and fusions in its body, a constant, a donated carry."""

    def function(weights, x, steps):
        def body(carry):
            i, x = carry
            for _ in range(3):
                x = jnp.tile(weighted_sum(weights, x)[:8], (1, 4)) + x
                x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
            return i + 1, x

        return jax.lax.while_loop(lambda carry: carry[0] < steps, body, (0, x + CONSTANT))

    args = (of(32, 1024), of(8, 1024), of(dtype=jnp.int32))
    return Program(function=function, args=args, jit_options={"donate_argnums": 1})


def same_name(constant_outside: float) -> Program:
    """Three kernels from one Python function: two alike, one with another constant and another grid."""

    def scaled(x, factor, rows):
        def kernel(x_ref, o_ref):
            i = jax.lax.axis_index("i")
            o_ref[i] = x_ref[i] * factor

        return plgpu.kernel(kernel, out_type=of(rows, 256), grid=(rows,), grid_names=("i",))(x)

    def function(x):
        return scaled(x, 2.0, 2) + scaled(x + 1, 2.0, 2), scaled(x, constant_outside, 4)

    return Program(function=function, args=(of(4, 256),))


def in_place() -> Program:
    """A kernel that updates a buffer through a reference."""

    def function(x):
        def kernel(x_ref):
            x_ref[...] = x_ref[...] * 2.0

        ref = jax.new_ref(x)
        plgpu.kernel(kernel, out_type=(), grid=(1,), grid_names=("i",))(ref)
        return jax.freeze(ref)

    return Program(function=function, args=(of(256),), jit_options={"donate_argnums": 0})


def nested() -> Program:
    """A product left to cuBLAS, and a loop in a loop."""

    def function(x, y, z):
        def inner(carry):
            i, z = carry
            return i + 1, jax.lax.fori_loop(0, 3, lambda _, z: z * 2 + 1, z)

        return x @ y, jax.lax.while_loop(lambda carry: carry[0] < 2, inner, (0, z))[1]

    matrix = of(256, 256, dtype=jnp.bfloat16)
    options = {"xla_gpu_enable_triton_gemm": False}
    return Program(function=function, args=(matrix, matrix, of(7)), compiler_options=options)


def aborts_below_sm_90() -> Program:
    def kernel(x_ref, o_ref, block):
        block[...] = x_ref[...]
        plgpu.commit_smem()  # a fence that Ampere does not have: LLVM ends the process
        o_ref[...] = block[...]

    call = plgpu.kernel(
        kernel, out_type=of(256), grid=(1,), grid_names=("i",), scratch_types=[plgpu.SMEM((256,), jnp.float32)]
    )
    return Program(function=call, args=(of(256),))


def generation_that_may_abort(config: ModelConfig, batch: int, context: int, dtype: str) -> Program:
    """A cell's program for one row; for more the compiler ends the process."""
    return generation(config, batch, context, dtype) if batch == 1 else aborts_below_sm_90()


def fails() -> Program:
    raise ValueError("this build fails")


def computed_in_the_build() -> Program:
    """The build runs something itself, on the CPU of the compiling process."""
    table = jnp.full((4096,), 3.0) * 2
    return Program(function=lambda x: x * table, args=(of(4096),))
