"""The parts of a decoder layer as Flax NNX modules.

Weights are stored [out, in], as checkpoints hold them. A layer knows nothing of caches: whoever runs it passes
`attend(x, projection) -> out`, which makes queries, keys and values of x, stores what is new and looks back over what
is old; and `kernels`, which says how the products run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdecode.config import ModelConfig
from pallas_kernels.flat_gemm import gated_linear, linear
from pallas_kernels.norm import Norm, normalize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """How the operations of one pass run.

    Attributes:
      implementation: forces one, see `pallas_kernels.dataflow.BACKENDS`; None for what the rules choose.
      valid_m: rows of the activations that are not padding; None for all.
      counters: a `jax.new_ref` of zeros that kernels count with; None if each makes its own.
    """

    implementation: str | None = None
    valid_m: int | None = None
    counters: Any = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of a product."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Projection(NamedTuple):
    """What makes queries, keys and values: the norm before the product, the product, the norms of each head."""

    norm: Norm | None
    weight: Array
    bias: Array | None
    q_norm: Norm | None
    k_norm: Norm | None


Attend = Callable[[Array, Projection], Array]  # x [..., embed_dim] -> [..., num_heads * head_dim]


class Linear(nnx.Module):
    """y = x @ weight.T + bias."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool, dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(_scaled_normal(rngs, (out_dim, in_dim), dtype))
        self.bias = nnx.Param(jnp.zeros(out_dim, dtype)) if bias else None

    @property
    def operands(self) -> tuple[Array, Array | None]:
        """Weight and bias."""
        return self.weight.get_value(), None if self.bias is None else self.bias.get_value()


class RMSNorm(nnx.Module):
    """x / rms(x) * (weight + offset) over the last axis, float32 inside."""

    def __init__(self, dim: int, config: ModelConfig, *, dtype):
        self.weight = nnx.Param(jnp.full(dim, 1 - config.norm_offset, dtype))
        self.eps, self.offset = config.norm_eps, config.norm_offset

    @property
    def operand(self) -> Norm:
        """What a product takes as the norm before it."""
        return Norm(weight=self.weight.get_value(), eps=self.eps, offset=self.offset)

    def __call__(self, x: Array) -> Array:
        return normalize(x, self.operand)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * weight + bias over the last axis, float32 inside."""

    def __init__(self, dim: int, config: ModelConfig, *, dtype):
        self.weight = nnx.Param(jnp.ones(dim, dtype))
        self.bias = nnx.Param(jnp.zeros(dim, dtype))
        self.eps = config.norm_eps

    @property
    def operand(self) -> Norm:
        """What a product takes as the norm before it."""
        weight, bias = self.weight.get_value(), self.bias.get_value()
        return Norm(weight=weight, bias=bias, eps=self.eps, centered=True)

    def __call__(self, x: Array) -> Array:
        return normalize(x, self.operand)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class Attention(nnx.Module):
    """Grouped-query attention; q, k and v come from one product."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = Linear(config.embed_dim, heads * config.head_dim, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.out = Linear(
            config.num_heads * config.head_dim, config.embed_dim, bias=config.out_bias, dtype=dtype, rngs=rngs
        )
        self.q_norm = RMSNorm(config.head_dim, config, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config, dtype=dtype) if config.qk_norm else None

    def __call__(
        self, x: Array, norm: Norm | None, attend: Attend, kernels: Kernels, *, residual: Array | None
    ) -> Array:
        """attention(norm(x)) + residual."""
        head_norms = (None if part is None else part.operand for part in (self.q_norm, self.k_norm))
        out = attend(x, Projection(norm, *self.qkv.operands, *head_norms))
        return linear(out, *self.out.operands, residual=residual, **kernels.options)


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)); gate and up are one product."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        embed_dim, mlp_dim, bias = config.embed_dim, config.mlp_dim, config.mlp_bias
        self.gate_up = Linear(embed_dim, 2 * mlp_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(mlp_dim, embed_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Array, norm: Norm | None, kernels: Kernels, *, residual: Array | None) -> Array:
        """mlp(norm(x)) + residual."""
        hidden = gated_linear(x, *self.gate_up.operands, norm=norm, activation=self.activation, **kernels.options)
        return linear(hidden, *self.down.operands, residual=residual, **kernels.options)


class MLP(nnx.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        embed_dim, mlp_dim, bias = config.embed_dim, config.mlp_dim, config.mlp_bias
        self.up = Linear(embed_dim, mlp_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(mlp_dim, embed_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Array, norm: Norm | None, kernels: Kernels, *, residual: Array | None) -> Array:
        """mlp(norm(x)) + residual."""
        hidden = linear(x, *self.up.operands, norm=norm, activation=self.activation, **kernels.options)
        return linear(hidden, *self.down.operands, residual=residual, **kernels.options)


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    With `post_norm` norm(x + attention(x)), then norm(x + mlp(x)); `parallel`, x + attention(norm(x)) + mlp(norm(x)).
    """

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.embed_dim, config, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = norm(config.embed_dim, config, dtype=dtype)
        self.mlp = (GatedMLP if config.gated_mlp else MLP)(config, dtype=dtype, rngs=rngs)
        self.post_norm, self.parallel = config.post_norm, config.parallel

    def __call__(self, x: Array, attend: Attend, kernels: Kernels) -> Array:
        """Runs the layer on x [..., embed_dim]; the leading axes are whatever `attend` understands."""
        if self.post_norm:
            x = self.attention_norm(self.attention(x, None, attend, kernels, residual=x))
            return self.mlp_norm(self.mlp(x, None, kernels, residual=x))
        attended = self.attention(x, self.attention_norm.operand, attend, kernels, residual=x)
        return self.mlp(x if self.parallel else attended, self.mlp_norm.operand, kernels, residual=attended)


class SandwichLayer(DecoderLayer):
    """x + out_norm(attention(norm(x))), then x + out_norm(mlp(norm(x))): four norms."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        norm = NORMS[config.norm]
        self.attention_out_norm = norm(config.embed_dim, config, dtype=dtype)
        self.mlp_out_norm = norm(config.embed_dim, config, dtype=dtype)

    def __call__(self, x: Array, attend: Attend, kernels: Kernels) -> Array:
        attended = self.attention(x, self.attention_norm.operand, attend, kernels, residual=None)
        x = x + self.attention_out_norm(attended)
        return x + self.mlp_out_norm(self.mlp(x, self.mlp_norm.operand, kernels, residual=None))


def _scaled_normal(rngs: nnx.Rngs, shape: tuple[int, int], dtype) -> Array:
    """Random weights that keep the size of activations: standard deviation in_dim ** -0.5."""
    return nnx.initializers.normal(shape[1] ** -0.5)(rngs.params(), shape, dtype)
