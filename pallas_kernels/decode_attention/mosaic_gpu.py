"""`decode_attention` on NVIDIA GPUs through Pallas Mosaic GPU (FlashDecoding++, arXiv 2311.01282, §3).

A block works as `pallas_kernels.flash` says, for all query heads of one KV head of one sequence, over that sequence's
slots or a share of them; the last share to arrive adds the partial results up. `columns` is q_per_kv rounded up to
tiles of the tensor cores (8 for head_dim 64, 128 and 256; 16 for 96; 32 for 80); what is beyond repeats the first query
and is never written. Keys, values and sequences need no padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import flash
from pallas_kernels.decode_attention.config import DecodeAttentionConfig, choose_config
from pallas_kernels.flash import Flash, Ref, Shared, Span
from pallas_kernels.kernel_names import kernel_name
from pallas_kernels.last_arriver import arrive
from pallas_kernels.safe_range import check_range
from pallas_kernels.targets import Target, this_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """Everything about a call that is known when the kernel is traced.

    Attributes:
      rows: of query and output; those past the batch are written as zeros.
      counted: whether the splits find their last arriver by a counter, or a second kernel adds them up.
    """

    flash: Flash
    batch: int
    rows: int
    q_per_kv: int
    window: int | None
    split_kv: int
    counted: bool

    @property
    def one_kernel(self) -> bool:
        return self.split_kv == 1 or self.counted


@dataclasses.dataclass(frozen=True)
class _Call:
    """The arrays of one KV head: query, out [q_per_kv, head_dim]; cache, twice [max_len, head_dim]; recomputed []."""

    query: Ref
    cache: tuple[Ref, Ref]
    out: Any
    recomputed: Any


def _load_queries(plan: _Plan, query: Ref, shared: Shared) -> list[Array | Ref]:
    """query [q_per_kv, head_dim] -> its transpose in pieces [tile, columns] for the first product."""
    flash_, pieces = plan.flash, []
    for at in range(0, flash_.head_dim, flash_.tile):
        part = pl.ds(at, flash_.tile)
        if plan.q_per_kv == flash_.columns:
            piece = plgpu.load(query.at[:, part].T, layout=flash_.queries, optimized=False)
        else:
            piece = _gather_columns(plan, query, part)
        if shared.queries is None:
            pieces.append(piece)
        else:
            plgpu.store(shared.queries.at[:, part].T, piece, optimized=False)
    return pieces or flash.pieces_of(shared.queries, flash_.head_dim)


def _gather_columns(plan: _Plan, query: Ref, part: Any) -> Array:
    """A piece [tile, columns] head by head; the columns past the last head repeat the first."""
    layout, shape = plan.flash.queries, (plan.flash.tile, plan.flash.columns)
    for head in range(plan.q_per_kv):
        row = plgpu.load(query.at[head, part], layout=layout.reduce(1), optimized=False)
        row = lax.broadcast_in_dim(row, shape, (0,))
        if head == 0:
            piece = row
            continue
        # by way of a vector: a two-dimensional iota in this layout counts wrongly in JAX 0.12
        column = plgpu.broadcasted_iota(jnp.int32, shape[1:], 0, layout=layout.reduce(0))
        piece = jnp.where(flash.along(column, shape) == head, row, piece)
    return piece


def _combine(plan: Flash, partials: Sequence[Ref], busy: Array) -> tuple[Array, Array]:
    """Adds up the partial results [split_kv, …] of the first `busy` splits, in their order: outᵀ and sums."""
    outs, sums, *maxima = partials
    vector = plan.out.reduce(0)

    def load(ref: Ref, layout: Any) -> Array:
        return plgpu.load(ref, layout=layout, optimized=False)

    def higher(i: Array, largest: Array) -> Array:
        return jnp.maximum(largest, load(maxima[0].at[i], vector))

    if maxima:
        largest = lax.fori_loop(0, busy, higher, flash.fill((plan.columns,), flash.LOWEST, vector))

    def add(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        part, weight = load(outs.at[i], plan.out), load(sums.at[i], vector)
        if maxima:
            factor = jnp.exp2(load(maxima[0].at[i], vector) - largest)
            part, weight = part * flash.along(factor, part.shape), weight * factor
        return carry[0] + part, carry[1] + weight

    zero = flash.fill((plan.head_dim, plan.columns), 0.0, plan.out), flash.fill((plan.columns,), 0.0, vector)
    return lax.fori_loop(0, busy, add, zero)


def _finish(plan: _Plan, call: _Call, shared: Shared, span: Span, out: Array, sums: Array) -> None:
    """Writes what the whole span came to, both in the layout of the output."""

    def again(online: Flash) -> tuple[Array, Array]:
        out, sums, _ = flash.attend(online, _load_queries(plan, call.query, shared), call.cache, shared, span)
        return out, flash.to_out(online, shared, sums)

    def real_and_seen() -> tuple[Array, Array]:
        head = plgpu.broadcasted_iota(jnp.int32, (plan.flash.columns,), 0, layout=plan.flash.out.reduce(0))
        return jnp.where(head < plan.q_per_kv, 1.0, 0.0), jnp.where(span.last > span.first, 1.0, 0.0)

    count = flash.finish(plan.flash, shared, out, sums, real_and_seen, lambda head: call.out.at[head], again)
    if count is not None:
        call.recomputed[...] = count


def _clear(plan: _Plan, out: Ref, kv_head: Array, worker: Array, workers: int) -> None:
    """Writes zeros to the rows past the batch, which the blocks of a KV head share among themselves."""
    zeros = flash.fill((plan.flash.head_dim,), 0.0, plan.flash.out.reduce(1)).astype(plan.flash.dtype)
    for first in range(plan.batch, plan.rows, workers):

        @pl.when(first + worker < plan.rows)
        def _(first=first):
            def clear_head(head: Array, _: None) -> None:
                plgpu.store(out.at[first + worker, kv_head * plan.q_per_kv + head], zeros, optimized=False)

            lax.fori_loop(0, plan.q_per_kv, clear_head, None)


def _whole_span(plan: _Plan, length: Array) -> Span:
    """The visible slots of a sequence."""
    stop = jnp.clip(length, 0, plan.flash.max_len)
    start = jnp.int32(0) if plan.window is None else jnp.maximum(stop - plan.window, 0)
    block_kv = plan.flash.block_kv
    return Span(start=start, stop=stop, first=start // block_kv, last=(stop + block_kv - 1) // block_kv)


def _share(plan: _Plan, span: Span, split: Array) -> tuple[Span, Array]:
    """The blocks of one split, and how many splits have any; of an empty sequence the first one has it."""
    count, split_kv = span.last - span.first, plan.split_kv
    each = jnp.maximum((count + split_kv - 1) // split_kv, 1)
    first = jnp.minimum(span.first + split * each, span.last)
    share = dataclasses.replace(span, first=first, last=jnp.minimum(first + each, span.last))
    return share, jnp.maximum((count + each - 1) // each, 1)


def _take_head(plan: _Plan, refs: Sequence[Ref], batch: Array, kv_head: Array) -> _Call:
    query, keys, values, out, *recomputed = refs
    heads = pl.ds(kv_head * plan.q_per_kv, plan.q_per_kv)
    return _Call(
        query=query.at[batch, heads],
        cache=(keys.at[batch, kv_head], values.at[batch, kv_head]),
        out=None if out is None else out.at[batch, heads],
        recomputed=recomputed[0].at[batch, kv_head] if recomputed else None,
    )


def _attend_kernel(plan: _Plan, query: Ref, keys: Ref, values: Ref, lengths: Ref, *refs: Ref) -> None:
    """One split of one KV head of one sequence: grid (batch, num_kv_heads, split_kv).

    query, out [rows, num_heads, head_dim]; keys, values [batch, num_kv_heads, max_len, head_dim]; lengths [batch];
    counters [at least batch · num_kv_heads]; recomputed [batch, num_kv_heads]; partial results
    [batch, num_kv_heads, split_kv, …].
    """
    num_results = _num_results(plan) if plan.one_kernel else 0
    num_partials = _num_partials(plan) if plan.split_kv > 1 else 0
    (counters,), refs = (refs[:1], refs[1:]) if plan.counted else ((None,), refs)
    results, partials = refs[:num_results], refs[num_results : num_results + num_partials]
    told, *scratch = refs[num_results + num_partials :]
    shared = flash.take_shared(plan.flash, scratch)
    batch, kv_head, split = (lax.axis_index(name) for name in ("batch", "kv_head", "split"))
    call = _take_head(plan, (query, keys, values, *(results or (None,))), batch, kv_head)
    whole = _whole_span(plan, lengths[batch])
    share, busy = _share(plan, whole, split)
    if results:
        _clear(plan, results[0], kv_head, batch * plan.split_kv + split, plan.batch * plan.split_kv)

    @pl.when(split < busy)
    def _():
        queries = _load_queries(plan, call.query, shared)
        parts = flash.attend(plan.flash, queries, call.cache, shared, share)
        if not partials:
            _finish(plan, call, shared, whole, parts[0], flash.to_out(plan.flash, shared, parts[1]))
            return
        for ref, part in zip(partials, parts, strict=True):
            plgpu.store(ref.at[batch, kv_head, split], part, optimized=False)
        if counters is None:
            return
        counter = counters.at[batch * keys.shape[1] + kv_head]

        @pl.when(arrive(counter, told) == busy - 1)
        def _():
            counter[...] = jnp.int32(0)
            mine = [ref.at[batch, kv_head] for ref in partials]
            _finish(plan, call, shared, whole, *_combine(plan.flash, mine, busy))


def _combine_kernel(plan: _Plan, query: Ref, keys: Ref, values: Ref, lengths: Ref, *refs: Ref) -> None:
    """What the last to arrive does, as a kernel of its own: grid (batch, num_kv_heads)."""
    partials, refs = refs[: _num_partials(plan)], refs[_num_partials(plan) :]
    results, (_, *scratch) = refs[: _num_results(plan)], refs[_num_results(plan) :]
    shared = flash.take_shared(plan.flash, scratch)
    batch, kv_head = lax.axis_index("batch"), lax.axis_index("kv_head")
    call = _take_head(plan, (query, keys, values, *results), batch, kv_head)
    whole = _whole_span(plan, lengths[batch])
    _, busy = _share(plan, whole, jnp.int32(0))
    _clear(plan, results[0], kv_head, batch, plan.batch)
    mine = [ref.at[batch, kv_head] for ref in partials]
    _finish(plan, call, shared, whole, *_combine(plan.flash, mine, busy))


def _num_results(plan: _Plan) -> int:
    return 1 if plan.flash.unified_max is None else 2  # out, recomputed


def _num_partials(plan: _Plan) -> int:
    return 3 if plan.flash.unified_max is None else 2  # outᵀ, sums, maxima


def _kernel(plan: _Plan, body: Any, out_type: Sequence[Any], grid: dict[str, int], interpret: Any) -> Any:
    def attention(*refs: Ref) -> None:
        body(plan, *refs)

    attention.__name__ = kernel_name("decode_attention", kv=plan.flash.block_kv, stages=plan.flash.num_stages)
    return plgpu.kernel(
        attention,
        out_type=tuple(out_type),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=[plgpu.SMEM((1,), jnp.int32), *flash.shared_types(plan.flash)],
        # exp2 in one instruction, within two units in the last place
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )


def _run(plan: _Plan, inputs: Sequence[Array], counters: Ref, interpret: Any) -> list[Array]:
    """query, keys, values, lengths -> out, and recomputed if there is a unified maximum."""
    query, keys = inputs[:2]
    grid = {"batch": keys.shape[0], "kv_head": keys.shape[1]}
    heads = tuple(grid.values())
    results = [jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct(heads, jnp.int32)]
    results = results[: _num_results(plan)]
    partials, split_kv, columns = [], plan.split_kv, plan.flash.columns
    if split_kv > 1:
        shapes = [(plan.flash.head_dim, columns), (columns,), (columns,)][: _num_partials(plan)]
        partials = [jax.ShapeDtypeStruct((*heads, split_kv, *shape), jnp.float32) for shape in shapes]
    both = [*(results if plan.one_kernel else ()), *partials]
    more = (counters,) if plan.counted else ()
    done = _kernel(plan, _attend_kernel, both, grid | {"split": split_kv}, interpret)(*inputs, *more)
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
    counters: Ref | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """See `api.decode_attention`; float16 or bfloat16 throughout.

    Args:
      query: [rows, num_heads, head_dim], a row for each sequence of the cache, and any number after them.
      keys, values: [batch, num_kv_heads, max_len, head_dim].
      lengths: [batch] int32.
      soft_cap: scores become soft_cap · tanh(score / soft_cap).
      unified_max: the maximum of every softmax, known beforehand; None for the online softmax.
      safe_range: of the scores. A row (one query head of one sequence) with a score above its upper end, or with a
        denominator so small that weights may have vanished, is computed again with the online softmax. The lower end
        is not looked at: lower scores only vanish.
      config: None for `choose_config`.
      target: the card to compile for; None for the one that JAX runs on.
      counters: a `jax.new_ref` of at least batch · num_kv_heads int32 zeros, zeros again afterwards: operations that
        run one after the other can share it. None makes one where the splits need it.
      interpret: `plgpu.InterpretGPUParams()` to run the form for Hopper on a CPU; there a second kernel adds up.

    Returns:
      [rows, num_heads, head_dim], zeros in the rows past the batch, and how many rows were computed again,
      [batch, num_kv_heads] int32.

    Raises:
      ValueError: unified_max without safe_range, or a range that float32 cannot hold; too few rows or counters.
      NotImplementedError: a type, head_dim or number of query heads without a kernel.
    """
    flash.check(query, keys, values)
    check_range(unified_max, safe_range)
    batch, num_kv_heads, max_len, head_dim = keys.shape
    _check_rows(query, batch, batch * num_kv_heads, counters)
    q_per_kv, tma = query.shape[1] // num_kv_heads, bool(interpret)
    target = target or this_device()
    if target is None:
        if config is None or not interpret:
            raise NotImplementedError('there is no NVIDIA GPU here; implementation="xla" runs anywhere')
    else:
        tma |= target.compute_capability >= (9, 0)
        shape = {"batch": batch, "num_kv_heads": num_kv_heads, "q_per_kv": q_per_kv, "max_len": max_len}
        config = config or choose_config(**shape, head_dim=head_dim, target=target)
    if config.block_kv > max_len:
        raise NotImplementedError(f"the cache's max_len is at least block_kv; got {max_len} and {config.block_kv}")
    block = Flash(
        block_kv=config.block_kv,
        num_stages=config.num_stages,
        columns=config.columns(q_per_kv, head_dim),
        dtype=query.dtype,
        max_len=max_len,
        head_dim=head_dim,
        scale=scale,
        soft_cap=soft_cap,
        unified_max=unified_max,
        safe_end=safe_range[1] * flash.LOG2E if safe_range else math.inf,
        weights_dtype=query.dtype if unified_max is None else jnp.dtype(jnp.bfloat16),
        queries_wait=config.query_in_shared(q_per_kv, head_dim),
        tma=tma,
    )
    sizes = {"batch": batch, "rows": query.shape[0], "q_per_kv": q_per_kv, "split_kv": config.split_kv}
    plan = _Plan(flash=block, window=window, **sizes, counted=config.split_kv > 1 and not interpret)
    if plan.counted and counters is None:
        counters = jax.new_ref(jnp.zeros((batch * num_kv_heads,), jnp.int32))
    out, *recomputed = _run(plan, (query, keys, values, lengths), counters, interpret)
    return out, recomputed[0] if recomputed else jnp.zeros((batch, num_kv_heads), jnp.int32)


def _check_rows(query: Array, batch: int, heads: int, counters: Any) -> None:
    if query.shape[0] < batch:
        raise ValueError(f"query has a row for each of the {batch} sequences; got {query.shape[0]}")
    if counters is not None and counters.shape[0] < heads:
        raise ValueError(f"counters has batch · num_kv_heads = {heads} entries; got {counters.shape}")
