"""The model run over a cache: one chunk of prompt or one token a row, as a chain of jitted layers.

Parameters come in as a plain nested dict. The layer is an inner `jax.jit`: traced and lowered once per shape, window
and softmax, called num_layers times. On an NVIDIA GPU a decode step is five kernels a layer: norm, query, key and
value with rotation and storing; attention; its output with the residual; norm, gate and up; down with the residual.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from jaxdecode.cache import KVCache, append_chunk
from jaxdecode.config import ModelConfig, UnifiedMax
from jaxdecode.layers import Kernels, Projection
from jaxdecode.models import Params, bind_layer, bind_model, project
from pallas_kernels.dataflow import INTERPRET, padded_rows, runs_kernels
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flat_gemm import qkv_linear
from pallas_kernels.heads import Rope
from pallas_kernels.prefill_attention import prefill_attention


def extend(
    params: Params,
    config: ModelConfig,
    cache: KVCache,
    tokens: Int[Array, "batch q_len"],
    start: Int[Array, ""],
    lengths: Int[Array, " batch"],
    implementation: str | None = None,
) -> tuple[Float[Array, "batch q_len embed_dim"], KVCache, Int[Array, " batch"]]:
    """Runs one chunk of every row's prompt and stores its keys and values.

    Args:
      tokens: [batch, q_len] int32, the slots start … start + q_len of every row; padding past a row's length is
        computed and later overwritten.
      start: scalar int32, the same for every row.
      lengths: [batch] int32, whole prompt lengths.
      implementation: see `pallas_kernels.dataflow.BACKENDS`.

    Returns:
      The last layer's output [batch, q_len, embed_dim]; the cache, its `lengths` left as they were; and how many rows
      of attention left the range of their unified maximum, [batch].
    """
    model = bind_model(config, params)
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    ropes = model.ropes(positions, lengths[:, None])
    seeing = jnp.where(positions < lengths[:, None], positions, -1)  # padding looks at nothing

    def layer(index: int, params: Params, x: Array, keys: Array, values: Array) -> tuple[Array, Array, Array, Array]:
        static = config, config.window(index), _softmax(config, index), implementation
        return _extend_layer(*static, params, x, ropes[config.layer_rope(index)], keys, values, start, seeing)

    x = model.first_input(tokens, positions, Kernels(implementation=implementation))
    return _run_layers(config, params, layer, x, cache)


def step(
    params: Params,
    config: ModelConfig,
    cache: KVCache,
    tokens: Int[Array, " batch"],
    implementation: str | None = None,
) -> tuple[Float[Array, "batch vocab_size"], KVCache, Int[Array, " batch"]]:
    """Runs one new token a row: stores its key and value in slot `cache.lengths` and looks back.

    Args:
      tokens: [batch] int32.
      implementation: see `pallas_kernels.dataflow.BACKENDS`.

    Returns:
      Logits [batch, vocab_size] float32 of the next token; the cache, its `lengths` left as they were; and how many
      rows of attention left the range of their unified maximum, [batch].
    """
    model, batch, dtype = bind_model(config, params), tokens.shape[0], cache.keys[0].dtype
    # padded once, so that no product has to: their kernels work on eight rows at a time
    padding = padded_rows(batch, implementation, dtype) - batch
    positions = jnp.pad(cache.lengths, (0, padding))
    ropes = model.ropes(positions, positions + 1)
    count = runs_kernels(implementation, dtype) and implementation != INTERPRET
    counters = jax.new_ref(_zero_counters(config, batch)) if count else None
    valid_m = batch if padding else None
    lengths = cache.lengths + 1

    def layer(index: int, params: Params, x: Array, keys: Array, values: Array) -> tuple[Array, Array, Array, Array]:
        static = config, config.window(index), _softmax(config, index), implementation, valid_m
        return _step_layer(*static, params, x, ropes[config.layer_rope(index)], keys, values, lengths, counters)

    kernels = Kernels(implementation=implementation, valid_m=valid_m, counters=counters)
    x = model.first_input(jnp.pad(tokens, (0, padding)), positions, kernels)
    x, cache, recomputed = _run_layers(config, params, layer, x, cache)
    return model.logits(x, kernels)[:batch], cache, recomputed


def logits(
    params: Params, config: ModelConfig, x: Float[Array, "*batch embed_dim"], implementation: str | None = None
) -> Float[Array, "*batch vocab_size"]:
    """float32 next-token scores [..., vocab_size] of the last layer's output [..., embed_dim]."""
    return bind_model(config, params).logits(x, Kernels(implementation=implementation))


def _run_layers(
    config: ModelConfig, params: Params, layer: Any, x: Array, cache: KVCache
) -> tuple[Array, KVCache, Array]:
    """layer(index, params, x, keys, values) -> x, keys, values, recomputed [batch, num_kv_heads], one by one."""
    keys, values, recomputed = [], [], []
    for index, own in enumerate(params["layers"]):
        x, new_keys, new_values, again = layer(index, own, x, cache.keys[index], cache.values[index])
        keys.append(new_keys)
        values.append(new_values)
        if _softmax(config, index):
            recomputed.append(again)
    total = jnp.zeros_like(cache.lengths)
    if recomputed:  # the barrier keeps XLA from a sum, so a kernel, for every layer
        total = lax.optimization_barrier(jnp.stack(recomputed)).sum(axis=(0, 2), dtype=jnp.int32)
    return x, KVCache(tuple(keys), tuple(values), cache.lengths), total


def _softmax(config: ModelConfig, index: int) -> UnifiedMax | None:
    return config.unified_max[index] if config.unified_max else None


def _zero_counters(config: ModelConfig, batch: int) -> Array:
    """What the kernels of a step count with: an entry for each 32 rows of a weight, or each KV head of a row."""
    heads = config.num_heads + 2 * config.num_kv_heads
    widest = max(heads * config.head_dim, 2 * config.mlp_dim, config.embed_dim, config.vocab_size)
    return jnp.zeros(max(-(-widest // 32), batch * config.num_kv_heads), jnp.int32)


def _attention_options(
    config: ModelConfig, window: int | None, softmax: UnifiedMax | None, implementation: str | None
) -> dict[str, Any]:
    options = {"scale": config.attention_scale, "soft_cap": config.attention_soft_cap, "window": window}
    options |= {"implementation": implementation}
    if softmax is not None:
        options |= {"unified_max": softmax.value, "safe_range": (softmax.lowest, softmax.highest)}
    return options


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _extend_layer(
    config: ModelConfig,
    window: int | None,
    softmax: UnifiedMax | None,
    implementation: str | None,
    params: Any,
    x: Array,
    rope: Rope | None,
    keys: Array,
    values: Array,
    start: Array,
    positions: Array,
) -> tuple[Array, Array, Array, Array]:
    kernels, recomputed = Kernels(implementation=implementation), None

    def attend(x: Array, projection: Projection) -> Array:
        nonlocal keys, values, recomputed
        query, key, value = project(config, x, projection, rope, **kernels.options)
        keys, values = append_chunk(keys, key, start), append_chunk(values, value, start)
        options = _attention_options(config, window, softmax, implementation)
        out, recomputed = prefill_attention(query, keys, values, positions, **options)
        return out.reshape(*x.shape[:2], -1)

    x = bind_layer(config, params)(x, attend, kernels)
    assert recomputed is not None
    return x, keys, values, recomputed


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _step_layer(
    config: ModelConfig,
    window: int | None,
    softmax: UnifiedMax | None,
    implementation: str | None,
    valid_m: int | None,
    params: Any,
    x: Array,
    rope: Rope | None,
    keys: Array,
    values: Array,
    lengths: Array,
    counters: Any,
) -> tuple[Array, Array, Array, Array]:
    """`lengths` counts the new token, which goes to the last slot."""
    kernels, recomputed = Kernels(implementation=implementation, valid_m=valid_m, counters=counters), None

    def attend(x: Array, projection: Projection) -> Array:
        nonlocal keys, values, recomputed
        norm, weight, bias, q_norm, k_norm = projection
        query, keys, values = qkv_linear(
            x,
            weight,
            bias,
            rope=rope,
            keys=keys,
            values=values,
            lengths=lengths - 1,
            norm=norm,
            q_norm=q_norm,
            k_norm=k_norm,
            implementation=implementation,
            counters=counters,
        )
        options = _attention_options(config, window, softmax, implementation)
        out, recomputed = decode_attention(query, keys, values, lengths, counters=counters, **options)
        return out.reshape(x.shape[0], -1)

    x = bind_layer(config, params)(x, attend, kernels)
    assert recomputed is not None
    return x, keys, values, recomputed


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
