"""A whole compiled program, kernel after kernel, in the compiler's own buffers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import ml_dtypes
import numpy as np

from jaxdecode.aot.program import Argument, CompiledProgram, Slice, Thunk
from ptx.faults import Fault
from ptx.launch import DeviceMemory, Launch
from ptx.parser import parse

DTYPES = {"pred": np.bool_, "bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "f64": np.float64}
DTYPES |= {f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)}
DTYPES |= {f"u{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)}


class Chain:
    """Runs a program's thunks in order: our kernels and XLA's alike, loops included.

    Args:
      program: as compiled.
      inputs: one array for each leaf of the program's arguments.
      seed: order in which blocks are interleaved; see `Launch`.
      sparse: names of kernels that may leave parts of what they write untouched.
      count_requests: counts reads, for `requests`; takes time.

    Attributes:
      outputs: the program's results.
      requests: per input how often each of its bytes was asked for, [nbytes], if `count_requests`.
      launched: the names of the kernels launched, in order.

    Raises:
      Fault: a kernel misbehaved, or left a buffer it writes unwritten.
      NotImplementedError: a thunk that is no kernel, copy, fill or loop.
    """

    def __init__(
        self,
        program: CompiledProgram,
        inputs: Sequence[np.ndarray],
        *,
        seed: int | None = None,
        sparse: Collection[str] = (),
        count_requests: bool = False,
    ) -> None:
        self.program, self.seed, self.sparse = program, seed, sparse
        self.device = DeviceMemory([allocation.size for allocation in program.allocations])
        self.modules = {key: parse(kernel.ptx) for key, kernel in program.kernels.items()}
        self.launched: list[str] = []
        for allocation, data in program.constants.items():
            self.device.write(allocation, np.frombuffer(data, np.uint8))
        for endpoint in program.parameters:
            self._fill(endpoint.slice, np.ascontiguousarray(inputs[endpoint.index]))
        if count_requests:
            self.device.memory.count_requests()
        self._run(program.thunks)
        self.requests: dict[int, np.ndarray] = {}
        if self.device.memory.requests is not None:
            for endpoint in program.parameters:
                self.requests[endpoint.index] = self.device.memory.requests[self._span(endpoint.slice)]
        self.outputs = [self._read(endpoint.slice) for endpoint in sorted(program.outputs, key=lambda e: e.index)]

    def _fill(self, where: Slice, array: np.ndarray) -> None:
        if array.nbytes != where.size:
            raise ValueError(f"an input of {array.nbytes} bytes for a buffer of {where.size}")
        self.device.write(where.allocation, array, where.offset)

    def _read(self, where: Slice) -> np.ndarray:
        raw = self.device.memory.data[self._span(where)]
        if not self.device.memory.written[self._span(where)].all():
            raise Fault("never-written", f"a part of an output was never written: {where}")
        assert where.shape is not None
        return raw.view(DTYPES[where.dtype]).reshape(where.shape).copy()

    def _span(self, where: Slice) -> slice:
        start = self.device.span(where.allocation).start + where.offset
        return slice(start, start + where.size)

    def _run(self, thunks: Sequence[Thunk]) -> None:
        for thunk in thunks:
            if thunk.kernel is not None:
                self._launch(thunk)
            elif thunk.kind == "while":
                self._loop(thunk)
            elif thunk.kind == "conditional":
                self._run(thunk.children[f"branch_{int(self._number(thunk.argument('branch_index')))}"])
            elif thunk.kind == "device_to_device_copy":
                source, target = (self._span(thunk.argument(name)) for name in ("source", "destination"))
                self.device.memory.data[target] = self.device.memory.data[source]
                self.device.memory.written[target] = self.device.memory.written[source]
            elif thunk.kind in ("memzero", "memset32bit_value"):
                value = np.uint32(thunk.attributes.get("value", 0))
                where = thunk.argument("dest")
                self._fill(where, np.full(-(-where.size // 4), value).view(np.uint8)[: where.size])
            elif thunk.kind == "sequential":
                self._run(thunk.children["thunks"])
            else:
                raise NotImplementedError(f"thunk {thunk.id}, {thunk.kind} {thunk.name}, runs in no kernel we see")

    def _number(self, where: Slice) -> int:
        raw = self.device.memory.data[self._span(where)]
        return int.from_bytes(raw[:4].tobytes(), "little")

    def _loop(self, thunk: Thunk) -> None:
        while True:
            self._run(thunk.children["condition"])
            if not self._number(thunk.argument("condition_result")) & 1:
                return
            self._run(thunk.children["body"])

    def _launch(self, thunk: Thunk) -> None:
        kernel = self.program.kernels[thunk.kernel]
        fresh = self._forget_results(thunk.arguments)
        self.device.open_padding(kernel.kind != "mosaic")
        Launch(
            self.modules[thunk.kernel],
            kernel.name,
            kernel.launch.grid,
            kernel.launch.block,
            [self._parameter(argument) for argument in thunk.arguments],
            self.device.memory,
            dynamic_shared=kernel.launch.shared_bytes,
            seed=self.seed,
        )
        self.launched.append(kernel.name)
        self.device.check_padding()
        for argument in fresh:
            if kernel.name not in self.sparse and not self.device.memory.written[self._span(argument.slice)].all():
                raise Fault("never-written", f"{kernel.name} left a part of {argument.name} unwritten")

    def _forget_results(self, arguments: Sequence[Argument]) -> list[Argument]:
        """What a kernel writes and does not read holds nothing yet; returns these arguments.

        XLA's own kernels do not tell the two apart, Pallas kernels do.
        """
        read = {a.slice for a in arguments if a.slice and not a.name.startswith("result_")}
        fresh = [a for a in arguments if a.name.startswith("result_") and a.slice and not self._overlaps(a.slice, read)]
        for argument in fresh:
            self.device.memory.written[self._span(argument.slice)] = False
        for argument in arguments:
            if argument.zeroed and argument.slice:
                self._fill(argument.slice, np.zeros(argument.slice.size, np.uint8))
        return fresh

    def _overlaps(self, where: Slice, others: Collection[Slice]) -> bool:
        mine = self._span(where)
        return any(mine.start < self._span(o).stop and self._span(o).start < mine.stop for o in others)

    def _parameter(self, argument: Argument) -> int | np.ndarray:
        if argument.slice is not None:
            return self.device.addresses[argument.slice.allocation] + argument.slice.offset
        if argument.by_value:
            raise NotImplementedError(f"parameter {argument.name} is filled by the host at launch")
        return np.frombuffer(argument.value, np.uint8)
