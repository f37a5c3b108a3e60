"""Arithmetic: what each thread computes from its own registers."""

from __future__ import annotations

import operator
from collections.abc import Callable

import ml_dtypes
import numpy as np

from ptx.faults import UnknownInstruction
from ptx.parser import Instruction, Vector
from ptx.values import (
    PACKED,
    SIGNED,
    UNSIGNED,
    WINDOW,
    bits_of,
    dtype_of,
    first_of,
    is_float,
    known,
    reader,
    writer,
)

Run = Callable[..., None]
RULES: dict[str, Callable[[Instruction], Run]] = {}

ROUNDING = ("rn", "rz", "rm", "rp", "ftz", "sat", "approx", "full", "relu")


def rule(*names: str):
    """Registers how instructions of these names are turned into functions of the block."""

    def register(build):
        RULES.update(dict.fromkeys(names, build))
        return build

    return register


def elementwise(instruction: Instruction, compute: Callable, types: list[str], result: str) -> Run:
    """d = compute(a, b, …), the operands read as `types`."""
    reads = [reader(operand, type_) for operand, type_ in zip(instruction.operands[1:], types, strict=True)]
    write = writer(instruction.operands[0], result)

    def run(block):
        write(block, compute(*[read(block) for read in reads]))

    return run


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers become zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def round_to(x: np.ndarray, target: type, mode: str) -> np.ndarray:
    """float64 `x` in a narrower float type, rounded as `.rn .rz .rm .rp` say."""
    near = x.astype(target)
    if mode == "rn" or target is np.float64:
        return near
    exact = near.astype(np.float64)
    down, up = exact > x, exact < x  # the nearest lies above or below
    step_down = down & ((mode == "rm") | ((mode == "rz") & (x > 0)))
    step_up = up & ((mode == "rp") | ((mode == "rz") & (x < 0)))
    below, above = _neighbours(near)
    return np.where(step_down, below, np.where(step_up, above, near))


def _neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x.dtype == ml_dtypes.bfloat16:
        infinity = np.asarray(np.inf, x.dtype)
        return np.nextafter(x, -infinity), np.nextafter(x, infinity)
    return np.nextafter(x, x.dtype.type(-np.inf)), np.nextafter(x, x.dtype.type(np.inf))


def finish(compute: Callable, instruction: Instruction, type_: str) -> Callable:
    """`compute` in float64 for the rounding modes and half types, with .ftz, .sat and .relu around it."""
    target = dtype_of(type_)
    mode = next((m for m in instruction.modifiers if m in ("rz", "rm", "rp")), "rn")
    widen = mode != "rn" or target not in (np.float32, np.float64) or instruction.name == "fma"
    ftz = "ftz" in instruction.modifiers and target is np.float32

    def run(*operands):
        if ftz:
            operands = [flush(x) for x in operands]
        result = compute(*[x.astype(np.float64) for x in operands]) if widen else compute(*operands)
        result = round_to(np.asarray(result, np.float64), target, mode) if widen else np.asarray(result, target)
        if ftz:
            result = flush(result)
        if "sat" in instruction.modifiers:
            result = np.where(np.isnan(result), 0, np.clip(result, 0, 1)).astype(target)
        if "relu" in instruction.modifiers:
            result = np.where(result < 0, 0, result).astype(target)
        return result

    return run


def int_divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounds towards zero; a division by zero gives all ones, as the hardware does."""
    safe = np.where(b == 0, np.ones_like(b), b)
    quotient = a // safe
    if quotient.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != a)).astype(quotient.dtype)
    return np.where(b == 0, ~np.zeros_like(quotient), quotient)


BINARY = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}


@rule("add", "sub", "mul", "div")
def _binary(instruction: Instruction) -> Run:
    types = known(instruction, *ROUNDING, "lo", "hi", "wide", "cc")
    type_ = types[-1]
    if is_float(type_):
        compute = finish(BINARY[instruction.name], instruction, type_)
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
    type_ = f"u{bits_of(known(instruction, 'cc', 'lo', 'hi')[-1])}"
    reads = [reader(operand, type_) for operand in instruction.operands[1:]]
    write = writer(instruction.operands[0], type_)
    carry_in = instruction.name.endswith("c")
    minus = instruction.name.startswith("sub")
    multiply = multiply_high if "hi" in instruction.modifiers else operator.mul

    def run(block):
        *factors, b = [read(block) for read in reads]
        a = multiply(*factors) if len(factors) == 2 else factors[0]
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
        # The product of two floats is exact in float64 and the sum rounded once more; float64 itself uses long double.
        def compute(a, b, c):
            if type_ == "f64":
                return (np.asarray(a, np.longdouble) * b + c).astype(np.float64)
            return a * b + c

        return elementwise(instruction, finish(compute, instruction, type_), [type_] * 3, type_)
    multiply, _, result = _int_multiply(instruction, type_)
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
    compute = {"abs": np.abs, "neg": np.negative, "min": smallest, "max": largest}[instruction.name]
    if is_float(type_):
        compute = _exact_float(compute, instruction)
    return elementwise(instruction, compute, [type_] * (len(instruction.operands) - 1), type_)


def _exact_float(compute: Callable, instruction: Instruction) -> Callable:
    def run(*operands):
        if "ftz" in instruction.modifiers and operands[0].dtype == np.float32:
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


COMPARE = {"eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge"}
COMPARE |= {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}


def comparison(name: str, floats: bool) -> Callable:
    """PTX's comparisons: the ordered ones are false where an operand is NaN, the unordered ones true."""
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    compare = getattr(operator, (COMPARE | UNORDERED)[name])
    if not floats:
        return compare
    if name in UNORDERED:
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))


COMPARISONS = (*COMPARE, *UNORDERED, "num", "nan")
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@rule("setp", "set")
def _compare(instruction: Instruction) -> Run:
    types = known(instruction, *COMPARISONS, *COMBINE, "ftz")
    type_ = types[-1]
    compare = comparison(next(m for m in instruction.modifiers if m in COMPARISONS), is_float(type_))
    combine = next((COMBINE[m] for m in instruction.modifiers if m in COMBINE), None)
    first, second = (reader(operand, type_) for operand in instruction.operands[1:3])
    third = reader(instruction.operands[3], "pred") if combine else None
    ftz = "ftz" in instruction.modifiers and type_ == "f32"

    def test(block):
        a, b = first(block), second(block)
        result = compare(flush(a), flush(b)) if ftz else compare(a, b)
        return result, (combine(result, third(block)) if combine else result)

    if instruction.name == "set":
        return _set_value(instruction, types[0], test)
    target, other = first_of(instruction.operands[0])
    write = writer(target, "pred")
    write_other = writer(other, "pred") if other is not None else None

    def run(block):
        plain, result = test(block)
        if type_ in PACKED:  # p and q are the two halves'
            write(block, result[..., 0])
            write_other(block, result[..., 1])
            return
        write(block, result)
        if write_other:
            write_other(block, combine(~plain, third(block)) if combine else ~plain)

    return run


def _set_value(instruction: Instruction, result: str, test: Callable) -> Run:
    write = writer(instruction.operands[0], result)
    target = dtype_of(result)
    true = np.asarray(1, target) if is_float(result) else np.asarray(~np.zeros((), target))
    return lambda block: write(block, np.where(test(block)[1], true, np.zeros((), target)))


@rule("selp")
def _select(instruction: Instruction) -> Run:
    (type_,) = known(instruction)
    return elementwise(instruction, lambda a, b, p: np.where(p, a, b), [type_, type_, "pred"], type_)


@rule("slct")
def _select_by_sign(instruction: Instruction) -> Run:
    result, test = known(instruction, "ftz")
    return elementwise(instruction, lambda a, b, c: np.where(c >= 0, a, b), [result, result, test], result)


@rule("testp")
def _classify(instruction: Instruction) -> Run:
    kinds = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "notanumber": np.isnan,
        "number": lambda x: ~np.isnan(x),
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny),
    }
    (type_,) = known(instruction, *kinds)
    return elementwise(instruction, kinds[instruction.modifiers[0]], [type_], "pred")


@rule("copysign")
def _copy_sign(instruction: Instruction) -> Run:
    (type_,) = known(instruction)
    return elementwise(instruction, lambda sign, value: np.copysign(value, sign), [type_, type_], type_)


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
        to_int = next((TO_INT[m] for m in modes if m in TO_INT), None)
        return finish(to_int or (lambda x: x), _Widened(instruction, modes), result)
    if is_float(result):
        mode = next((m for m in modes if m in ("rz", "rm", "rp")), "rn")
        # 64-bit integers are not exact in float64: numpy's own conversion rounds once.
        return lambda x: x.astype(target) if mode == "rn" else round_to(x.astype(np.float64), target, mode)
    low, high = np.iinfo(target).min, np.iinfo(target).max
    if is_float(source):
        to_int = next(TO_INT[m] for m in modes if m in TO_INT)

        def from_float(x):
            x = flush(x) if "ftz" in modes and source == "f32" else x
            whole = to_int(x.astype(np.float64))
            inside = (whole >= low) & (whole <= high) & (whole < float(high) + 1)
            clamped = np.where(whole > 0, high, low).astype(target)
            return np.where(np.isnan(whole), target(0), np.where(inside, np.where(inside, whole, 0).astype(target), clamped))

        return from_float
    if "sat" in modes:
        return lambda x: np.clip(x, max(low, np.iinfo(x.dtype).min), min(high, np.iinfo(x.dtype).max)).astype(target)
    return lambda x: x.astype(target)


class _Widened:
    """An instruction seen as an fma: computed in float64 and rounded once."""

    name = "fma"

    def __init__(self, instruction: Instruction, modifiers: tuple[str, ...]) -> None:
        self.modifiers, self.text = modifiers, instruction.text


def _to_tf32(x: np.ndarray) -> np.ndarray:
    """Ten bits of mantissa, ties away from zero."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits).view(np.float32)
