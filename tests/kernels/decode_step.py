"""Whole decode steps as programs to compile for a card that is not here. Holds no test."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdecode.aot import Program
from jaxdecode.cache import init_cache
from jaxdecode.config import ModelConfig
from jaxdecode.engine import step
from jaxdecode.generation import decode, prefill
from jaxdecode.models import abstract_params


def one_step(config: ModelConfig, batch: int, max_len: int, dtype: str) -> Program:
    """Logits of the next tokens, and the cache, which is given up."""

    def function(cache, params, tokens):
        return step(params, config, cache, tokens)

    cache = jax.eval_shape(lambda: init_cache(config, batch, max_len, dtype))
    args = cache, abstract_params(config, dtype), jax.ShapeDtypeStruct((batch,), jnp.int32)
    return Program(function=function, args=args, jit_options={"donate_argnums": 0})


def loop(config: ModelConfig, batch: int, max_len: int, dtype: str, max_new_tokens: int = 64) -> Program:
    """The decode loop of `generate`, its state given up."""
    params = abstract_params(config, dtype)
    shapes = {"shape": (batch, max_len - max_new_tokens), "dtype": jnp.int32}, {"shape": (batch,), "dtype": jnp.int32}
    tokens, lengths = (jax.ShapeDtypeStruct(**shape) for shape in shapes)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def start(params, tokens, lengths, key):
        return prefill(params, config, tokens, lengths, key, max_new_tokens=max_new_tokens, implementation="xla")

    state = jax.eval_shape(start, params, tokens, lengths, key)

    def function(state, params):
        return decode(params, config, state, max_new_tokens)

    return Program(function=function, args=(state, params), jit_options={"donate_argnums": 0})
