"""What kernels ask of device memory, in bytes, by arithmetic from their blocks; tests count the same in execution."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one launch reads.

    Attributes:
      least: weights, or keys and values in the valid range, each byte once.
      requested: what is asked for of those, the rest of a last block of slots and rows that two blocks share included.
      activations: x, asked for by every block that needs it; after the first time the level-2 cache answers.
    """

    least: int
    requested: int
    activations: int


def product_traffic(*, blocks: int, block_rows: int, rows_of_x: int, n: int, k: int, itemsize: int) -> Traffic:
    """Of a product x [m, k] with a weight [n, k], whatever the split of k.

    Args:
      blocks: along n.
      block_rows: weight rows of a block, all segments together.
      rows_of_x: that a block reads, padding included.
    """
    row = k * itemsize
    return Traffic(least=n * row, requested=blocks * block_rows * row, activations=blocks * rows_of_x * row)


def attention_traffic(
    lengths: Sequence[int],
    *,
    block_kv: int,
    split_kv: int,
    num_kv_heads: int,
    num_heads: int,
    head_dim: int,
    itemsize: int,
    window: int | None = None,
) -> tuple[Traffic, int]:
    """Of decode attention over caches with `lengths` valid slots, whose queries are activations; and busy blocks."""
    slot = 2 * num_kv_heads * head_dim * itemsize
    valid = blocks = splits = 0
    for length in lengths:
        start = max(0, length - window) if window else 0
        mine = -(-length // block_kv) - start // block_kv
        valid, blocks = valid + length - start, blocks + mine
        each = max(1, -(-mine // split_kv))
        splits += max(1, -(-mine // each))
    activations = splits * num_heads * head_dim * itemsize
    traffic = Traffic(least=valid * slot, requested=blocks * block_kv * slot, activations=activations)
    return traffic, splits * num_kv_heads
