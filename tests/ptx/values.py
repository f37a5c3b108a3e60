"""Operands as numpy arrays: a register is one unsigned integer a thread, read as the type an instruction names.

The arrays in `block.registers` are never changed in place, so that one may stand in several registers.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from ptx.faults import UnknownInstruction
from ptx.parser import BITS, Immediate, Instruction, Pair, Register, Symbol, Vector

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64, "tf32": np.float32}
PACKED = {"f16x2": np.float16, "bf16x2": ml_dtypes.bfloat16}
# Where each memory lies among the generic addresses.
WINDOW = {"local": 0x4000_0000_0000, "param": 0x5000_0000_0000}
WINDOW |= {"shared": 0x6000_0000_0000, "global": 0x7000_0000_0000}

Reader = Callable[..., np.ndarray]
Writer = Callable[..., None]


def dtype_of(name: str) -> type:
    """PTX type -> numpy scalar type; packed halves give that of one half."""
    if name in FLOATS:
        return FLOATS[name]
    if name in PACKED:
        return PACKED[name]
    if name not in BITS:
        raise UnknownInstruction(f"unknown type .{name}")
    return SIGNED[BITS[name]] if name[0] == "s" else UNSIGNED[BITS[name]]


def is_float(name: str) -> bool:
    return name in FLOATS or name in PACKED


def bits_of(name: str) -> int:
    return 32 if name == "tf32" else BITS[name]


def is_type(modifier: str) -> bool:
    return modifier in BITS or modifier == "tf32"


def reader(operand: object, type_: str) -> Reader:
    """A function of the block that gives the operand's value as `type_`: [threads], packed halves [threads, 2]."""
    if isinstance(operand, Register):
        return _register_reader(operand, type_)
    if isinstance(operand, Immediate):
        value = _immediate(operand, type_)
        return lambda block: value
    if isinstance(operand, Symbol):
        convert = dtype_of(type_)
        name = operand.name
        return lambda block: np.asarray(block.symbol(name)).astype(convert)
    raise UnknownInstruction(f"operand {operand} where a value was expected")


def _register_reader(register: Register, type_: str) -> Reader:
    index, bits, negated = register.index, register.bits, register.negated
    target = dtype_of(type_)
    if bits == 1:
        if negated:
            return lambda block: ~block.registers[index]
        return lambda block: block.registers[index]
    if type_ in PACKED:
        return lambda block: np.ascontiguousarray(block.registers[index]).view(target).reshape(-1, 2)
    if bits_of(type_) == bits:
        return lambda block: block.registers[index].view(target)
    if bits_of(type_) > bits:
        raise UnknownInstruction(f"a {bits}-bit register read as .{type_}")
    narrow = UNSIGNED[bits_of(type_)]
    return lambda block: block.registers[index].astype(narrow).view(target)


def _immediate(operand: Immediate, type_: str) -> np.ndarray:
    target = dtype_of(type_)
    if operand.float_bits:
        as_float = np.uint32(operand.value).view(np.float32) if operand.float_bits == 32 else None
        exact = np.float64(as_float) if as_float is not None else np.uint64(operand.value).view(np.float64)
        if is_float(type_):
            return np.asarray(exact).astype(target)
        if bits_of(type_) == operand.float_bits:
            return np.asarray(operand.value, UNSIGNED[operand.float_bits])
        raise UnknownInstruction(f"a float constant read as .{type_}")
    if type_ in PACKED:
        return np.asarray([operand.value & 0xFFFF, operand.value >> 16], np.uint16).view(target)
    if is_float(type_):  # the bits of a half: 0x3C00
        return np.asarray(operand.value, UNSIGNED[bits_of(type_)]).view(target)
    if type_ == "pred":
        return np.asarray(bool(operand.value))
    wrapped = operand.value % (1 << bits_of(type_))
    return np.asarray(wrapped, UNSIGNED[bits_of(type_)]).view(target)


def writer(operand: object, type_: str) -> Writer:
    """A function (block, value of `type_`) that sets the operand in the active threads.

    A register wider than the type gets it sign- or zero-extended, as PTX does for loads and conversions.
    """
    if isinstance(operand, Symbol) and operand.name == "_":
        return lambda block, value: None
    if not isinstance(operand, Register):
        raise UnknownInstruction(f"operand {operand} where a register was expected")
    index, bits = operand.index, operand.bits
    if bits == 1:
        return lambda block, value: block.set(index, np.broadcast_to(value, block.threads))
    target = UNSIGNED[bits]
    source = dtype_of(type_)
    if type_ in PACKED:

        def set_packed(block, value):
            block.set(index, np.ascontiguousarray(np.broadcast_to(value, (block.threads, 2))).view(target)[:, 0])

        return set_packed
    if bits_of(type_) > bits:
        raise UnknownInstruction(f"a .{type_} result for a {bits}-bit register")
    narrow = UNSIGNED[bits_of(type_)] if source not in SIGNED.values() else SIGNED[bits]

    def set_bits(block, value):
        value = np.asarray(value, source)
        if bits_of(type_) != bits:
            value = (value.view(narrow) if source not in SIGNED.values() else value.astype(narrow)).astype(target)
        else:
            value = value.view(target)
        block.set(index, np.broadcast_to(value, block.threads))

    return set_bits


def registers_of(operand: object) -> tuple:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def first_of(operand: object) -> tuple:
    """`a|b` -> (a, b), anything else -> (it, None)."""
    return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)


def known(instruction: Instruction, *allowed: str) -> list[str]:
    """The types among the modifiers, in order.

    Raises:
      UnknownInstruction: a modifier that is neither a type nor one of `allowed`.
    """
    for modifier in instruction.modifiers:
        if modifier not in allowed and not is_type(modifier):
            raise UnknownInstruction(f".{modifier} of `{instruction.text}`")
    return [modifier for modifier in instruction.modifiers if is_type(modifier)]
