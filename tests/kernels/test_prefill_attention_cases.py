"""What the tests of prefill attention share: a case with its arrays, and the answer in float64. Holds no test."""

from __future__ import annotations

import dataclasses
import functools

import ml_dtypes
import numpy as np
import tolerance
from test_decode_attention_cases import WIDE

from pallas_kernels.prefill_attention.config import PrefillAttentionConfig

SMALL = PrefillAttentionConfig(block_kv=32, num_stages=3, max_columns=32)
UNIFIED = {"unified_max": 0.0, "safe_range": WIDE}
SKIP = -1  # the position of a query that sees nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call.

    Attributes:
      starts: where each sequence's chunk begins in its cache.
      ragged: positions (sequence, number in the chunk) that see nothing.
      shuffled: whether the positions of a chunk are in no order.
      overflow: rows (sequence, number in the chunk, head) that are given a score of about 40.
      size: of the queries, so of the scores.
      tail: the queries grow row by row, the last by this factor: at 180 the scores reach about ±400, as OPT's do.
    """

    q_len: int = 16
    starts: tuple[int, ...] = (0, 60)
    ragged: tuple[tuple[int, int], ...] = ()
    shuffled: bool = False
    num_kv_heads: int = 2
    q_per_kv: int = 1
    max_len: int = 128
    head_dim: int = 64
    dtype: str = "float16"
    window: int | None = None
    soft_cap: float | None = None
    unified_max: float | None = None
    safe_range: tuple[float, float] | None = None
    config: PrefillAttentionConfig | None = SMALL
    overflow: tuple[tuple[int, int, int], ...] = ()
    size: float = 1.0
    tail: float = 1.0

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def tolerance(self) -> float:
        # rows that see few slots lie further from 0 than those of decode
        return tolerance.PREFILL * (tolerance.ONLINE if self.unified_max is None else tolerance.UNIFIED)[self.dtype]

    @property
    def options(self) -> dict:
        names = ("scale", "window", "soft_cap", "unified_max", "safe_range", "config")
        return {name: getattr(self, name) for name in names}

    @property
    def positions(self) -> np.ndarray:
        positions = np.array(self.starts)[:, None] + np.arange(self.q_len)
        if self.shuffled:
            positions = np.random.default_rng(1).permuted(positions, axis=1)
        for where in self.ragged:
            positions[where] = SKIP
        return positions.astype(np.int32)

    def visible(self, b: int, q: int) -> slice:
        position = int(self.positions[b, q])
        return slice(max(0, position - self.window + 1) if self.window else 0, position + 1)

    def arrays(self) -> list[np.ndarray]:
        """query, keys, values, positions; NaN and infinity in every slot outside what a sequence's queries see."""
        return list(_arrays(self))

    def answer(self) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
        """The output in float64, the rows to be computed again [batch, q_len, num_heads], and the scores' extremes."""
        return _answer(self)

    def check(self, out: np.ndarray, recomputed: np.ndarray) -> None:
        """Asserts that a result is the answer: recomputed [batch, num_kv_heads]."""
        expected, again, _ = self.answer()
        error = (np.abs(np.asarray(out, np.float64) - expected) / np.maximum(1, np.abs(expected))).max()
        assert error <= self.tolerance, f"off by {error:.3g}"
        counts = again.reshape(len(self.starts), self.q_len, self.num_kv_heads, -1).sum(axis=(1, 3))
        assert np.asarray(recomputed).tolist() == counts.tolist()


@functools.cache
def _arrays(case: Case) -> tuple[np.ndarray, ...]:
    dtype = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[case.dtype]
    random, batch = np.random.default_rng(0), len(case.starts)
    cache = (batch, case.num_kv_heads, case.max_len, case.head_dim)
    rows = (batch, case.q_len, case.num_kv_heads * case.q_per_kv)
    query = case.size * random.standard_normal((*rows, case.head_dim))
    query *= np.geomspace(1, case.tail, query[..., 0].size).reshape(*rows, 1)
    keys, values = random.standard_normal(cache), random.standard_normal(cache)
    for b, q, head in case.overflow:
        row = query[b, q, head]
        keys[b, head // case.q_per_kv, case.positions[b, q]] = 40 / case.scale * row / (row @ row)
    for b in range(batch):
        seen = [case.visible(b, q) for q in range(case.q_len) if case.positions[b, q] >= 0]
        first, last = min((s.start for s in seen), default=0), max((s.stop for s in seen), default=0)
        for array, poison in ((keys, np.nan), (values, np.inf)):
            array[b, :, :first] = array[b, :, last:] = poison
    return query.astype(dtype), keys.astype(dtype), values.astype(dtype), case.positions


@functools.cache
def _answer(case: Case) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    query, keys, values, _ = (array.astype(np.float64) for array in case.arrays())
    out, again, extremes = np.zeros(query.shape), np.zeros(query.shape[:3], bool), [0.0]
    for b, q, head in np.ndindex(again.shape):
        if case.positions[b, q] < 0:
            continue
        slots, kv_head = case.visible(b, q), head // case.q_per_kv
        scores = case.scale * keys[b, kv_head, slots] @ query[b, q, head]
        if case.soft_cap:
            scores = case.soft_cap * np.tanh(scores / case.soft_cap)
        weights = np.exp(scores - scores.max())
        out[b, q, head] = weights / weights.sum() @ values[b, kv_head, slots]
        extremes += [scores.min(), scores.max()]
        if case.unified_max is not None:
            vanished = np.exp(scores - case.unified_max).sum() < np.finfo(np.float32).tiny
            again[b, q, head] = scores.max() > case.safe_range[1] or vanished
    return out, again, (min(extremes), max(extremes))
