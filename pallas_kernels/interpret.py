"""Runs the Mosaic GPU kernels on a CPU, in the form for Hopper: slow, and watched.

A race between threads, a read past the end of an array or of memory that was never written is an error there.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels.dataflow import INTERPRET


def interpreter(implementation: str | None) -> Any:
    """What the kernels take as `interpret`: None for kernels that are compiled."""
    return interpret_params() if implementation == INTERPRET else None


@functools.cache
def interpret_params() -> Any:
    """The interpreter's own parameters; makes sure that it can multiply."""
    from jax._src.pallas.mosaic_gpu.primitives import mma_p
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jax.interpreters import mlir

    def multiply(accumulator, left, right):
        return accumulator + jnp.dot(left, right, preferred_element_type=jnp.float32)

    # the tensor cores have no rule on the CPU; the interpreter runs everything else
    mlir.register_lowering(mma_p, mlir.lower_fun(multiply, multiple_results=False), platform="cpu")
    return plgpu.InterpretGPUParams(detect_races=True)
