"""What `generate` is given: checked, and made into the arrays that its traced part takes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxdecode.config import ModelConfig, positions_needed

ArrayLike = Array | np.ndarray


def check_sizes(
    config: ModelConfig, tokens: ArrayLike, lengths: ArrayLike, max_new_tokens: int, max_len: int | None
) -> None:
    """Refuses shapes and sizes that do not fit together, and more tokens than the model has positions.

    Raises:
      ValueError: the rule, and what was given.
    """
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must be [batch, prompt_len], neither of them 0; got {tokens.shape}")
    if lengths.shape != tokens.shape[:1]:
        raise ValueError(f"lengths must be [batch] like tokens {tokens.shape}; got {lengths.shape}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    needed = tokens.shape[1] + max_new_tokens
    if max_len is not None and max_len < needed:
        raise ValueError(f"max_len must be at least prompt_len + max_new_tokens = {needed}; got {max_len}")
    _check_positions(config, tokens.shape[1], lengths, max_new_tokens)
    check_growth(config, lengths, max_new_tokens)


def _check_positions(config: ModelConfig, prompt_len: int, lengths: ArrayLike, max_new_tokens: int) -> None:
    lack = config.lacks_positions(positions_needed(prompt_len, max_new_tokens))
    if lack is None:
        return
    prompts, cut = f"prompts of {prompt_len} tokens", "cut the padding, "
    if isinstance(lengths, Tracer):
        prompts += ", padding counted,"
    elif (longest := int(np.max(np.asarray(lengths)))) < prompt_len:
        prompts = f"prompts padded to {prompt_len} tokens, the longest of which has {longest},"
    else:
        cut = ""
    raise ValueError(f"{lack}, for {prompts} and {max_new_tokens} new ones: {cut}{config.ways_to_fit}")


def check_growth(config: ModelConfig, lengths: ArrayLike, max_new_tokens: int) -> None:
    """Refuses rows that a longrope would turn in two ways; traced lengths tell nothing.

    Raises:
      ValueError: see `ModelConfig.require_growth`.
    """
    if config.rope is None or config.rope.kind != "longrope" or isinstance(lengths, Tracer):
        return
    for length in np.unique(np.asarray(lengths)).tolist():
        config.require_growth(length, positions_needed(length, max_new_tokens))


def to_arrays(
    tokens: ArrayLike,
    lengths: ArrayLike,
    key: Array,
    max_new_tokens: int,
    token_limits: ArrayLike | None,
    eos_token_ids: Sequence[int | Array] | ArrayLike,
    stop_sequences: Sequence[Sequence[int | Array]] | ArrayLike,
    pad_token_id: int | ArrayLike,
) -> tuple[Array, ...]:
    """The arguments of `generate` as the arrays that `_prefill` takes, in its order."""
    batch = tokens.shape[0]
    limits = jnp.full(batch, max_new_tokens, jnp.int32)
    if token_limits is not None:
        limits = jnp.minimum(limits, jnp.asarray(token_limits, jnp.int32))
    return (
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        _row_keys(key, batch),
        limits,
        jnp.asarray(eos_token_ids, jnp.int32).reshape(-1),
        _pad_stops(stop_sequences),
        jnp.asarray(pad_token_id, jnp.int32),
    )


def _row_keys(key: Array, batch: int) -> Array:
    """One typed key a row, from one key or [batch] of them, typed or old-style uint32."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"key must be one random key or one a row, [{batch}]; got {key.shape}")
    return key


def _pad_stops(stop_sequences: Sequence[Sequence[int | Array]] | ArrayLike) -> Array:
    """[num_stops, stop_len] int32, short sequences padded in front with -1."""
    if isinstance(stop_sequences, jax.Array | np.ndarray):
        return jnp.asarray(stop_sequences, jnp.int32)
    if any(len(sequence) == 0 for sequence in stop_sequences):
        raise ValueError("a stop sequence must hold at least one token")
    longest = max((len(sequence) for sequence in stop_sequences), default=0)
    rows = [[-1] * (longest - len(sequence)) + list(sequence) for sequence in stop_sequences]
    return jnp.asarray(rows, jnp.int32).reshape(len(rows), longest)
