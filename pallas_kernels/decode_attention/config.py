"""How decode attention is cut into blocks, and the rule that cuts it."""

from __future__ import annotations

import dataclasses

from pallas_kernels.targets import Target

ITEMSIZE = 2  # bytes of float16 and bfloat16
MAX_SPLIT_KV = 64  # beyond, adding the partial results up takes longer than the keys and values they save
_MAX_STAGES = 4
RESERVED = 4096  # bytes a block needs besides its ring: reductions across warps, barriers, alignment
SYSTEM = 1024  # bytes of a multiprocessor's shared memory that the system keeps for every block


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeAttentionConfig:
    """Blocks of decode attention.

    Attributes:
      block_kv: cache slots of one pipeline step, a multiple of 32.
      num_stages: steps that the ring in shared memory holds; one less are in flight.
      split_kv: blocks that share the valid slots of one KV head; the last to arrive combines their partial results.
    """

    block_kv: int = 64
    num_stages: int = 2
    split_kv: int = 1

    def __post_init__(self) -> None:
        if self.block_kv <= 0 or self.block_kv % 32:
            raise ValueError(f"block_kv is a multiple of 32; got {self.block_kv}")
        if self.num_stages < 2:
            raise ValueError(
                f"num_stages is at least 2: one step is read while another is copied; got {self.num_stages}"
            )
        if self.split_kv < 1:
            raise ValueError(f"split_kv is at least 1; got {self.split_kv}")

    def columns(self, q_per_kv: int, head_dim: int) -> int:
        """Query heads of a KV head, rounded up to whole tiles of both products."""
        tile = max(column_tile(self.block_kv), column_tile(head_dim))
        return -(-q_per_kv // tile) * tile

    def query_in_shared(self, q_per_kv: int, head_dim: int) -> bool:
        """Whether the queries wait in shared memory; up to 4096 numbers they take at most 64 registers a thread."""
        return self.columns(q_per_kv, head_dim) * head_dim > 4096

    def shared_bytes(self, q_per_kv: int, head_dim: int) -> int:
        """An upper bound of the shared memory of a block, bytes: the ring, the weights, queries that wait."""
        columns = self.columns(q_per_kv, head_dim)
        ring = 2 * self.num_stages * self.block_kv * head_dim
        waiting = columns * head_dim if self.query_in_shared(q_per_kv, head_dim) else 0
        return (ring + self.block_kv * columns + waiting) * ITEMSIZE + RESERVED


def m_warps(rows: int) -> int:
    """Warps side by side along the rows of a product with `rows` rows; the others share its columns."""
    return next(warps for warps in (4, 2, 1) if rows % (16 * warps) == 0)


def column_tile(rows: int) -> int:
    """Columns that a tile of a product with `rows` rows holds: 8 for each warp along the columns."""
    return 8 * (4 // m_warps(rows))


def choose_config(
    *, batch: int, num_kv_heads: int, q_per_kv: int, max_len: int, head_dim: int, target: Target
) -> DecodeAttentionConfig:
    """The rule, not measured on any card.

    The ring: blocks of 64 slots, and as many stages up to 4 as let two blocks share a multiprocessor, so that one
    computes while the other waits; if not even two stages do, those that fit one block; then the same with 32 slots.
    The splits: the fewest for which the last wave of blocks leaves less than a fifth of the card idle; each split keeps
    at least two blocks of a full cache, and there are at most 64.

    Raises:
      NotImplementedError: max_len is under 32, or two stages exceed the card's shared memory.
    """
    if max_len < 32:
        raise NotImplementedError(f"the kernel reads 32 slots at a time: give the cache at least 32; got {max_len=}")
    block_kv, num_stages, resident = _choose_ring(q_per_kv, max_len, head_dim, target)
    slots = resident * target.num_sms
    most = max(1, min(MAX_SPLIT_KV, max_len // (2 * block_kv)))

    def idle(split_kv: int) -> float:
        blocks = batch * num_kv_heads * split_kv
        return 1 - blocks / (-(-blocks // slots) * slots)

    enough = (split_kv for split_kv in range(1, most + 1) if idle(split_kv) < 0.2)
    split_kv = next(enough, min(range(1, most + 1), key=idle))
    return DecodeAttentionConfig(block_kv=block_kv, num_stages=num_stages, split_kv=split_kv)


def _choose_ring(q_per_kv: int, max_len: int, head_dim: int, target: Target) -> tuple[int, int, int]:
    """block_kv, num_stages, and how many such blocks a multiprocessor holds at once."""
    for block_kv in (64, 32):
        if block_kv > max_len:
            continue
        for resident in (2, 1):
            limit = min(target.shared_per_block, target.shared_per_sm // resident - SYSTEM)
            for num_stages in range(_MAX_STAGES, 1, -1):
                config = DecodeAttentionConfig(block_kv=block_kv, num_stages=num_stages)
                if config.shared_bytes(q_per_kv, head_dim) <= limit:
                    return block_kv, num_stages, resident
    raise NotImplementedError(
        f"two steps of 32 slots of {head_dim=} do not fit the {target.shared_per_block} bytes of shared memory of "
        f"{target.name}; 256 and less does on every card known here"
    )
