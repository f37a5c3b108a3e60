"""`decode_attention` on NVIDIA GPUs through Pallas Mosaic GPU (FlashDecoding++, arXiv 2311.01282, §3).

One block of 128 threads walks over the slots of one KV head, or over its share of them, with all query heads of that
KV head, so that every key and value is read once. The queries are the narrow side of both products:

    scores  [block_kv, columns] = keys [block_kv, head_dim] · queriesᵀ [head_dim, columns]
    sums    [columns]          += Σ weights,   weights = exp(scores − maximum)
    outᵀ    [head_dim, columns] += valuesᵀ [head_dim, block_kv] · weights [block_kv, columns]

`columns` is q_per_kv rounded up to tiles of the tensor cores (8 for head_dim 64, 128 and 256; 16 for 96; 32 for 80);
what is beyond repeats the first query and is never written. Keys, values and sequences need no padding.

`maximum` is unified_max for every block, known beforehand: the shares are independent and only added. Without one it
is the largest score so far, for which every step has to bring its threads together and rescale: the online softmax.

Weights of the unified maximum are bfloat16 in the second product also for float16 caches: exp reaches 3e10 if the
maximum is the lower end of the range, and float16 ends at 65504. Scaling them down into float16 instead would leave a
row of low scores in its subnormal numbers. A float16 value is then the exact sum of two bfloat16 numbers, which takes
a second product but no second read. The sums add the rounded weights, so that a row with one visible slot returns
that slot's value.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import nvvm

from pallas_kernels.decode_attention.config import DecodeAttentionConfig, choose_config, m_warps
from pallas_kernels.last_arriver import arrive
from pallas_kernels.targets import Target, this_device

LOG2E = math.log2(math.e)
LOWEST = -3e38  # stands for "no score yet"; finite, so that a difference of two is no NaN
HEADROOM = 60.0  # exp of it times 32k slots times the largest float16 value is a finite float32
_STEP = 16  # slots of one product with the values

Ref = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """Everything about a call that is known when the kernel is traced; scores are in units of log2."""

    config: DecodeAttentionConfig
    dtype: Any
    q_per_kv: int
    max_len: int
    head_dim: int
    scale: float
    window: int | None
    soft_cap: float | None
    unified_max: float | None
    largest: float
    weights_dtype: Any
    tma: bool
    one_kernel: bool

    @property
    def columns(self) -> int:
        return self.config.columns(self.q_per_kv, self.head_dim)

    @property
    def tile(self) -> int:
        """Columns of a swizzled tile in shared memory: the widest of which head_dim is a multiple."""
        return next(tile for tile in (64, 32, 16) if self.head_dim % tile == 0)

    @property
    def least_sum(self) -> float:
        """Under it a thousandth of a denominator may have vanished: each weight under float32's least normal does."""
        return float(jnp.finfo(jnp.float32).tiny) * 1024 * self.max_len

    @property
    def scores(self) -> Any:
        return plgpu.Layout.MMA_ACC(self.dtype, m_warps=m_warps(self.config.block_kv))

    @property
    def queries(self) -> Any:
        return plgpu.Layout.MMA_RHS(self.dtype, m_warps=m_warps(self.config.block_kv))

    @property
    def out(self) -> Any:
        return plgpu.Layout.MMA_ACC(self.dtype, m_warps=m_warps(self.head_dim))

    @property
    def values(self) -> Any:
        return plgpu.Layout.MMA_LHS(self.dtype, m_warps=m_warps(self.head_dim))

    @property
    def weights(self) -> Any:
        return plgpu.Layout.MMA_RHS(self.dtype, m_warps=m_warps(self.head_dim))


@dataclasses.dataclass(frozen=True)
class _Shared:
    """A block's shared memory.

    Attributes:
      k_ring, v_ring: [num_stages, block_kv, head_dim].
      weights: [block_kv, columns].
      exchange: [columns] float32, one number a column on its way to the threads of the other product.
      queries: [columns, head_dim] if they do not fit the registers.
      landed: num_stages barriers, TMA only.
    """

    k_ring: Ref
    v_ring: Ref
    weights: Ref
    exchange: Ref
    queries: Any
    landed: Any


@dataclasses.dataclass(frozen=True)
class _Refs:
    """The arrays of one KV head: query, out [q_per_kv, head_dim]; cache, twice [max_len, head_dim]; recomputed []."""

    query: Ref
    cache: tuple[Ref, Ref]
    out: Any
    recomputed: Any


@dataclasses.dataclass(frozen=True)
class _Span:
    """Slots start … stop of a sequence, in the blocks first … last; all scalars on the device."""

    start: Array
    stop: Array
    first: Array
    last: Array


def _fill(shape: tuple[int, ...], value: float, layout: Any) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _along(vector: Array, shape: tuple[int, ...]) -> Array:
    """[columns] -> [rows, columns]."""
    return lax.broadcast_in_dim(vector, shape, (1,))


@plgpu.inline_mgpu()
def _commit_nothing(_) -> None:
    nvvm.cp_async_commit_group()


def _first_row(plan: _Plan, block: Array) -> Array:
    """The slot a block is read from; the last block of a cache that it does not divide starts earlier."""
    return jnp.minimum(block * plan.config.block_kv, plan.max_len - plan.config.block_kv)


def _fetch(plan: _Plan, shared: _Shared, cache: Sequence[Ref], block: Array, span: _Span) -> None:
    """Starts the copy of a block into its slot of the ring, if the span has such a block."""
    slot = lax.rem(block - span.first, plan.config.num_stages)
    options: dict[str, Any] = {"oob_mode": plgpu.OOBFillMode.PROMISE_IN_BOUNDS}
    if plan.tma:
        options = {"barrier": shared.landed.at[slot]}

    @pl.when(block < span.last)
    def _():
        rows = pl.ds(_first_row(plan, block), plan.config.block_kv)
        for source, ring in zip(cache, (shared.k_ring, shared.v_ring), strict=True):
            plgpu.copy_gmem_to_smem(source.at[rows, :], ring.at[slot], **options)

    if not plan.tma:  # the wait counts groups of copies, so there are two a step until the end

        @pl.when(block >= span.last)
        def _():
            _commit_nothing()  # pyright: ignore[reportCallIssue]
            _commit_nothing()  # pyright: ignore[reportCallIssue]


def _await(plan: _Plan, shared: _Shared, slot: Array) -> None:
    """Returns when the slot's block is there and no thread is at work on the block before it."""
    if plan.tma:
        plgpu.barrier_wait(shared.landed.at[slot])
        _release(plan)
    else:
        plgpu.wait_gmem_to_smem(2 * (plan.config.num_stages - 2))  # and for the other threads


def _release(plan: _Plan) -> None:
    """Lets copies overwrite what all threads have read of the ring."""
    if plan.tma:
        plgpu.commit_smem()  # the copy engine writes by another path, which a barrier alone does not order


def _load_queries(plan: _Plan, query: Ref, shared: _Shared) -> list[Array | Ref]:
    """query [q_per_kv, head_dim] -> its transpose in pieces [tile, columns] for the first product."""
    pieces = []
    for at in range(0, plan.head_dim, plan.tile):
        part = pl.ds(at, plan.tile)
        if plan.q_per_kv == plan.columns:
            piece = plgpu.load(query.at[:, part].T, layout=plan.queries, optimized=False)
        else:
            piece = _gather_columns(plan, query, part)
        if shared.queries is not None:
            waiting = shared.queries.at[:, part].T
            plgpu.store(waiting, piece, optimized=False)
            piece = waiting
        pieces.append(piece)
    return pieces


def _gather_columns(plan: _Plan, query: Ref, part: Any) -> Array:
    """A piece [tile, columns] head by head; the columns past the last head repeat the first."""
    shape = (plan.tile, plan.columns)
    for head in range(plan.q_per_kv):
        row = plgpu.load(query.at[head, part], layout=plan.queries.reduce(1), optimized=False)
        row = lax.broadcast_in_dim(row, shape, (0,))
        if head == 0:
            piece = row
            continue
        # by way of a vector: a two-dimensional iota in this layout counts wrongly in JAX 0.12
        column = plgpu.broadcasted_iota(jnp.int32, shape[1:], 0, layout=plan.queries.reduce(0))
        piece = jnp.where(_along(column, shape) == head, row, piece)
    return piece


def _block_scores(plan: _Plan, queries: Sequence[Array | Ref], keys: Ref) -> Array:
    """keys [block_kv, head_dim] -> scores [block_kv, columns], times log2(e)."""
    scores = _fill((plan.config.block_kv, plan.columns), 0.0, plan.scores)
    left = plgpu.Layout.MMA_LHS(plan.dtype, m_warps=m_warps(plan.config.block_kv))
    for i, right in enumerate(queries):
        if not isinstance(right, Array):
            right = plgpu.load(right, layout=plan.queries, optimized=False)
        scores = plgpu.mma(scores, plgpu.load(keys.at[:, pl.ds(i * plan.tile, plan.tile)], layout=left), right)
    if plan.soft_cap is None:
        return scores * (plan.scale * LOG2E)
    # tanh by way of exp2: the hardware's tanh is good to three digits only
    double = jnp.exp2(scores * (2 * LOG2E * plan.scale / plan.soft_cap))
    return plan.soft_cap * LOG2E * (1 - 2 / (1 + double))


def _add_values(plan: _Plan, out: Array, values: Ref, weights: Ref, low: Array, high: Array) -> Array:
    """out + valuesᵀ · weights; of the values [block_kv, head_dim] only the rows low … high are used.

    Rows outside are zeroed: their weights are zero, but 0 · NaN is NaN.
    """
    for at in range(0, plan.config.block_kv, _STEP):
        left = plgpu.load(values.at[pl.ds(at, _STEP), :].T, layout=plan.values)
        right = plgpu.load(weights.at[pl.ds(at, _STEP), :], layout=plan.weights, optimized=False)
        row = at + plgpu.broadcasted_iota(jnp.int32, left.shape, 1, layout=plan.values)
        left = jnp.where((row >= low) & (row < high), left, jnp.zeros((), left.dtype))
        if left.dtype == right.dtype:
            out = plgpu.mma(out, left, right)
            continue
        coarse = left.astype(right.dtype)
        fine = (left.astype(jnp.float32) - coarse.astype(jnp.float32)).astype(right.dtype)
        out = plgpu.mma(plgpu.mma(out, coarse, right), fine, right)
    return out


def _to_out(plan: _Plan, shared: _Shared, vector: Array) -> Array:
    """[columns] of the first product -> of the second, whose columns may lie with other threads."""
    if m_warps(plan.config.block_kv) == m_warps(plan.head_dim):
        return vector
    shared.exchange[...] = vector
    return plgpu.load(shared.exchange, layout=plan.out.reduce(0), optimized=False)


def _attend(
    plan: _Plan, queries: Sequence[Array | Ref], cache: Sequence[Ref], shared: _Shared, span: _Span
) -> tuple[Array, Array, Array]:
    """Attention over a span: outᵀ [head_dim, columns] before division, sums [columns], largest score [columns]."""
    block_kv, ahead = plan.config.block_kv, plan.config.num_stages - 1
    shape = (block_kv, plan.columns)
    unified = plan.unified_max is not None

    def step(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, sums, largest = carry
        slot = lax.rem(block - span.first, plan.config.num_stages)
        _await(plan, shared, slot)
        _fetch(plan, shared, cache, block + ahead, span)
        first = _first_row(plan, block)
        low, high = jnp.maximum(span.start, block * block_kv) - first, span.stop - first
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plan.scores)
        visible = (row >= low) & (row < high)
        scores = jnp.where(visible, _block_scores(plan, queries, shared.k_ring.at[slot]), LOWEST)
        if unified:
            largest, maximum = jnp.maximum(largest, scores), (plan.unified_max or 0.0) * LOG2E
        else:
            before, largest = largest, jnp.maximum(largest, jnp.max(scores, axis=0))
            kept, maximum = jnp.exp2(before - largest), _along(largest, shape)
            out = out * _along(_to_out(plan, shared, kept), out.shape)
            sums = sums * _along(kept, shape)
        weights = jnp.where(visible, jnp.exp2(scores - maximum), 0.0).astype(plan.weights_dtype)
        shared.weights[...] = weights  # a barrier before and after comes with it
        out = _add_values(plan, out, shared.v_ring.at[slot], shared.weights, low, high)
        return out, sums + weights.astype(jnp.float32), largest

    for block in range(ahead):
        _fetch(plan, shared, cache, span.first + block, span)
    out = _fill((plan.head_dim, plan.columns), 0.0, plan.out)
    sums = _fill(shape, 0.0, plan.scores)
    largest = _fill(shape, LOWEST, plan.scores) if unified else _fill(shape[1:], LOWEST, plan.scores.reduce(0))
    out, sums, largest = lax.fori_loop(span.first, span.last, step, (out, sums, largest))
    return out, jnp.sum(sums, axis=0), jnp.max(largest, axis=0) if unified else largest


def _combine(plan: _Plan, partials: Sequence[Ref], busy: Array) -> tuple[Array, Array, Array]:
    """Adds up the partial results [split_kv, …] of the first `busy` splits, in their order."""
    outs, sums, largests = partials
    vector = plan.out.reduce(0)

    def load(ref: Ref, layout: Any) -> Array:
        return plgpu.load(ref, layout=layout, optimized=False)

    def add(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        part, weight = load(outs.at[i], plan.out), load(sums.at[i], vector)
        if plan.unified_max is None:
            factor = jnp.exp2(load(largests.at[i], vector) - largest)
            part, weight = part * _along(factor, part.shape), weight * factor
        return carry[0] + part, carry[1] + weight

    def higher(i: Array, largest: Array) -> Array:
        return jnp.maximum(largest, load(largests.at[i], vector))

    largest = lax.fori_loop(0, busy, higher, _fill((plan.columns,), LOWEST, vector))
    zero = _fill((plan.head_dim, plan.columns), 0.0, plan.out), _fill((plan.columns,), 0.0, vector)
    return *lax.fori_loop(0, busy, add, zero), largest


def _write(plan: _Plan, out: Ref, result: Array, sums: Array, only: Array | None) -> None:
    """Writes out [q_per_kv, head_dim] from outᵀ [head_dim, columns] / sums; `only` the columns where it is not 0."""
    result = result / _along(sums, result.shape)
    index = plgpu.broadcasted_iota(jnp.int32, (plan.columns,), 0, layout=plan.out.reduce(0))
    column = _along(index, result.shape)

    def write_head(head: Array, _: None) -> None:
        wanted = True if only is None else jnp.sum(jnp.where(index == head, only, 0.0)) > 0

        @pl.when(wanted)
        def _():
            row = jnp.sum(jnp.where(column == head, result, 0.0), axis=1)
            plgpu.store(out.at[head], row.astype(plan.dtype), optimized=False)

    lax.fori_loop(0, plan.q_per_kv, write_head, None)


def _finish(plan: _Plan, call: _Refs, shared: _Shared, span: _Span, totals: tuple[Array, Array, Array]) -> None:
    """Writes the output of one KV head, and again with the online softmax where the unified maximum did not do.

    totals: outᵀ [head_dim, columns], sums [columns], largest score [columns], all in the layout of the output.
    """
    out, sums, largest = totals
    some = jnp.where(span.last > span.first, 1.0, 0.0)
    _write(plan, call.out, out, sums + (1.0 - some), None)  # 0 / 1 for an empty sequence
    if plan.unified_max is None:
        return
    head = plgpu.broadcasted_iota(jnp.int32, (plan.columns,), 0, layout=plan.out.reduce(0))
    sound = (largest <= plan.largest) & (sums >= plan.least_sum)  # also false for NaN
    unsound = jnp.where(sound | (head >= plan.q_per_kv), 0.0, 1.0) * some
    count = jnp.sum(unsound)
    call.recomputed[...] = count.astype(jnp.int32)

    @pl.when(count > 0)
    def _():
        _release(plan)  # the ring begins anew
        online = dataclasses.replace(plan, unified_max=None)
        queries = _load_queries(plan, call.query, shared)
        again, sums, _ = _attend(online, queries, call.cache, shared, span)
        _write(plan, call.out, again, _to_out(plan, shared, sums), unsound)


def _whole_span(plan: _Plan, length: Array) -> _Span:
    """The visible slots of a sequence."""
    stop = jnp.clip(length, 0, plan.max_len)
    start = jnp.int32(0) if plan.window is None else jnp.maximum(stop - plan.window, 0)
    block_kv = plan.config.block_kv
    return _Span(start=start, stop=stop, first=start // block_kv, last=(stop + block_kv - 1) // block_kv)


def _share(plan: _Plan, span: _Span, split: Array) -> tuple[_Span, Array]:
    """The blocks of one split, and how many splits have any; of an empty sequence the first one has it."""
    count, split_kv = span.last - span.first, plan.config.split_kv
    each = jnp.maximum((count + split_kv - 1) // split_kv, 1)
    first = jnp.minimum(span.first + split * each, span.last)
    share = dataclasses.replace(span, first=first, last=jnp.minimum(first + each, span.last))
    return share, jnp.maximum((count + each - 1) // each, 1)


def _shared_types(plan: _Plan) -> list[Any]:
    """What `_take_shared` turns into `_Shared`."""
    config, float32 = plan.config, jnp.float32
    tiling = plgpu.TilingTransform((8, plan.tile))  # pyright: ignore[reportAbstractUsage]
    tiles = (tiling, plgpu.SwizzleTransform(2 * plan.tile))  # pyright: ignore[reportAbstractUsage]
    ring = plgpu.SMEM((config.num_stages, config.block_kv, plan.head_dim), plan.dtype, transforms=tiles)
    types: list[Any] = [ring, ring, plgpu.SMEM((config.block_kv, plan.columns), plan.weights_dtype)]
    types += [plgpu.SMEM((plan.columns,), float32), plgpu.SMEM((1,), jnp.int32)]
    if config.query_in_shared(plan.q_per_kv, plan.head_dim):
        types.append(plgpu.SMEM((plan.columns, plan.head_dim), plan.dtype))
    if plan.tma:
        types.append(plgpu.Barrier(num_arrivals=2, num_barriers=config.num_stages))
    return types


def _take_shared(plan: _Plan, refs: Sequence[Ref]) -> tuple[_Shared, Ref]:
    k_ring, v_ring, weights, exchange, told, *others = refs
    queries = others.pop(0) if plan.config.query_in_shared(plan.q_per_kv, plan.head_dim) else None
    landed = others.pop(0) if plan.tma else None
    shared = _Shared(k_ring=k_ring, v_ring=v_ring, weights=weights, exchange=exchange, queries=queries, landed=landed)
    return shared, told


def _take_head(plan: _Plan, refs: Sequence[Ref], batch: Array, kv_head: Array) -> _Refs:
    query, keys, values, out, *recomputed = refs
    heads = pl.ds(kv_head * plan.q_per_kv, plan.q_per_kv)
    return _Refs(
        query=query.at[batch, heads],
        cache=(keys.at[batch, kv_head], values.at[batch, kv_head]),
        out=None if out is None else out.at[batch, heads],
        recomputed=recomputed[0].at[batch, kv_head] if recomputed else None,
    )


def _attend_kernel(plan: _Plan, query: Ref, keys: Ref, values: Ref, lengths: Ref, arrivals: Ref, *refs: Ref) -> None:
    """One split of one KV head of one sequence: grid (batch, num_kv_heads, split_kv).

    query, out [batch, num_heads, head_dim]; keys, values [batch, num_kv_heads, max_len, head_dim]; lengths [batch];
    arrivals, recomputed [batch, num_kv_heads]; partial results [batch, num_kv_heads, split_kv, …].
    """
    num_results, num_partials = _num_results(plan) if plan.one_kernel else 0, 3 if plan.config.split_kv > 1 else 0
    results, partials = refs[:num_results], refs[num_results : num_results + num_partials]
    shared, told = _take_shared(plan, refs[num_results + num_partials :])
    batch, kv_head, split = (lax.axis_index(name) for name in ("batch", "kv_head", "split"))
    call = _take_head(plan, (query, keys, values, *(results or (None,))), batch, kv_head)
    whole = _whole_span(plan, lengths[batch])
    share, busy = _share(plan, whole, split)

    @pl.when(split < busy)
    def _():
        out, sums, largest = _attend(plan, _load_queries(plan, call.query, shared), call.cache, shared, share)
        if not partials:
            totals = out, _to_out(plan, shared, sums), _to_out(plan, shared, largest)
            _finish(plan, call, shared, whole, totals)
            return
        for ref, part in zip(partials, (out, sums, largest), strict=True):
            plgpu.store(ref.at[batch, kv_head, split], part, optimized=False)
        if not plan.one_kernel:
            return

        @pl.when(arrive(arrivals.at[batch, kv_head], told) == busy - 1)
        def _():
            arrivals[batch, kv_head] = jnp.int32(0)
            mine = [ref.at[batch, kv_head] for ref in partials]
            _finish(plan, call, shared, whole, _combine(plan, mine, busy))


def _combine_kernel(plan: _Plan, query: Ref, keys: Ref, values: Ref, lengths: Ref, *refs: Ref) -> None:
    """What the last to arrive does, as a kernel of its own: grid (batch, num_kv_heads)."""
    partials, results, scratch = refs[:3], refs[3 : 3 + _num_results(plan)], refs[3 + _num_results(plan) :]
    shared, _ = _take_shared(plan, scratch)
    batch, kv_head = lax.axis_index("batch"), lax.axis_index("kv_head")
    call = _take_head(plan, (query, keys, values, *results), batch, kv_head)
    whole = _whole_span(plan, lengths[batch])
    _, busy = _share(plan, whole, jnp.int32(0))
    _finish(plan, call, shared, whole, _combine(plan, [ref.at[batch, kv_head] for ref in partials], busy))


def _num_results(plan: _Plan) -> int:
    return 1 if plan.unified_max is None else 2  # out, recomputed


def _kernel(plan: _Plan, body: Any, out_type: Sequence[Any], grid: dict[str, int], interpret: Any) -> Any:
    return plgpu.kernel(
        functools.partial(body, plan),
        out_type=tuple(out_type),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=_shared_types(plan),
        # exp2 in one instruction, within two units in the last place
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )


def _run(plan: _Plan, inputs: Sequence[Array], arrivals: Ref, interpret: Any) -> list[Array]:
    """query, keys, values, lengths -> out, and recomputed if there is a unified maximum."""
    query, keys = inputs[:2]
    grid = {"batch": keys.shape[0], "kv_head": keys.shape[1]}
    heads = tuple(grid.values())
    results = [jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct(heads, jnp.int32)]
    results = results[: _num_results(plan)]
    partials, split_kv = [], plan.config.split_kv
    if split_kv > 1:
        shapes = ((plan.head_dim, plan.columns), (plan.columns,), (plan.columns,))
        partials = [jax.ShapeDtypeStruct((*heads, split_kv, *shape), jnp.float32) for shape in shapes]
    both = [*(results if plan.one_kernel else ()), *partials]
    done = _kernel(plan, _attend_kernel, both, grid | {"split": split_kv}, interpret)(*inputs, arrivals)
    if plan.one_kernel:
        return list(done[: len(results)])
    return list(_kernel(plan, _combine_kernel, results, grid, interpret)(*inputs, *done))


def decode_attention(
    query: Array,
    keys: Array,
    values: Array,
    lengths: Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    unified_max: float | None = None,
    safe_range: tuple[float, float] | None = None,
    config: DecodeAttentionConfig | None = None,
    target: Target | None = None,
    arrivals: Ref | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """See `api.decode_attention`; float16 or bfloat16 throughout.

    Args:
      query: [batch, num_heads, head_dim].
      keys, values: [batch, num_kv_heads, max_len, head_dim].
      lengths: [batch] int32.
      soft_cap: scores become soft_cap · tanh(score / soft_cap).
      unified_max: the maximum of every softmax, known beforehand; None for the online softmax.
      safe_range: of the scores. A row (one query head of one sequence) with a score above its upper end, or with a
        denominator so small that weights may have vanished, is computed again with the online softmax. The lower end
        is not looked at: lower scores only vanish.
      config: None for `choose_config`.
      target: the card to compile for; None for the one that JAX runs on.
      arrivals: a `jax.new_ref` of zeros [batch, num_kv_heads] int32, zeros again afterwards: layers that run one after
        the other can share it. None makes one.
      interpret: `plgpu.InterpretGPUParams()` to run the form for Hopper on a CPU, the combination
        of the splits then as a second kernel.

    Returns:
      [batch, num_heads, head_dim], and how many rows were computed again, [batch, num_kv_heads] int32.

    Raises:
      ValueError: unified_max without safe_range, or a range that float32 cannot hold.
      NotImplementedError: a type, head_dim or number of query heads without a kernel.
    """
    _check(query, keys, values, unified_max, safe_range)
    batch, num_kv_heads, max_len, head_dim = keys.shape
    q_per_kv = query.shape[1] // num_kv_heads
    target = target or this_device()
    if target is None:
        if config is None or not interpret:
            raise NotImplementedError('there is no NVIDIA GPU here; implementation="xla" runs anywhere')
    elif config is None:
        config = choose_config(
            batch=batch, num_kv_heads=num_kv_heads, q_per_kv=q_per_kv, max_len=max_len, head_dim=head_dim, target=target
        )
    if config.block_kv > max_len or max_len % 8:
        raise NotImplementedError(
            f"the cache's max_len is a multiple of 8 and at least block_kv; got {max_len} and {config.block_kv}"
        )
    unified = unified_max is not None
    plan = _Plan(
        config=config,
        dtype=query.dtype,
        q_per_kv=q_per_kv,
        max_len=max_len,
        head_dim=head_dim,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        unified_max=unified_max,
        largest=safe_range[1] * LOG2E if safe_range else math.inf,
        weights_dtype=jnp.dtype(jnp.bfloat16) if unified else query.dtype,
        tma=bool(interpret) or target is None or target.compute_capability >= (9, 0),
        one_kernel=config.split_kv == 1 or not interpret,
    )
    if arrivals is None:
        arrivals = jax.new_ref(jnp.zeros((batch, num_kv_heads), jnp.int32))
    out, *recomputed = _run(plan, (query, keys, values, lengths), arrivals, interpret)
    return out, recomputed[0] if unified else jnp.zeros((batch, num_kv_heads), jnp.int32)


def _check(
    query: Array, keys: Array, values: Array, unified_max: float | None, safe_range: tuple[float, float] | None
) -> None:
    dtypes, head_dim = {query.dtype, keys.dtype, values.dtype}, query.shape[2]
    if len(dtypes) > 1 or query.dtype not in (jnp.float16, jnp.bfloat16):
        raise NotImplementedError(
            f"the kernel takes float16 or bfloat16, one for query, keys and values; got {sorted(map(str, dtypes))}; "
            'implementation="xla" takes others'
        )
    if head_dim % 16 or head_dim > 256:
        raise NotImplementedError(
            f'head_dim is a multiple of 16 up to 256; got {head_dim}; implementation="xla" takes others'
        )
    if query.shape[1] // keys.shape[1] > 32:
        raise NotImplementedError(
            f"at most 32 query heads a KV head; got {query.shape[1]} and {keys.shape[1]}; "
            'implementation="xla" takes more'
        )
    if unified_max is None:
        return
    if safe_range is None:
        raise ValueError(f"unified_max needs the safe_range of the scores; got {unified_max=} and none")
    if safe_range[1] - unified_max > HEADROOM:
        raise ValueError(
            f"safe_range may end at most {HEADROOM} above unified_max, where exp still fits float32; "
            f"got {safe_range} and {unified_max}"
        )
