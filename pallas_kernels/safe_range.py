"""The range of scores in which a softmax may do without its row's own maximum (FlashDecoding++, section 3)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

HEADROOM = 60.0  # exp of it times 32k slots times the largest float16 value is a finite float32


def check_range(unified_max: float | None, safe_range: tuple[float, float] | None) -> None:
    """Refuses a unified maximum that no range of scores, or one too wide, goes with.

    Raises:
      ValueError: the two do not belong together.
    """
    if unified_max is None:
        return
    if safe_range is None or safe_range[0] >= safe_range[1]:
        raise ValueError(f"unified_max needs the safe_range (lowest, highest) of the scores; got {safe_range}")
    if safe_range[1] - unified_max > HEADROOM:
        raise ValueError(
            f"safe_range may end at most {HEADROOM} above unified_max, where exp still fits float32; "
            f"got {safe_range} and {unified_max}"
        )


def least_sum(max_len: int) -> float:
    """Under it a thousandth of a denominator may have vanished: each weight under float32's least normal does."""
    return float(jnp.finfo(jnp.float32).tiny) * 1024 * max_len


def is_unsafe(scores: Array, visible: Array, unified_max: float, safe_range: tuple[float, float]) -> Array:
    """[..., rows, slots] -> [..., rows]: a score above the range, or a denominator too small for all its weights."""
    high = jnp.where(visible, scores, -jnp.inf).max(axis=-1)
    total = jnp.where(visible, jnp.exp(scores - unified_max), 0.0).sum(axis=-1)
    return visible.any(axis=-1) & ((high > safe_range[1]) | (total < least_sum(scores.shape[-1])))
