"""The model run over a cache: one chunk of prompt or one token a row, as a chain of jitted layers.

Parameters come in as a plain nested dict. The layer is an inner `jax.jit`: traced and lowered once per shape and
window, called num_layers times.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from jaxdecode.cache import KVCache, append_chunk, append_token
from jaxdecode.config import ModelConfig
from jaxdecode.layers import Rope
from jaxdecode.models import Params, bind_layer, bind_model
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.prefill_attention import prefill_attention


def extend(
    params: Params,
    config: ModelConfig,
    cache: KVCache,
    tokens: Int[Array, "batch q_len"],
    start: Int[Array, ""],
    lengths: Int[Array, " batch"],
) -> tuple[Float[Array, "batch q_len embed_dim"], KVCache]:
    """Runs one chunk of every row's prompt and stores its keys and values.

    Args:
      tokens: [batch, q_len] int32, the slots start … start + q_len of every row; padding past a row's length is
        computed and later overwritten.
      start: scalar int32, the same for every row.
      lengths: [batch] int32, whole prompt lengths.

    Returns:
      The last layer's output [batch, q_len, embed_dim] and the cache; its `lengths` are left as they were.
    """
    model = bind_model(config, params)
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    rope = model.rope(positions, lengths[:, None])
    x, keys, values = model.embed(tokens), [], []
    for index, layer in enumerate(params["layers"]):
        x, layer_keys, layer_values = _extend_layer(
            config, config.window(index), layer, x, rope, cache.keys[index], cache.values[index], start
        )
        keys.append(layer_keys)
        values.append(layer_values)
    return x, KVCache(tuple(keys), tuple(values), cache.lengths)


def step(
    params: Params, config: ModelConfig, cache: KVCache, tokens: Int[Array, " batch"]
) -> tuple[Float[Array, "batch vocab_size"], KVCache]:
    """Runs one new token a row: stores its key and value in slot `cache.lengths` and looks back.

    Args:
      tokens: [batch] int32.

    Returns:
      Logits [batch, vocab_size] float32 of the next token, and the cache; its `lengths` are left as they were.
    """
    model = bind_model(config, params)
    rope = model.rope(cache.lengths, cache.lengths + 1)
    x, keys, values = model.embed(tokens), [], []
    for index, layer in enumerate(params["layers"]):
        x, layer_keys, layer_values = _step_layer(
            config,
            config.window(index),
            layer,
            x,
            rope,
            cache.keys[index],
            cache.values[index],
            cache.lengths,
        )
        keys.append(layer_keys)
        values.append(layer_values)
    return model.logits(x), KVCache(tuple(keys), tuple(values), cache.lengths)


def logits(
    params: Params, config: ModelConfig, x: Float[Array, "*batch embed_dim"]
) -> Float[Array, "*batch vocab_size"]:
    """float32 next-token scores [..., vocab_size] of the last layer's output [..., embed_dim]."""
    return bind_model(config, params).logits(x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _extend_layer(
    config: ModelConfig,
    window: int | None,
    params: Any,
    x: Array,
    rope: Rope,
    keys: Array,
    values: Array,
    start: Array,
) -> tuple[Array, Array, Array]:
    def attend(query: Array, key: Array, value: Array) -> Array:
        nonlocal keys, values
        keys, values = append_chunk(keys, key, start), append_chunk(values, value, start)
        positions = jnp.broadcast_to(start + jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        return prefill_attention(query, keys, values, positions, scale=config.head_dim**-0.5, window=window)

    x = bind_layer(config, params)(x, rope, attend)
    return x, keys, values


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step_layer(
    config: ModelConfig,
    window: int | None,
    params: Any,
    x: Array,
    rope: Rope,
    keys: Array,
    values: Array,
    lengths: Array,
) -> tuple[Array, Array, Array]:
    def attend(query: Array, key: Array, value: Array) -> Array:
        nonlocal keys, values
        keys, values = append_token(keys, key, lengths), append_token(values, value, lengths)
        return decode_attention(query, keys, values, lengths + 1, scale=config.head_dim**-0.5, window=window)

    x = bind_layer(config, params)(x, rope, attend)
    return x, keys, values


def prefill_chunks(prompt_len: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Chunk sizes that serve prompts of up to `prompt_len` tokens: those that fit, the smallest always."""
    return tuple(size for size in sizes if size <= prompt_len) or (min(sizes),)


def for_each_chunk(sizes: tuple[int, ...], total: Array, body, carry):
    """Calls `carry = body(start, size, carry)` for chunks that cover 0 … total, big ones first.

    The number of chunks is data, so one compiled program serves every prompt length.
    """
    start = jnp.zeros((), jnp.int32)
    for size in sorted(sizes, reverse=True):
        smallest = size == min(sizes)

        def more(loop, size=size, smallest=smallest):
            return loop[0] < total if smallest else loop[0] + size <= total

        def run(loop, size=size):
            start, carry = loop
            return start + size, body(start, size, carry)

        start, carry = lax.while_loop(more, run, (start, carry))
    return carry
