"""`prefill_attention` on NVIDIA GPUs through Pallas Mosaic GPU: flash attention of a chunk over a cache that holds it.

A block works as `pallas_kernels.flash` says, for all query heads of one KV head at several positions, each of which
sees the cache up to itself. It starts at the first block of slots that one of its queries sees, with a window, and
ends at the last; other blocks of queries read the same keys and values again, at best from a cache.
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
from pallas_kernels.flash import Flash, Ref, Shared, Span
from pallas_kernels.kernel_names import kernel_name
from pallas_kernels.prefill_attention.config import RUN, Columns, PrefillAttentionConfig, choose_config
from pallas_kernels.safe_range import check_range
from pallas_kernels.targets import Target, this_device

_FAR = 1 << 30  # past every slot


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """Everything about a call that is known when the kernel is traced."""

    flash: Flash
    columns: Columns
    window: int | None


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A block of queries of one KV head: query, out [q_len, num_heads, head_dim], its first position and query head."""

    query: Ref
    out: Ref
    first_q: Array
    first_head: Array


def query_of(lay: Columns, first_q: Any, column: Any) -> tuple[Any, Any, Any]:
    """Position in the chunk, head, and whether this is the column that is written; a scalar or a vector."""
    run, k = lax.div(column, lay.run), lax.rem(column, lay.run)
    real = column < lay.run * lay.runs
    if not lay.heads:
        q = jnp.minimum(first_q, lay.q_len - lay.run) + k
        return q, run, real & (q >= first_q)
    per_position = lay.runs // lay.block_q
    q, first = first_q + lax.div(run, per_position), lax.rem(run, per_position) * lay.run
    head = jnp.minimum(first, lay.q_per_kv - lay.run) + k
    return q, head, real & (q < lay.q_len) & (head >= first)


def _runs(lay: Columns, chunk: _Chunk) -> list[tuple[Any, Any, Any]]:
    """Each run's columns and the positions and heads of its queries; at the end the first ones once more."""
    runs = []
    for at in range(0, lay.columns, lay.run):
        run, size = at // lay.run % lay.runs, min(lay.run, lay.columns - at)
        if lay.heads:
            position, part = divmod(run, lay.runs // lay.block_q)
            q = jnp.minimum(chunk.first_q + position, lay.q_len - 1)
            heads = pl.ds(chunk.first_head + min(part * lay.run, lay.q_per_kv - lay.run), size)
        else:
            q = pl.ds(jnp.minimum(chunk.first_q, lay.q_len - lay.run), size)
            heads = chunk.first_head + run
        runs.append((pl.ds(at, size), q, heads))
    return runs


def _load_queries(plan: _Plan, chunk: _Chunk, shared: Shared) -> list[Array | Ref]:
    """Brings the queries to shared memory: their transpose in pieces [tile, columns] for the first product."""
    tile, layout = plan.flash.tile, plgpu.Layout.MMA_RHS(plan.flash.dtype, m_warps=4)
    pieces = [pl.ds(at, tile) for at in range(0, plan.flash.head_dim, tile)]
    for columns, q, heads in _runs(plan.columns, chunk):
        for part in pieces:
            piece = plgpu.load(chunk.query.at[q, heads, part].T, layout=layout, optimized=False)
            plgpu.store(shared.queries.at[columns, part].T, piece, optimized=False)
    return flash.pieces_of(shared.queries, plan.flash.head_dim)


def _load_positions(plan: _Plan, chunk: _Chunk, positions: Ref, told: Ref) -> None:
    """Brings the position of each column to `told` [columns]; positions [q_len]."""
    layout = plgpu.Layout.MMA_RHS(plan.flash.dtype, m_warps=4).reduce(0)  # one number a thread: no aligned pairs
    for columns, q, _ in _runs(plan.columns, chunk):
        if plan.columns.heads:
            position = plgpu.layout_cast(lax.broadcast(positions[q], (columns.size,)), layout)
        else:
            position = plgpu.load(positions.at[q], layout=layout, optimized=False)
        plgpu.store(told.at[columns], position, optimized=False)


def _span(plan: _Plan, told: Ref) -> Span:
    """What the block's queries see."""
    newest = plgpu.load(told, layout=plan.flash.scores.reduce(0), optimized=False)
    stop, start = jnp.clip(jnp.max(newest) + 1, 0, plan.flash.max_len), jnp.int32(0)
    if plan.window is not None:
        start = jnp.clip(jnp.min(jnp.where(newest >= 0, newest, _FAR)) - (plan.window - 1), 0, stop)
    block_kv = plan.flash.block_kv
    first, last = lax.div(start, block_kv), lax.div(stop + block_kv - 1, block_kv)
    return Span(start=start, stop=stop, first=first, last=last, positions=told, window=plan.window)


def _attend_kernel(plan: _Plan, query: Ref, keys: Ref, values: Ref, positions: Ref, out: Ref, *refs: Ref) -> None:
    """A block of queries of one KV head of one sequence: grid (batch, num_kv_heads, blocks).

    query, out [batch, q_len, num_heads, head_dim]; keys, values [batch, num_kv_heads, max_len, head_dim];
    positions [batch, q_len]; recomputed [batch, num_kv_heads, blocks].
    """
    *recomputed, told = refs[: 1 if plan.flash.unified_max is None else 2]
    scratch = refs[1 + len(recomputed) :]
    shared = flash.take_shared(plan.flash, scratch)
    batch, kv_head, block = (lax.axis_index(name) for name in ("batch", "kv_head", "block"))
    first_q, first_head = block * plan.columns.block_q, kv_head * plan.columns.q_per_kv
    chunk = _Chunk(query=query.at[batch], out=out.at[batch], first_q=first_q, first_head=first_head)
    cache = keys.at[batch, kv_head], values.at[batch, kv_head]
    _load_positions(plan, chunk, positions.at[batch], told)
    queries, span = _load_queries(plan, chunk, shared), _span(plan, told)

    def attend(form: Flash) -> tuple[Array, Array]:
        result, sums, *_ = flash.attend(form, queries, cache, shared, span)
        return result, flash.to_out(form, shared, sums)

    def row_of(column: Array) -> Ref:
        q, head, _ = query_of(plan.columns, first_q, column)
        return chunk.out.at[q, first_head + head]

    def real_and_seen() -> tuple[Array, Array]:
        vector = plan.flash.out.reduce(0)
        column = plgpu.broadcasted_iota(jnp.int32, (plan.flash.columns,), 0, layout=vector)
        sees = plgpu.load(told, layout=vector, optimized=False) >= 0
        return jnp.where(query_of(plan.columns, first_q, column)[2], 1.0, 0.0), jnp.where(sees, 1.0, 0.0)

    count = flash.finish(plan.flash, shared, *attend(plan.flash), real_and_seen, row_of, attend)
    if count is not None:
        recomputed[0][batch, kv_head, block] = count


def _run(plan: _Plan, inputs: Sequence[Array], interpret: Any) -> tuple[Array, Array | None]:
    """query, keys, values, positions -> out, and the rows computed again if there is a unified maximum."""
    query, keys = inputs[:2]
    grid = {"batch": keys.shape[0], "kv_head": keys.shape[1], "block": -(-plan.columns.q_len // plan.columns.block_q)}
    results = [jax.ShapeDtypeStruct(query.shape, query.dtype)]
    if plan.flash.unified_max is not None:
        results.append(jax.ShapeDtypeStruct(tuple(grid.values()), jnp.int32))

    def attention(*refs: Ref) -> None:
        _attend_kernel(plan, *refs)

    blocks = {"q": plan.columns.block_q, "kv": plan.flash.block_kv, "stages": plan.flash.num_stages}
    attention.__name__ = kernel_name("prefill_attention", **blocks)
    kernel = plgpu.kernel(
        attention,
        out_type=tuple(results),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=[plgpu.SMEM((plan.flash.columns,), jnp.int32), *flash.shared_types(plan.flash)],
        # exp2 in one instruction, within two units in the last place
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    out, *recomputed = kernel(*inputs)
    return out, jnp.sum(recomputed[0], axis=2, dtype=jnp.int32) if recomputed else None


def prefill_attention(
    query: Array,
    keys: Array,
    values: Array,
    positions: Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    unified_max: float | None = None,
    safe_range: tuple[float, float] | None = None,
    config: PrefillAttentionConfig | None = None,
    target: Target | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """See `api.prefill_attention`; float16 or bfloat16 throughout.

    Args:
      query: [batch, q_len, num_heads, head_dim]. Up to 7 positions of up to 7 query heads a KV head are padded to 8
        positions, which takes two more kernels.
      keys, values: [batch, num_kv_heads, max_len, head_dim], which hold the chunk's own already.
      positions: [batch, q_len] int32 in any order, -1 for a query that sees nothing. Slots between the first and the
        last that the queries of a sequence see hold finite numbers, seen or not; others may hold anything.
      soft_cap: scores become soft_cap · tanh(score / soft_cap).
      unified_max, safe_range: as for `decode_attention`; a row is one query head of one position.
      config: None for `choose_config`.
      target: the card to compile for; None for the one that JAX runs on.
      interpret: `plgpu.InterpretGPUParams()` to run the form for Hopper on a CPU.

    Returns:
      An array like query, and how many rows were computed again, [batch, num_kv_heads] int32.

    Raises:
      ValueError: unified_max without safe_range, or a range that float32 cannot hold.
      NotImplementedError: a type, head_dim or number of query heads without a kernel.
    """
    flash.check(query, keys, values)
    check_range(unified_max, safe_range)
    (batch, num_kv_heads, max_len, head_dim), q_len = keys.shape, query.shape[1]
    q_per_kv, tma = query.shape[2] // num_kv_heads, bool(interpret)
    target = target or this_device()
    if target is None:
        if config is None or not interpret:
            raise NotImplementedError('there is no NVIDIA GPU here; implementation="xla" runs anywhere')
    else:
        tma |= target.compute_capability >= (9, 0)
        two_parts = unified_max is not None and query.dtype == jnp.float16
        shape = {"q_per_kv": q_per_kv, "max_len": max_len, "head_dim": head_dim}
        config = config or choose_config(**shape, target=target, two_parts=two_parts)
    if config.block_kv > max_len:
        raise NotImplementedError(f"the cache's max_len is at least block_kv; got {max_len} and {config.block_kv}")
    missing = max(0, RUN - q_len) if q_per_kv < RUN else 0
    if missing:
        query = jnp.pad(query, ((0, 0), (0, missing), (0, 0), (0, 0)))
        positions = jnp.pad(positions, ((0, 0), (0, missing)), constant_values=-1)
    columns = config.columns(q_len + missing, q_per_kv, head_dim)
    block = Flash(
        block_kv=config.block_kv,
        num_stages=config.num_stages,
        columns=columns.columns,
        dtype=query.dtype,
        max_len=max_len,
        head_dim=head_dim,
        scale=scale,
        soft_cap=soft_cap,
        unified_max=unified_max,
        safe_end=safe_range[1] * flash.LOG2E if safe_range else math.inf,
        weights_dtype=query.dtype if unified_max is None else jnp.dtype(jnp.bfloat16),
        queries_wait=True,
        tma=tma,
    )
    plan = _Plan(flash=block, columns=columns, window=window)
    out, recomputed = _run(plan, (query, keys, values, positions), interpret)
    out = out[:, :q_len] if missing else out
    return out, jnp.zeros((batch, num_kv_heads), jnp.int32) if recomputed is None else recomputed
