"""Moves and conversions between registers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.faults import UnknownInstruction
from ptx.parser import Instruction, Vector
from ptx.rounding import DIRECTED, ROUNDING, finish, flush, round_to
from ptx.rules import Run, elementwise, rule
from ptx.values import PACKED, UNSIGNED, WINDOW, bits_of, dtype_of, is_float, known, reader, writer


@rule("mov")
def _move(instruction: Instruction) -> Run:
    (type_,) = known(instruction)
    target, source = instruction.operands
    if isinstance(source, Vector):
        return _pack(target, source.parts, bits_of(type_))
    if isinstance(target, Vector):
        return _unpack(target.parts, source, bits_of(type_))
    return elementwise(instruction, lambda x: x, [type_], type_)


def _pack(target: object, parts: tuple, bits: int) -> Run:
    width = bits // len(parts)
    reads = [reader(part, f"b{width}") for part in parts]
    write = writer(target, f"b{bits}")
    wide = UNSIGNED[bits]

    def run(block):
        result = wide(0)
        for i, read in enumerate(reads):
            result = result | read(block).astype(wide) << wide(width * i)
        write(block, result)

    return run


def _unpack(parts: tuple, source: object, bits: int) -> Run:
    width = bits // len(parts)
    read = reader(source, f"b{bits}")
    writes = [writer(part, f"b{width}") for part in parts]

    def run(block):
        value = read(block)
        for i, write in enumerate(writes):
            write(block, (value >> value.dtype.type(width * i)).astype(UNSIGNED[width]))

    return run


@rule("cvta")
def _convert_address(instruction: Instruction) -> Run:
    """Shared and local addresses count from zero in their own space; all others are generic already."""
    known(instruction, "to", "global", "shared", "const", "param", "local", "cta")
    space = next(m for m in instruction.modifiers if m in ("global", "shared", "const", "param", "local"))
    offset = np.uint64(WINDOW[space] if space in ("shared", "local") else 0)
    if "to" in instruction.modifiers:
        return elementwise(instruction, lambda x: x - offset, ["u64"], "u64")
    return elementwise(instruction, lambda x: x + offset, ["u64"], "u64")


TO_INT = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@rule("cvt")
def _convert(instruction: Instruction) -> Run:
    types = known(instruction, *ROUNDING, *TO_INT, "rna", "satfinite")
    result, source = types
    if "satfinite" in instruction.modifiers and is_float(result):
        raise UnknownInstruction(instruction.text)
    if result in PACKED:
        half = result[:-2]
        convert = _conversion(instruction, half, source)
        return elementwise(
            instruction,
            lambda high, low: np.stack(np.broadcast_arrays(convert(low), convert(high)), axis=-1),
            [source, source],
            result,
        )
    return elementwise(instruction, _conversion(instruction, result, source), [source], result)


def _conversion(instruction: Instruction, result: str, source: str) -> Callable:
    modes = instruction.modifiers
    target = dtype_of(result)
    if result == "tf32":
        return _to_tf32
    if is_float(result) and is_float(source):
        to_int = next((TO_INT[m] for m in modes if m in TO_INT), lambda x: x)
        narrow = finish(to_int, instruction, result, exact=result != "f64")
        return (lambda x: narrow(flush(x))) if "ftz" in modes else narrow
    if is_float(result):
        mode = next((m for m in modes if m in DIRECTED), "rn")
        if mode != "rn" and bits_of(source) == 64:  # not exact in float64
            raise UnknownInstruction(instruction.text)
        return lambda x: x.astype(target) if mode == "rn" else round_to(x.astype(np.float64), target, mode)
    low, high = np.iinfo(target).min, np.iinfo(target).max
    if is_float(source):
        wide = bits_of(result) == 64 or source == "f64"
        nan = np.asarray(1 << (bits_of(result) - 1) if wide else 0, UNSIGNED[bits_of(result)]).view(target)
        to_int = next(TO_INT[m] for m in modes if m in TO_INT)

        def from_float(x):
            x = flush(x) if "ftz" in modes else x
            whole = to_int(x.astype(np.float64))
            inside = (whole >= low) & (whole <= high) & (whole < float(high) + 1)
            clamped = np.where(whole > 0, target(high), target(low))
            result = np.where(inside, np.where(inside, whole, 0).astype(target), clamped)
            return np.where(np.isnan(whole), nan, result)

        return from_float
    if "sat" in modes:
        return lambda x: np.clip(x, max(low, np.iinfo(x.dtype).min), min(high, np.iinfo(x.dtype).max)).astype(target)
    return lambda x: x.astype(target)


def _to_tf32(x: np.ndarray) -> np.ndarray:
    """Ten bits of mantissa, ties away from zero."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits).view(np.float32)
