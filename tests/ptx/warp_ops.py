"""Instructions a warp executes as one: matrix products, shuffles, votes.

Each rule marks its function with `warp`: the operand that names the lanes that must take part, or None for all.
"""

from __future__ import annotations

import numpy as np

from ptx.choices import COMBINE
from ptx.faults import UnknownInstruction
from ptx.memory_ops import Addresses, space_of
from ptx.parser import Immediate, Instruction
from ptx.rules import Run, rule
from ptx.values import Reader, dtype_of, first_of, known, reader, registers_of, writer

WARP = 32
ALL = Immediate(0xFFFFFFFF)


def by_warp(block, values: np.ndarray) -> np.ndarray:
    """[threads, …] -> [warps, 32, …]; the last warp is filled up with zeros."""
    values = np.broadcast_to(values, (block.threads, *np.shape(values)[1:])) if np.ndim(values) < 2 else values
    missing = -len(values) % WARP
    if missing:
        values = np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])
    return values.reshape(-1, WARP, *values.shape[1:])


def by_thread(block, values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, *values.shape[2:])[: block.threads]


def bits(lanes: np.ndarray) -> np.ndarray:
    """bool[…, 32] -> uint32[…]"""
    return (lanes << np.arange(WARP, dtype=np.uint64)).sum(-1, dtype=np.uint64).astype(np.uint32)


def lanes_asked(block, members: Reader) -> np.ndarray:
    """[warps, 32, 32]: which active lanes each lane's mask names."""
    masks = by_warp(block, np.broadcast_to(members(block), block.threads))
    named = masks[:, :, None] >> np.arange(WARP, dtype=np.uint32) & np.uint32(1) == 1
    active = by_warp(block, block.active)
    return named & active[:, None, :] & active[:, :, None]


def whole_warp(run: Run, members: object = ALL) -> Run:
    run.warp = reader(members, "u32")
    return run


@rule("shfl")
def _shuffle(instruction: Instruction) -> Run:
    known(instruction, "sync", "up", "down", "bfly", "idx")
    mode = instruction.modifiers[1]
    target, found = first_of(instruction.operands[0])
    read, read_lane, read_clamp = (reader(operand, "b32") for operand in instruction.operands[1:4])
    write = writer(target, "b32")
    write_found = writer(found, "pred") if found is not None else None

    def run(block):
        value, by, clamp = (by_warp(block, f(block)).astype(np.int64) for f in (read, read_lane, read_clamp))
        lane = np.arange(WARP)
        segment, limit = clamp >> 8 & 31, clamp & 31
        highest = (lane & segment) | (limit & ~segment)
        lowest = lane & segment
        by = by & 31
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | (by & ~segment)}[mode]
        inside = source >= highest if mode == "up" else source <= highest
        source = np.where(inside, source, lane)
        write(block, by_thread(block, np.take_along_axis(value, source, axis=1)).astype(np.uint32))
        if write_found:
            write_found(block, by_thread(block, inside))

    return whole_warp(run, instruction.operands[4])


@rule("vote")
def _vote(instruction: Instruction) -> Run:
    known(instruction, "sync", "all", "any", "uni", "ballot")
    mode = instruction.modifiers[1]
    read = reader(instruction.operands[1], "pred")
    write = writer(instruction.operands[0], "b32" if mode == "ballot" else "pred")
    members = reader(instruction.operands[2], "u32")

    def run(block):
        asked, holds = lanes_asked(block, members), by_warp(block, read(block))[:, None, :]
        if mode == "ballot":
            write(block, by_thread(block, bits(asked & holds)))
            return
        everyone, someone = (holds | ~asked).all(2), (holds & asked).any(2)
        write(block, by_thread(block, {"all": everyone, "any": someone, "uni": everyone | ~someone}[mode]))

    return whole_warp(run, instruction.operands[2])


@rule("match")
def _match(instruction: Instruction) -> Run:
    (type_,) = known(instruction, "sync", "any", "all")
    target, found = first_of(instruction.operands[0])
    read = reader(instruction.operands[1], type_)
    write = writer(target, "b32")
    write_found = writer(found, "pred") if found is not None else None

    members = reader(instruction.operands[2], "u32")

    def run(block):
        asked, value = lanes_asked(block, members), by_warp(block, read(block))
        same = (value[:, :, None] == value[:, None, :]) & asked
        if "all" not in instruction.modifiers:
            write(block, by_thread(block, bits(same)))
            return
        agree = (same | ~asked).all(2)
        write(block, by_thread(block, np.where(agree, bits(same), np.uint32(0))))
        if write_found:
            write_found(block, by_thread(block, agree))

    return whole_warp(run, instruction.operands[2])


@rule("activemask")
def _active_mask(instruction: Instruction) -> Run:
    write = writer(instruction.operands[0], known(instruction)[0])

    def run(block):
        write(block, by_thread(block, np.repeat(bits(by_warp(block, block.active))[:, None], WARP, 1)))

    return run


@rule("bar", "barrier")
def _warp_barrier(instruction: Instruction) -> Run:
    """Brings lanes together; warps are not told apart further, so it orders nothing else."""
    known(instruction, "warp", "sync")
    return whole_warp(lambda block: None, instruction.operands[0])


@rule("redux")
def _reduce(instruction: Instruction) -> Run:
    (type_,) = known(instruction, "sync", "add", "min", "max", *COMBINE)
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum}
    functions |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    function = functions[instruction.modifiers[1]]
    read, write = reader(instruction.operands[1], type_), writer(instruction.operands[0], type_)
    members = reader(instruction.operands[2], "u32")

    def run(block):
        value, asked = by_warp(block, read(block)), lanes_asked(block, members)
        result = np.zeros_like(value)
        for warp, lane in np.argwhere(asked.any(2)):
            result[warp, lane] = function.reduce(value[warp][asked[warp, lane]])
        write(block, by_thread(block, result))

    return whole_warp(run, instruction.operands[2])


@rule("ldmatrix")
def _load_matrix(instruction: Instruction) -> Run:
    known(instruction, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "cta")
    count = int(next(m for m in instruction.modifiers if m in ("x1", "x2", "x4"))[1])
    transposed = "trans" in instruction.modifiers
    addresses = Addresses(instruction.operands[1], space_of(instruction))
    writes = [writer(target, "b32") for target in registers_of(instruction.operands[0])]
    if len(writes) != count:
        raise UnknownInstruction(instruction.text)

    def run(block):
        block.require_whole_warps()
        _, address = addresses(block)
        index = block.index.reshape(-1, WARP)
        used = address.reshape(-1, WARP)[:, : 8 * count]
        agents = block.agents[index[:, : 8 * count]].reshape(-1)
        raw = block.shared.load(used.reshape(-1), 16, agents, block.launch.clocks)
        tiles = raw.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        fragments = np.ascontiguousarray(tiles).view(np.uint32).reshape(-1, count, WARP)
        for i, write in enumerate(writes):
            write(block, block.spread(fragments[:, i].reshape(-1)))

    return whole_warp(run)


SHAPES = {"m16n8k4": 4, "m16n8k8": 8, "m16n8k16": 16, "m16n8k32": 32}


@rule("mma")
def _multiply_matrices(instruction: Instruction) -> Run:
    """d[16, 8] = a[16, k] · b[k, 8] + c. Thread t holds rows t/4 and t/4 + 8 of a, column t/4 of b."""
    types = known(instruction, "sync", "aligned", *SHAPES, "row", "col", "satfinite")
    shapes = [SHAPES[m] for m in instruction.modifiers if m in SHAPES]
    if not shapes or len(types) != 4 or "col" not in instruction.modifiers:
        raise UnknownInstruction(instruction.text)
    (k,) = shapes
    result, left, right, addend = types
    each = {"tf32": 1, "f16": 2, "bf16": 2, "s8": 4, "u8": 4}.get(left)
    clamped = "satfinite" in instruction.modifiers
    if each is None or k % (4 * each) or (clamped and result != "s32"):
        raise UnknownInstruction(instruction.text)
    a, b = (_fragment(operand, type_) for operand, type_ in zip(instruction.operands[1:3], (left, right), strict=True))
    c, write = _accumulator(instruction.operands[3], addend), _result(instruction.operands[0], result)
    lane = np.arange(WARP)
    step = (lane % 4)[:, None, None] * each + np.arange(each)  # [lane, 1, each]
    register = np.arange(k // (4 * each))[None, :, None]
    column = step + register * 4 * each  # [lane, register, each]: the place along k
    wide = np.int64 if each == 4 else np.float32

    def run(block):
        block.require_whole_warps()
        warps = block.index.size // WARP
        x = np.zeros((warps, 16, k), wide)
        y = np.zeros((warps, k, 8), wide)
        fa, fb = a(block), b(block)
        rows = (lane // 4)[:, None, None]
        x[:, rows, column] = fa[:, :, 0::2].astype(wide)
        x[:, rows + 8, column] = fa[:, :, 1::2].astype(wide)
        y[:, column, rows] = fb.astype(wide)
        tile = c(block).astype(wide) + x @ y
        write(block, np.clip(tile, -(1 << 31), (1 << 31) - 1) if clamped else tile)

    return whole_warp(run)


def _fragment(operand: object, type_: str):
    """-> [warps, 32, registers, elements a register]"""
    reads = [reader(part, "b32") for part in registers_of(operand)]
    dtype = dtype_of(type_)

    def read(block):
        raw = np.stack([block.of_active(f(block)) for f in reads], axis=-1)
        if type_ == "tf32":
            raw = raw & np.uint32(0xFFFFE000)  # the product ignores the low bits
        return np.ascontiguousarray(raw).view(dtype).reshape(-1, WARP, len(reads), 4 // np.dtype(dtype).itemsize)

    return read


ROWS = np.arange(WARP)[:, None] // 4 + np.array([0, 0, 8, 8])
COLUMNS = np.arange(WARP)[:, None] % 4 * 2 + np.array([0, 1, 0, 1])


def _accumulator(operand: object, type_: str):
    """-> [warps, 16, 8]"""
    reads = [reader(part, "f16x2" if type_ == "f16" else type_) for part in registers_of(operand)]

    def read(block):
        parts = [block.of_active(f(block)) for f in reads]
        held = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1).reshape(-1, WARP, 4)
        tile = np.zeros((len(held), 16, 8), held.dtype)
        tile[:, ROWS, COLUMNS] = held
        return tile

    return read


def _result(operand: object, type_: str):
    each = 2 if type_ == "f16" else 1
    writes = [writer(part, "f16x2" if type_ == "f16" else type_) for part in registers_of(operand)]
    dtype = dtype_of(type_)

    def write_all(block, tile):
        held = tile[:, ROWS, COLUMNS].reshape(-1, 4)
        held = held.astype(np.int64).astype(dtype) if type_ == "s32" else held.astype(dtype)
        for i, write in enumerate(writes):
            write(block, block.spread(held[:, i] if each == 1 else held[:, 2 * i : 2 * i + 2]))

    return write_all
