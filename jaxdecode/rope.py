"""Rotary position embedding: frequencies of every scaling rule, and tables of cos and sin."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdecode.config import RopeConfig


def rope_table(rope: RopeConfig, rotary_dim: int, positions: Array, context: Array) -> tuple[Array, Array]:
    """cos and sin of every position's angles.

    Args:
      rotary_dim: dimensions of a head that turn.
      positions: [...] int32, place of each token in its sequence.
      context: int32, broadcastable to `positions`: tokens in the sequence so far; `dynamic` and `longrope` read it.

    Returns:
      Two float32 arrays [..., rotary_dim // 2], multiplied by the attention factor.
    """
    frequencies = _FREQUENCIES[rope.kind](rope, rotary_dim, context)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def _plain(theta: float, rotary_dim: int) -> np.ndarray:
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)


def _default(rope: RopeConfig, rotary_dim: int, context: Array) -> np.ndarray:
    return _plain(rope.theta, rotary_dim)


def _linear(rope: RopeConfig, rotary_dim: int, context: Array) -> np.ndarray:
    return _plain(rope.theta, rotary_dim) / np.float32(rope.factor)


def _dynamic(rope: RopeConfig, rotary_dim: int, context: Array) -> Array:
    """Raises theta with the context once it exceeds the trained one (NTK-aware scaling): [..., rotary_dim // 2]."""
    assert rope.original_max_len is not None  # RopeConfig requires it
    context = jnp.maximum(context, rope.original_max_len).astype(jnp.float32)[..., None]
    growth = rope.factor * context / rope.original_max_len - (rope.factor - 1)
    theta = rope.theta * growth ** (rotary_dim / (rotary_dim - 2))
    return 1.0 / theta ** (np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim))


def _llama3(rope: RopeConfig, rotary_dim: int, context: Array) -> np.ndarray:
    """Keeps short wavelengths, divides long ones by the factor, blends between the two bands."""
    assert rope.original_max_len is not None
    plain = _plain(rope.theta, rotary_dim)
    rotations = rope.original_max_len * plain / (2 * math.pi)  # over the original context
    share = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = np.clip(share, 0, 1).astype(np.float32)
    return (1 - share) * plain / np.float32(rope.factor) + share * plain


def _yarn(rope: RopeConfig, rotary_dim: int, context: Array) -> np.ndarray:
    """Keeps dimensions that turn often, divides those that turn rarely, ramps linearly between (arXiv 2309.00071)."""
    original_max_len = rope.original_max_len
    assert original_max_len is not None

    def dimension(rotations: float) -> float:
        """Which pair turns this many times over the original context."""
        return rotary_dim * math.log(original_max_len / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = (np.arange(rotary_dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    stretched = np.clip(ramp, 0, 1).astype(np.float32)
    plain = _plain(rope.theta, rotary_dim)
    return plain / np.float32(rope.factor) * stretched + plain * (1 - stretched)


def _longrope(rope: RopeConfig, rotary_dim: int, context: Array) -> Array:
    """Divides each frequency by one of its two factors, by the context: [..., rotary_dim // 2] (arXiv 2402.13753)."""
    assert rope.original_max_len is not None
    sets = (np.asarray(factors, np.float32) for factors in (rope.long_factors, rope.short_factors))
    powers = np.float32(rope.theta) ** (np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim))
    long, short = (np.float32(1.0) / (factors * powers) for factors in sets)
    return jnp.where((context > rope.original_max_len)[..., None], long, short)


_FREQUENCIES = {
    "default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn,
    "longrope": _longrope,
}  # fmt: skip
