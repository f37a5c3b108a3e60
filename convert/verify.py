"""A converted checkpoint against its source: our engine beside transformers + torch, on the same prompts.

Both sides compute in float32. If the checkpoint was written in a narrower type, the source's weights are
rounded to that type first: what is judged is the conversion, not the rounding that was asked for, so one
tolerance serves every type.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.hf_reference import find_python, run_reference
from jaxdecode import engine
from jaxdecode.cache import init_cache
from jaxdecode.checkpoint import load_config, load_manifest, load_params
from jaxdecode.config import ModelConfig
from jaxdecode.generation import jit_generate
from jaxdecode.models import Params

# float32 sums in another order; logits of trained models reach 10 … 40, so a part grows with them.
LOGIT_TOLERANCE, LOGIT_SLOPE = 1e-3, 5e-5
KL_TOLERANCE = 1e-5  # nats, at the worst position
TOP_K, TOP_K_AGREEMENT = 10, 0.99  # mean share of the ten best ids that both sides name
MAX_POSITIONS = 64  # per prompt whose logits are compared
LONGEST = 2048  # positions of the longest sequence, or the model's fewer: the reference's scores grow with their square
_ALONE = 512  # prompts longer than this do not share a batch, which would be as long as its longest

_TEXTS = (
    "The",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at a lower temperature on a mountain because the air presses on it less. " * 12,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptResult:
    """How far the two sides are apart on one prompt.

    Attributes:
      tokens: length of the prompt.
      positions: how many positions' logits were compared, over the prompt and its greedy continuation.
      logit_difference, largest_logit: the largest absolute difference, and the largest absolute logit.
      kl: largest KL divergence of ours from theirs at a position, in nats.
      top_agreement: mean share of the ten best ids that both name.
      greedy_equal: greedy tokens that agree before the first that differs.
      greedy_tokens: greedy tokens compared.
      tie_gap: where they first differ, how far apart their two best logits are; None if they never differ.
      logprob_difference: largest difference of the log-probabilities of the greedy tokens that agree.
    """

    tokens: int
    positions: int
    logit_difference: float
    largest_logit: float
    kl: float
    top_agreement: float
    greedy_equal: int
    greedy_tokens: int
    tie_gap: float | None
    logprob_difference: float

    @property
    def tolerance(self) -> float:
        """Largest logit difference allowed."""
        return LOGIT_TOLERANCE + LOGIT_SLOPE * self.largest_logit

    def problems(self) -> list[str]:
        """What is out of bounds; a greedy token may differ only where the source's two best tie."""
        found = []
        # `not <= < inf`, so that NaN and infinity count as problems
        if not self.logit_difference <= self.tolerance < np.inf:
            found.append(f"logits differ by {self.logit_difference:.2e} (allowed {self.tolerance:.2e})")
        if not self.kl <= KL_TOLERANCE:
            found.append(f"KL divergence {self.kl:.2e} (allowed {KL_TOLERANCE:.0e})")
        if not self.top_agreement >= TOP_K_AGREEMENT:
            found.append(f"top-{TOP_K} agreement {self.top_agreement:.1%} (needed {TOP_K_AGREEMENT:.0%})")
        if not self.logprob_difference <= self.tolerance:
            found.append(f"log-probabilities differ by {self.logprob_difference:.2e} (allowed {self.tolerance:.2e})")
        if self.tie_gap is not None and not self.tie_gap <= self.tolerance:
            found.append(f"greedy token {self.greedy_equal + 1} differs, their two best {self.tie_gap:.2e} apart")
        return [f"prompt of {self.tokens} tokens: {problem}" for problem in found]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of `verify_against_source`; `str()` is a table for people."""

    results: tuple[PromptResult, ...]
    reference: str
    dtype: str

    @property
    def problems(self) -> list[str]:
        return [problem for result in self.results for problem in result.problems()]

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As a certificate records it."""
        prompts = [dataclasses.asdict(row) | {"tolerance": row.tolerance} for row in self.results]
        bounds = {"kl": KL_TOLERANCE, "top_agreement": TOP_K_AGREEMENT, "top_k": TOP_K}
        return {"reference": self.reference, "weights_dtype": self.dtype, "bounds": bounds, "prompts": prompts}

    def __str__(self) -> str:
        return "\n".join([self.table(), *self.problems, "verify: PASS" if self.passed else "verify: FAIL"])

    def table(self) -> str:
        """A line a prompt, and where two tokens were as good as equal."""
        lines = [
            f"compared with {self.reference}, float32 arithmetic, weights in {self.dtype}",
            "prompt  positions  logit diff  allowed   largest KL  top-10   greedy   logprob diff",
        ]
        for row in self.results:
            lines.append(
                f"{row.tokens:6d}  {row.positions:9d}  {row.logit_difference:10.2e}  {row.tolerance:.1e}  "
                f"{row.kl:10.2e}  {row.top_agreement:6.1%}  {row.greedy_equal:3d}/{row.greedy_tokens:<3d}  "
                f"{row.logprob_difference:12.2e}"
            )
        lines += [
            f"prompt of {row.tokens} tokens: near tie at greedy token {row.greedy_equal + 1}, "
            f"the source's two best logits are {row.tie_gap:.1e} apart"
            for row in self.results
            if row.tie_gap is not None and not row.problems()
        ]
        return "\n".join(lines)


def verify_against_source(
    checkpoint: str | Path,
    source: str | Path,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 64,
    longest: int = LONGEST,
    attention: str = "eager",
    python: str | None = None,
) -> Report:
    """Compares logits and greedy tokens of a converted checkpoint with transformers + torch on its source.

    The reference runs in its own process, one prompt at a time; ours runs short prompts in one ragged batch.

    Args:
      source: what it was converted from: a Hugging Face directory, a GGUF file or a hub name.
      prompts: token ids; None takes a few texts through the checkpoint's tokenizer, if any, else made-up ids, and
        made-up ids up to the last position.
      longest: last position at most, in place of the model's own.
      python: an interpreter with torch; None for `hf_reference.find_python`.

    Raises:
      ReferenceUnavailable: no Python with torch was found, or the reference process failed.
      ValueError: `checkpoint` does not load.
    """
    python = python or find_python()  # before anything slow
    with tempfile.TemporaryDirectory(prefix="jaxdecode-verify-") as folder:
        output = Path(folder) / "reference.npz"
        options = {"prompts": prompts, "max_new_tokens": max_new_tokens, "longest": longest, "attention": attention}
        job = reference_job(checkpoint, source, output, **options)
        run_reference([job], python=python)
        return judge(checkpoint, job)


def reference_job(
    checkpoint: str | Path,
    source: str | Path,
    output: Path,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 64,
    longest: int = LONGEST,
    attention: str = "eager",
) -> dict[str, Any]:
    """What `run_reference` is to compute for `judge`; arguments as for `verify_against_source`."""
    dtypes = _dtypes(checkpoint)
    if prompts is None:
        limit = _limit(checkpoint, longest)
        max_new_tokens = min(max_new_tokens, limit // 2)
        prompts = _default_prompts(Path(checkpoint), limit - max_new_tokens)
    return {
        "source": str(_local(source)),
        "output": str(output),
        "prompts": [list(prompt) for prompt in prompts],
        "attention": attention,
        "max_new_tokens": max_new_tokens,
        "forward": "sequence",
        "positions": [_spread(len(prompt) + max_new_tokens) for prompt in prompts],
        "top_k": TOP_K,
        "weights_dtype": dtypes[0] if len(dtypes) == 1 and dtypes != ["float32"] else None,
    }


def judge(checkpoint: str | Path, job: dict[str, Any]) -> Report:
    """Runs our side of a job whose reference output is there, and compares.

    Raises:
      ValueError: `checkpoint` does not load.
    """
    params, config = load_params(checkpoint, dtype=jnp.float32)
    prompts, positions = job["prompts"], job["positions"]
    ours = _greedy(params, config, prompts, job["max_new_tokens"])
    with np.load(job["output"]) as reference:
        results = tuple(
            _compare(params, config, prompt, where, _part(reference, index), ours[index])
            for index, (prompt, where) in enumerate(zip(prompts, positions, strict=True))
        )
        meta = json.loads(str(reference["meta"]))
    name = f"transformers {meta['transformers']} + torch {meta['torch']} ({meta['attention']} attention)"
    return Report(results=results, reference=name, dtype=" and ".join(_dtypes(checkpoint)))


def full_logits(params: Params, config: ModelConfig, sequence: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """Our float32 logits [len(positions), vocab_size] from one teacher-forced pass over a sequence."""
    # Padded to powers of two, so that sequences of many lengths share a program; causality hides the padding.
    tokens = np.zeros((1, _power_of_two(len(sequence), 128)), np.int32)
    tokens[0, : len(sequence)] = sequence
    where = np.zeros(_power_of_two(len(positions), MAX_POSITIONS), np.int32)
    where[: len(positions)] = positions
    lengths = jnp.asarray([len(sequence)], jnp.int32)
    logits = _logits_at(params, config, jnp.asarray(tokens), lengths, jnp.asarray(where))
    return np.asarray(logits)[: len(positions)]


def _logits(params, config: ModelConfig, tokens, lengths, where):
    cache = init_cache(config, 1, tokens.shape[1], params["embed"]["weight"].dtype)
    hidden, *_ = engine.extend(params, config, cache, tokens, jnp.int32(0), lengths)
    return engine.logits(params, config, hidden[0, where])


_logits_at = jax.jit(_logits, static_argnames=("config",))


def _greedy(params, config: ModelConfig, prompts: list[list[int]], max_new_tokens: int):
    """(tokens, logprobs), each [max_new_tokens], of every prompt."""
    groups = [[index] for index, prompt in enumerate(prompts) if len(prompt) > _ALONE]
    made = {}
    for group in [*groups, [index for index, prompt in enumerate(prompts) if len(prompt) <= _ALONE]]:
        if not group:
            continue
        lengths = np.asarray([len(prompts[index]) for index in group], np.int32)
        tokens = np.zeros((len(group), lengths.max()), np.int32)
        for row, index in zip(tokens, group, strict=True):
            row[: len(prompts[index])] = prompts[index]
        key, arrays = jax.random.key(0), (jnp.asarray(tokens), jnp.asarray(lengths))
        out = jax.device_get(jit_generate(params, config, *arrays, key, max_new_tokens=max_new_tokens))
        made |= dict(zip(group, zip(out.tokens, out.logprobs, strict=True), strict=True))
    return [made[index] for index in range(len(prompts))]


def _compare(params, config, prompt, positions, theirs: dict[str, np.ndarray], ours) -> PromptResult:
    our_tokens, our_logprobs = ours
    sequence = [*prompt, *theirs["tokens"].tolist()]
    our_logits, logits = full_logits(params, config, sequence, positions), theirs["logits"]
    our_top = np.argpartition(our_logits, -TOP_K, axis=-1)[:, -TOP_K:]
    shared = [len(set(a) & set(b)) / TOP_K for a, b in zip(our_top.tolist(), theirs["top_ids"].tolist(), strict=True)]
    total = len(theirs["tokens"])
    agree = our_tokens == theirs["tokens"]
    equal = total if agree.all() else int(agree.argmin())
    gap = None
    if equal < total:
        best = np.sort(theirs["step_logits"][equal])[-2:]
        gap = float(best[1] - best[0])
    drift = np.abs(our_logprobs[:equal] - theirs["step_logprobs"][:equal])
    return PromptResult(
        tokens=len(prompt), positions=len(positions), greedy_equal=equal, greedy_tokens=total, tie_gap=gap,
        logit_difference=float(np.abs(our_logits - logits).max()), largest_logit=float(np.abs(logits).max()),
        kl=largest_kl(logits, our_logits), top_agreement=float(np.mean(shared)),
        logprob_difference=float(drift.max(initial=0.0)),
    )  # fmt: skip


def largest_kl(logits: np.ndarray, other: np.ndarray) -> float:
    """max over rows of sum p log(p / q), p = softmax(logits), q = softmax(other), in float64."""

    def log_softmax(rows):
        rows = rows.astype(np.float64)
        rows -= rows.max(axis=-1, keepdims=True)
        return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))

    with np.errstate(invalid="ignore"):  # an infinite logit gives NaN, which no tolerance lets pass
        log_p, log_q = log_softmax(logits), log_softmax(other)
        return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).max())


def _spread(length: int) -> list[int]:
    """Up to MAX_POSITIONS positions over a sequence, its first and last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, MAX_POSITIONS)).round().astype(int)).tolist()


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _dtypes(checkpoint: str | Path) -> list[str]:
    return sorted({row["dtype"] for row in load_manifest(checkpoint)["tensors"].values()})


def _limit(checkpoint: str | Path, longest: int) -> int:
    """Positions that may be compared: those the model was trained for, `longest` at most."""
    config, source = load_config(checkpoint), load_manifest(checkpoint)["source"]
    limit = min(source.get("trained_positions", config.max_position), longest)
    if limit < 2:
        raise ValueError(f"a comparison needs at least 2 positions, a prompt's and a new token's; got {limit}")
    return limit


def _default_prompts(checkpoint: Path, room: int) -> list[list[int]]:
    """Some short prompts, and one of `room` tokens."""
    from jaxdecode.tokenizer import encode_text, load_tokenizer

    config, folder = load_config(checkpoint), checkpoint / "tokenizer"
    tokenizer = load_tokenizer(folder) if any(folder.glob("*")) else None
    made_up = np.random.RandomState(0).randint(config.vocab_size, size=max(room, 300)).tolist()
    prompts = [made_up[:length] for length in (1, 7, 50, 300)]
    if tokenizer is not None:
        prompts = [*(encode_text(tokenizer, text) for text in _TEXTS), made_up[:50]]
    return [prompt for prompt in prompts if len(prompt) < room] + [made_up[:room]]


def _local(source: str | Path) -> Path:
    if Path(source).exists():
        return Path(source).resolve()
    from convert.hub import download

    return download(str(source))


def _part(reference: Any, index: int) -> dict[str, np.ndarray]:
    names = ("tokens", "step_logits", "step_logprobs", "logits", "top_ids")
    return {name: reference[f"{name}/{index}"] for name in names}
