"""What a product becomes in the kernel that multiplies: bias, activation, gate, residual; heads, turned and stored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flat_gemm.plan import EIGHTS, ROWS, Heads, Plan
from pallas_kernels.flat_gemm.ring import product_of


def scratch(plan: Plan) -> dict[str, Any]:
    """The result on its way to other lanes, and heads on their way to the cache."""
    types = {"stage": plgpu.SMEM(product_of(plan).stage_shape(plan), jnp.float32)}
    if plan.squares:
        types["squares"] = plgpu.SMEM((plan.m,), jnp.float32)
    if plan.heads is not None:
        types["turned"] = plgpu.SMEM((plan.segments, plan.live, plan.rows), plan.dtype)
    return types


def finish(plan: Plan, refs: SimpleNamespace, results: tuple[Array, ...]) -> None:
    """Makes the block's part of the result of its sums over k."""
    parts = _segments(plan, refs, results)
    if plan.heads is not None:
        _finish_heads(plan, plan.heads, refs, *parts)
        return
    start = plan.first_row(lax.axis_index("n"))
    y = parts[0] if plan.activation is None else _ACTIVATIONS[plan.activation](parts[0])
    y = y * parts[1] if plan.segments == 2 else y
    if refs.residual is not None:
        y = y + plgpu.load(
            refs.residual.at[pl.ds(0, plan.live), pl.ds(start, plan.rows)], layout=ROWS, optimized=False
        ).astype(jnp.float32)
    _store_columns(plan, refs, start, y)


def _segments(plan: Plan, refs: SimpleNamespace, results: tuple[Array, ...]) -> list[Array]:
    """The product, normed and with the bias: float32 [live, rows] a segment."""
    product = product_of(plan)
    factor = product.stage(plan, refs, results)
    parts = [
        plgpu.load(product.staged(plan, refs, i * plan.rows, plan.rows), layout=ROWS, optimized=False)
        for i in range(plan.segments)
    ]
    if factor is not None:
        parts = [y * lax.broadcast_in_dim(factor, y.shape, (0,)) for y in parts]
    if refs.bias is not None:
        rows = [pl.ds(plan.weight_row(i, lax.axis_index("n")), plan.rows) for i in range(plan.segments)]
        bias = [_load_columns(refs.bias, part) for part in rows]
        parts = [y + lax.broadcast_in_dim(b, y.shape, (1,)) for y, b in zip(parts, bias, strict=True)]
    return parts


def _load_columns(ref: Any, columns: Any) -> Array:
    """A piece of a vector over the columns of the result, float32."""
    return plgpu.load(ref.at[columns], layout=ROWS.reduce(0), optimized=False).astype(jnp.float32)


def _store_columns(plan: Plan, refs: SimpleNamespace, start, y: Array) -> None:
    """Stores y [live, rows]; a last block that went back leaves to others what is theirs."""
    tail, block = plan.n % plan.rows, lax.axis_index("n")
    if not tail:
        _store(plan, refs.out, start, y)
        return

    @pl.when(block < plan.num_blocks - 1)
    def _():
        _store(plan, refs.out, start, y)

    @pl.when(block == plan.num_blocks - 1)
    def _():
        staged, start = product_of(plan).staged, plan.rows - tail
        plgpu.store(staged(plan, refs, 0, plan.rows), y, optimized=False)
        for size in (64, 32, 16, 8):  # the strides of shared memory need to be whole pieces
            if tail & size:
                part = plgpu.load(staged(plan, refs, start, size), layout=EIGHTS, optimized=False)
                _store(plan, refs.out, plan.n - plan.rows + start, part, piece=True)
                start += size


def _store(plan: Plan, out: Any, start, y: Array, *, piece: bool = False) -> None:
    """Stores y [live, width] from column start on; zeros where x was padding that nothing multiplied."""
    columns, layout = pl.ds(start, y.shape[1]), EIGHTS if piece else ROWS
    if plan.valid < plan.live:
        row = plgpu.layout_cast(lax.iota(jnp.int32, plan.live), layout.reduce(1))
        y = jnp.where(lax.broadcast_in_dim(row, y.shape, (0,)) < plan.valid, y, 0.0)
    plgpu.store(out.at[pl.ds(0, plan.live), columns], y.astype(out.dtype), optimized=False)
    if padding := plan.m - plan.live:
        zeros = plgpu.layout_cast(jnp.zeros((padding, y.shape[1]), out.dtype), layout)
        plgpu.store(out.at[pl.ds(plan.live, padding), columns], zeros, optimized=False)


def _finish_heads(plan: Plan, heads: Heads, refs: SimpleNamespace, first: Array, second: Array) -> None:
    """Norms and turns the pairs of a block; queries become the result, keys and values go to the cache."""
    head, start, distance, turns = heads.place(lax.axis_index("n"), plan.rows)
    num_turned = heads.num_heads + heads.num_kv_heads
    parts = _norm_heads(plan, heads, refs, head, (first, second))
    if heads.rotary_dim:
        rows = pl.ds(0, plan.live)
        angles = pl.ds(start if turns is True else jnp.where(turns, start, 0), plan.rows)
        share = jnp.where((head < num_turned) & turns, 1.0, 0.0)  # a value is turned by nothing: cos 1, sin 0
        cos = plgpu.load(refs.cos.at[rows, angles], layout=ROWS, optimized=False) * share + (1.0 - share)
        sin = plgpu.load(refs.sin.at[rows, angles], layout=ROWS, optimized=False) * share
        parts = parts[0] * cos - parts[1] * sin, parts[1] * cos + parts[0] * sin

    @pl.when(head < heads.num_heads)
    def _():
        for i, y in enumerate(parts):
            _store(plan, refs.out, head * heads.head_dim + start + i * distance, y)

    def append(cache: Any, kv_head) -> None:
        def append_row(row, _):
            for i in range(2):
                y = plgpu.load(refs.turned.at[i, row], layout=ROWS.reduce(0), optimized=False)
                slot = cache.at[row, kv_head, refs.lengths[row], pl.ds(start + i * distance, plan.rows)]
                plgpu.store(slot, y, optimized=False)

        for i, y in enumerate(parts):
            plgpu.store(refs.turned.at[i], y.astype(cache.dtype), optimized=False)
        lax.fori_loop(0, plan.batch, append_row, None)

    for cache, before in ((refs.keys, heads.num_heads), (refs.values, num_turned)):
        pl.when((head >= before) & (head < before + heads.num_kv_heads))(lambda c=cache, b=before: append(c, head - b))


def _norm_heads(plan: Plan, heads: Heads, refs: SimpleNamespace, head, parts: tuple[Array, Array]):
    """An RMSNorm over a block that is a head, whose weight is that of queries or of keys; values pass."""
    if heads.query_eps is None and heads.key_eps is None:
        return parts
    mean = (jnp.sum(parts[0] * parts[0], axis=1) + jnp.sum(parts[1] * parts[1], axis=1)) / heads.head_dim
    is_query = jnp.where(head < heads.num_heads, 1.0, 0.0)
    is_key = jnp.where(head < heads.num_heads + heads.num_kv_heads, 1.0, 0.0) - is_query
    gains, share = [0.0, 0.0], 0.0
    factor: Any = 0.0
    for ref, eps, offset, chosen in (
        (refs.query_gain, heads.query_eps, heads.query_offset, is_query),
        (refs.key_gain, heads.key_eps, heads.key_offset, is_key),
    ):
        if eps is not None:
            pieces = [pl.ds(i * plan.rows, plan.rows) for i in range(2)]
            loaded = [_load_columns(ref, piece) for piece in pieces]
            loaded = [gain + offset for gain in loaded] if offset else loaded
            gains = [g + gain * chosen for g, gain in zip(gains, loaded, strict=True)]
            factor = factor + lax.rsqrt(mean + eps) * chosen
            share = share + chosen
    factor = factor + (1.0 - share)
    scaled = [y * lax.broadcast_in_dim(factor, y.shape, (0,)) for y in parts]
    return tuple(y * lax.broadcast_in_dim(g + (1.0 - share), y.shape, (1,)) for y, g in zip(scaled, gains, strict=True))


def _erf(y: Array) -> Array:
    """Abramowitz and Stegun 7.1.26, within 2e-7 of erf; Mosaic's layout inference has no rule for `lax.erf`."""
    t = 1.0 / (1.0 + 0.3275911 * jnp.abs(y))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = series * jnp.exp(-y * y)
    return jnp.where(y < 0.0, tail - 1.0, 1.0 - tail)


_ACTIVATIONS = {
    "silu": lambda y: y / (1.0 + jnp.exp(-y)),
    "gelu": lambda y: 0.5 * y * (1.0 + _erf(y * 0.5**0.5)),
    "gelu_tanh": lambda y: 0.5 * y * (1.0 + jnp.tanh(0.7978845608028654 * (y + 0.044715 * y * y * y))),
    "relu": lambda y: jnp.maximum(y, 0.0),
}
