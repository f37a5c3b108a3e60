"""A launch: blocks of one kernel over one memory, in any order and interleaved."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from ptx.block import Block
from ptx.clocks import Clocks
from ptx.faults import Fault
from ptx.memory import ALIGNMENT, Memory
from ptx.parser import Module, Variable
from ptx.program import Program
from ptx.values import WINDOW
from ptx.warp_ops import WARP

GUARD = 4096  # bytes between two buffers that belong to neither
PADDING = 0xAB
RESIDENT = 64  # blocks in flight at once
PATIENCE = 5000  # turns a block in flight may take without anything changing in memory


class DeviceMemory:
    """Buffers in a device's memory, apart from each other, at fixed addresses."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.addresses, at = [], WINDOW["global"] + GUARD
        for size in sizes:
            self.addresses.append(at)
            at += -(-size // ALIGNMENT) * ALIGNMENT + GUARD
        self.memory = Memory("global memory", WINDOW["global"], at - WINDOW["global"])
        self.sizes = list(sizes)
        for address, size in zip(self.addresses, sizes, strict=True):
            self.memory.allocate(address, size)

    def span(self, i: int) -> slice:
        at = self.addresses[i] - self.memory.base
        return slice(at, at + self.sizes[i])

    def open_padding(self, readable: bool) -> None:
        """Lets programs read on to the next multiple of 256 bytes behind a buffer, where allocators leave room.

        XLA's kernels do so before they look whether the element is theirs.
        """
        for address, size in zip(self.addresses, self.sizes, strict=True):
            end = address + size - self.memory.base
            padding = slice(end, end + -size % ALIGNMENT)
            self.memory.exists[padding] = self.memory.written[padding] = readable
            self.memory.data[padding] = PADDING

    def check_padding(self) -> None:
        """Raises Fault if a program has written behind a buffer."""
        for address, size in zip(self.addresses, self.sizes, strict=True):
            end = address + size - self.memory.base
            if (self.memory.data[end : end + -size % ALIGNMENT] != PADDING).any():
                raise Fault("out-of-bounds", f"a write behind the buffer of {size} bytes at {address:#x}")

    def write(self, i: int, array: np.ndarray, offset: int = 0) -> None:
        """Fills a buffer from the host."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        at = self.addresses[i] - self.memory.base + offset
        self.memory.data[at : at + len(raw)] = raw
        self.memory.written[at : at + len(raw)] = True

    def read(self, i: int, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        """A buffer's content as an array."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.memory.data[self.span(i)][:count].view(dtype).reshape(shape).copy()

    def unwritten(self, i: int, size: int | None = None) -> int:
        """How many of a buffer's bytes nobody has written."""
        return int((~self.memory.written[self.span(i)][:size]).sum())


class Launch:
    """Runs `kernel<<<grid, block, dynamic_shared>>>(parameters)`.

    Args:
      module: the parsed PTX.
      kernel: the entry's name.
      grid: blocks along x, y, z.
      block: threads along x, y, z.
      parameters: one value a parameter, in the order of the entry: an address in `memory` (int) or a numpy scalar.
      memory: what the addresses point into.
      dynamic_shared: bytes.
      seed: None runs a block until it ends or can do nothing; a number interleaves the blocks in an order of its own.

    Raises:
      Fault: the program did something that `faults.KINDS` lists.
      UnknownInstruction: it holds an instruction without a rule.
    """

    def __init__(
        self,
        module: Module,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: Sequence[int | np.generic],
        memory: Memory,
        *,
        dynamic_shared: int = 0,
        seed: int | None = None,
    ) -> None:
        entry = module.kernels[kernel]
        self.program = Program(entry, module.variables)
        self.grid, self.block, self.memory, self.dynamic_shared = grid, block, memory, dynamic_shared
        self.random = None if seed is None else random.Random(seed)
        threads = block[0] * block[1] * block[2]
        if threads > min(1024, entry.max_threads or 1024):
            raise ValueError(f"{threads} threads a block; {kernel} allows {min(1024, entry.max_threads or 1024)}")
        warps = -(-block[0] * block[1] * block[2] // WARP)
        self.clocks = Clocks(grid[0] * grid[1] * grid[2] * warps, warps)
        self._place_parameters(entry.params, parameters)
        self._place_variables(module.variables)
        memory.forget_accesses()
        self._run()

    def _place_parameters(self, declared: list[Variable], given: Sequence[int | np.generic]) -> None:
        if len(declared) != len(given):
            raise ValueError(f"the kernel takes {len(declared)} parameters, {len(given)} were given")
        self.parameters, self.offsets = bytearray(), {}
        for variable, value in zip(declared, given, strict=True):
            raw = np.uint64(value).tobytes() if isinstance(value, int) else value.tobytes()
            if len(raw) != variable.size:
                raise ValueError(f"parameter {variable.name} holds {variable.size} bytes, {len(raw)} were given")
            self.parameters += b"\0" * (-len(self.parameters) % max(variable.align, 1))
            self.offsets[variable.name] = WINDOW["param"] + len(self.parameters)
            self.parameters += raw

    def _place_variables(self, variables: list[Variable]) -> None:
        """Module-level constants live behind the buffers."""
        self.constants = {}
        constants = [v for v in variables if v.space in ("global", "const")]
        if not constants:
            return
        at = self.memory.end()
        self.memory.grow(sum(GUARD + -(-v.size // ALIGNMENT) * ALIGNMENT for v in constants))
        for variable in constants:
            self.constants[variable.name] = at
            self.memory.allocate(at, variable.size, variable.data or bytes(variable.size))
            at += -(-variable.size // ALIGNMENT) * ALIGNMENT + GUARD

    def symbol(self, name: str) -> int:
        if name in self.offsets:
            return self.offsets[name]
        return self.constants[name]

    def parameter_bytes(self, address: np.ndarray, size: int) -> np.ndarray:
        at = address - WINDOW["param"]
        if (at < 0).any() or (at + size > len(self.parameters)).any():
            raise Fault("out-of-bounds", f"{size}-byte read past the parameters")
        return np.frombuffer(bytes(self.parameters), np.uint8)[at[:, None] + np.arange(size)]

    def any_order(self, count: int) -> list[int]:
        order = list(range(count))
        if self.random:
            self.random.shuffle(order)
        return order

    def _run(self) -> None:
        x, y, z = self.grid
        waiting = [(i, (i % x, i // x % y, i // (x * y))) for i in range(x * y * z)]
        if self.random:
            self.random.shuffle(waiting)
        waiting.reverse()
        running: list[tuple[Block, Iterator[str]]] = []
        idle, turn = 0, 0
        while waiting or running:
            while waiting and len(running) < (RESIDENT if self.random or idle else 1):
                number, place = waiting.pop()
                block = Block(self, self.program, place, number, self.block)
                running.append((block, block.run()))
            turn = self.random.randrange(len(running)) if self.random else (turn + bool(idle)) % len(running)
            block, steps = running[turn]
            before = self.memory.changes + block.shared.changes
            with np.errstate(all="ignore"):  # not in the block: a fault may leave it for a garbage collector to end
                event = next(steps, None)
            if event is None:
                del running[turn]
            moved = event != "atomic" or self.memory.changes + block.shared.changes != before
            idle = 0 if moved else idle + 1
            if idle > PATIENCE * len(running):
                raise Fault("deadlock", f"{len(running)} blocks wait in a loop for what nobody does")
