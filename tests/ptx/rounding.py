"""Floats as PTX rounds them."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from ptx.faults import UnknownInstruction
from ptx.parser import Instruction
from ptx.values import dtype_of

ROUNDING = ("rn", "rz", "rm", "rp", "ftz", "sat", "approx", "full", "relu")
DIRECTED = ("rz", "rm", "rp")


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 and float16 numbers become zeros of their sign."""
    if x.dtype not in (np.float32, np.float16):
        return x
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def to_odd(x: np.ndarray, error: np.ndarray) -> np.ndarray:
    """x + error, which x is the nearest number to, rounded so that rounding it once more to fewer bits is right.

    Of the two numbers around an inexact result the one with an odd last bit is taken.
    """
    bits = x.view(np.uint64 if x.dtype == np.float64 else np.uint32)
    even = (bits & bits.dtype.type(1)) == 0
    towards = np.where(error > 0, np.inf, -np.inf).astype(x.dtype)
    return np.where(even & (error != 0) & np.isfinite(x), np.nextafter(x, towards), x)


def add_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    return to_odd(np.asarray(total), np.where(np.isfinite(total), error, 0))


def nearest(x: np.ndarray, target: type) -> np.ndarray:
    """float64 -> a narrower type, rounded once; bfloat16's own conversion goes through float32."""
    if target is not ml_dtypes.bfloat16:
        return x.astype(target)
    single = x.astype(np.float32)
    return to_odd(single, np.where(np.isfinite(x), x - single, 0)).astype(target)


def round_to(x: np.ndarray, target: type, mode: str) -> np.ndarray:
    """float64 `x` in a narrower float type, rounded as `.rn .rz .rm .rp` say."""
    near = nearest(x, target)
    if mode == "rn":
        return near
    exact = near.astype(np.float64)
    down = (exact > x) & ((mode == "rm") | ((mode == "rz") & (x > 0)))
    up = (exact < x) & ((mode == "rp") | ((mode == "rz") & (x < 0)))
    infinity = np.asarray(np.inf, near.dtype)
    return np.where(down, np.nextafter(near, -infinity), np.where(up, np.nextafter(near, infinity), near))


def finish(compute: Callable, instruction: Instruction, type_: str, exact: bool = False) -> Callable:
    """`compute` in float64 for the rounding modes and half types, with .ftz, .sat and .relu around it.

    Args:
      exact: `compute` in float64 is exact or rounded to odd, so that any rounding may follow.

    Raises:
      UnknownInstruction: a directed rounding of what is not.
    """
    target = dtype_of(type_)
    mode = next((m for m in instruction.modifiers if m in DIRECTED), "rn")
    if mode != "rn" and (not exact or target is np.float64):
        raise UnknownInstruction(instruction.text)
    widen = target is not np.float64 and (mode != "rn" or target is not np.float32 or exact)
    ftz = "ftz" in instruction.modifiers

    def run(*operands):
        if ftz:
            operands = [flush(x) for x in operands]
        if widen:
            result = round_to(np.asarray(compute(*[x.astype(np.float64) for x in operands])), target, mode)
        else:
            result = np.asarray(compute(*operands), target)
        if ftz:
            result = flush(result)
        if "sat" in instruction.modifiers:
            result = np.where((result > 0) & ~np.isnan(result), np.minimum(result, target(1)), target(0))
        if "relu" in instruction.modifiers:
            result = np.where(result < 0, target(0), result)
        return result

    return run
