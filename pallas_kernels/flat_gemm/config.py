"""How a flat GEMM is cut into blocks, and the rule that cuts it."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.targets import Target

MAX_M = 64  # beyond, the activations weigh as much as the weights, and XLA's dot is the better kernel
MAX_GEMV_M = 4  # beyond, the CUDA cores of an A100 are busier than its memory
MAX_SPLIT_K = 8
_DEEPEST = 6  # stages, where a multiprocessor has one block at most
_GEMV_STEP = 64 * 128  # weights of a step that the registers of a block hold on CUDA cores, beside x and the sums
_BLOCK_K = (128, 64, 32)  # 128 keeps a row of a tile at 256 bytes, two sectors of DRAM burst


def stage_width(m: int) -> int:
    """Row length, in float32, of a result [block_n, m] in shared memory.

    Mosaic wants multiples of 8; an odd one spreads the transposed read over four banks, an even one over two or one.
    """
    return 8 * (m // 8 | 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatGemmConfig:
    """Blocks of y[m, n] = x[m, k] · w[n, k]ᵀ with the weights as left operand.

    Attributes:
      block_n: weight rows of a block: 32, or a multiple of 64.
      block_k: columns of one pipeline step: 32, 64 or 128.
      num_stages: steps that the ring in shared memory holds; one less are in flight.
      split_k: blocks that share k of the same rows; the last to arrive adds their partial sums.
    """

    block_n: int = 64
    block_k: int = 128
    num_stages: int = 4
    split_k: int = 1

    def __post_init__(self) -> None:
        if self.block_n != 32 and (self.block_n <= 0 or self.block_n % 64):
            raise ValueError(f"block_n is 32 or a multiple of 64; got {self.block_n}")
        if self.block_k not in _BLOCK_K:
            raise ValueError(f"block_k is one of {_BLOCK_K}; got {self.block_k}")
        if self.num_stages < 2:
            raise ValueError(
                f"num_stages is at least 2: one step is read while another is copied; got {self.num_stages}"
            )
        if self.split_k < 1:
            raise ValueError(f"split_k is at least 1; got {self.split_k}")

    @property
    def m_warps(self) -> int:
        """Warps side by side along the rows of a block; the others share its columns."""
        return min(4, self.block_n // 16)

    def pad_m(self, m: int) -> int:
        """m rounded up to whole tiles of the tensor cores, 8 a warp along the columns, and to whole copies."""
        tile = max(8 * (4 // self.m_warps), 512 // self.block_k)
        return -(-m // tile) * tile

    def shared_bytes(self, m: int, dtype: DTypeLike) -> int:
        """Shared memory of a block, bytes: the ring, the result on its way to other lanes, and rounded."""
        m = self.pad_m(m)
        itemsize = jnp.dtype(dtype).itemsize
        ring = self.num_stages * (self.block_n + m) * self.block_k * itemsize
        return ring + self.block_n * (stage_width(m) * 4 + m * itemsize) + 1024

    def check(self, m: int, n: int, k: int, dtype: DTypeLike, *, segments: int = 1, gemv: bool = False) -> None:
        """Refuses what would read past the end of an array, or does not fit this configuration.

        Args:
          n: all rows of the weight.
          segments: parts of the weight that a block takes equal shares of: 2 for gate and up.
          gemv: on CUDA cores.

        Raises:
          NotImplementedError: type, m, n or k are not what the kernel is made for.
          ValueError: more steps in flight, or more splits, than k has.
        """
        if jnp.dtype(dtype) not in (jnp.float16, jnp.bfloat16):
            raise NotImplementedError(f"flat_gemm takes float16 or bfloat16; got {jnp.dtype(dtype).name}: use dense")
        if not 1 <= m <= MAX_M:
            raise NotImplementedError(f"flat_gemm takes 1 to {MAX_M} rows of x; got m = {m}: use dense")
        if n < self.block_n:
            raise NotImplementedError(f"flat_gemm needs n >= block_n; got n = {n}, block_n = {self.block_n}: use dense")
        if n // segments % 8:
            raise NotImplementedError(f"flat_gemm needs n as a multiple of 8; got n = {n // segments}: use dense")
        if self.block_n // segments % 32:
            raise NotImplementedError(f"{segments} segments of 32 rows need block_n >= {32 * segments}")
        if k % self.block_k:
            raise NotImplementedError(
                f"flat_gemm needs k as a multiple of block_k; got k = {k}, block_k = {self.block_k}: use dense"
            )
        if gemv and (self.block_n > 128 or self.block_n * self.block_k > _GEMV_STEP):
            raise NotImplementedError(
                f"gemv takes block_n up to 128, and {_GEMV_STEP} weights a step; got block_n = {self.block_n}, "
                f"block_k = {self.block_k}"
            )
        if (k // self.block_k) // self.split_k < self.num_stages - 1:
            raise ValueError(
                f"k / block_k = {k // self.block_k} steps are too few for split_k = {self.split_k} blocks with "
                f"{self.num_stages - 1} steps in flight each"
            )


def choose_config(
    m: int,
    n: int,
    k: int,
    dtype: DTypeLike,
    target: Target,
    *,
    segments: int = 1,
    unit: int | None = None,
    block_n: int | None = None,
    gemv: bool = False,
) -> FlatGemmConfig:
    """The blocks for one product on one card, by a rule that no measurement has touched.

    block_n is 128 from m = 32 on, where x would be re-read as often as the weights are read, else 64 (32 if n or a unit
    asks for it); block_k 128 or 64 (32 if k asks for it); num_stages 4 or 3; none that pads m if there is one that does
    not. The first in that order that lets two blocks share a multiprocessor is taken, else the first that fits alone.
    split_k is the smallest power of two that gives every multiprocessor two blocks, as long as a split keeps twice the
    steps that the ring holds. If even so some multiprocessors have none, the others get up to 6 stages: a small weight
    takes as long as its bytes in flight are few.

    Args:
      n: all rows of the weight.
      segments: parts of the weight of which a block takes equal shares.
      unit: rows that a block must divide; None for none: the last block then goes back to end with n.
      block_n: the only size that will do; None for any.
      gemv: on CUDA cores.

    Raises:
      NotImplementedError: no block suits n or k, or nothing fits the card; the message says what is needed.
    """
    sizes_n, sizes_k = _block_sizes(m, n, k, segments, unit, block_n)
    stages = sorted({max(2, min(num, k // sizes_k[-1] + 1)) for num in (4, 3)}, reverse=True)
    candidates = [
        FlatGemmConfig(block_n=block_n, block_k=block_k, num_stages=num_stages)
        for block_n, block_k, num_stages in itertools.product(sizes_n, sizes_k, stages)
        if k // block_k >= num_stages - 1 and not (gemv and block_n * block_k > _GEMV_STEP)
    ]
    unpadded = [config for config in candidates if config.pad_m(m) == m]  # a pad would be a kernel of its own
    for limit in (target.shared_per_sm // 2 - 1024, target.shared_per_block):
        for config in unpadded or candidates:
            if config.shared_bytes(m, dtype) <= limit:
                split = dataclasses.replace(config, split_k=_choose_split_k(config, n, k, target))
                return _deepen(split, m, n, k, dtype, target)
    raise NotImplementedError(
        f"flat_gemm at m = {m} does not fit the {target.shared_per_block} bytes of {target.name}: use dense"
    )


def _deepen(config: FlatGemmConfig, m: int, n: int, k: int, dtype: DTypeLike, target: Target) -> FlatGemmConfig:
    """More stages for a grid that has less than a block for each multiprocessor, as far as k and the card allow."""
    if -(-n // config.block_n) * config.split_k >= target.num_sms:
        return config
    steps = k // config.block_k // config.split_k
    for num_stages in range(min(_DEEPEST, steps), config.num_stages, -1):
        deeper = dataclasses.replace(config, num_stages=num_stages)
        if deeper.shared_bytes(m, dtype) <= target.shared_per_block:
            return deeper
    return config


def _block_sizes(
    m: int, n: int, k: int, segments: int, unit: int | None, block_n: int | None
) -> tuple[list[int], list[int]]:
    """Candidates for block_n and block_k, best first."""
    fixed = (block_n,) if block_n else (128, 64, 32) if m >= 32 else (64, 32)
    sizes_n = [size for size in fixed if 32 * segments <= size <= n and (unit or size) % size == 0]
    sizes_k = [size for size in (128, 64) if k % size == 0] or [size for size in (32,) if k % size == 0]
    if k % 32:
        raise NotImplementedError(f"flat_gemm needs k as a multiple of 32; got k = {k}: use dense")
    if not sizes_n and unit:
        raise NotImplementedError(
            f"flat_gemm needs heads in blocks of {block_n or 32 * segments} rows; got head_dim and rotary_dim with the "
            f"common divisor {unit}: use dense"
        )
    if n // segments % 8:
        raise NotImplementedError(f"flat_gemm needs n as a multiple of 8; got n = {n // segments}: use dense")
    if not sizes_n:
        raise NotImplementedError(f"flat_gemm needs n >= {32 * segments}; got n = {n}: use dense")
    return sizes_n, sizes_k


def _choose_split_k(config: FlatGemmConfig, n: int, k: int, target: Target) -> int:
    steps, split_k = k // config.block_k, 1
    while -(-n // config.block_n) * split_k < 2 * target.num_sms and 2 * split_k <= MAX_SPLIT_K:
        if steps // (2 * split_k) < 2 * config.num_stages:
            break
        split_k *= 2
    return split_k
