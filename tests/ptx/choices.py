"""Comparisons, and choices by their results."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from ptx.parser import Instruction
from ptx.rounding import flush
from ptx.rules import Run, elementwise, rule
from ptx.values import PACKED, dtype_of, first_of, is_float, known, reader, writer

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
    ftz = "ftz" in instruction.modifiers

    def test(block):
        a, b = first(block), second(block)
        result = compare(flush(a), flush(b)) if ftz else compare(a, b)
        if not combine:
            return result, result, ~result
        other = third(block)[..., None] if type_ in PACKED else third(block)
        return result, combine(result, other), combine(~result, other)

    if instruction.name == "set":
        return _set_value(instruction, types[0], test)
    target, other = first_of(instruction.operands[0])
    write = writer(target, "pred")
    write_other = writer(other, "pred") if other is not None else None

    def run(block):
        _, result, opposite = test(block)
        if type_ in PACKED:  # p and q are the two halves'
            write(block, result[..., 0])
            write_other(block, result[..., 1])
            return
        write(block, result)
        if write_other:
            write_other(block, opposite)

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
    clean = flush if "ftz" in instruction.modifiers else lambda c: c
    return elementwise(instruction, lambda a, b, c: np.where(clean(c) >= 0, a, b), [result, result, test], result)


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
