"""Compile a program for an NVIDIA card that is not here, and see everything that would run on it.

    from jaxdecode.aot import Program, compile_program

    def build(n):                                  # at the top of an importable module
        x = jax.ShapeDtypeStruct((n, n), jnp.float32)
        return Program(function=jnp.tanh, args=(x,), jit_options={"donate_argnums": 0})

    program = compile_program(build, 1024, target="a100-80gb")
    for kernel in program.kernels.values():
        print(kernel.name, kernel.launch.grid, kernel.report.registers)

`program` describes the result, `compiler` runs the process (`worker`) that produces it; the other files read what the
compiler writes. `mosaic` tells how a Pallas kernel appears in a compiled program. On top of them, `traffic` and `cost`
say what kernels ask of memory and would take, and `check` does so for whole models.
"""

from jaxdecode.aot.compiler import (
    CompileError,
    MissingCompilerError,
    compile_program,
    compile_programs,
    compiler_installed,
)
from jaxdecode.aot.job import Job, Program
from jaxdecode.aot.program import (
    Allocation,
    Argument,
    CompiledProgram,
    Endpoint,
    GraphNode,
    Kernel,
    Launch,
    MemoryUse,
    PtxasReport,
    Slice,
    Thunk,
)

__all__ = [
    "Allocation",
    "Argument",
    "CompileError",
    "CompiledProgram",
    "Endpoint",
    "GraphNode",
    "Job",
    "Kernel",
    "Launch",
    "MemoryUse",
    "MissingCompilerError",
    "Program",
    "PtxasReport",
    "Slice",
    "Thunk",
    "compile_program",
    "compile_programs",
    "compiler_installed",
]
