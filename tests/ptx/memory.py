"""Memory that knows which bytes exist, which were ever written, and who touched each one last.

An agent is a warp of the launch, numbered from 1; 0 stands for nobody, whose accesses are always over.
"""

from __future__ import annotations

import numpy as np

from ptx.clocks import Clocks
from ptx.faults import Fault

ALIGNMENT = 256


class Memory:
    """Bytes at `base … base + size`, of which only the allocated ones may be touched.

    Accesses come as n addresses of `width` bytes each; since every one is a multiple of its width, the arrays below are
    indexed by whole rows of `width` bytes. Of the reads of a byte the last is remembered; see `SharedMemory` for all.
    """

    def __init__(self, name: str, base: int, size: int) -> None:
        self.name, self.base = name, base
        self.size = size = -(-size // ALIGNMENT) * ALIGNMENT
        self.data = np.zeros(size, np.uint8)
        self.exists = np.zeros(size, bool)
        self.written = np.zeros(size, bool)
        self.changes = 0
        self.requests: np.ndarray | None = None  # per byte, how often a warp has asked for it; None: not counted
        self.forget_accesses()

    def forget_accesses(self) -> None:
        """What comes before a new launch is over."""
        # of each byte the last weak and the last strong access
        self.writer = np.zeros((2, self.size), np.int32)
        self.write_epoch = np.zeros((2, self.size), np.int32)
        self.reader = np.zeros((2, self.size), np.int32)
        self.read_epoch = np.zeros((2, self.size), np.int32)

    def end(self) -> int:
        return self.base + self.size

    def grow(self, size: int) -> None:
        """Adds bytes that nobody owns yet at the end."""
        more = -(-size // ALIGNMENT) * ALIGNMENT
        self.data = np.concatenate([self.data, np.zeros(more, np.uint8)])
        self.exists, self.written = (np.concatenate([x, np.zeros(more, bool)]) for x in (self.exists, self.written))
        self.size += more

    def count_requests(self) -> None:
        """From now on counts how often each byte is read."""
        self.requests = np.zeros(self.size, np.int32)

    def allocate(self, address: int, size: int, data: bytes | np.ndarray | None = None) -> None:
        at = address - self.base
        self.exists[at : at + size] = True
        if data is not None:
            raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
            self.data[at : at + len(raw)] = raw
            self.written[at : at + len(raw)] = True

    def rows(self, address: np.ndarray, width: int) -> np.ndarray:
        """Which rows of `array.reshape(-1, width)` the accesses touch.

        Raises:
          Fault: misaligned, or not all bytes allocated.
        """
        odd = address & (width - 1) != 0
        if odd.any():
            raise Fault("misaligned", f"{width}-byte access to {self.describe(address[odd][0])}")
        outside = (address < self.base) | (address + width > self.base + self.size)
        row = (address - self.base) // width
        if not outside.any():
            outside = ~self.exists.reshape(-1, width)[row].all(axis=1)
        if outside.any():
            raise Fault("out-of-bounds", f"{width}-byte access to {self.describe(address[outside][0])}")
        return row

    def describe(self, address: int) -> str:
        allocated = np.flatnonzero(self.exists[: max(0, int(address) - self.base)])
        if not len(allocated):
            return f"{self.name} address {int(address):#x}"
        past = int(address) - self.base - int(allocated[-1]) - 1
        return f"{self.name} address {int(address):#x}" + (f", {past} bytes past the end of a buffer" if past else "")

    def load(
        self, address: np.ndarray, width: int, agents: np.ndarray, clocks: Clocks, strong: bool = False
    ) -> np.ndarray:
        """[n] addresses -> uint8[n, width]. Strong accesses, atomic or volatile, race with others' weak ones only."""
        row = self.rows(address, width)
        written = self.written.reshape(-1, width)[row]
        if not written.all():
            bad = address[~written.all(axis=1)][0]
            raise Fault("uninitialised", f"read of bytes never written, {self.describe(bad)}")
        self.check_written(row, width, agents, clocks, strong, None)
        self.note_read(row, width, agents, clocks, strong)
        if self.requests is not None:  # lanes of a warp that read one place ask once
            asked = np.unique(np.stack([row, agents]), axis=1)[0]
            np.add.at(self.requests.reshape(-1, width), asked, 1)
        return self.data.reshape(-1, width)[row]

    def store(
        self, address: np.ndarray, values: np.ndarray, agents: np.ndarray, clocks: Clocks, strong: bool = False
    ) -> None:
        """uint8[n, width] to [n] addresses."""
        width = values.shape[1]
        row = self.rows(address, width)
        data = self.data.reshape(-1, width)
        self.check_written(row, width, agents, clocks, strong, values)
        self.check_read(row, width, agents, clocks, strong)
        self.changes += bool((data[row] != values).any())
        data[row] = values
        if not strong and (data[row] != values).any():
            raise Fault("race", f"two threads write different values to the same {self.name} bytes")
        self.written.reshape(-1, width)[row] = True
        self.writer[int(strong)].reshape(-1, width)[row] = agents[:, None]
        self.write_epoch[int(strong)].reshape(-1, width)[row] = clocks.epoch[agents][:, None]

    def check_written(
        self,
        row: np.ndarray,
        width: int,
        agents: np.ndarray,
        clocks: Clocks,
        strong: bool,
        values: np.ndarray | None,
    ) -> None:
        """Bytes another warp wrote must not be read, nor given other `values`, before something orders the two.

        Compilers let several warps write one value to one place; that is no fault.
        """
        for kind in (0,) if strong else (0, 1):
            writer = self.writer[kind].reshape(-1, width)[row]
            if not writer.any():
                continue
            late = self.write_epoch[kind].reshape(-1, width)[row] > clocks.seen[agents[:, None], writer]
            late &= writer != agents[:, None]
            if values is not None:
                late &= self.data.reshape(-1, width)[row] != values
            if late.any():
                what = "read of" if values is None else "write over"
                raise Fault("race", f"{what} {self.name} bytes another warp has written, and nothing orders the two")

    def check_read(self, row: np.ndarray, width: int, agents: np.ndarray, clocks: Clocks, strong: bool) -> None:
        """Bytes another warp may still be reading must not be written."""
        for kind in (0,) if strong else (0, 1):
            reader = self.reader[kind].reshape(-1, width)[row]
            late = self.read_epoch[kind].reshape(-1, width)[row] > clocks.seen[agents[:, None], reader]
            if (late & (reader != agents[:, None])).any():
                raise Fault("race", f"write over {self.name} bytes that another warp may still be reading")

    def note_read(self, row: np.ndarray, width: int, agents: np.ndarray, clocks: Clocks, strong: bool) -> None:
        self.reader[int(strong)].reshape(-1, width)[row] = agents[:, None]
        self.read_epoch[int(strong)].reshape(-1, width)[row] = clocks.epoch[agents][:, None]


class SharedMemory(Memory):
    """A block's shared memory: remembers each warp's last read of each byte, and the copies in flight.

    Args:
      first_agent: the block's first warp.
      warps: how many it has.
    """

    def __init__(self, base: int, size: int, first_agent: int, warps: int) -> None:
        self.first_agent, self.warps = first_agent, warps
        super().__init__("shared memory", base, size)
        self.copy_thread = np.zeros(self.size, np.int32)  # thread + 1 while its copy is in flight
        self.copy_group = np.zeros(self.size, np.int32)
        self.copies = False

    def forget_accesses(self) -> None:
        super().forget_accesses()
        self.reads = np.zeros((2, self.size, self.warps), np.int32)

    def check_in_flight(self, row: np.ndarray, width: int, what: str) -> None:
        if self.copies and self.copy_thread.reshape(-1, width)[row].any():
            raise Fault("in-flight", f"{what} shared memory bytes that a cp.async has not finished writing")

    def load(
        self, address: np.ndarray, width: int, agents: np.ndarray, clocks: Clocks, strong: bool = False
    ) -> np.ndarray:
        self.check_in_flight(self.rows(address, width), width, "read of")
        return super().load(address, width, agents, clocks, strong)

    def store(
        self, address: np.ndarray, values: np.ndarray, agents: np.ndarray, clocks: Clocks, strong: bool = False
    ) -> None:
        self.check_in_flight(self.rows(address, values.shape[1]), values.shape[1], "write over")
        super().store(address, values, agents, clocks, strong)

    def check_read(self, row: np.ndarray, width: int, agents: np.ndarray, clocks: Clocks, strong: bool) -> None:
        known = clocks.seen[agents, self.first_agent : self.first_agent + self.warps]
        known[np.arange(len(agents)), agents - self.first_agent] = np.iinfo(np.int32).max
        for kind in (0,) if strong else (0, 1):
            if (self.reads[kind].reshape(-1, width, self.warps)[row] > known[:, None, :]).any():
                raise Fault("race", "write over shared memory bytes that another warp may still be reading")

    def note_read(self, row: np.ndarray, width: int, agents: np.ndarray, clocks: Clocks, strong: bool) -> None:
        reads = self.reads[int(strong)].reshape(-1, width, self.warps)
        reads[row, :, agents - self.first_agent] = clocks.epoch[agents][:, None]

    def start_copy(
        self,
        address: np.ndarray,
        values: np.ndarray,
        threads: np.ndarray,
        groups: np.ndarray,
        agents: np.ndarray,
        clocks: Clocks,
    ) -> None:
        """cp.async: uint8[n, width] are in flight until each thread has waited for its group."""
        width = values.shape[1]
        row = self.rows(address, width)
        self.check_in_flight(row, width, "copy into")
        if len(np.unique(row)) < len(row):
            raise Fault("in-flight", "two threads copy to the same shared memory bytes")
        self.check_written(row, width, agents, clocks, False, None)
        self.check_read(row, width, agents, clocks, False)
        self.data.reshape(-1, width)[row] = values
        self.copy_thread.reshape(-1, width)[row] = threads[:, None] + 1
        self.copy_group.reshape(-1, width)[row] = groups[:, None]
        self.copies = True

    def finish_copies(self, done: np.ndarray, agents: np.ndarray, clocks: Clocks) -> None:
        """The copies of thread t up to group done[t] have arrived: written by its warp, agents[t], now."""
        if not self.copies:
            return
        at = np.flatnonzero(self.copy_thread)
        thread = self.copy_thread[at] - 1
        arrived = self.copy_group[at] <= done[thread]
        at, thread = at[arrived], thread[arrived]
        self.copy_thread[at] = 0
        self.written[at] = True
        self.writer[0, at] = agents[thread]
        self.write_epoch[0, at] = clocks.epoch[agents[thread]]
        self.copies = not arrived.all()
