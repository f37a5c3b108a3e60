"""What a compiled program consists of: plain, picklable data that needs neither JAX nor the compiler.

A program is a list of thunks (XLA's word for one step of an executable) over numbered allocations. Running one means:
make the allocations, fill those of `constants` and `parameters`, run the thunks in order, read the slices of `outputs`.

    kernel launch (`thunk.kernel` set)   `arguments` are the kernel's parameters, in the order of the PTX
    "while"                              children["condition"], stop if slice "condition_result" is 0, children["body"]
    "conditional"                        children["branch_<i>"], i in slice "branch_index"
    "device_to_device_copy"              slice "source" to slice "destination"
    "memzero", "memset32bit_value"       fill slice "dest"; attributes["value"]
    anything else                        a library call or a transfer, by XLA's name for it, with its slices by name
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from pallas_kernels.targets import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """A range of bytes of an allocation, and the array in it as far as XLA says.

    Attributes:
      allocation: index into `CompiledProgram.allocations`.
      offset: bytes from its start.
      size: bytes.
      dtype: XLA's name in lower case ("f32", "bf16", "pred", "s32"), "" if not said.
      shape: None if not said.
    """

    allocation: int
    offset: int
    size: int
    dtype: str = ""
    shape: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Argument:
    """One parameter of a kernel, or one named buffer of any other thunk.

    Attributes:
      name: "operand_0", "result_0" (Mosaic), "args_0" (XLA's kernels), else XLA's name for it ("source").
      slice: None for a parameter that is not an address of ours: constant bytes, a TMA descriptor, or null.
      written: the thunk writes it. A result that shares its slice with an operand is one that is also read.
      zeroed: it is filled with zeros before the kernel runs.
      value: the bytes of a constant parameter.
      by_value: bytes of a parameter that the host fills at launch (TMA descriptors), 0 if none.
    """

    name: str
    slice: Slice | None
    written: bool = False
    zeroed: bool = False
    value: bytes = b""
    by_value: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel is launched.

    Attributes:
      grid: blocks along x, y, z.
      block: threads of a block along x, y, z.
      cluster: blocks of a cluster, None if launched without clusters.
      shared_bytes: dynamic shared memory of a block, beside the static of `PtxasReport`.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] | None
    shared_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PtxasReport:
    """What ptxas says of one kernel: per thread, except `shared_bytes` (static shared memory) and `barriers`."""

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_bytes: int
    barriers: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel.

    Attributes:
      key: its key in `CompiledProgram.kernels`; names of Mosaic kernels are not unique, keys are.
      name: its entry in `ptx`.
      kind: "mosaic", "triton" (written by XLA through Triton), "xla", or "library": one of those compiled into XLA
        itself, of which there is neither PTX nor report.
    """

    key: str
    name: str
    kind: str
    ptx: str
    launch: Launch
    report: PtxasReport | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thunk:
    """One step of the program.

    Attributes:
      id: XLA's number of it, as in `CompiledProgram.graphs`.
      kind: XLA's kind: "custom_kernel", "custom_call", "while", "gemm", "device_to_device_copy", …
      name: the HLO instruction it comes from.
      kernel: key of the kernel it launches; None if it launches none that we see.
      target: what a "custom_call" calls.
      arguments: a kernel's parameters in the order of its PTX, or named slices.
      buffers: all it reads or writes, in XLA's order: also those that a kernel knows by a descriptor only.
      children: nested sequences by name: "condition" and "body", "branch_0" …
      attributes: its plain numbers and strings ("mem_size", "trip_count", "value").
    """

    id: int
    kind: str
    name: str
    kernel: str | None
    target: str
    arguments: tuple[Argument, ...]
    buffers: tuple[Argument, ...]
    children: Mapping[str, tuple[Thunk, ...]]
    attributes: Mapping[str, Any]

    def argument(self, name: str) -> Slice:
        """The slice of a name.

        Raises:
          KeyError: there is none.
        """
        for argument in self.arguments:
            if argument.name == name and argument.slice is not None:
                return argument.slice
        raise KeyError(f"thunk {self.id} ({self.kind}) has no slice {name!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphNode:
    """A thunk after conversion to CUDA graphs: those under a "command_buffer" are launched as one graph."""

    id: int
    kind: str
    name: str
    children: Mapping[str, tuple[GraphNode, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """One allocation.

    Attributes:
      role: "parameter", "constant", "output", "temporary" or "local" (only a name inside a kernel).
      parameter: the HLO entry parameter that lies in it, None if none.
      live_out: an output lies in it.
      aliased: a donated parameter that an output takes over.
    """

    index: int
    size: int
    role: str
    parameter: int | None
    live_out: bool
    aliased: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An input or an output of the program.

    Attributes:
      index: of an input, its place among the leaves of the build's arguments (arguments that the program does not use
        have none); of an output, its place among the leaves of the result.
    """

    index: int
    slice: Slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes on the device; `aliased` bytes are counted in `arguments` and in `outputs`."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """A program compiled for one card.

    Attributes:
      thunks: what runs, before conversion to CUDA graphs.
      thunk_text: XLA's own print of them.
      graphs: the same thunks after conversion; equal in structure if nothing was converted.
      graph_text: XLA's own print of it.
      constants: their bytes by allocation.
      cached: it came from the cache, nothing was compiled.
    """

    target: Target
    thunks: tuple[Thunk, ...]
    thunk_text: str
    graphs: tuple[GraphNode, ...]
    graph_text: str
    kernels: Mapping[str, Kernel]
    allocations: tuple[Allocation, ...]
    parameters: tuple[Endpoint, ...]
    outputs: tuple[Endpoint, ...]
    constants: Mapping[int, bytes]
    memory: MemoryUse
    cached: bool = False

    def walk(self) -> Iterator[Thunk]:
        """Every thunk once, in order, a loop before its condition and body."""
        return walk(self.thunks)


def walk(thunks: tuple[Thunk, ...]) -> Iterator[Thunk]:
    """Every thunk of a sequence and of those nested in it, once and in order."""
    for thunk in thunks:
        yield thunk
        for children in thunk.children.values():
            yield from walk(children)
