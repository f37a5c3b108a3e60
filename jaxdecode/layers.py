"""The parts of a decoder layer as Flax NNX modules.

Weights are stored [out, in], as checkpoints hold them. A layer knows nothing of caches: whoever runs it passes
`attend(query, key, value) -> out`, which stores the new keys and values and looks back over the old ones.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdecode.config import ModelConfig
from jaxdecode.rope import apply_rope
from pallas_kernels.flat_gemm import gated_linear, linear

Attend = Callable[[Array, Array, Array], Array]
Rope = tuple[Array, Array]  # cos and sin, each [..., head_dim // 2]


class Linear(nnx.Module):
    """y = x @ weight.T + bias."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool, dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(_scaled_normal(rngs, (out_dim, in_dim), dtype))
        self.bias = nnx.Param(jnp.zeros(out_dim, dtype)) if bias else None

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        return linear(x, self.weight.get_value(), _value(self.bias), residual=residual)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, float32 inside."""

    def __init__(self, dim: int, eps: float, *, dtype):
        self.weight = nnx.Param(jnp.ones(dim, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide / jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.weight.get_value()


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; q, k and v come from one product."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = Linear(config.embed_dim, heads * config.head_dim, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.out = Linear(
            config.num_heads * config.head_dim, config.embed_dim, bias=config.out_bias, dtype=dtype, rngs=rngs
        )
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, dtype=dtype) if config.qk_norm else None
        self.config = config

    def __call__(self, x: Array, residual: Array, rope: Rope, attend: Attend) -> Array:
        num_heads, num_kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = self.qkv(x).reshape(*x.shape[:-1], -1, self.config.head_dim)
        query, key, value = jnp.split(qkv, [num_heads, num_heads + num_kv_heads], axis=-2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        out = attend(apply_rope(query, *rope), apply_rope(key, *rope), value)
        return self.out(out.reshape(*x.shape[:-1], -1), residual)


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)); gate and up are one product."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        embed_dim, mlp_dim, bias = config.embed_dim, config.mlp_dim, config.mlp_bias
        self.gate_up = Linear(embed_dim, 2 * mlp_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(mlp_dim, embed_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Array, residual: Array) -> Array:
        weight, bias = self.gate_up.weight.get_value(), _value(self.gate_up.bias)
        return self.down(gated_linear(x, weight, bias, activation=self.activation), residual)


class DecoderLayer(nnx.Module):
    """Pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, rope: Rope, attend: Attend) -> Array:
        """Runs the layer on x [..., embed_dim]; the leading axes are whatever `attend` understands."""
        x = self.attention(self.attention_norm(x), x, rope, attend)
        return self.mlp(self.mlp_norm(x), x)


def _value(param: nnx.Param | None) -> Array | None:
    return None if param is None else param.get_value()


def _scaled_normal(rngs: nnx.Rngs, shape: tuple[int, int], dtype) -> Array:
    """Random weights that keep the size of activations: standard deviation in_dim ** -0.5."""
    return nnx.initializers.normal(shape[1] ** -0.5)(rngs.params(), shape, dtype)
