"""What the PTX and the assembler's report of one kernel say about how it treats the hardware."""

from __future__ import annotations

import dataclasses
import re

from jaxdecode.aot.program import Kernel
from pallas_kernels.targets import Target

_COPY = re.compile(r"cp\.async\.c([ag])\.shared\S* .*, (\d+)(?:, \S+)?;")
_TMA = "cp.async.bulk.tensor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelFacts:
    """How a kernel computes and fetches.

    Attributes:
      spill_bytes: of registers, stored or loaded, a thread; `local_memory` also covers arrays the compiler left there.
      tensor_cores: it multiplies on them (mma.sync m16n8k16).
      async_copies: instructions that copy 16 bytes a thread, or a tile by TMA, into shared memory.
      narrow_copies: asynchronous copies of less than 16 bytes a thread.
    """

    spill_bytes: int
    local_memory: bool
    tensor_cores: bool
    async_copies: int
    narrow_copies: int


def find_faults(kernel: Kernel, target: Target) -> list[str]:
    """What a kernel of ours must not do: leave registers or shared memory, or fetch in small pieces or one by one."""
    facts, report, op = inspect_kernel(kernel), kernel.report, kernel.name
    assert report is not None  # inspect_kernel has seen it
    shared, attention = kernel.launch.shared_bytes + report.shared_bytes, "attention" in op
    faults = {
        f"spills {facts.spill_bytes} bytes of registers a thread": facts.spill_bytes,
        "uses local memory": facts.local_memory and not facts.spill_bytes,
        "lacks tensor-core instructions": not facts.tensor_cores and not op.startswith("gemv"),
        "copies nothing 16 bytes a thread, nor by TMA": not facts.async_copies,
        "copies less than 16 bytes a thread": facts.narrow_copies and attention,  # a product may do so with x
        f"needs {shared} bytes of shared memory, the card has {target.shared_per_block}": shared
        > target.shared_per_block,
    }
    return [fault for fault, is_so in faults.items() if is_so]


def inspect_kernel(kernel: Kernel) -> KernelFacts:
    """Reads a kernel that has PTX and a report.

    Raises:
      ValueError: it has none, being one of those compiled into XLA itself.
    """
    if kernel.report is None:
        raise ValueError(f"{kernel.name} is a library kernel: there is neither PTX nor a report of it")
    copies = [(cache, int(size)) for cache, size in _COPY.findall(kernel.ptx)]
    wide = sum(size == 16 for _, size in copies)
    return KernelFacts(
        spill_bytes=kernel.report.spill_store_bytes + kernel.report.spill_load_bytes,
        local_memory=bool(kernel.report.stack_bytes) or ".local" in kernel.ptx,
        tensor_cores="mma.sync.aligned.m16n8k16" in kernel.ptx,
        async_copies=wide + kernel.ptx.count(_TMA),
        narrow_copies=len(copies) - wide,
    )
