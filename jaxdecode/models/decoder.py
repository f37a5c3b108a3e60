"""A decoder-only language model: embedding, layers, final norm, output head."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdecode.config import ModelConfig, RopeConfig
from jaxdecode.layers import NORMS, DecoderLayer, Kernels, Linear, Projection
from jaxdecode.rope import rope_table
from pallas_kernels.flat_gemm import linear
from pallas_kernels.heads import Rope, split_heads
from pallas_kernels.prefill_attention import prefill_attention

Params = dict[str, Any]
_BY_RULE = Kernels()


class Embedding(nnx.Module):
    """Rows of a table, times a scale that is rounded to their type."""

    def __init__(self, rows: int, dim: int, *, scale: float | None = None, dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (rows, dim), dtype))
        self.scale = scale

    def __call__(self, rows: Array) -> Array:
        found = jnp.take(self.weight.get_value(), rows, axis=0, mode="clip")
        return found if self.scale is None else found * jnp.asarray(self.scale, found.dtype)


class Decoder(nnx.Module):
    """The skeleton every family fills in; called as a module it runs whole sequences without a cache.

    The decode loop uses the same parts, bound to a plain dict of parameters: see `jaxdecode.generation`.
    """

    layer_type: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(self, config: ModelConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        token_dim = config.token_dim or config.embed_dim
        self.embed = Embedding(config.vocab_size, token_dim, scale=config.embed_scale, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([self.layer_type(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        if config.final_norm:
            self.norm = NORMS[config.norm](config.embed_dim, config, dtype=dtype)
        if not config.tied_embeddings:
            self.head = Linear(token_dim, config.vocab_size, bias=False, dtype=dtype, rngs=rngs)
        if config.rope is None:
            rows = config.max_position + config.position_offset
            self.positions = Embedding(rows, config.embed_dim, dtype=dtype, rngs=rngs)
        if config.token_dim is not None:
            self.token_in = Linear(config.token_dim, config.embed_dim, bias=False, dtype=dtype, rngs=rngs)
            self.token_out = Linear(config.embed_dim, config.token_dim, bias=False, dtype=dtype, rngs=rngs)

    def ropes(self, positions: Array, context: Array) -> dict[RopeConfig | None, Rope | None]:
        """cos and sin for tokens at `positions` in sequences that hold `context` tokens, by the rule of a layer."""
        rules = dict.fromkeys((self.config.rope, self.config.local_rope or self.config.rope))
        head_dim = self.config.head_dim
        return {rule: rule and rope_table(rule, rule.turned(head_dim), positions, context) for rule in rules}

    def first_input(self, tokens: Array, positions: Array, kernels: Kernels = _BY_RULE) -> Array:
        """What the first layer takes [..., embed_dim] for tokens [...] at their positions [...]."""
        x, place = self.embed(tokens), None
        if self.config.rope is None:
            place = self.positions(positions + self.config.position_offset)
        if self.config.token_dim is not None:
            return linear(x, *self.token_in.operands, residual=place, **kernels.options)
        return x if place is None else x + place

    def logits(self, x: Array, kernels: Kernels = _BY_RULE) -> Array:
        """float32 scores [..., vocab_size] of the next token from the last layer's output [..., embed_dim]."""
        table = self.embed if self.config.tied_embeddings else self.head
        norm = self.norm.operand if self.config.final_norm else None
        if self.config.token_dim is not None:
            x, norm = linear(x, *self.token_out.operands, norm=norm, **kernels.options), None
        scores = linear(x, table.weight.get_value(), norm=norm, out_dtype=jnp.float32, **kernels.options)
        cap = self.config.logit_soft_cap
        return scores if cap is None else cap * jnp.tanh(scores / cap)

    def __call__(self, tokens: Array) -> Array:
        """Logits [batch, n, vocab_size] of whole sequences [batch, n].

        Raises:
          ValueError: the sequences are longer than the learned positions.
        """
        batch, n = tokens.shape
        self.config.require_positions(n)
        positions = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))
        ropes = self.ropes(positions, jnp.full((batch, 1), n, jnp.int32))
        kernels = Kernels(implementation="xla")  # unlike our kernels it can be differentiated
        x = self.first_input(tokens, positions, kernels)
        for index, layer in enumerate(self.layers):
            rope = ropes[self.config.layer_rope(index)]
            attend = functools.partial(_attend_causally, self.config, self.config.window(index), positions, rope)
            x = layer(x, attend, kernels)
        return self.logits(x, kernels)


def project(config: ModelConfig, x: Array, projection: Projection, rope: Rope | None, **options: Any) -> list[Array]:
    """Query, key and value [..., heads, head_dim] of x [..., embed_dim], normed and turned."""
    norm, weight, bias, q_norm, k_norm = projection
    shape = {"num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    qkv = linear(x, weight, bias, norm=norm, **options)
    return list(split_heads(qkv, **shape, rope=rope, q_norm=q_norm, k_norm=k_norm))


def _attend_causally(
    config: ModelConfig, window: int | None, positions: Array, rope: Rope | None, x: Array, projection: Projection
) -> Array:
    query, *new = project(config, x, projection, rope, implementation="xla")
    keys, values = (jnp.swapaxes(part, 1, 2) for part in new)
    # The definition, since unlike a loop over cache blocks it can be differentiated.
    options = {"scale": config.attention_scale, "soft_cap": config.attention_soft_cap, "window": window}
    options |= {"implementation": "reference"}
    out, _ = prefill_attention(query, keys, values, positions, **options)
    return out.reshape(*x.shape[:-1], -1)


def bind(module: nnx.Module, params: Any) -> Any:
    """Puts arrays (or whatever stands for a weight) into the parameters of a module made by `nnx.eval_shape`.

    Args:
      params: nested dicts and lists named like the module's attributes; parts left out stay abstract.

    Raises:
      AttributeError: `params` names a part that the module lacks.
    """
    children = enumerate(params) if isinstance(params, list) else params.items()
    for name, value in children:
        child = module[name] if isinstance(params, list) else getattr(module, name)  # pyright: ignore
        if isinstance(child, nnx.Variable):
            child.set_value(value)
        else:
            bind(child, value)
    return module


def params_of(model: nnx.Module) -> Params:
    """The parameters of a model as plain nested dicts, its layers as a list."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    layers = params["layers"]
    return {**params, "layers": [layers[index] for index in range(len(layers))]}
