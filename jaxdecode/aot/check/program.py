"""What is compiled for a cell: `generate` of a model, from prompt to last token, as one program."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from jaxdecode.aot.job import Program
from jaxdecode.config import ModelConfig
from jaxdecode.generation import generate
from jaxdecode.models import Params, abstract_params

NEW_TOKENS = 64


def prompt_len(context: int) -> int:
    """Prompt tokens of a row whose cache ends up with `context` slots: all but those that are generated."""
    return context - min(NEW_TOKENS, context // 2)


def generation(config: ModelConfig, batch: int, context: int, dtype: str) -> Program:
    """Greedy generation until each of `batch` rows holds `context` tokens; parameters in `dtype`."""
    prompt = prompt_len(context)
    tokens = jax.ShapeDtypeStruct((batch, prompt), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def function(params: Params, tokens: jax.Array, lengths: jax.Array, key: jax.Array) -> jax.Array:
        return generate(params, config, tokens, lengths, key, max_new_tokens=context - prompt)  # pyright: ignore

    return Program(function=function, args=(abstract_params(config, dtype), tokens, lengths, key))


def weight_names(config: ModelConfig, dtype: str) -> list[str]:
    """Of each leaf of the parameters, which come first among the program's arguments: "layers.0.mlp.down.weight"."""
    paths = jax.tree_util.tree_leaves_with_path(abstract_params(config, dtype))
    return [re.sub(r"\['?(\w+)'?\]", r".\1", jax.tree_util.keystr(path))[1:] for path, _ in paths]
