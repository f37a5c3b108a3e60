"""Drives the engine for rows of different length: few shapes, compile time apart, rounds of a few tokens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdecode import generation
from jaxdecode.config import ModelConfig, positions_needed
from jaxdecode.generation import DecodeState
from jaxdecode.sampling import Sampler

_MIN_NEW_TOKENS = 64
_MIN_CAPACITY = 1024
_MIN_SCORED = 256

_ready: set[Any] = set()  # shapes whose programs this process has made


@dataclasses.dataclass(kw_only=True)
class Timing:
    """Seconds: making the programs ready (compiling them, or reading them from the cache), and running them.

    Attributes:
      compile_seconds: tracing and compiling; next to nothing once the shapes have been seen.
      first_token_seconds: from the prompts' tokens to the first new token of every row.
      decode_seconds: from then to the last token.
      decoded_tokens: tokens generated in `decode_seconds`, over all rows.
    """

    compile_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed after the first token, None if there was only that."""
        return self.decoded_tokens / self.decode_seconds if self.decoded_tokens else None


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes a batch is padded to, powers of two within the model's positions, so that few programs serve all.

    Attributes:
      batch: rows; the added ones generate nothing.
      prompt: slots for each prompt. A program reads only as many as the longest prompt has, so large is free.
      new_tokens: slots for what is generated; each row's own limit is data.
    """

    batch: int
    prompt: int
    new_tokens: int

    @classmethod
    def of_prompts(cls, prompts: Sequence[Sequence[int]], max_new_tokens: int, max_position: int) -> Buckets:
        longest, new_tokens = max(map(len, prompts)), _power_of_two(max(max_new_tokens, _MIN_NEW_TOKENS))
        if longest + new_tokens > max_position:  # there may be no positions for what is never used
            new_tokens = max_new_tokens
        # the last token needs a slot, but no position
        most = max(max_position, longest + new_tokens)
        capacity = min(_power_of_two(max(longest + new_tokens, _MIN_CAPACITY)), most)
        return cls(_power_of_two(len(prompts)), capacity - new_tokens, new_tokens)

    @classmethod
    def of_texts(cls, texts: Sequence[Sequence[int]], max_position: int) -> Buckets:
        longest = _power_of_two(max(max(map(len, texts)), _MIN_SCORED))
        return cls(_power_of_two(len(texts)), min(longest, max_position), 0)

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [batch, prompt] and lengths [batch] int32; added rows hold one token."""
        tokens = np.zeros((self.batch, self.prompt), np.int32)
        lengths = np.ones((self.batch,), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
            lengths[index] = len(row)
        return tokens, lengths


class Run:
    """One batch from prompt to end, on the engine's jitted functions.

    Args:
      prompts: tokens of each row.
      seeds: (seed, sample) of each row; its key is fold_in(key(seed), sample), whatever the other rows are.

    Raises:
      ValueError: a row would grow past the length where a longrope changes its frequencies.
    """

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[tuple[int, int]],
        sampler: Sampler,
        max_new_tokens: int,
        eos_token_ids: Sequence[int],
        implementation: str | None = None,
    ):
        for prompt in prompts:
            config.require_growth(len(prompt), positions_needed(len(prompt), max_new_tokens))
        self.timing = Timing()
        self._rows = len(prompts)
        self._buckets = Buckets.of_prompts(prompts, max_new_tokens, config.max_position)
        self._params, self._config, self._implementation = params, config, implementation
        self._sampler = _pad_sampler(sampler, self._rows, self._buckets.batch)
        self._prompts = self._buckets.pad(prompts)
        self._eos = np.asarray(eos_token_ids, np.int32)
        self._limits = np.zeros((self._buckets.batch,), np.int32)
        self._limits[: self._rows] = max_new_tokens
        padded = np.zeros((self._buckets.batch, 2), np.uint32)
        padded[: self._rows] = [(seed % 2**32, sample) for seed, sample in seeds]
        self._keys = _row_keys(padded[:, 0], padded[:, 1])

    def rounds(self, chunk: int) -> Iterator[list[list[int]]]:
        """Yields each row's new tokens: one after the prompt, then up to `chunk` at a time."""
        self._compile()
        started = time.perf_counter()
        state = self._prefill(*self._prompts, self._limits)
        seen, fresh = self._read(state, np.zeros((self._rows,), np.int64))
        self.timing.first_token_seconds = time.perf_counter() - started
        while True:
            yield fresh
            if not self._running().any():
                return
            started = time.perf_counter()
            state = self._decode(dataclasses.replace(state, limits=jnp.array(self._limits)), chunk)
            seen, fresh = self._read(state, seen)
            self.timing.decode_seconds += time.perf_counter() - started
            self.timing.decoded_tokens += sum(map(len, fresh))

    def stop_rows(self, stopped: Sequence[bool]) -> None:
        """Ends rows between two rounds."""
        self._limits = self._limits.copy()  # JAX may still be reading the old ones
        self._limits[: self._rows][np.asarray(stopped)] = 0

    def logprobs(self, row: int, count: int) -> list[float]:
        """Log-probabilities of a row's first tokens."""
        return [float(x) for x in self._output.logprobs[row, :count]]

    def _running(self) -> np.ndarray:
        return ~np.asarray(self._output.finished) & (np.asarray(self._output.lengths) < self._limits)

    def _prefill(self, tokens: np.ndarray, lengths: np.ndarray, limits: np.ndarray) -> DecodeState:
        return generation.jit_prefill(
            self._params,
            self._config,
            tokens,
            lengths,
            self._keys,
            sampler=self._sampler,
            max_new_tokens=self._buckets.new_tokens,
            max_len=self._buckets.prompt + self._buckets.new_tokens,
            token_limits=limits,
            eos_token_ids=self._eos,
            implementation=self._implementation,
        )

    def _decode(self, state: DecodeState, chunk: int) -> DecodeState:
        until = np.int32(self._step + chunk)
        how = {"sampler": self._sampler, "implementation": self._implementation}
        return generation.jit_decode(self._params, self._config, state, until, **how)

    def _compile(self) -> None:
        """Makes both programs ready by running them on no tokens: what that takes is compile time alone."""
        started = time.perf_counter()
        self._step = 0
        arguments = (self._params, self._sampler, self._eos)
        shapes = tuple((np.shape(leaf), leaf.dtype) for leaf in map(jnp.asarray, jax.tree.leaves(arguments)))
        key = (self._config, self._implementation, self._buckets, jax.tree.structure(arguments), shapes)
        if key in _ready:
            return
        state = self._prefill(self._prompts[0], np.zeros_like(self._prompts[1]), np.zeros_like(self._limits))
        limits = jnp.zeros_like(state.limits)
        jax.block_until_ready(self._decode(dataclasses.replace(state, limits=limits), 0))
        _ready.add(key)
        self.timing.compile_seconds = time.perf_counter() - started

    def _read(self, state: DecodeState, seen: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
        """Waits for a round; returns how many tokens each row has now, and those beyond `seen`."""
        self._output = jax.device_get(state.output)
        self._step = int(state.step)
        lengths = self._output.lengths[: self._rows]
        rows = zip(self._output.tokens, seen, lengths, strict=False)  # the bucket may have more rows
        return lengths, [tokens[start:end].tolist() for tokens, start, end in rows]


@jax.jit
def _row_keys(seeds: jax.Array, samples: jax.Array) -> jax.Array:
    return jax.vmap(lambda seed, sample: jax.random.fold_in(jax.random.key(seed), sample))(seeds, samples)


def _pad_sampler(sampler: Sampler, rows: int, batch: int) -> Sampler:
    """Extends numbers that are one per row to the bucket's rows."""

    def pad(leaf: Any) -> Any:
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != rows:
            return leaf
        return np.pad(np.asarray(leaf), [(0, batch - rows), *[(0, 0)] * (np.ndim(leaf) - 1)], mode="edge")

    return jax.tree.map(pad, sampler)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
