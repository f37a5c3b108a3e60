"""Bits of integers: logic, shifts, fields, bytes."""

from __future__ import annotations

import numpy as np

from ptx.parser import Instruction
from ptx.rules import Run, elementwise, rule
from ptx.values import UNSIGNED, bits_of, known


@rule("and", "or", "xor", "not", "cnot")
def _logic(instruction: Instruction) -> Run:
    (type_,) = known(instruction)
    compute = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "not": np.invert,
        "cnot": lambda x: (x == 0).astype(x.dtype),
    }[instruction.name]
    return elementwise(instruction, compute, [type_] * (len(instruction.operands) - 1), type_)


@rule("shl", "shr")
def _shift(instruction: Instruction) -> Run:
    (type_,) = known(instruction)
    bits = bits_of(type_)

    def compute(a, count):
        amount = np.minimum(count, bits - 1).astype(a.dtype)
        shifted = a << amount if instruction.name == "shl" else a >> amount
        beyond = a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" and instruction.name == "shr" else np.zeros_like(a)
        return np.where(count >= bits, beyond, shifted)

    return elementwise(instruction, compute, [type_, "u32"], type_)


@rule("shf")
def _funnel_shift(instruction: Instruction) -> Run:
    (type_,) = known(instruction, "l", "r", "wrap", "clamp")

    def compute(low, high, count):
        count = count & 31 if "wrap" in instruction.modifiers else np.minimum(count, 32)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        if "l" in instruction.modifiers:
            return (both << count.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)
        return (both >> count.astype(np.uint64)).astype(np.uint32)

    return elementwise(instruction, compute, [type_, type_, "u32"], type_)


@rule("bfe")
def _extract(instruction: Instruction) -> Run:
    (type_,) = known(instruction)
    bits = bits_of(type_)

    def compute(a, position, length):
        position, length = np.minimum(position & 255, 255), np.minimum(length & 255, 255)
        taken = np.zeros(np.broadcast_shapes(a.shape, position.shape, length.shape), np.uint64)
        wide = np.asarray(a).view(UNSIGNED[bits]).astype(np.uint64)
        sign_at = np.minimum(position + length - 1, bits - 1)
        sign = (wide >> sign_at.astype(np.uint64)) & np.uint64(1) if a.dtype.kind == "i" else np.uint64(0)
        sign = np.where(length == 0, 0, sign).astype(np.uint64)
        for i in range(bits):
            source = (wide >> np.minimum(position + i, 63).astype(np.uint64)) & np.uint64(1)
            bit = np.where((i < length) & (position + i < bits), source, sign)
            taken |= bit << np.uint64(i)
        return taken.astype(UNSIGNED[bits]).view(a.dtype)

    return elementwise(instruction, compute, [type_, "u32", "u32"], type_)


@rule("bfi")
def _insert(instruction: Instruction) -> Run:
    (type_,) = known(instruction)
    bits = bits_of(type_)

    def compute(a, b, position, length):
        position, length = (np.minimum(x & 255, bits).astype(np.uint64) for x in (position, length))
        one = np.uint64(1)
        full = np.uint64((1 << bits) - 1)
        field = np.where(length >= 64, full, (one << np.minimum(length, 63)) - one)
        mask = np.where(position >= bits, np.uint64(0), (field << np.minimum(position, 63)) & full)
        shifted = a.astype(np.uint64) << np.minimum(position, 63)
        return ((shifted & mask) | (b.astype(np.uint64) & ~mask)).astype(a.dtype)

    return elementwise(instruction, compute, [type_, type_, "u32", "u32"], type_)


@rule("brev", "clz", "popc", "bfind")
def _bits(instruction: Instruction) -> Run:
    (type_,) = known(instruction, "shiftamt")
    bits = bits_of(type_)

    def bit_list(a):
        raw = np.asarray(a).view(UNSIGNED[bits])[..., None]
        return (raw >> np.arange(bits, dtype=raw.dtype)) & raw.dtype.type(1)

    def top(a):
        return np.where(bit_list(a).any(-1), bits - 1 - bit_list(a)[..., ::-1].argmax(-1), -1)

    def find(a):
        a = np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a
        at = top(a)
        return np.where(at < 0, -1, bits - 1 - at) if "shiftamt" in instruction.modifiers else at

    if instruction.name == "brev":
        weights = np.uint64(1) << np.arange(bits, dtype=np.uint64)[::-1]
        return elementwise(
            instruction, lambda a: (bit_list(a) * weights).sum(-1, dtype=np.uint64).astype(a.dtype), [type_], type_
        )
    compute = {"clz": lambda a: bits - 1 - top(a), "popc": lambda a: bit_list(a).sum(-1), "bfind": find}
    counted = compute[instruction.name]
    return elementwise(instruction, lambda a: counted(a).astype(np.int32).view(np.uint32), [type_], "u32")


@rule("prmt")
def _permute(instruction: Instruction) -> Run:
    (type_,) = known(instruction)

    def compute(a, b, selector):
        a, b, selector = np.broadcast_arrays(a, b, selector)
        choice = np.concatenate([np.ascontiguousarray(x).view(np.uint8).reshape(*a.shape, 4) for x in (a, b)], axis=-1)
        nibbles = (selector[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
        taken = np.take_along_axis(choice, (nibbles & np.uint32(7)).astype(np.int64), -1)
        taken = np.where(nibbles & np.uint32(8), (taken.view(np.int8) >> 7).view(np.uint8), taken)
        return np.ascontiguousarray(taken).view(np.uint32)[..., 0]

    return elementwise(instruction, compute, [type_, type_, "u32"], type_)


@rule("lop3")
def _three_way_logic(instruction: Instruction) -> Run:
    (type_,) = known(instruction)
    table = instruction.operands[4].value

    def compute(a, b, c, _):
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
        for i in range(8):
            if table >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return elementwise(instruction, compute, [type_, type_, type_, "u32"], type_)


@rule("sad")
def _sum_of_difference(instruction: Instruction) -> Run:
    (type_,) = known(instruction)

    def compute(a, b, c):
        return c + np.where(a < b, b - a, a - b).astype(c.dtype)

    return elementwise(instruction, compute, [type_, type_, type_], type_)


@rule("dp4a")
def _dot_of_bytes(instruction: Instruction) -> Run:
    first, second = known(instruction)
    result = "s32" if "s32" in (first, second) else "u32"

    def compute(a, b, c):
        a, b, c = np.broadcast_arrays(a, b, c)
        signs = (np.int8 if type_ == "s32" else np.uint8 for type_ in (first, second))
        x, y = (np.ascontiguousarray(v).view(t).reshape(-1, 4) for v, t in zip((a, b), signs, strict=True))
        return ((x.astype(np.int64) * y).sum(-1) + c).astype(np.uint32 if result == "u32" else np.int32)

    return elementwise(instruction, compute, [first, second, result], result)
