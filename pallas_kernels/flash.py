"""What the attention kernels for NVIDIA GPUs share: one block of 128 threads walks over the slots of one KV head.

The queries that a block works for (all query heads of the KV head; in prefill also several positions) are the narrow
side of both products, so that every key and value is read once for all of them:

    scores  [block_kv, columns] = keys [block_kv, head_dim] · queriesᵀ [head_dim, columns]
    sums    [columns]          += Σ weights,   weights = exp(scores − maximum)
    outᵀ    [head_dim, columns] += valuesᵀ [head_dim, block_kv] · weights [block_kv, columns]

`maximum` is unified_max for every block, known beforehand (FlashDecoding++, arXiv 2311.01282, §3): shares of the slots
are independent and only added. Without one it is the largest score so far, for which every step has to bring its
threads together and rescale: the online softmax. A column that the unified maximum did not suit is computed again with
the online softmax, and it alone is written again.

Weights of the unified maximum are bfloat16 in the second product also for float16 caches: exp reaches 3e10 if the
maximum is the lower end of the range, and float16 ends at 65504. Scaling them down into float16 instead would leave a
row of low scores in its subnormal numbers. A float16 value is then the exact sum of two bfloat16 numbers, which takes
a second product but no second read. The sums add the rounded weights, so that a row with one visible slot returns
that slot's value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import nvvm

from pallas_kernels.decode_attention.config import column_tile, m_warps
from pallas_kernels.safe_range import least_sum

LOG2E = math.log2(math.e)
LOWEST = -3e38  # stands for "no score yet"; finite, so that a difference of two is no NaN
_STEP = 16  # rows of an operand that are in registers at a time: the least that the tensor cores take

Ref = Any


def _layout(operand: str, rows: str) -> Any:
    """A property of `Flash`: how the threads share an operand of a product with so many rows."""
    return property(lambda flash: getattr(plgpu.Layout, operand)(flash.dtype, m_warps=m_warps(getattr(flash, rows))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flash:
    """Everything about a block's work that is known when the kernel is traced; scores are in units of log2.

    Attributes:
      columns: queries of a block, in whole tiles of both products.
      safe_end: the largest score that the unified maximum may meet.
      queries_wait: whether the queries wait in shared memory, or stay in registers.
      tma: copies by TMA (Hopper and newer, the interpreter) or by cp.async.
    """

    block_kv: int
    num_stages: int
    columns: int
    dtype: Any
    max_len: int
    head_dim: int
    scale: float
    soft_cap: float | None
    unified_max: float | None
    safe_end: float
    weights_dtype: Any
    queries_wait: bool
    tma: bool

    @property
    def tile(self) -> int:
        """Columns of a swizzled tile in shared memory: the widest of which head_dim is a multiple."""
        return _tile(self.head_dim)

    # operands and results of the two products
    scores = _layout("MMA_ACC", "block_kv")
    keys = _layout("MMA_LHS", "block_kv")
    queries = _layout("MMA_RHS", "block_kv")
    out = _layout("MMA_ACC", "head_dim")
    values = _layout("MMA_LHS", "head_dim")
    weights = _layout("MMA_RHS", "head_dim")


@dataclasses.dataclass(frozen=True)
class Shared:
    """A block's shared memory.

    Attributes:
      k_ring, v_ring: [num_stages, block_kv, head_dim].
      weights: [block_kv, columns].
      exchange: [columns] float32, one number a column on its way to the threads of the other product.
      wanted: [columns] float32, not 0 for the columns to be written.
      queries: [columns, head_dim] if they wait here.
      landed: num_stages barriers, TMA only.
    """

    k_ring: Ref
    v_ring: Ref
    weights: Ref
    exchange: Ref
    wanted: Ref
    queries: Any
    landed: Any


@dataclasses.dataclass(frozen=True)
class Span:
    """Slots start … stop of a sequence in the blocks first … last, scalars on the device; no query sees another slot.

    Where its queries differ, `positions` [columns] in shared memory are theirs: each sees the slots up to its own, the
    last `window` of them.
    """

    start: Array
    stop: Array
    first: Array
    last: Array
    positions: Any = None
    window: int | None = None


def _tile(width: int) -> int:
    return next(tile for tile in (64, 32, 16, 8) if width % tile == 0)


def fill(shape: tuple[int, ...], value: float, layout: Any) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along(vector: Array, shape: tuple[int, ...]) -> Array:
    """[columns] -> [rows, columns]."""
    return lax.broadcast_in_dim(vector, shape, (1,))


def _swizzled(shape: tuple[int, ...], dtype: Any, most: int = 64) -> Any:
    """Shared memory in tiles, at most so wide, that the tensor cores' loads read without bank conflicts."""
    tile = min(_tile(shape[-1]), most)
    if tile == 8:
        return plgpu.SMEM(shape, dtype)
    tiling = plgpu.TilingTransform((8, tile))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(2 * tile)))  # pyright: ignore[reportAbstractUsage]


def shared_types(flash: Flash) -> list[Any]:
    """The scratch that `take_shared` turns into `Shared`."""
    ring = _swizzled((flash.num_stages, flash.block_kv, flash.head_dim), flash.dtype)
    types: list[Any] = [ring, ring, _swizzled((flash.block_kv, flash.columns), flash.weights_dtype)]
    types.append(plgpu.SMEM((2, flash.columns), jnp.float32))
    if flash.queries_wait:
        types.append(_swizzled((flash.columns, flash.head_dim), flash.dtype, _STEP))
    if flash.tma:
        types.append(plgpu.Barrier(num_arrivals=2, num_barriers=flash.num_stages))
    return types


def take_shared(flash: Flash, refs: Sequence[Ref]) -> Shared:
    k_ring, v_ring, weights, vectors, *others = refs
    queries = others.pop(0) if flash.queries_wait else None
    landed = others.pop(0) if flash.tma else None
    return Shared(k_ring, v_ring, weights, vectors.at[0], vectors.at[1], queries, landed)


@plgpu.inline_mgpu()
def _commit_nothing(_) -> None:
    nvvm.cp_async_commit_group()


def _first_row(flash: Flash, block: Array) -> Array:
    """The slot a block is read from; the last block of a cache that it does not divide starts earlier."""
    return jnp.minimum(block * flash.block_kv, flash.max_len - flash.block_kv)


def _fetch(flash: Flash, shared: Shared, cache: Sequence[Ref], block: Array, span: Span) -> None:
    """Starts the copy of a block into its slot of the ring, if the span has such a block."""
    slot = lax.rem(block - span.first, flash.num_stages)
    options: dict[str, Any] = {"oob_mode": plgpu.OOBFillMode.PROMISE_IN_BOUNDS}
    if flash.tma:
        options = {"barrier": shared.landed.at[slot]}

    @pl.when(block < span.last)
    def _():
        rows = pl.ds(_first_row(flash, block), flash.block_kv)
        for source, ring in zip(cache, (shared.k_ring, shared.v_ring), strict=True):
            plgpu.copy_gmem_to_smem(source.at[rows, :], ring.at[slot], **options)

    if not flash.tma:  # the wait counts groups of copies, so there are two a step until the end

        @pl.when(block >= span.last)
        def _():
            _commit_nothing()  # pyright: ignore[reportCallIssue]
            _commit_nothing()  # pyright: ignore[reportCallIssue]


def _await(flash: Flash, shared: Shared, slot: Array) -> None:
    """Returns when the slot's block is there and no thread is at work on the block before it."""
    if flash.tma:
        plgpu.barrier_wait(shared.landed.at[slot])
        _release(flash)
    else:
        plgpu.wait_gmem_to_smem(2 * (flash.num_stages - 2))  # and for the other threads


def _release(flash: Flash) -> None:
    """Lets copies overwrite what all threads have read of the ring."""
    if flash.tma:
        plgpu.commit_smem()  # the copy engine writes by another path, which a barrier alone does not order


def pieces_of(queries: Ref, head_dim: int) -> list[Ref]:
    """Queries [columns, head_dim] that wait in shared memory, transposed, in pieces that few registers hold."""
    return [queries.at[:, pl.ds(at, _STEP)].T for at in range(0, head_dim, _STEP)]


def _block_scores(flash: Flash, queries: Sequence[Array | Ref], keys: Ref) -> Array:
    """keys [block_kv, head_dim] -> scores [block_kv, columns], times log2(e)."""
    scores, tile, at = fill((flash.block_kv, flash.columns), 0.0, flash.scores), flash.tile, 0
    for right in queries:
        if at % tile == 0:
            left = plgpu.load(keys.at[:, pl.ds(at, tile)], layout=flash.keys)
        if not isinstance(right, Array):
            right = plgpu.load(right, layout=flash.queries)
        scores = plgpu.mma(scores, left[:, at % tile : at % tile + right.shape[0]], right)
        at += right.shape[0]
    if flash.soft_cap is None:
        return scores * (flash.scale * LOG2E)
    # tanh by way of exp2: the hardware's tanh is good to three digits only
    double = jnp.exp2(scores * (2 * LOG2E * flash.scale / flash.soft_cap))
    return flash.soft_cap * LOG2E * (1 - 2 / (1 + double))


def _visible(flash: Flash, span: Span, block: Array) -> tuple[Array, Array, Array]:
    """Which scores [block_kv, columns] of a block count, and the rows low … high that some query sees."""
    shape, first = (flash.block_kv, flash.columns), _first_row(flash, block)
    low, high = jnp.maximum(span.start, block * flash.block_kv) - first, span.stop - first
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=flash.scores)
    visible = (row >= low) & (row < high)
    if span.positions is not None:
        newest = along(plgpu.load(span.positions, layout=flash.scores.reduce(0), optimized=False) - first, shape)
        visible &= row <= newest
        if span.window is not None:
            visible &= row > newest - span.window
    return visible, low, high


def _add_values(flash: Flash, out: Array, values: Ref, weights: Ref, low: Array, high: Array) -> Array:
    """out + valuesᵀ · weights; of the values [block_kv, head_dim] only the rows low … high are used.

    Rows outside are zeroed: their weights are zero, but 0 · NaN is NaN.
    """
    for at in range(0, flash.block_kv, _STEP):
        left = plgpu.load(values.at[pl.ds(at, _STEP), :].T, layout=flash.values)
        right = plgpu.load(weights.at[pl.ds(at, _STEP), :], layout=flash.weights, optimized=False)
        row = at + plgpu.broadcasted_iota(jnp.int32, left.shape, 1, layout=flash.values)
        left = jnp.where((row >= low) & (row < high), left, jnp.zeros((), left.dtype))
        if left.dtype == right.dtype:
            out = plgpu.mma(out, left, right)
            continue
        coarse = left.astype(right.dtype)
        fine = (left.astype(jnp.float32) - coarse.astype(jnp.float32)).astype(right.dtype)
        out = plgpu.mma(plgpu.mma(out, coarse, right), fine, right)
    return out


def to_out(flash: Flash, shared: Shared, vector: Array) -> Array:
    """[columns] of the first product -> of the second, whose columns may lie with other threads."""
    if m_warps(flash.block_kv) == m_warps(flash.head_dim):
        return vector
    shared.exchange[...] = vector
    return plgpu.load(shared.exchange, layout=flash.out.reduce(0), optimized=False)


def attend(
    flash: Flash, queries: Sequence[Array | Ref], cache: Sequence[Ref], shared: Shared, span: Span
) -> tuple[Array, ...]:
    """Attention over a span: outᵀ [head_dim, columns] before division, sums [columns], and the maximum [columns].

    The last of these only for the online softmax. With a unified maximum a sum is infinite where a score was too large
    for it: so the largest score needs no registers.

    queries: transposed, in pieces [tile, columns].
    """
    ahead, shape = flash.num_stages - 1, (flash.block_kv, flash.columns)

    def step(block: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        out, sums, *largest = carry
        slot = lax.rem(block - span.first, flash.num_stages)
        _await(flash, shared, slot)
        _fetch(flash, shared, cache, block + ahead, span)
        visible, low, high = _visible(flash, span, block)
        scores = jnp.where(visible, _block_scores(flash, queries, shared.k_ring.at[slot]), LOWEST)
        maximum = (flash.unified_max or 0.0) * LOG2E
        if largest:
            before, largest = largest[0], [jnp.maximum(largest[0], jnp.max(scores, axis=0))]
            kept, maximum = jnp.exp2(before - largest[0]), along(jnp.maximum(largest[0], LOWEST / 4), shape)
            out = out * along(to_out(flash, shared, kept), out.shape)
            sums = sums * along(kept, shape)
        weights = jnp.exp2(scores - maximum).astype(flash.weights_dtype)  # 0 where the score is LOWEST
        shared.weights[...] = weights  # a barrier before and after comes with it
        out = _add_values(flash, out, shared.v_ring.at[slot], shared.weights, low, high)
        added = weights.astype(jnp.float32)
        if not largest:
            added = jnp.where(scores > flash.safe_end, math.inf, added)
        return out, sums + added, *largest

    for block in range(ahead):
        _fetch(flash, shared, cache, span.first + block, span)
    carry = fill((flash.head_dim, flash.columns), 0.0, flash.out), fill(shape, 0.0, flash.scores)
    if flash.unified_max is None:
        carry = *carry, fill(shape[1:], LOWEST, flash.scores.reduce(0))
    out, sums, *largest = lax.fori_loop(span.first, span.last, step, carry)
    return out, jnp.sum(sums, axis=0), *largest


def finish(
    flash: Flash,
    shared: Shared,
    out: Array,
    sums: Array,
    real_and_seen: Callable[[], tuple[Array, Array]],
    row_of: Callable[[Array], Ref],
    again: Callable[[Flash], tuple[Array, Array]],
) -> Array | None:
    """Writes the output, and again with the online softmax where the unified maximum did not do.

    Args:
      out, sums: of `attend`, both in the layout of the output.
      real_and_seen: gives [columns], 1 for the queries to be written and 0 for others, and [columns] or a scalar, 1 for
        queries that see anything; the others get zeros.
      row_of: a column's row [head_dim] of the output.
      again: out and sums once more, in the form it is given.

    Returns:
      How many rows were computed again; None without a unified maximum.
    """
    real, seen = real_and_seen()
    shared.wanted[...] = real
    _write(flash, shared, row_of, out, sums + (1.0 - seen))  # 0 / 1 where nothing is seen
    if flash.unified_max is None:
        return None
    sound = (sums >= least_sum(flash.max_len)) & (sums < math.inf)  # also false for NaN
    unsound = jnp.where(sound, 0.0, real) * seen
    count = jnp.sum(unsound)

    @pl.when(count > 0)
    def _():
        shared.wanted[...] = unsound
        _release(flash)  # the ring begins anew
        _write(flash, shared, row_of, *again(dataclasses.replace(flash, unified_max=None)))

    return count.astype(jnp.int32)


def _write(flash: Flash, shared: Shared, row_of: Callable[[Array], Ref], out: Array, sums: Array) -> None:
    """Writes outᵀ [head_dim, columns] / sums to the rows of the columns that are wanted."""
    tile = column_tile(flash.head_dim)
    out = out / along(sums, out.shape)
    index = plgpu.broadcasted_iota(jnp.int32, (tile,), 0, layout=flash.out.reduce(0))
    for at in range(0, flash.columns, tile):
        part = out[:, at : at + tile]

        def write_row(i: Array, _: None, at=at, part=part) -> None:
            @pl.when(shared.wanted[at + i] > 0)
            def _():
                row = jnp.sum(jnp.where(along(index, part.shape) == i, part, 0.0), axis=1)
                plgpu.store(row_of(at + i), row.astype(flash.dtype), optimized=False)

        lax.fori_loop(0, tile, write_row, None)


def check(query: Array, keys: Array, values: Array) -> None:
    """Raises NotImplementedError for arrays without a kernel; query [..., num_heads, head_dim]."""
    dtypes, (num_heads, head_dim) = {query.dtype, keys.dtype, values.dtype}, query.shape[-2:]
    if len(dtypes) > 1 or query.dtype not in (jnp.float16, jnp.bfloat16):
        raise NotImplementedError(
            f"the kernel takes float16 or bfloat16, one for query, keys and values; got {sorted(map(str, dtypes))}; "
            'implementation="xla" takes others'
        )
    if head_dim % 16 or head_dim > 256:
        raise NotImplementedError(
            f'head_dim is a multiple of 16 up to 256; got {head_dim}; implementation="xla" takes others'
        )
    if num_heads // keys.shape[1] > 32:
        raise NotImplementedError(
            f'at most 32 query heads a KV head; got {num_heads} and {keys.shape[1]}; implementation="xla" takes more'
        )
    if keys.shape[2] % 8:
        raise NotImplementedError(f"the cache's max_len is a multiple of 8; got {keys.shape[2]}")
