"""Our engine as a benchmark worker: the pure functions a user calls, jitted, greedy, no end token.

python jaxdecode_engine.py CHECKPOINT
"""

from __future__ import annotations

import platform
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from worker import serve

import jaxdecode
from jaxdecode.checkpoint import load_params
from jaxdecode.generation import jit_decode, jit_prefill


def main(checkpoint: str) -> None:
    params, config = load_params(checkpoint, dtype=jnp.float32)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "describe":
            versions = {"jaxdecode": jaxdecode.__version__, "jax": jax.__version__}
            return {"versions": versions | {"python": platform.python_version()}}
        return run(params, config, request["prompts"], request["new_tokens"])

    serve(answer)


def run(params, config, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Tokens, and seconds to the first token and from there to the last."""
    tokens = jnp.asarray(prompts, jnp.int32)
    lengths = jnp.full(len(prompts), tokens.shape[1], jnp.int32)
    key = jax.random.key(0)
    jax.block_until_ready((params, tokens, lengths))
    started = time.perf_counter()
    state = jit_prefill(params, config, tokens, lengths, key, max_new_tokens=new_tokens)
    jax.block_until_ready(state)
    first = time.perf_counter()
    state = jit_decode(params, config, state, new_tokens)
    made = state.output.tokens.tolist()
    ended = time.perf_counter()
    return {"tokens": made, "first_token_seconds": first - started, "decode_seconds": ended - first}


if __name__ == "__main__":
    main(sys.argv[1])
