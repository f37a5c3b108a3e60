"""How prefill attention is cut into blocks, and the rule that cuts it."""

from __future__ import annotations

import dataclasses

from pallas_kernels.decode_attention.config import ITEMSIZE, RESERVED, SYSTEM, column_tile
from pallas_kernels.targets import Target

RUN = 8  # queries that are copied together at the least: a tile of the tensor cores
_MAX_STAGES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """The queries of a block: query heads of one KV head at several positions, in runs of evenly spaced ones.

    With fewer than 8 query heads a run is one head at block_q positions; else it is heads of one position. A run that
    would pass the end is moved back, so that some queries stand in two columns, or in two blocks; the later is not
    written.

    Attributes:
      q_len: positions of a chunk.
      q_per_kv: query heads of a KV head.
      block_q: positions of a block.
      run: queries of a run, a multiple of 8.
      heads: whether a run goes along the heads; else along the positions.
      runs: their number.
      columns: run · runs, rounded up to whole tiles of both products; the last ones repeat the first.
    """

    q_len: int
    q_per_kv: int
    block_q: int
    run: int
    heads: bool
    runs: int
    columns: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillAttentionConfig:
    """Blocks of prefill attention.

    Attributes:
      block_kv: cache slots of one pipeline step, a multiple of 32.
      num_stages: steps that the ring in shared memory holds; one less are in flight.
      max_columns: queries (positions times query heads of a KV head) of a block, unless one position has more or 8
        positions have.
    """

    block_kv: int = 64
    num_stages: int = 2
    max_columns: int = 64

    def __post_init__(self) -> None:
        if self.block_kv <= 0 or self.block_kv % 32:
            raise ValueError(f"block_kv is a multiple of 32; got {self.block_kv}")
        if self.num_stages < 2:
            raise ValueError(
                f"num_stages is at least 2: one step is read while another is copied; got {self.num_stages}"
            )
        if self.max_columns <= 0 or self.max_columns % RUN:
            raise ValueError(f"max_columns is a multiple of {RUN}; got {self.max_columns}")

    def columns(self, q_len: int, q_per_kv: int, head_dim: int) -> Columns:
        """How the queries of a chunk are laid out; with fewer than 8 query heads q_len is at least 8."""
        tile = max(column_tile(self.block_kv), column_tile(head_dim))
        heads = q_per_kv >= RUN
        if heads:
            run = q_per_kv if q_per_kv % RUN == 0 else RUN
            block_q = min(q_len, max(1, self.max_columns // _round_up(q_per_kv, RUN)))
            runs = block_q * -(-q_per_kv // run)
        else:
            block_q = run = RUN * min(q_len // RUN, max(1, self.max_columns // (RUN * q_per_kv)))
            runs = q_per_kv
        return Columns(
            q_len=q_len,
            q_per_kv=q_per_kv,
            block_q=block_q,
            run=run,
            heads=heads,
            runs=runs,
            columns=_round_up(run * runs, tile),
        )

    def reread_factor(self, q_len: int, q_per_kv: int, head_dim: int) -> int:
        """How many blocks ask for a key or value that all queries of a chunk see: from device memory or a cache."""
        q_len = q_len if q_per_kv >= RUN else max(q_len, RUN)
        return -(-q_len // self.columns(q_len, q_per_kv, head_dim).block_q)

    def shared_bytes(self, q_per_kv: int, head_dim: int) -> int:
        """An upper bound of the shared memory of a block, bytes: the ring, the queries, the weights."""
        columns = self.columns(self.max_columns, q_per_kv, head_dim).columns
        ring = 2 * self.num_stages * self.block_kv * head_dim
        return (ring + columns * (head_dim + self.block_kv)) * ITEMSIZE + RESERVED


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def choose_config(
    *, q_per_kv: int, max_len: int, head_dim: int, target: Target, two_parts: bool = False
) -> PrefillAttentionConfig:
    """The rule, not measured on any card.

    As many columns as the registers hold without spilling: 64, 48 for head_dim over 96 or values split in two parts
    (float16 with a unified maximum), 32 for head_dim over 128. Blocks of 64 slots and the most stages, up to 4, with
    which two blocks share a multiprocessor, so that one computes while the other waits; if
    not even two stages do, those that fit one block; then the same with 32 slots.

    Raises:
      NotImplementedError: max_len is under 32, or two stages exceed the card's shared memory.
    """
    if max_len < 32:
        raise NotImplementedError(f"the kernel reads 32 slots at a time: give the cache at least 32; got {max_len=}")
    max_columns = 32 if head_dim > 128 else 48 if two_parts or head_dim > 96 else 64
    for block_kv in (64, 32):
        if block_kv > max_len:
            continue
        for resident in (2, 1):
            limit = min(target.shared_per_block, target.shared_per_sm // resident - SYSTEM)
            for num_stages in range(_MAX_STAGES, 1, -1):
                config = PrefillAttentionConfig(block_kv=block_kv, num_stages=num_stages, max_columns=max_columns)
                if config.shared_bytes(q_per_kv, head_dim) <= limit:
                    return config
    raise NotImplementedError(
        f"two steps of 32 slots of {head_dim=} do not fit the {target.shared_per_block} bytes of shared memory of "
        f"{target.name}; 256 and less does on every card known here"
    )
