"""One thread block: threads side by side in numpy arrays, each with its own program counter.

Among the threads that can run, those at the lowest program counter run together, until they would pass another that
could join them. That brings threads together again after a branch as a GPU does, with no analysis of the program.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ptx.faults import Fault, UnknownInstruction
from ptx.memory import ALIGNMENT, Memory, SharedMemory
from ptx.program import Barrier, Branch, Exit, Program, Step
from ptx.warp_ops import WARP

READY, PARKED, WAITING, EXITED = range(4)
SHARED_BASE = 1024
ALL_LANES = np.uint32(0xFFFFFFFF)
MAX_STEPS = 5_000_000


class Block:
    """The state of a block's threads.

    Attributes:
      registers: one array [threads] a register, None until written.
      active: [threads] who executes the current instruction; `index` holds their numbers, `full` if all.
      committed: [threads] how many groups of asynchronous copies each thread has closed.
    """

    def __init__(self, launch, program: Program, place: tuple[int, int, int], number: int, size: tuple[int, int, int]):
        self.launch, self.program, self.size, self.place = launch, program, size, place
        self.threads = threads = size[0] * size[1] * size[2]
        self.warps = -(-threads // WARP)
        self.registers = [np.zeros(threads, dtype) for dtype in program.register_types]
        self.everyone = np.arange(threads)
        first_agent = 1 + number * self.warps
        self.agents = first_agent + self.everyone // WARP
        self.carry = np.zeros(threads, bool)
        self.committed = np.zeros(threads, np.int64)
        self.pc = np.zeros(threads, np.int64)
        self.status = np.full(threads, READY)
        self.yields = np.zeros(threads, np.int64)
        self.barrier = np.full(threads, -1)
        self.arrived: dict[int, tuple] = {}
        self.steps = 0
        self.shared = self._shared_memory(first_agent)
        self.local = self._local_memory()
        self.specials = self._special_registers()

    def _shared_memory(self, first_agent: int) -> SharedMemory:
        """Static variables, then the dynamic one, with bytes between them that belong to nobody.

        CUDA C++ declares the dynamic memory as an array without a size, Mosaic GPU as a single byte.
        """
        at, self.addresses = SHARED_BASE, {}
        dynamic = self.launch.dynamic_shared
        sizes = [(v, dynamic if v.size == 0 or (v.size == 1 and dynamic) else v.size) for v in self.program.shared]
        for variable, size in sizes:
            at = -(-at // max(variable.align, ALIGNMENT)) * max(variable.align, ALIGNMENT)
            self.addresses[variable.name] = (at, size)
            at += size + ALIGNMENT
        shared = SharedMemory(0, at, first_agent, self.warps)
        for address, size in self.addresses.values():
            shared.allocate(address, size)
        return shared

    def _local_memory(self) -> Memory:
        at = 0
        for variable in self.program.kernel.local:
            at = -(-at // variable.align) * variable.align
            self.addresses[variable.name] = (at, variable.size)
            at += variable.size
        self.local_size = -(-at // ALIGNMENT) * ALIGNMENT
        local = Memory("local memory", 0, self.local_size * self.threads)
        local.allocate(0, local.size)
        return local

    def _special_registers(self) -> dict[str, np.ndarray | int]:
        t, (x, y, _) = self.everyone, self.size
        values = {"%laneid": t % WARP, "%warpid": t // WARP, "%smid": 0, "%nsmid": 1, "%WARP_SZ": WARP}
        lane = (t % WARP).astype(np.uint64)
        one = np.uint64(1)
        values["%lanemask_lt"] = (one << lane) - one
        values["%lanemask_le"] = (one << (lane + one)) - one
        values["%lanemask_eq"] = one << lane
        values["%lanemask_ge"] = ~values["%lanemask_lt"] & np.uint64(0xFFFFFFFF)
        values["%lanemask_gt"] = ~values["%lanemask_le"] & np.uint64(0xFFFFFFFF)
        values["%dynamic_smem_size"] = self.launch.dynamic_shared
        inside = (t % x, t // x % y, t // (x * y))
        for i, axis in enumerate("xyz"):
            values[f"%tid.{axis}"], values[f"%ntid.{axis}"] = inside[i], self.size[i]
            values[f"%ctaid.{axis}"], values[f"%nctaid.{axis}"] = self.place[i], self.launch.grid[i]
        return values

    def symbol(self, name: str) -> np.ndarray | int:
        """What a name stands for: a special register's value, or the address of a variable."""
        if name in self.specials:
            return self.specials[name]
        if name in self.addresses:
            return self.addresses[name][0]
        if name.startswith("%"):
            raise UnknownInstruction(f"special register {name}")
        return self.launch.symbol(name)

    def memory(self, space: str, address: np.ndarray) -> tuple[Memory, np.ndarray]:
        """The memory of a space and the active threads' addresses in it; each thread's local memory is its own."""
        if space == "local":
            return self.local, address + self.index * self.local_size
        return (self.shared if space == "shared" else self.launch.memory), address

    def set(self, register: int, value: np.ndarray) -> None:
        self.registers[register] = value if self.full else np.where(self.active, value, self.registers[register])

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Values of the active threads -> of all threads, whatever the others get."""
        if self.full:
            return values
        spread = np.zeros((self.threads, *values.shape[1:]), values.dtype)
        spread[self.index] = values
        return spread

    def of_active(self, values: np.ndarray) -> np.ndarray:
        """The active threads' values, of a register or a constant."""
        return np.broadcast_to(values, (self.threads, *values.shape[1:]))[self.index]

    def flag(self, space: str, address: int) -> tuple[int, int]:
        """What tells atomics' places apart: shared addresses are the same in every block."""
        return (int(self.agents[0]) if space == "shared" else 0, int(address))

    def read_flags(self, space: str, address: np.ndarray, wide: bool) -> None:
        for agent, each in zip(self.agents[self.index], address, strict=True):
            self.launch.clocks.read_flag(int(agent), self.flag(space, each), wide)

    def write_flags(self, space: str, address: np.ndarray, wide: bool) -> None:
        for agent, each in zip(self.agents[self.index], address, strict=True):
            self.launch.clocks.write_flag(int(agent), self.flag(space, each), wide)

    def require_whole_warps(self) -> None:
        """Raises Fault if a warp takes part with some of its lanes only."""
        lanes = np.bincount(self.index // WARP)
        if ((lanes != 0) & (lanes != WARP)).any():
            raise Fault("divergent", "a matrix instruction by a part of a warp")

    def wait_for_copies(self, left: int) -> None:
        """The active threads wait until at most `left` of their closed groups are in flight (-1: none at all)."""
        done = np.where(self.active, self.committed - left, -1)
        self.shared.finish_copies(done, self.agents, self.launch.clocks)

    def run(self) -> Iterator[str]:
        """Runs to the end, stopping wherever another block may take its turn: at barriers and atomics.

        Raises:
          Fault: with the instruction at fault named.
        """
        while self.choose():
            try:
                yield from self.run_together()
            except Fault as fault:
                if fault.where is not None:
                    raise
                raise Fault(fault.kind, fault.message, self.describe()) from None

    def describe(self) -> str:
        threads = self.index if len(self.index) else self.everyone
        who = f"threads {threads[0]}…{threads[-1]}" if len(threads) > 1 else f"thread {threads[0]}"
        return f"{self.program.text(self.at)}   (block {self.place}, {who})"

    def choose(self) -> bool:
        """Picks the threads to run next; False when all have left.

        Threads that went through fewer atomics come first, so that one that waits in a loop lets the others work.
        """
        ready = self.status == READY
        if not ready.any():
            if (self.status == EXITED).all():
                return False
            raise self.stuck()
        fewest = self.yields[ready].min()
        self.at = int(self.pc[ready & (self.yields == fewest)].min())
        can_join = ready | (self.status == PARKED)
        self.take((self.pc == self.at) & can_join)
        self.status[self.group] = READY
        others = self.pc[can_join & ~self.group]
        self.limit = int(others[others > self.at].min(initial=len(self.program.steps)))
        self.alone = len(others) == 0
        return True

    def take(self, group: np.ndarray) -> None:
        self.group = self.active = group
        self.group_full = self.full = bool(group.all())
        self.group_index = self.index = self.everyone if self.full else np.flatnonzero(group)

    def stuck(self) -> Fault:
        """What to say when no thread can go on: some wait at barriers, some for the rest of their warp."""
        parts = [f"{(self.barrier[self.status == WAITING] == b).sum()} threads at barrier {b}" for b in self.arrived]
        parked = self.pc[self.status == PARKED]
        parts += [f"{(parked == at).sum()} threads without the rest of their warp" for at in np.unique(parked)]
        kind = "divergent" if any(self.program.steps[at].aligned for at in parked) else "deadlock"
        where = self.program.text(int(parked[0])) if len(parked) else None
        return Fault(kind, "nobody can go on: " + "; ".join(parts), where)

    def run_together(self) -> Iterator[str]:
        """Runs the chosen threads until they part, wait, leave, or come to where others stand."""
        steps = self.program.steps
        while True:
            step: Step = steps[self.at]
            self.count_step()
            if step.predicate is not None:
                holds = self.registers[step.predicate.index] ^ step.predicate.negated
                self.active = self.group & holds
                self.full = self.group_full and bool(holds.all())
                self.index = self.everyone if self.full else np.flatnonzero(self.active)
            if step.control is not None:
                if not (yield from self.control(step)):
                    return
            else:
                if len(self.index):
                    if step.members is not None and not self.gather(step.members(self)):
                        return
                    step.run(self)
                self.at += 1
                if step.yields:
                    self.pc[self.group] = self.at
                    self.yields[self.group] += 1
                    yield "atomic"
                    return
            if step.predicate is not None:
                self.active, self.full, self.index = self.group, self.group_full, self.group_index
            if self.at >= self.limit and not self.alone:
                self.pc[self.group] = self.at
                return

    def count_step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Fault("deadlock", f"still running after {MAX_STEPS} instructions")

    def gather(self, members: np.ndarray) -> bool:
        """Goes on with the warps whose lanes that must take part ([threads] bit masks) are all here, if any.

        The other warps' lanes wait where they are.
        """
        here = np.zeros((self.warps, WARP), bool)
        here.reshape(-1)[self.index] = True
        named = self.of_active(members)[:, None] >> np.arange(WARP, dtype=np.uint32) & np.uint32(1) == 1
        if not named[np.arange(len(self.index)), self.index % WARP].all():
            raise Fault("divergent", "an instruction for lanes among which the one that executes it is not")
        wanted = np.zeros((self.warps, WARP), bool)
        np.logical_or.at(wanted, self.index // WARP, named)
        alive = np.zeros(self.warps * WARP, bool)
        alive[: self.threads] = self.status != EXITED
        missing = wanted & ~here & alive.reshape(self.warps, WARP)
        if not missing.any():
            return True
        if missing.reshape(-1)[: self.threads][self.group].any():
            raise Fault("divergent", "an instruction for a whole warp, with some of its lanes predicated off")
        self.pc[self.group] = self.at
        incomplete = missing.any(axis=1)[self.everyone // WARP]
        self.status[self.group & incomplete] = PARKED
        active = self.active & ~incomplete
        self.take(self.group & ~incomplete)
        self.active, self.index, self.alone = active, np.flatnonzero(active), False
        return len(self.index) > 0

    def control(self, step: Step) -> Iterator[str]:
        """Branches, exits and barriers. Returns whether the same threads go on together."""
        match step.control:
            case Branch(target):
                return self.branch(target)
            case Exit():
                return (yield from self.leave())
            case Barrier():
                return (yield from self.meet(step.control))
            case _:
                if len(self.index):
                    raise Fault("trap", "the program stopped itself")
                self.at += 1
                return True

    def branch(self, target: int) -> bool:
        if not len(self.index):
            self.at += 1
            return True
        if len(self.index) == len(self.group_index):
            together = self.alone or self.at < target <= self.limit
            self.at = target
            if not together:
                self.pc[self.group] = target
            return together
        self.pc[self.group] = self.at + 1
        self.pc[self.active] = target
        return False

    def leave(self) -> Iterator[str]:
        self.pc[self.group] = self.at + 1
        self.status[self.active] = EXITED
        self.status[self.status == PARKED] = READY  # who waited for those who left need not any more
        self.release_barriers()
        yield "exit"
        return False

    def meet(self, barrier: Barrier) -> Iterator[str]:
        """The active threads arrive; they wait unless `barrier.arrive`."""
        if len(self.index):
            if barrier.aligned and not self.gather(np.asarray(ALL_LANES)):
                return False
            numbers = self.of_active(barrier.number(self))
            for number in np.unique(numbers):
                self.arrive(barrier, int(number), self.index[numbers == number])
        self.pc[self.group] = self.at + 1
        self.release_barriers()
        yield "barrier"
        return False

    def arrive(self, barrier: Barrier, number: int, threads: np.ndarray) -> None:
        count = None
        if barrier.count is not None:
            counts = np.broadcast_to(barrier.count(self), self.threads)[threads]
            count = int(counts[0])
            if (counts != count).any() or count % WARP or not 0 < count <= self.warps * WARP:
                raise Fault("barrier", f"barrier {number} counts {set(counts.tolist())} of {self.threads} threads")
        arrivals, expected, known, votes = self.arrived.get(number, (0, count, 0, []))
        if expected != count:
            raise Fault("barrier", f"barrier {number} counts {count} threads here and {expected} elsewhere")
        known = np.maximum(known, self.launch.clocks.arrive(np.unique(self.agents[threads])))
        if barrier.reduce:
            votes = [*votes, np.broadcast_to(barrier.reduce.read(self), self.threads)[threads]]
        self.arrived[number] = (arrivals + len(threads), count, known, votes)
        if not barrier.arrive:
            self.status[threads] = WAITING
            self.barrier[threads] = number

    def release_barriers(self) -> None:
        for number, (arrivals, count, known, votes) in list(self.arrived.items()):
            waiting = (self.status == WAITING) & (self.barrier == number)
            if count is None:
                complete = (waiting | (self.status == EXITED)).all()
            else:
                complete = arrivals == count
                if arrivals > count:
                    raise Fault("barrier", f"{arrivals} threads arrived at barrier {number}, which counts {count}")
            if complete:
                del self.arrived[number]
                self.launch.clocks.learn(np.unique(self.agents[waiting]), known)
                self.status[waiting] = READY
                if votes:
                    self.hand_out(waiting, np.concatenate(votes))

    def hand_out(self, waiting: np.ndarray, votes: np.ndarray) -> None:
        """Gives the threads that leave a barrier the reduction of the predicates they brought."""
        for at in np.unique(self.pc[waiting]):
            reduction = self.program.steps[at - 1].control.reduce
            self.active, self.full = waiting & (self.pc == at), False
            reduction.write(self, np.asarray(reduction.combine(votes)))
