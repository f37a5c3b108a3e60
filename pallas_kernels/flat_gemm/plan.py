"""What is known of a product before it runs: shapes, segments, layouts, and what stands before and after it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flat_gemm.config import FlatGemmConfig

_SUMS = 64  # of one thread in float32, on CUDA cores
# y [m, n] after the product: a warp takes 32 columns of a row, or 8 of them four times, the four warps take four rows
EIGHTS = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 8), (1,))), warp_dims=(-3,), lane_dims=(plgpu.Replicated(4), -2), vector_dim=-1
)
ROWS = plgpu.Layout.TILED(plgpu.Tiling(((4, 32), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """What the rows of a fused query, key and value weight are.

    Attributes:
      query_eps, key_eps: of an RMSNorm over each head; None for none.
      query_offset, key_offset: added to their gains.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    query_eps: float | None = None
    key_eps: float | None = None
    query_offset: float = 0.0
    key_offset: float = 0.0

    @property
    def block_n(self) -> int | None:
        """Rows that a block must have: a head, if its norm is taken."""
        return None if self.query_eps is None and self.key_eps is None else self.head_dim

    def place(self, block, rows: int) -> tuple[Any, Any, Any, Any]:
        """A block's head, where in the head its rows start, how far their partners are, and whether they turn.

        A block holds `rows` rows and as many of their partners, so that a pair meets in one lane.
        """
        blocks = self.head_dim // (2 * rows)
        turning, half = self.rotary_dim // (2 * rows), self.rotary_dim // 2
        head, at = block // blocks, lax.rem(block, blocks)
        if turning == blocks:
            return head, at * rows, half, True
        turns = at < turning
        start = jnp.where(turns, at * rows, self.rotary_dim + (at - turning) * rows)
        return head, start, jnp.where(turns, half, (self.head_dim - self.rotary_dim) // 2), turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormPlan:
    """The norm before a product; its arrays are operands."""

    eps: float
    centered: bool
    bias: bool
    offset: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is known of a launch before it runs.

    Attributes:
      m: rows of x, padded.
      valid: rows of x that are multiplied; the others give zeros. All, unless on CUDA cores.
      n: weight rows of one segment.
      segments: parts of the weight of which a block takes equal shares: gate and up, or partners in a rotation.
      heads: None unless the product is query, key and value.
      batch: rows of the cache.
      tma: copies by TMA; else by cp.async.
      tensor_cores: whether the product is theirs (flat_gemm) or the CUDA cores' (gemv).
    """

    m: int
    valid: int
    n: int
    k: int
    dtype: Any
    config: FlatGemmConfig
    segments: int
    norm: NormPlan | None
    activation: str | None
    heads: Heads | None
    batch: int
    tma: bool
    tensor_cores: bool

    @property
    def rows(self) -> int:
        """Rows of each segment that a block owns."""
        return self.config.block_n // self.segments

    @property
    def live(self) -> int:
        """Rows of x that the epilogue sees: whole groups of four, one row a warp."""
        return -(-self.valid // 4) * 4

    @property
    def num_blocks(self) -> int:
        return -(-self.n // self.rows)

    @property
    def copies(self) -> int:
        """Copies of one step: the segments of the weight, and x for tensor cores."""
        return self.segments + (1 if self.tensor_cores else 0)

    @property
    def statistics(self) -> bool:
        """Whether x is read for its mean and size before the product, and normed before it is multiplied.

        Else an RMSNorm's squares are summed during the product, which is divided by the size of x afterwards. float16
        could not hold x times the gain before that division, whatever the size of x.
        """
        if self.norm is None:
            return False
        one_pass = self.tensor_cores and self.dtype == jnp.bfloat16 and not (self.norm.centered or self.norm.bias)
        return not one_pass

    @property
    def squares(self) -> bool:
        """Whether the squares of x are summed during the product."""
        return self.norm is not None and not self.statistics

    @property
    def chunk(self) -> int:
        """Columns of a step that are in registers at once: under a norm x is there in float32 too."""
        return self.config.block_k if self.norm is None else min(64, self.config.block_k)

    @property
    def k_lanes(self) -> int:
        """Lanes of a warp along k on CUDA cores; the more, the fewer conversions of x, and the more sums a thread."""
        fitting = (
            lanes
            for lanes in (8, 4, 2)
            if 8 * lanes <= self.config.block_k
            and 128 // lanes <= self.config.block_n
            and self.config.block_n * lanes // 16 * self.valid <= _SUMS
        )
        return next(fitting)

    @property
    def lanes(self) -> Any:
        """Of weights [block_n, block_k] on CUDA cores: 16 bytes of a row a lane, and no conflict between banks."""
        rows = 32 // self.k_lanes
        tiles = plgpu.Tiling(((4 * rows, 8 * self.k_lanes), (rows, 8)))
        order = (-2, -3) if self.k_lanes == 8 else (-3, -2)
        return plgpu.Layout.TILED(tiles, warp_dims=(-4,), lane_dims=order, vector_dim=-1)

    def first_row(self, block):
        """Where a block's rows start in a segment; the last block goes back, to end where the segment does."""
        start = block * self.rows
        return start if self.n % self.rows == 0 else jnp.minimum(start, self.n - self.rows)

    def weight_row(self, segment: int, block):
        """The first row of the weight in a block's segment."""
        if self.heads is None:
            return segment * self.n + self.first_row(block)
        head, start, distance, _ = self.heads.place(block, self.rows)
        return head * self.heads.head_dim + start + segment * distance

    def layout(self, operand: str) -> Any:
        """Of "LHS", "RHS" or "ACC" of the tensor cores."""
        return getattr(plgpu.Layout, f"MMA_{operand}")(self.dtype, m_warps=self.config.m_warps)
