"""Which of the blocks that share a result comes last: it adds up what the others left in global memory."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

# One thread counts, between two barriers of the block: the first lets it speak for all, the second tells them all.
_ARRIVE = """{
    .reg .pred first;
    .reg .b32 number;
    mov.u32 number, %tid.x;
    setp.eq.u32 first, number, 0;
    bar.sync 1, 128;
    @first atom.add.acq_rel.gpu.global.u32 number, [$1], 1;
    @first st.shared.u32 [$2], number;
    bar.sync 1, 128;
    ld.shared.u32 $0, [$2];
}"""


def arrive(counter: Any, told: Any) -> Array:
    """How many blocks were here before; what those have written is visible from here on.

    Pallas has no atomic that returns a value, and the interpreter none at all: compiled kernels of one warpgroup only.

    Args:
      counter: reference to an int32 in global memory, zero at first; the last arriver sets it back.
      told: reference to one int32 of shared memory.
    """
    return _arrive(counter, told)  # pyright: ignore[reportCallIssue]


@plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), plgpu.RefType()),
    return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT(())),
)
def _arrive(_, counter, told):
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    pointers = [llvm.ptrtoint(kind, mgpu.utils.memref_ptr(ref)) for kind, ref in ((i64, counter), (i32, told))]
    number = llvm.inline_asm(i32, pointers, _ARRIVE, "=r,l,r", has_side_effects=True)
    return mgpu.FragmentedArray.splat(number, (), is_signed=True)
