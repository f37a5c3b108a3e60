"""Floats as PTX rounds them."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from ptx.parser import Instruction
from ptx.values import dtype_of

ROUNDING = ("rn", "rz", "rm", "rp", "ftz", "sat", "approx", "full", "relu")


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
