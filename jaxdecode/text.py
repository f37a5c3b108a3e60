"""The text layer: a model with its tokenizer; prompts in, completions out.

Prompts are padded to few shapes (see `decoding.Buckets`), so another prompt, temperature, seed or set
of weights compiles nothing. Stop strings are matched here, on the host, alike for `generate` and `stream`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxdecode import generation, tokenizer
from jaxdecode.checkpoint import load_params
from jaxdecode.compilation import enable_cache
from jaxdecode.config import ModelConfig, positions_needed
from jaxdecode.decoding import Buckets, Run, Timing
from jaxdecode.sampling import Greedy, Sampler
from jaxdecode.tokenizer import Message, TextBuilder

Prompt = str | Sequence[Message]
FinishReason = Literal["eos", "stop", "length"]

_STOP_CHUNK = 16  # tokens decoded between two looks at the text
_MAX_BATCH = 32  # rows decoded together; more prompts take turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What one prompt was continued with.

    Attributes:
      text: without the end token, cut before a stop string.
      tokens: everything generated, the end token included.
      logprobs: of each token, under the model's own distribution.
      timing: of the whole batch it was generated in.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    prompt_tokens: int
    timing: Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How probable a text is: logprobs[i] belongs to tokens[i + 1]; the first token has none."""

    tokens: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.total / len(self.logprobs))


class TextStream(Iterator[str]):
    """Pieces of one completion as they come; `completion` is there once they have ended."""

    completion: Completion | None = None

    def __init__(self, pieces: Iterator[str | Completion]):
        self._pieces = pieces

    def __next__(self) -> str:
        for piece in self._pieces:
            if isinstance(piece, str):
                return piece
            self.completion = piece
        raise StopIteration


@dataclasses.dataclass
class LanguageModel:
    """Parameters, their configuration and a transformers tokenizer (None: token ids only).

    The parameters may be replaced by others of the same shapes; nothing is compiled again. `implementation` forces one
    for all operations, see `jaxdecode.generate`.
    """

    params: Any
    config: ModelConfig
    tokenizer: Any = None
    implementation: str | None = None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        sampler: Sampler = Greedy(),
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        num_samples: int = 1,
        stop: str | Sequence[str] = (),
        chat: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Continues every prompt; what a prompt gets does not depend on the others in the call.

        Args:
          prompts: a text, a conversation (list of {"role", "content"}), or a list of either.
          max_new_tokens: most tokens a completion may have.
          sampler: see `jaxdecode.sampler`; its numbers may be one per prompt.
          seed: of all prompts; sample i of a prompt draws with fold_in(key(seed), i).
          seeds: one per prompt instead.
          num_samples: completions per prompt; they follow each other in the result.
          stop: strings that end a completion and are cut off.
          chat: wrap each text in the model's chat template; a conversation always is.
          progress: called with the number of tokens of the batch so far, every few tokens.

        Raises:
          ValueError: empty prompt, prompt too long for the model, an option out of range, no tokenizer.
        """
        rows = self._rows(prompts, max_new_tokens, seed, seeds, num_samples, chat)
        stop = _stop_strings(stop)
        chunk = _STOP_CHUNK if stop or progress else max_new_tokens
        completions: list[Completion] = []
        for first in range(0, len(rows), _MAX_BATCH):
            part = slice(first, first + _MAX_BATCH)
            part_sampler = _rows_of_sampler(sampler, len(rows) // num_samples, num_samples, part)
            batch = _Batch(self, rows[part], part_sampler, max_new_tokens, stop)
            for _ in batch.advance(chunk):
                if progress:
                    progress(sum(len(c.tokens) for c in completions) + sum(map(len, batch.tokens)))
            completions += batch.completions()
        return completions

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        sampler: Sampler = Greedy(),
        seed: int = 0,
        stop: str | Sequence[str] = (),
        chat: bool = False,
    ) -> TextStream:
        """Yields the text of `generate` for one prompt, piece by piece; arguments as for `generate`."""
        rows = self._rows([prompt], max_new_tokens, seed, None, 1, chat)
        batch = _Batch(self, rows, sampler, max_new_tokens, _stop_strings(stop))

        def pieces() -> Iterator[str | Completion]:
            for texts in batch.advance(1):
                if texts[0]:
                    yield texts[0]
            yield batch.completions()[0]

        return TextStream(pieces())

    def score(self, texts: str | Sequence[str]) -> list[Score]:
        """Log-probabilities of given texts, token by token.

        Raises:
          ValueError: a text of fewer than two tokens, or longer than the model allows.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        encoded = [tokenizer.encode_text(self._tokenizer(), text) for text in texts]
        for text, tokens in zip(texts, encoded, strict=True):
            if len(tokens) < 2:
                raise ValueError(f"a text needs at least 2 tokens to be scored; {text!r} has {len(tokens)}")
            self._check_length(len(tokens), 0)
        scores = []
        for first in range(0, len(encoded), _MAX_BATCH):
            part = encoded[first : first + _MAX_BATCH]
            tokens, lengths = Buckets.of_texts(part, self.config.max_position).pad(part)
            logprobs = generation.jit_score(
                self.params, self.config, tokens, lengths, implementation=self.implementation
            )
            logprobs = np.asarray(logprobs)
            for row, values in zip(part, logprobs, strict=False):  # the bucket may have more rows
                scores.append(Score(tokens=row, logprobs=[float(x) for x in values[: len(row) - 1]]))
        return scores

    def encode(self, prompt: Prompt, *, chat: bool = False) -> list[int]:
        """Tokens of a text or a conversation, as `generate` would feed them."""
        if isinstance(prompt, str) and not chat:
            return tokenizer.encode_text(self._tokenizer(), prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.encode_chat(self._tokenizer(), messages)

    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the model's, else the tokenizer's."""
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return self.config.eos_token_ids or (() if eos is None else (eos,))

    def _rows(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int,
        seed: int,
        seeds: Sequence[int] | None,
        num_samples: int,
        chat: bool,
    ) -> list[_Row]:
        if max_new_tokens < 1 or num_samples < 1:
            raise ValueError(
                f"max_new_tokens and num_samples must be at least 1; got {max_new_tokens} and {num_samples}"
            )
        listed = _as_list(prompts)
        seeds = [seed] * len(listed) if seeds is None else list(seeds)
        if len(seeds) != len(listed):
            raise ValueError(f"seeds must be one per prompt; got {len(seeds)} for {len(listed)} prompts")
        rows = []
        for prompt, own_seed in zip(listed, seeds, strict=True):
            tokens = self.encode(prompt, chat=chat)
            self._check_length(len(tokens), max_new_tokens)
            rows += [_Row(tokens, own_seed, sample) for sample in range(num_samples)]
        return rows

    def _check_length(self, prompt_tokens: int, max_new_tokens: int) -> None:
        needed = positions_needed(prompt_tokens, max_new_tokens)
        if needed > self.config.max_position:
            raise ValueError(
                f"prompt and new tokens must fit the model's {self.config.max_position} positions; got "
                f"{prompt_tokens} + {max_new_tokens}, which need {needed}: {self.config.ways_to_fit}"
            )

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                "this checkpoint has no tokenizer: convert it again from a source that has one, or pass "
                "token ids to jaxdecode.generate"
            )
        return self.tokenizer


def load(path: str | Path, *, dtype: Any = None, implementation: str | None = None) -> LanguageModel:
    """Loads a checkpoint that `jaxdecode convert` wrote, and turns on the compilation cache.

    Args:
      path: the checkpoint's folder.
      dtype: of the parameters in memory; None as stored.
      implementation: forces one for all operations, see `jaxdecode.generate`.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: something else is there; the message says how to convert it.
    """
    path = Path(path).expanduser()
    _check_checkpoint(path)
    enable_cache()
    params, config = load_params(path, dtype=dtype)
    return LanguageModel(params, config, tokenizer.load_tokenizer(path / "tokenizer"), implementation)


def _check_checkpoint(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; `jaxdecode convert SOURCE {path}` makes one")
    if path.suffix == ".gguf" or (path / "config.json").exists():
        kind = "a GGUF file" if path.suffix == ".gguf" else "a Hugging Face checkpoint"
        target = path.with_name(f"{path.stem if path.suffix == '.gguf' else path.resolve().name}-jax")
        raise ValueError(
            f"{path} is {kind}; convert it once: `jaxdecode convert {path} {target}`, load {target}"
        )
    if not path.is_dir() or not (path / "manifest").exists():
        raise ValueError(f"{path} is no jaxdecode checkpoint (no manifest); `jaxdecode convert` makes one")


@dataclasses.dataclass(frozen=True)
class _Row:
    tokens: list[int]
    seed: int
    sample: int


class _Batch:
    """Rows generated together: the engine's run and one `TextBuilder` a row."""

    def __init__(
        self,
        model: LanguageModel,
        rows: list[_Row],
        sampler: Sampler,
        max_new_tokens: int,
        stop: tuple[str, ...],
    ):
        self.tokens: list[list[int]] = [[] for _ in rows]
        self._rows = rows
        self._eos = frozenset(model.eos_token_ids())
        self._builders = [TextBuilder(model.tokenizer, row.tokens, stop) for row in rows]
        self._run = Run(
            model.params,
            model.config,
            [row.tokens for row in rows],
            seeds=[(row.seed, row.sample) for row in rows],
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            eos_token_ids=model.eos_token_ids(),
            implementation=model.implementation,
        )

    def advance(self, chunk: int) -> Iterator[list[str]]:
        """Yields each row's new text, after the first token and then every `chunk` tokens."""
        for fresh in self._run.rounds(chunk):
            texts = [self._feed(row, tokens) for row, tokens in enumerate(fresh)]
            self._run.stop_rows([builder.stopped for builder in self._builders])
            yield texts
        yield [builder.finish() for builder in self._builders]

    def _feed(self, row: int, tokens: list[int]) -> str:
        builder, text = self._builders[row], ""
        for token in tokens:
            if builder.stopped:
                break
            self.tokens[row].append(token)
            if token not in self._eos:
                text += builder.feed(token)
        return text

    def completions(self) -> list[Completion]:
        return [self._completion(index) for index in range(len(self._rows))]

    def _completion(self, index: int) -> Completion:
        tokens, builder = self.tokens[index], self._builders[index]
        reason: FinishReason = "eos" if tokens and tokens[-1] in self._eos else "length"
        return Completion(
            text=builder.text,
            tokens=tokens,
            logprobs=self._run.logprobs(index, len(tokens)),
            finish_reason="stop" if builder.stopped else reason,
            prompt_tokens=len(self._rows[index].tokens),
            timing=self._run.timing,
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping)):
        return [prompts]  # pyright: ignore[reportReturnType]
    if not prompts:
        raise ValueError("no prompts were given")
    return list(prompts)  # pyright: ignore[reportReturnType]


def _stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in strings:
        raise ValueError("a stop string must not be empty")
    return strings


def _rows_of_sampler(sampler: Sampler, prompts: int, num_samples: int, part: slice) -> Sampler:
    """The sampler of some rows, its numbers that are one per prompt repeated for every sample."""

    def rows(leaf: Any) -> Any:
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != prompts:
            return leaf
        return np.repeat(np.asarray(leaf), num_samples, axis=0)[part]

    return jax.tree.map(rows, sampler)
