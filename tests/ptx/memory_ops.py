"""Loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.faults import Fault, UnknownInstruction
from ptx.parser import Address, Instruction
from ptx.rules import Run, rule
from ptx.values import WINDOW, bits_of, dtype_of, known, reader, registers_of, writer

SPACES = ("global", "shared", "const", "param", "local")
HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1", "L2", "no_allocate", "evict_last", "evict_first")
HINTS += ("evict_normal", "evict_unchanged", "64B", "128B", "256B", "cta", "entry")
STRONG = ("volatile", "relaxed", "acquire", "release", "acq_rel", "weak")
SCOPES = ("gpu", "sys", "cluster")
WIDTHS = {"v2": 2, "v4": 4}


class Addresses:
    """The addresses an operand names in the active threads, and the memory they lie in."""

    def __init__(self, operand: object, space: str) -> None:
        if not isinstance(operand, Address):
            raise UnknownInstruction(f"operand {operand} where an address was expected")
        self.space, self.offset = space, operand.offset
        bits = getattr(operand.base, "bits", 64)
        self.base = reader(operand.base, f"u{bits}")

    def __call__(self, block) -> tuple[str, np.ndarray]:
        address = block.of_active(self.base(block)).astype(np.int64) + self.offset
        if self.space:
            return self.space, address
        for space in ("global", "shared", "param", "local"):
            inside = address >= WINDOW[space]
            if inside.all():
                return space, address - (WINDOW[space] if space in ("shared", "local") else 0)
            if inside.any():
                raise UnknownInstruction("one generic access to two memories")
        raise Fault("out-of-bounds", f"address {int(address[0]):#x} lies in no memory")


def space_of(instruction: Instruction) -> str:
    """The state space named, "" for a generic address."""
    spaces = [m for m in instruction.modifiers if m in SPACES]
    return "global" if spaces == ["const"] else (spaces[0] if spaces else "")


def strength(instruction: Instruction) -> str:
    """weak, volatile, relaxed, acquire, release or acq_rel."""
    return next((m for m in instruction.modifiers if m in STRONG), "weak")


@rule("ld", "ldu")
def _load(instruction: Instruction) -> Run:
    (type_,) = known(instruction, *SPACES, *HINTS, *STRONG, *SCOPES, *WIDTHS)
    space, strong, wide = space_of(instruction), strength(instruction), "cta" not in instruction.modifiers
    targets = registers_of(instruction.operands[0])
    writes = [writer(target, type_) for target in targets]
    addresses = Addresses(instruction.operands[1], space)
    width = bits_of(type_) // 8
    whole = width * len(writes)
    dtype = dtype_of(type_)

    def run(block):
        where, address = addresses(block)
        if where == "param":
            raw = block.launch.parameter_bytes(address, whole)
        else:
            memory, place = block.memory(where, address)
            raw = memory.load(place, whole, block.agents[block.index], block.launch.clocks, strong != "weak")
        values = np.ascontiguousarray(raw).view(dtype)
        for i, write in enumerate(writes):
            write(block, block.spread(values[:, i]))
        if strong != "weak":
            block.read_flags(where, address, wide)
        if strong == "acquire":
            block.launch.clocks.acquire(np.unique(block.agents[block.index]), wide)

    run.yields = strong != "weak"
    return run


@rule("st")
def _store(instruction: Instruction) -> Run:
    (type_,) = known(instruction, *SPACES, *HINTS, *STRONG, *SCOPES, *WIDTHS)
    space, strong, wide = space_of(instruction), strength(instruction), "cta" not in instruction.modifiers
    addresses = Addresses(instruction.operands[0], space)
    reads = [reader(source, type_) for source in registers_of(instruction.operands[1])]
    dtype = dtype_of(type_)

    def run(block):
        where, address = addresses(block)
        values = np.stack([block.of_active(read(block)) for read in reads], axis=-1)
        raw = np.ascontiguousarray(values.astype(dtype, copy=False)).view(np.uint8)
        if strong == "release":
            block.launch.clocks.release(np.unique(block.agents[block.index]), wide)
        if strong != "weak":
            block.write_flags(where, address, wide)
        memory, place = block.memory(where, address)
        memory.store(place, raw, block.agents[block.index], block.launch.clocks, strong != "weak")

    run.yields = strong != "weak"
    return run


def _increment(old, limit):
    return np.where(old >= limit, np.zeros_like(old), old + 1)


def _decrement(old, limit):
    return np.where((old == 0) | (old > limit), limit, old - 1)


ATOMICS: dict[str, Callable] = {
    "add": lambda old, new: old + new,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "min": np.minimum,
    "max": np.maximum,
    "exch": lambda old, new: new,
    "inc": _increment,
    "dec": _decrement,
    "cas": lambda old, expected, new: np.where(old == expected, new, old),
}


@rule("atom", "red")
def _atomic(instruction: Instruction) -> Run:
    types = known(instruction, *ATOMICS, *STRONG, *SCOPES, "global", "shared", "cta", "noftz")
    type_ = types[-1]
    strong, wide = strength(instruction), "cta" not in instruction.modifiers
    combine = ATOMICS[next(m for m in instruction.modifiers if m in ATOMICS)]
    returns = instruction.name == "atom"
    write = writer(instruction.operands[0], type_) if returns else None
    target, *sources = instruction.operands[returns:]
    addresses = Addresses(target, space_of(instruction))
    reads = [reader(source, type_) for source in sources]
    dtype = dtype_of(type_)

    def run(block):
        where, address = addresses(block)
        operands = [block.of_active(read(block)) for read in reads]
        agents, clocks = block.agents[block.index], block.launch.clocks
        memory, place = block.memory(where, address)
        old = [None] * len(address)
        if strong in ("release", "acq_rel"):
            clocks.release(np.unique(agents), wide)
        for i in block.launch.any_order(len(address)):
            one = slice(i, i + 1)
            before = memory.load(place[one], _width(type_), agents[one], clocks, True).view(dtype)[0]
            old[i] = before if before.shape[0] > 1 else before[0]
            after = combine(old[i], *[operand[i] for operand in operands])
            raw = np.atleast_1d(np.asarray(after, dtype)).view(np.uint8)[None, :]
            memory.store(place[one], raw, agents[one], clocks, True)
            flag = block.flag(where, address[i])
            clocks.read_flag(int(agents[i]), flag, wide)
            clocks.write_flag(int(agents[i]), flag, wide)
        if strong in ("acquire", "acq_rel"):
            clocks.acquire(np.unique(agents), wide)
        if write:
            write(block, block.spread(np.asarray(old, dtype)))

    run.yields = True
    return run


def _width(type_: str) -> int:
    return bits_of(type_) // 8


@rule("membar", "fence")
def _fence(instruction: Instruction) -> Run:
    """Fences for one block (`.cta`) order nothing between blocks."""
    known(instruction, "gl", "sys", "cta", "gpu", "cluster", "sc", "acq_rel", "acquire", "release")
    wide = "cta" not in instruction.modifiers

    def run(block):
        agents = np.unique(block.agents[block.index])
        if "acquire" not in instruction.modifiers:
            block.launch.clocks.release(agents, wide)
        if "release" not in instruction.modifiers:
            block.launch.clocks.acquire(agents, wide)

    return run


@rule("nanosleep")
def _sleep(instruction: Instruction) -> Run:
    """Time is not modelled; the others get their turn."""
    known(instruction)

    def run(block):
        pass

    run.yields = True
    return run


@rule("prefetch", "prefetchu")
def _prefetch(instruction: Instruction) -> Run:
    """A hint that reads nothing a program can see."""
    known(instruction, *SPACES, *HINTS)
    return lambda block: None


@rule("cp")
def _copy(instruction: Instruction) -> Run:
    modifiers = instruction.modifiers
    if not modifiers or modifiers[0] != "async" or any(m in modifiers for m in ("bulk", "mbarrier")):
        raise UnknownInstruction(instruction.text)
    known(instruction, "async", *HINTS, "shared", "global", "commit_group", "wait_group", "wait_all")
    if "commit_group" in modifiers:

        def commit(block):
            block.committed = block.committed + block.active

        return commit
    if "wait_group" in modifiers or "wait_all" in modifiers:
        left = instruction.operands[0].value if "wait_group" in modifiers else -1  # wait_all: the uncommitted one too

        def wait(block):
            block.wait_for_copies(left)

        return wait
    return _start_copy(instruction)


def _start_copy(instruction: Instruction) -> Run:
    to, source, size = instruction.operands[:3]
    targets, sources = Addresses(to, "shared"), Addresses(source, "global")
    width = size.value
    if width not in (4, 8, 16) or ("cg" in instruction.modifiers and width != 16):
        raise UnknownInstruction(f"copy of {width} bytes: `{instruction.text}`")
    taken = _bytes_taken(instruction.operands[3], width) if len(instruction.operands) > 3 else None

    def run(block):
        _, target = targets(block)
        _, address = sources(block)
        agents = block.agents[block.index]
        if (address & (width - 1)).any():
            raise Fault("misaligned", f"a copy of {width} bytes from {int(address[0]):#x}")
        values = np.zeros((len(target), width), np.uint8)
        count = np.full(len(target), width)
        if taken is not None:
            count = block.of_active(taken(block)).astype(np.int64)
            if (count > width).any():
                raise Fault("out-of-bounds", f"a copy of {width} bytes takes {int(count.max())} from its source")
        memory = block.launch.memory
        for n in np.unique(count[count > 0]):
            some = count == n
            part = _partial(memory, address[some], int(n), agents[some], block.launch.clocks)
            values[np.flatnonzero(some), :n] = part
        groups = block.committed[block.index] + 1
        threads = block.index
        block.shared.start_copy(target, values, threads, groups, agents, block.launch.clocks)

    return run


def _bytes_taken(operand: object, width: int):
    """The bytes read from the source, the rest of the target becoming zero: a number, or "none" as a predicate."""
    if getattr(operand, "bits", 0) == 1:
        ignored = reader(operand, "pred")
        return lambda block: np.where(ignored(block), 0, width)
    return reader(operand, "u32")


def _partial(memory, address, count, agents, clocks):
    """The first `count` bytes at each address, read in pieces that are powers of two."""
    pieces, at = [], 0
    while at < count:
        piece = 1 << ((count - at).bit_length() - 1)
        pieces.append(memory.load(address + at, piece, agents, clocks))
        at += piece
    return np.concatenate(pieces, axis=1)
