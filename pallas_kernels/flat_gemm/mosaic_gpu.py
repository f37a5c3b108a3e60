"""The products of a decode step, after FlashDecoding++ (arXiv 2311.01282): `flat_gemm` (section 4) and `gemv`.

A block owns `block_n` weight rows and a share of k, and copies both operands through a ring in shared memory (`ring`).
It multiplies on tensor cores with the weights as left operand (`tensor_cores`), or on CUDA cores (`cuda_cores`). The
norm before the product and what comes after it (`epilogue`) happen in the same kernel (`kernel`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.flat_gemm.config import MAX_GEMV_M, FlatGemmConfig, choose_config
from pallas_kernels.flat_gemm.kernel import launch_product
from pallas_kernels.flat_gemm.plan import Heads, NormPlan, Plan
from pallas_kernels.norm import Norm
from pallas_kernels.targets import Target, this_device

IMPLEMENTATIONS = ("flat_gemm", "gemv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """How and where a product runs.

    Attributes:
      implementation: "flat_gemm", on tensor cores, or "gemv", on CUDA cores for up to 4 rows of x.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Product:
    """One product as it was asked for.

    Attributes:
      out: width and type of the result.
      rowwise: operands with a row for each row of x.
      others: the other operands.
      heads, batch: of a query, key and value product.
    """

    x: Array
    weight: Array
    out: tuple[int, DTypeLike]
    norm: Norm | None
    valid_m: int | None
    rowwise: dict[str, Array | None]
    others: dict[str, Any]
    segments: int = 1
    activation: str | None = None
    heads: Heads | None = None

    @property
    def unit(self) -> int | None:
        """Rows that a block must divide."""
        return None if self.heads is None else math.gcd(self.heads.rotary_dim, self.heads.head_dim)


def _run(launch: Launch, product: _Product) -> Array:
    """Chooses, checks, pads and launches; returns [m, out[0]]."""
    m = product.x.shape[0]
    plan = _plan(launch, product)
    inputs = {"weight": product.weight, **product.others}
    if product.norm is not None:
        inputs |= {"gain": product.norm.weight, "shift": product.norm.bias}
    for name, array in {"x": product.x, **product.rowwise}.items():
        inputs[name] = array if array is None or m == plan.m else jnp.pad(array, ((0, plan.m - m), (0, 0)))
    given = {name: array for name, array in inputs.items() if array is not None}
    out = jax.ShapeDtypeStruct((plan.m, product.out[0]), product.out[1])
    y = launch_product(plan, given, out, launch.counters, launch.interpret)
    return y if m == plan.m else y[:m]


def _plan(launch: Launch, product: _Product) -> Plan:
    (m, k), n, norm = product.x.shape, product.weight.shape[0], product.norm
    valid = m if product.valid_m is None else product.valid_m
    target = launch.target or this_device()
    _check(launch, product, valid, target)
    config, dtype, gemv = launch.config, product.x.dtype, launch.implementation == "gemv"
    if config is None:
        if target is None:
            raise ValueError("interpret mode needs a config or a target: there is no card to choose blocks for")
        block_n = None if product.heads is None else product.heads.block_n
        options = {"segments": product.segments, "unit": product.unit, "block_n": block_n, "gemv": gemv}
        config = choose_config(m, n, k, dtype, target, **options)
    config.check(m, n, k, dtype, segments=product.segments, gemv=gemv)
    _check_heads(product, config)
    return Plan(
        m=config.pad_m(m),
        valid=valid if gemv else config.pad_m(m),
        n=n // product.segments,
        k=k,
        dtype=dtype,
        config=config,
        segments=product.segments,
        norm=norm and _norm_plan(norm),
        activation=product.activation,
        heads=product.heads,
        batch=m if product.heads is None else product.others["lengths"].shape[0],
        tma=bool(launch.interpret) or (target is not None and target.compute_capability >= (9, 0)),
        tensor_cores=not gemv,
    )


def _norm_plan(norm: Norm) -> NormPlan:
    return NormPlan(eps=norm.eps, centered=norm.centered, bias=norm.bias is not None, offset=norm.offset)


def _check(launch: Launch, product: _Product, valid: int, target: Target | None) -> None:
    """Refuses what no blocks would make possible."""
    x, weight = product.x, product.weight
    if launch.implementation not in IMPLEMENTATIONS:
        raise NotImplementedError(f"implementation is one of {IMPLEMENTATIONS}; got {launch.implementation!r}")
    if not launch.interpret and (target is None or target.compute_capability < (8, 0)):
        raise NotImplementedError("mosaic_gpu needs an NVIDIA card of compute capability 8.0 or newer: use dense")
    if not 1 <= valid <= x.shape[0]:
        raise ValueError(f"valid_m counts rows of x, 1 to {x.shape[0]}; got {valid}")
    if launch.implementation == "gemv" and valid > MAX_GEMV_M:
        raise NotImplementedError(f"gemv takes 1 to {MAX_GEMV_M} rows of x; got m = {valid}: use flat_gemm")
    if weight.dtype != x.dtype:
        raise NotImplementedError(f"the product needs one type; got x {x.dtype} and weight {weight.dtype}: use dense")


def _check_heads(product: _Product, config: FlatGemmConfig) -> None:
    """Refuses heads that the blocks do not divide, or do not cover where a norm needs it."""
    heads, unit = product.heads, product.unit
    if heads is None or unit is None:
        return
    if unit % config.block_n:
        raise NotImplementedError(
            f"head_dim and rotary_dim need to be multiples of block_n = {config.block_n}; "
            f"got {heads.head_dim} and {heads.rotary_dim}: use dense"
        )
    if heads.block_n not in (None, config.block_n) or (heads.block_n and unit != heads.head_dim):
        raise NotImplementedError(
            f"a norm over each head needs block_n = head_dim = rotary_dim; got block_n = {config.block_n}, "
            f"head_dim = {heads.head_dim}, rotary_dim = {heads.rotary_dim}: use dense"
        )
    if product.others["keys"].dtype != product.x.dtype:
        raise NotImplementedError(
            f"the cache needs the type of x, {product.x.dtype}; got {product.others['keys'].dtype}: use dense"
        )


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
      norm: before the product.
      activation: "silu", "gelu", "gelu_tanh" or "relu"; None for none.
      residual: [m, n].
      valid_m: rows of x that are not padding; None for all. Padding gives zeros in gemv, its product in flat_gemm.

    Returns:
      [m, n] of `out_dtype`, None for that of x.

    Raises:
      NotImplementedError: a type or a shape that the kernel is not made for; the message says what it needs.
      ValueError: `launch.config` does not fit k.
    """
    return _run(
        launch,
        _Product(
            x=x,
            weight=weight,
            out=(weight.shape[0], out_dtype or x.dtype),
            norm=norm,
            valid_m=valid_m,
            rowwise={"residual": residual},
            others={"bias": bias},
            activation=activation,
        ),
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
    return _run(
        launch,
        _Product(
            x=x,
            weight=weight,
            out=(weight.shape[0] // 2, x.dtype),
            norm=norm,
            valid_m=valid_m,
            rowwise={},
            others={"bias": bias},
            segments=2,
            activation=activation,
        ),
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
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    launch: Launch = _DEFAULT,
) -> Array:
    """Query, key and value of one token a row, turned by its position; key and value are stored. One kernel.

        query, key, value = split(normalize(x, norm) @ weight.T + bias)
        query, key = normalize(query, q_norm), normalize(key, k_norm)
        keys[row, :, lengths[row]] = rope(key); values[row, :, lengths[row]] = value

    Args:
      x: [m, k] float16 or bfloat16; rows from batch on are padding.
      weight: [(num_heads + 2 * num_kv_heads) * head_dim, k].
      cos, sin: [m, rotary_dim // 2] float32; pairs (i, i + rotary_dim // 2) of a head are turned. None turns nothing.
      keys, values: `jax.Ref` of a layer's cache [batch, num_kv_heads, max_len, head_dim], written in place.
      lengths: [batch] int32, the slot of each row's token; below max_len.
      q_norm, k_norm: RMSNorms over each head, weights [head_dim].

    Returns:
      The queries [m, num_heads, head_dim]; zeros for padding if the implementation is gemv.

    Raises:
      As `linear`; also NotImplementedError if head_dim or rotary_dim is not a multiple of block_n, or a norm over heads
      meets a block that is not a head; ValueError if x has fewer rows than the cache.
    """
    batch, num_kv_heads, _, head_dim = keys.shape
    if x.shape[0] < batch:
        raise ValueError(f"x needs a row for each of the {batch} rows of the cache; got {x.shape[0]}")
    if any(of is not None and (of.centered or of.bias is not None) for of in (q_norm, k_norm)):
        raise NotImplementedError("q_norm and k_norm are RMSNorms without bias; got another norm: use dense")
    num_heads = weight.shape[0] // head_dim - 2 * num_kv_heads
    heads = Heads(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=0 if cos is None else 2 * cos.shape[-1],
        query_eps=None if q_norm is None else q_norm.eps,
        key_eps=None if k_norm is None else k_norm.eps,
        query_offset=0.0 if q_norm is None else q_norm.offset,
        key_offset=0.0 if k_norm is None else k_norm.offset,
    )
    query = _run(
        launch,
        _Product(
            x=x,
            weight=weight,
            out=(num_heads * head_dim, x.dtype),
            norm=norm,
            valid_m=batch,
            rowwise={"cos": cos, "sin": sin},
            others={"bias": bias, "keys": keys, "values": values, "lengths": lengths}
            | {"query_gain": q_norm and q_norm.weight, "key_gain": k_norm and k_norm.weight},
            segments=2,
            heads=heads,
        ),
    )
    return query.reshape(-1, num_heads, head_dim)
