"""`linear` and `gated_linear` for a decode step: the flat GEMM of FlashDecoding++ (arXiv 2311.01282, section 4).

The weights are the left operand of the tensor cores, so the few rows of x are padded to 8, not to 16 or 64. A block
owns `block_n` weight rows and a share of k, and copies both operands through a ring in shared memory: cp.async before
sm_90, TMA from there on. Each weight byte is requested once. What comes before the product (RMSNorm) and after it
(bias, activation, gate, residual) happens in the same kernel.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.flat_gemm.config import FlatGemmConfig, choose_config, stage_width
from pallas_kernels.last_arriver import arrive
from pallas_kernels.norm import Norm
from pallas_kernels.targets import Target, this_device

IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
# float16 ends at 65504, and x times the norm's gain is not yet divided by the row's size
_FLOAT16_SCALE = 2.0**-4
# y [m, n] after the transpose: a warp takes 32 columns of a row, the four warps take four rows
_ROWS = plgpu.Layout.TILED(plgpu.Tiling(((4, 32), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Heads:
    """What the rows of a fused query, key and value weight are."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int

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
class _Plan:
    """All that is known of a launch before it runs.

    Attributes:
      m: rows of x, padded.
      n: weight rows of one segment.
      segments: parts of the weight of which a block takes equal shares: gate and up, or partners in a rotation.
      eps: of the norm before the product; None for no norm.
      heads: None unless the product is query, key and value.
      batch: rows of x before padding.
    """

    m: int
    n: int
    k: int
    dtype: Any
    config: FlatGemmConfig
    segments: int
    eps: float | None
    activation: str | None
    heads: _Heads | None
    batch: int
    tma: bool

    @property
    def rows(self) -> int:
        """Rows of each segment that a block owns."""
        return self.config.block_n // self.segments

    @property
    def num_blocks(self) -> int:
        return self.n // self.rows

    @property
    def copies(self) -> int:
        """Copies of one step: the segments of the weight, and x."""
        return self.segments + 1

    @property
    def chunk(self) -> int:
        """Columns of a step that are in registers at once: under a norm x is there in float32 too."""
        return self.config.block_k if self.eps is None else min(64, self.config.block_k)

    @property
    def sum_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of what is summed over k: the product, and under a norm the squares of each row of x."""
        product = (self.config.block_n, self.m)
        return (product,) if self.eps is None else (product, (self.m,))

    @property
    def sum_layouts(self) -> tuple[Any, ...]:
        product = self.layout("ACC")
        return (product,) if self.eps is None else (product, self.layout("RHS").reduce(0))

    def weight_row(self, segment: int, block):
        """The first row of the weight in a block's segment."""
        if self.heads is None:
            return segment * self.n + block * self.rows
        head, start, distance, _ = self.heads.place(block, self.rows)
        return head * self.heads.head_dim + start + segment * distance

    def layout(self, operand: str) -> Any:
        return getattr(plgpu.Layout, f"MMA_{operand}")(self.dtype, m_warps=self.config.m_warps)


def _flat_gemm_kernel(plan: _Plan, refs: SimpleNamespace) -> None:
    """One block: `rows` columns of the result over one share of k. Grid: split, n."""
    if plan.config.split_k == 1:
        _finish(plan, refs, _accumulate(plan, refs))
        return
    _partial_kernel(plan, refs)
    block = lax.axis_index("n")

    before = arrive(refs.counters.at[block], refs.told)

    @pl.when(before == plan.config.split_k - 1)
    def _():
        _combine_kernel(plan, refs)
        refs.counters[block] = jnp.int32(0)


def _partial_kernel(plan: _Plan, refs: SimpleNamespace) -> None:
    """A block's sums over its share of k, left in device memory."""
    block, split = lax.axis_index("n"), lax.axis_index("split")
    sums = _accumulate(plan, refs)
    for ref, values in zip((refs.partials, refs.partial_squares), sums, strict=False):
        plgpu.store(ref.at[split, block], values, optimized=False)


def _combine_kernel(plan: _Plan, refs: SimpleNamespace) -> None:
    """Adds up a block's shares in the order of k: the same bits whoever comes last."""
    block = lax.axis_index("n")
    partials = list(zip((refs.partials, refs.partial_squares), plan.sum_layouts, strict=False))

    def add(split, sums):
        return tuple(
            total + plgpu.load(ref.at[split, block], layout=layout, optimized=False)
            for total, (ref, layout) in zip(sums, partials, strict=True)
        )

    _finish(plan, refs, lax.fori_loop(0, plan.config.split_k, add, _zeros(plan)))


def _zeros(plan: _Plan) -> tuple[Array, ...]:
    """What is summed over k: the product [block_n, m], and under a norm the squares of x [m]; float32."""
    shapes = zip(plan.sum_shapes, plan.sum_layouts, strict=True)
    return tuple(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout) for shape, layout in shapes)


def _accumulate(plan: _Plan, refs: SimpleNamespace) -> tuple[Array, ...]:
    """The sums of `_zeros` over this block's share of k, through the ring."""
    config = plan.config
    num_steps, split = plan.k // config.block_k, lax.axis_index("split")
    first, last = split * num_steps // config.split_k, (split + 1) * num_steps // config.split_k
    count = last - first if config.split_k > 1 else num_steps
    ahead = config.num_stages - 1

    def step(i, sums, *, newer: int, fetch: bool):
        slot = lax.rem(i, config.num_stages)
        gain = _load_gain(plan, refs, first + i)  # on its way while the copies are awaited
        if plan.tma:
            plgpu.barrier_wait(refs.arrived.at[slot])
            plgpu.commit_smem()  # all have left the slot that is filled next, and TMA may know it
        else:
            # ends in a barrier: every thread's copies are here, and all have left the slot that is filled next
            plgpu.wait_gmem_to_smem(plan.copies * newer)
        if fetch:
            _fetch(plan, refs, first + i + ahead, lax.rem(i + ahead, config.num_stages))
        return _multiply(plan, refs, slot, gain, sums)

    for i in range(ahead):
        _fetch(plan, refs, first + i, i)
    sums = lax.fori_loop(0, count - ahead, lambda i, sums: step(i, sums, newer=ahead - 1, fetch=True), _zeros(plan))
    # a copy cannot be switched off, so the steps with nothing left to fetch stand apart
    for left in reversed(range(ahead)):
        sums = step(count - 1 - left, sums, newer=left, fetch=False)
    return sums


def _fetch(plan: _Plan, refs: SimpleNamespace, step, slot) -> None:
    """Starts the copies of one step: weights [block_n, block_k] in segments, x [m, block_k]."""
    columns = pl.ds(step * plan.config.block_k, plan.config.block_k)
    options: dict[str, Any] = {"barrier": refs.arrived.at[slot]} if plan.tma else {"oob_mode": IN_BOUNDS}
    for segment in range(plan.segments):
        rows = pl.ds(plan.weight_row(segment, lax.axis_index("n")), plan.rows)
        into = refs.weight_ring.at[slot, pl.ds(segment * plan.rows, plan.rows)]
        plgpu.copy_gmem_to_smem(refs.weight.at[rows, columns], into, **options)
    plgpu.copy_gmem_to_smem(refs.x.at[:, columns], refs.x_ring.at[slot], **options)


def _load_gain(plan: _Plan, refs: SimpleNamespace, step) -> list[Array]:
    """The norm's gain for one step, in pieces [chunk], in the lanes that hold the same k of x."""
    if plan.eps is None:
        return []
    layout, start = plan.layout("RHS").reduce(1), step * plan.config.block_k
    pieces = [pl.ds(start + at, plan.chunk) for at in range(0, plan.config.block_k, plan.chunk)]
    return [plgpu.load(refs.gain.at[piece], layout=layout, optimized=False) for piece in pieces]


def _multiply(plan: _Plan, refs: SimpleNamespace, slot, gain: list[Array], sums: tuple[Array, ...]):
    """Adds the product of one slot of the ring; under a norm x is scaled in registers, and its squares summed."""
    for i in range(plan.config.block_k // plan.chunk):
        columns = pl.ds(i * plan.chunk, plan.chunk)
        left = plgpu.load(refs.weight_ring.at[slot, :, columns], layout=plan.layout("LHS"))
        right = plgpu.load(refs.x_ring.at[slot, :, columns].T, layout=plan.layout("RHS"))
        if len(sums) == 1:
            sums = (plgpu.mma(sums[0], left, right),)
            continue
        wide = right.astype(jnp.float32)
        scale = lax.broadcast_in_dim(gain[i].astype(jnp.float32) * _norm_scale(plan), wide.shape, (0,))
        scaled = (wide * scale).astype(plan.dtype)
        sums = plgpu.mma(sums[0], left, scaled), sums[1] + jnp.sum(wide * wide, axis=0)
    return sums


def _norm_scale(plan: _Plan) -> float:
    return _FLOAT16_SCALE if plan.dtype == jnp.float16 else 1.0


def _finish(plan: _Plan, refs: SimpleNamespace, sums: tuple[Array, ...]) -> None:
    """The epilogue: turns the sums [block_n, m] around, and makes the result of them."""
    refs.stage.at[:, pl.ds(0, plan.m)][...] = sums[0]
    parts = _segments(plan, refs, sums[1] if len(sums) > 1 else None)
    if plan.heads is not None:
        _finish_heads(plan, plan.heads, refs, *parts)
        return
    columns = pl.ds(lax.axis_index("n") * plan.rows, plan.rows)
    y = parts[0] if plan.activation is None else _ACTIVATIONS[plan.activation](parts[0])
    y = y * parts[1] if plan.segments == 2 else y
    if refs.residual is not None:
        y = y + plgpu.load(refs.residual.at[:, columns], layout=_ROWS, optimized=False).astype(jnp.float32)
    plgpu.store(refs.out.at[:, columns], y.astype(refs.out.dtype), optimized=False)


def _stage(plan: _Plan, refs: SimpleNamespace, segment: int) -> Any:
    """A segment in shared memory as [m, rows]."""
    return refs.stage.at[pl.ds(segment * plan.rows, plan.rows), pl.ds(0, plan.m)].T


def _segments(plan: _Plan, refs: SimpleNamespace, squares: Array | None) -> list[Array]:
    """The staged product, divided by the rows' size and with the bias: float32 [m, rows] a segment."""
    parts = [plgpu.load(_stage(plan, refs, i), layout=_ROWS, optimized=False) for i in range(plan.segments)]
    if squares is not None and plan.eps is not None:
        plgpu.store(refs.squares, squares, optimized=False)
        mean = plgpu.load(refs.squares, layout=_ROWS.reduce(1), optimized=False) / plan.k
        factor = lax.rsqrt(mean + plan.eps) / _norm_scale(plan)
        parts = [y * lax.broadcast_in_dim(factor, y.shape, (0,)) for y in parts]
    if refs.bias is not None:
        rows = [pl.ds(plan.weight_row(i, lax.axis_index("n")), plan.rows) for i in range(plan.segments)]
        bias = [plgpu.load(refs.bias.at[part], layout=_ROWS.reduce(0), optimized=False) for part in rows]
        parts = [
            y + lax.broadcast_in_dim(b.astype(jnp.float32), y.shape, (1,)) for y, b in zip(parts, bias, strict=True)
        ]
    return parts


def _finish_heads(plan: _Plan, heads: _Heads, refs: SimpleNamespace, first: Array, second: Array) -> None:
    """Turns the pairs of a block; queries become the result, keys and values go to their slots of the cache."""
    head, start, distance, turns = heads.place(lax.axis_index("n"), plan.rows)
    num_turned = heads.num_heads + heads.num_kv_heads
    parts = first, second
    if heads.rotary_dim:
        angles = pl.ds(start if turns is True else jnp.where(turns, start, 0), plan.rows)
        share = jnp.where((head < num_turned) & turns, 1.0, 0.0)  # a value is turned by nothing: cos 1, sin 0
        cos = plgpu.load(refs.cos.at[:, angles], layout=_ROWS, optimized=False) * share + (1.0 - share)
        sin = plgpu.load(refs.sin.at[:, angles], layout=_ROWS, optimized=False) * share
        parts = first * cos - second * sin, second * cos + first * sin

    @pl.when(head < heads.num_heads)
    def _():
        for i, y in enumerate(parts):
            columns = pl.ds(head * heads.head_dim + start + i * distance, plan.rows)
            plgpu.store(refs.out.at[:, columns], y.astype(refs.out.dtype), optimized=False)

    def append(cache: Any, kv_head) -> None:
        def append_row(row, _):
            for i in range(2):
                y = plgpu.load(refs.turned.at[i, row], layout=_ROWS.reduce(0), optimized=False)
                slot = cache.at[row, kv_head, refs.lengths[row], pl.ds(start + i * distance, plan.rows)]
                plgpu.store(slot, y, optimized=False)

        for i, y in enumerate(parts):
            plgpu.store(refs.turned.at[i], y.astype(cache.dtype), optimized=False)
        lax.fori_loop(0, plan.batch, append_row, None)

    for cache, before in ((refs.keys, heads.num_heads), (refs.values, num_turned)):
        pl.when((head >= before) & (head < before + heads.num_kv_heads))(lambda c=cache, b=before: append(c, head - b))


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


def _scratch(plan: _Plan) -> dict[str, Any]:
    config = plan.config

    def ring(rows: int, swizzle: int) -> Any:
        tiling = plgpu.TilingTransform((8, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
        tiles = (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM((config.num_stages, rows, config.block_k), plan.dtype, transforms=tiles)

    scratch = {
        "weight_ring": ring(config.block_n, min(128, 2 * config.block_k)),
        "x_ring": ring(plan.m, max(32, config.block_k // 2)),  # a cp.async copy is a multiple of four tiles
        "stage": plgpu.SMEM((config.block_n, stage_width(plan.m)), jnp.float32),
    }
    if plan.eps is not None:
        scratch["squares"] = plgpu.SMEM((plan.m,), jnp.float32)
    if plan.heads is not None:
        scratch["turned"] = plgpu.SMEM((plan.segments, plan.m, plan.rows), plan.dtype)
    if config.split_k > 1:
        scratch["told"] = plgpu.SMEM((1,), jnp.int32)
    if plan.tma:
        scratch["arrived"] = plgpu.Barrier(num_arrivals=plan.copies, num_barriers=config.num_stages)
    return scratch


def _call(plan: _Plan, body: Any, inputs: dict[str, Any], outputs: dict[str, Any], interpret: Any) -> tuple[Array, ...]:
    """Runs `body(plan, refs)` over the grid; `refs` holds inputs, outputs and scratch by name, None for the others."""
    empty = dict.fromkeys(("bias", "residual", "partial_squares"))

    def flat_gemm(*refs, **scratch):
        body(plan, SimpleNamespace(**empty | dict(zip((*inputs, *outputs), refs, strict=True)) | scratch))

    grid = (1 if body is _combine_kernel else plan.config.split_k, plan.num_blocks)
    call = plgpu.kernel(
        flat_gemm,
        out_type=tuple(outputs.values()),
        grid=grid,
        grid_names=("split", "n"),
        scratch_types=_scratch(plan),
        interpret=interpret,
    )
    return call(*inputs.values())


def _launch(plan: _Plan, inputs: dict[str, Any], out: jax.ShapeDtypeStruct, counters: Any, interpret: Any) -> Array:
    """The result [m, width], padded rows included."""
    if plan.config.split_k == 1:
        return _call(plan, _flat_gemm_kernel, inputs, {"out": out}, interpret)[0]
    names, lead = ("partials", "partial_squares"), (plan.config.split_k, plan.num_blocks)
    partials = {
        name: jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)
        for name, shape in zip(names, plan.sum_shapes, strict=False)
    }
    if interpret:  # the interpreter has no atomics: the same two parts, one kernel after the other
        operands = {name: inputs.pop(name) for name in ("x", "weight", "gain") if name in inputs}
        sums = _call(plan, _partial_kernel, operands, partials, interpret)
        return _call(plan, _combine_kernel, inputs | dict(zip(partials, sums, strict=True)), {"out": out}, interpret)[0]
    if counters is None:
        counters = jax.new_ref(jnp.zeros(plan.num_blocks, jnp.int32))
    elif counters.shape[0] < plan.num_blocks:
        raise ValueError(f"{plan.num_blocks} blocks need a counter each; got {counters.shape[0]}")
    return _call(plan, _flat_gemm_kernel, {**inputs, "counters": counters}, {"out": out, **partials}, interpret)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """How and where a product runs.

    Attributes:
      implementation: "flat_gemm", on the tensor cores.
      config: the blocks; None for `choose_config`.
      target: the card; None for the one JAX runs on.
      counters: int32 `jax.Ref` of zeros, one for each block of rows, that splits count themselves with; left at zero,
        so one serves all products that run one after the other. None makes one, which costs a small kernel.
      interpret: `plgpu.InterpretGPUParams` to run the TMA form on a CPU.
    """

    implementation: str = "flat_gemm"
    config: FlatGemmConfig | None = None
    target: Target | None = None
    counters: Any = None
    interpret: Any = None


def _flat_gemm(
    launch: Launch,
    x: Array,
    weight: Array,
    *,
    out: tuple[int, DTypeLike],
    norm: Norm | None,
    valid_m: int | None,
    rowwise: dict[str, Array | None],
    others: dict[str, Any],
    segments: int = 1,
    activation: str | None = None,
    heads: _Heads | None = None,
) -> Array:
    """Chooses, checks, pads and launches; `rowwise` arrays have a row for each row of x. Returns [m, out[0]]."""
    m, k = x.shape
    if launch.implementation != "flat_gemm":
        raise NotImplementedError(f"unknown implementation {launch.implementation!r}: use 'flat_gemm'")
    if valid_m is not None and not 1 <= valid_m <= m:
        raise ValueError(f"valid_m counts rows of x, 1 to {m}; got {valid_m}")
    if norm is not None and (norm.centered or norm.bias is not None):
        raise NotImplementedError("a LayerNorm before the product: use dense")
    target = launch.target or this_device()
    if not launch.interpret and (target is None or target.compute_capability < (8, 0)):
        raise NotImplementedError("mosaic_gpu needs an NVIDIA card of compute capability 8.0 or newer: use dense")
    config = launch.config
    if config is None:
        if target is None:
            raise ValueError("interpret mode needs a config or a target: there is no card to choose blocks for")
        unit = math.gcd(heads.rotary_dim, heads.head_dim) if heads else None
        config = choose_config(m, weight.shape[0], k, x.dtype, target, segments=segments, unit=unit)
    config.check(m, weight.shape[0], k, x.dtype, segments=segments)
    if heads and math.gcd(heads.rotary_dim, heads.head_dim) % config.block_n:
        raise NotImplementedError(
            f"head_dim and rotary_dim need to be multiples of block_n = {config.block_n}; "
            f"got {heads.head_dim} and {heads.rotary_dim}"
        )
    if heads and others["keys"].dtype != x.dtype:
        raise NotImplementedError(f"the cache needs the type of x, {x.dtype}; got {others['keys'].dtype}")
    if weight.dtype != x.dtype:
        raise NotImplementedError(f"flat_gemm needs one type; got x {x.dtype} and weight {weight.dtype}: use dense")
    plan = _Plan(
        m=config.pad_m(m),
        n=weight.shape[0] // segments,
        k=k,
        dtype=x.dtype,
        config=config,
        segments=segments,
        eps=None if norm is None else norm.eps,
        activation=activation,
        heads=heads,
        batch=m if heads is None else others["lengths"].shape[0],
        tma=bool(launch.interpret) or (target is not None and target.compute_capability >= (9, 0)),
    )
    inputs = {"weight": weight, "gain": None if norm is None else norm.weight, **others}
    for name, array in {"x": x, **rowwise}.items():
        inputs[name] = array if array is None or m == plan.m else jnp.pad(array, ((0, plan.m - m), (0, 0)))
    given = {name: array for name, array in inputs.items() if array is not None}
    y = _launch(plan, given, jax.ShapeDtypeStruct((plan.m, out[0]), out[1]), launch.counters, launch.interpret)
    return y if m == plan.m else y[:m]


_DEFAULT = Launch()


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Array | None = None,
    out_dtype: DTypeLike | None = None,
    valid_m: int | None = None,
    launch: Launch = _DEFAULT,
) -> Array:
    """Product of up to 64 rows of x with a weight matrix, in one kernel.

        y = activation(normalize(x, norm) @ weight.T + bias) + residual

    Args:
      x: [m, k] float16 or bfloat16; rows are padded to `config.pad_m(m)`, at no cost if they are that many.
      weight: [n, k] of the same type.
      norm: before the product; an RMSNorm.
      activation: "silu", "gelu", "gelu_tanh" or "relu"; None for none.
      residual: [m, n].
      valid_m: rows of x that are not padding; None for all. What comes of padding is not specified.

    Returns:
      [m, n] of `out_dtype`, None for that of x.

    Raises:
      NotImplementedError: a type or a shape that the kernel is not made for; the message says what it needs.
      ValueError: `launch.config` does not fit k.
    """
    return _flat_gemm(
        launch,
        x,
        weight,
        out=(weight.shape[0], out_dtype or x.dtype),
        norm=norm,
        valid_m=valid_m,
        rowwise={"residual": residual},
        others={"bias": bias},
        activation=activation,
    )


def gated_linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str = "silu",
    norm: Norm | None = None,
    valid_m: int | None = None,
    launch: Launch = _DEFAULT,
) -> Array:
    """The gated half of an MLP, in one kernel: [m, n].

        gate, up = split(normalize(x, norm) @ weight.T + bias, 2, axis=-1)
        y = activation(gate) * up

    Args and errors as `linear`; weight [2 * n, k] has the gate's rows first.
    """
    return _flat_gemm(
        launch,
        x,
        weight,
        out=(weight.shape[0] // 2, x.dtype),
        norm=norm,
        valid_m=valid_m,
        rowwise={},
        others={"bias": bias},
        segments=2,
        activation=activation,
    )


def qkv_linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    cos: Array | None,
    sin: Array | None,
    keys: Any,
    values: Any,
    lengths: Array,
    norm: Norm | None = None,
    launch: Launch = _DEFAULT,
) -> Array:
    """Query, key and value of one token a row, turned by its position; key and value are stored. One kernel.

        query, key, value = split(normalize(x, norm) @ weight.T + bias)
        keys[row, :, lengths[row]] = rope(key); values[row, :, lengths[row]] = value

    Args:
      x: [m, k] float16 or bfloat16; rows from batch on are padding.
      weight: [(num_heads + 2 * num_kv_heads) * head_dim, k].
      cos, sin: [m, rotary_dim // 2] float32; pairs (i, i + rotary_dim // 2) of a head are turned. None turns nothing.
      keys, values: `jax.Ref` of a layer's cache [batch, num_kv_heads, max_len, head_dim], written in place.
      lengths: [batch] int32, the slot of each row's token; below max_len.

    Returns:
      The queries [m, num_heads, head_dim].

    Raises:
      As `linear`; also NotImplementedError if head_dim or rotary_dim is not a multiple of block_n, ValueError if x has
      fewer rows than the cache.
    """
    batch, num_kv_heads, _, head_dim = keys.shape
    if x.shape[0] < batch:
        raise ValueError(f"x needs a row for each of the {batch} rows of the cache; got {x.shape[0]}")
    num_heads = weight.shape[0] // head_dim - 2 * num_kv_heads
    rotary_dim = 0 if cos is None else 2 * cos.shape[-1]
    heads = _Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, rotary_dim=rotary_dim)
    query = _flat_gemm(
        launch,
        x,
        weight,
        out=(num_heads * head_dim, x.dtype),
        norm=norm,
        valid_m=batch,
        rowwise={"cos": cos, "sin": sin},
        others={"bias": bias, "keys": keys, "values": values, "lengths": lengths},
        segments=2,
        heads=heads,
    )
    return query.reshape(-1, num_heads, head_dim)
