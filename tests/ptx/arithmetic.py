"""Arithmetic: what each thread computes from its own registers."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from ptx.parser import Instruction
from ptx.rounding import DIRECTED, ROUNDING, add_to_odd, finish, flush
from ptx.rules import Run, elementwise, rule
from ptx.values import SIGNED, UNSIGNED, bits_of, dtype_of, is_float, known, reader, writer


def int_divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounds towards zero; a division by zero gives all ones, as the hardware does."""
    safe = np.where(b == 0, np.ones_like(b), b)
    quotient = a // safe
    if quotient.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != a)).astype(quotient.dtype)
    return np.where(b == 0, ~np.zeros_like(quotient), quotient)


# In float64 the product of two narrower floats is exact, and a sum is rounded so that rounding it again does no harm.
WIDE = {"add": add_to_odd, "sub": lambda a, b: add_to_odd(a, -b), "mul": operator.mul}
BINARY = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}


@rule("add", "sub", "mul", "div")
def _binary(instruction: Instruction) -> Run:
    types = known(instruction, *ROUNDING, "lo", "hi", "wide", "cc")
    type_ = types[-1]
    if is_float(type_):
        directed = any(m in DIRECTED for m in instruction.modifiers)
        exact = instruction.name != "div" and type_ != "f64" and (type_ != "f32" or directed)
        compute = finish(WIDE[instruction.name] if exact else BINARY[instruction.name], instruction, type_, exact)
        return elementwise(instruction, compute, [type_, type_], type_)
    if "cc" in instruction.modifiers:
        return _with_carry(instruction)
    if instruction.name == "mul":
        return elementwise(instruction, *_int_multiply(instruction, type_))
    if "sat" in instruction.modifiers:
        wide = {"add": operator.add, "sub": operator.sub}[instruction.name]
        low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
        return elementwise(
            instruction, lambda a, b: np.clip(wide(a.astype(np.int64), b), low, high), [type_, type_], type_
        )
    compute = int_divide if instruction.name == "div" else BINARY[instruction.name]
    return elementwise(instruction, compute, [type_, type_], type_)


def _int_multiply(instruction: Instruction, type_: str) -> tuple[Callable, list[str], str]:
    if "wide" in instruction.modifiers:
        wide = type_[0] + str(2 * bits_of(type_))
        target = dtype_of(wide)
        return lambda a, b: a.astype(target) * b.astype(target), [type_, type_], wide
    if "hi" in instruction.modifiers:
        return multiply_high, [type_, type_], type_
    return operator.mul, [type_, type_], type_


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * bits]
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = np.asarray(a).view(np.uint64), np.asarray(b).view(np.uint64)
    low = (x & mask) * (y & mask)
    mid = (x >> half) * (y & mask) + (low >> half)
    cross = (x & mask) * (y >> half) + (mid & mask)
    high = (x >> half) * (y >> half) + (mid >> half) + (cross >> half)
    if a.dtype.kind == "i":
        zero = np.uint64(0)
        high = high - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)
    return high.view(a.dtype)


@rule("addc", "subc", "madc")
def _with_carry(instruction: Instruction) -> Run:
    """Sums of long numbers: `.cc` leaves the carry in the thread's condition code, the c of the name adds it."""
    named = known(instruction, "cc", "lo", "hi")[-1]
    type_ = f"u{bits_of(named)}"
    *factors, _ = operands = instruction.operands[1:]
    multiplies = len(operands) == 3
    reads = [reader(operand, named if multiplies else type_) for operand in factors] + [reader(operands[-1], type_)]
    write = writer(instruction.operands[0], type_)
    carry_in = instruction.name.endswith("c")
    minus = instruction.name.startswith("sub")
    multiply = multiply_high if "hi" in instruction.modifiers else operator.mul

    def run(block):
        *factors, b = [read(block) for read in reads]
        a = np.asarray(multiply(*factors)).view(b.dtype) if multiplies else factors[0]
        carry = block.carry.astype(b.dtype) if carry_in else np.zeros_like(b)
        if minus:
            result, out = a - b - carry, (a < b) | ((a == b) & (carry == 1))
        else:
            result, out = a + b + carry, (a + b < a) | (a + b + carry < carry)
        write(block, result)
        if "cc" in instruction.modifiers:
            block.carry = np.where(block.active, out, block.carry)

    return run


@rule("mad", "fma")
def _multiply_add(instruction: Instruction) -> Run:
    types = known(instruction, *ROUNDING, "lo", "hi", "wide", "cc")
    type_ = types[-1]
    if "cc" in instruction.modifiers:
        return _with_carry(instruction)
    if is_float(type_):
        if type_ == "f64":
            compute = finish(lambda a, b, c: np.asarray(a, np.longdouble) * b + c, instruction, type_)
        else:
            compute = finish(lambda a, b, c: add_to_odd(a * b, c), instruction, type_, exact=True)
        return elementwise(instruction, compute, [type_] * 3, type_)
    multiply, _, result = _int_multiply(instruction, type_)
    if "sat" in instruction.modifiers:  # mad.hi.sat.s32
        low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
        return elementwise(
            instruction,
            lambda a, b, c: np.clip(multiply(a, b).astype(np.int64) + c, low, high),
            [type_, type_, result],
            result,
        )
    return elementwise(instruction, lambda a, b, c: multiply(a, b) + c, [type_, type_, result], result)


@rule("rem")
def _remainder(instruction: Instruction) -> Run:
    (type_,) = known(instruction)
    return elementwise(instruction, lambda a, b: a - int_divide(a, b) * b, [type_, type_], type_)


@rule("abs", "neg", "min", "max")
def _sign_and_order(instruction: Instruction) -> Run:
    (type_,) = known(instruction, "ftz", "NaN", "relu")
    nan = "NaN" in instruction.modifiers
    smallest, largest = (np.minimum, np.maximum) if nan or not is_float(type_) else (np.fmin, np.fmax)
    if is_float(type_):
        smallest, largest = _zeros_in_order(smallest, 1), _zeros_in_order(largest, 0)
    compute = {"abs": np.abs, "neg": np.negative, "min": smallest, "max": largest}[instruction.name]
    if is_float(type_):
        compute = _exact_float(compute, instruction)
    return elementwise(instruction, compute, [type_] * (len(instruction.operands) - 1), type_)


def _zeros_in_order(choose: Callable, first_if: int) -> Callable:
    """-0 lies below +0: of two equal numbers the first is taken if its sign bit is `first_if`."""

    def run(a, b):
        return np.where(a == b, np.where(np.signbit(a) == first_if, a, b), choose(a, b))

    return run


def _exact_float(compute: Callable, instruction: Instruction) -> Callable:
    def run(*operands):
        if "ftz" in instruction.modifiers:
            operands = [flush(x) for x in operands]
        result = compute(*operands)
        return np.where(result < 0, np.zeros_like(result), result) if "relu" in instruction.modifiers else result

    return run


FUNCTIONS = {
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@rule(*FUNCTIONS)
def _function(instruction: Instruction) -> Run:
    """The approximate forms give the correctly rounded value, which is within their error bounds."""
    (type_,) = known(instruction, *ROUNDING)
    exact = FUNCTIONS[instruction.name]
    compute = finish(lambda x: exact(x.astype(np.float64)).astype(x.dtype), instruction, type_)
    return elementwise(instruction, compute, [type_], type_)
