"""What the tests of decode attention share: a case with its arrays, and the answer in float64. Holds no test."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import tolerance

from pallas_kernels.decode_attention.config import DecodeAttentionConfig

SMALL = DecodeAttentionConfig(block_kv=32, num_stages=3, split_kv=2)
WIDE = (-30.0, 30.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call.

    Attributes:
      overflow: rows (sequence, head) that are given a score of about 40.
      size: of the queries, so of the scores.
      tail: the queries grow row by row, the last by this factor: at 180 the scores reach about ±400, as OPT's do.
      rows: of the query, those past the batch NaN; None for the batch.
    """

    lengths: tuple[int, ...] = (100, 33)
    num_kv_heads: int = 2
    q_per_kv: int = 1
    max_len: int = 128
    head_dim: int = 64
    dtype: str = "float16"
    window: int | None = None
    soft_cap: float | None = None
    unified_max: float | None = None
    safe_range: tuple[float, float] | None = None
    config: DecodeAttentionConfig | None = SMALL
    overflow: tuple[tuple[int, int], ...] = ()
    size: float = 1.0
    tail: float = 1.0
    rows: int | None = None

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def tolerance(self) -> float:
        return (tolerance.ONLINE if self.unified_max is None else tolerance.UNIFIED)[self.dtype]

    @property
    def options(self) -> dict:
        names = ("scale", "window", "soft_cap", "unified_max", "safe_range", "config")
        return {name: getattr(self, name) for name in names}

    def arrays(self) -> list[np.ndarray]:
        """query, keys, values, lengths; NaN and infinity in every slot past a length."""
        dtype = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[self.dtype]
        random, batch = np.random.default_rng(0), len(self.lengths)
        cache = (batch, self.num_kv_heads, self.max_len, self.head_dim)
        query = self.size * random.standard_normal((batch, self.num_kv_heads * self.q_per_kv, self.head_dim))
        query *= np.geomspace(1, self.tail, query[..., 0].size).reshape(*query.shape[:2], 1)
        keys, values = random.standard_normal(cache), random.standard_normal(cache)
        for b, head in self.overflow:
            row = query[b, head]
            keys[b, head // self.q_per_kv, self.lengths[b] - 1] = 40 / self.scale * row / (row @ row)
        for b, length in enumerate(self.lengths):
            keys[b, :, length:], values[b, :, length:] = np.nan, np.inf
        query = np.concatenate([query, np.full(((self.rows or batch) - batch, *query.shape[1:]), np.nan)])
        return [query.astype(dtype), keys.astype(dtype), values.astype(dtype), np.array(self.lengths, np.int32)]

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest score that counts."""
        query, keys = (array.astype(np.float64) for array in self.arrays()[:2])
        keys = np.repeat(keys, self.q_per_kv, axis=1)
        scores = [self.scale * keys[b, :, :n] @ query[b, :, :, None] for b, n in enumerate(self.lengths)]
        return min(part.min() for part in scores), max(part.max() for part in scores)

    def answer(self) -> tuple[np.ndarray, np.ndarray]:
        """The output in float64, and the rows to be computed again, [batch, num_heads]."""
        query, keys, values, _ = (array.astype(np.float64) for array in self.arrays())
        out, again = np.zeros(query.shape), np.zeros((len(self.lengths), query.shape[1]), bool)
        for b, head in np.ndindex(again.shape):
            length = self.lengths[b]
            slots = slice(max(0, length - self.window) if self.window else 0, length)
            scores = self.scale * keys[b, head // self.q_per_kv, slots] @ query[b, head]
            if length == 0:
                continue
            if self.soft_cap:
                scores = self.soft_cap * np.tanh(scores / self.soft_cap)
            weights = np.exp(scores - scores.max())
            out[b, head] = weights / weights.sum() @ values[b, head // self.q_per_kv, slots]
            if self.unified_max is not None:
                vanished = np.exp(scores - self.unified_max).sum() < np.finfo(np.float32).tiny
                again[b, head] = scores.max() > self.safe_range[1] or vanished
        return out, again

    def check(self, out: np.ndarray, recomputed: np.ndarray) -> None:
        """Asserts that a result is the answer: recomputed [batch, num_kv_heads]."""
        expected, again = self.answer()
        error = np.abs(np.asarray(out, np.float64) - expected).max()
        assert error <= self.tolerance, f"off by {error:.3g}"
        assert np.asarray(recomputed).tolist() == again.reshape(*recomputed.shape, -1).sum(axis=2).tolist()
