"""`linear`, `gated_linear` and `qkv_linear`: the weight products of a decoder layer, with what stands around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from pallas_kernels.dataflow import Choice, choose_implementation, device_of, resolve, runs_kernels
from pallas_kernels.flat_gemm import dense, reference
from pallas_kernels.fold import fold_batch
from pallas_kernels.heads import Rope
from pallas_kernels.interpret import interpreter
from pallas_kernels.norm import Norm
from pallas_kernels.weights import QuantizedWeight, Weight, weight_format

_PLAIN = {"reference": reference, "dense": dense}


def linear(
    x: Float[Array, "*m k"],
    weight: Float[Array, "n k"] | QuantizedWeight,
    bias: Float[Array, " n"] | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Float[Array, "*m n"] | None = None,
    out_dtype: DTypeLike | None = None,
    valid_m: int | None = None,
    implementation: str | None = None,
    counters: Any = None,
) -> Float[Array, "*m n"]:
    """Product with a weight matrix as checkpoints store it, accumulated in float32.

        y = activation(norm(x) @ weight.T + bias) + residual

    Under `vmap` a mapped activation axis becomes more rows; mapped weights run one after the other.

    Args:
      activation: "silu", "gelu", "gelu_tanh", "relu", or None.
      out_dtype: type of the result; None means that of `x`.
      valid_m: rows of x that matter, the rest being padding: a kernel may skip those and return anything finite for
        them. None for all. Whoever pads activations to a multiple of 8 rows once spares every product doing so.
      implementation: "reference", "dense" (XLA's dot), "flat_gemm" (tensor cores, m ≤ 64) or "gemv" (CUDA cores,
        m ≤ 4), a backend of `dataflow.BACKENDS`, or None for `choose_implementation`.
      counters: a `jax.new_ref` of int32 zeros that kernels with split_k count with and leave at zero, so one serves
        all that run one after the other; it needs an entry for each 32 rows of the weight. Not under `vmap`. None
        makes one, which costs a small kernel.

    Raises:
      ValueError: `x` and `weight` disagree on k, or an activation of no such name.
      NotImplementedError: unknown implementation, or one that does not take these types or sizes.
    """
    _check(x, weight, activation)

    def run(x: Array, residual: Array | None, weight: Any, bias: Array | None, norm: Norm | None) -> Array:
        name, launch = _choose("linear", x, weight, valid_m, implementation, counters)
        options = {"norm": norm, "activation": activation, "residual": residual, "out_dtype": out_dtype or x.dtype}
        if launch is None:
            return _PLAIN[name].linear(x, weight, bias, **options)
        return _kernels().linear(x, weight, bias, **options, valid_m=valid_m, launch=launch)

    if _is_plain(implementation, x):
        return run(x, residual, weight, bias, norm)
    n = weight.shape[0]
    flat = None if residual is None else residual.reshape(-1, n)
    y = _foldable(run, counters, valid_m, rows=2)(x.reshape(-1, x.shape[-1]), flat, weight, bias, norm)
    return y.reshape(*x.shape[:-1], n)


def gated_linear(
    x: Float[Array, "*m k"],
    weight: Float[Array, "n_gate_up k"] | QuantizedWeight,
    bias: Float[Array, " n_gate_up"] | None = None,
    *,
    norm: Norm | None = None,
    activation: str = "silu",
    valid_m: int | None = None,
    implementation: str | None = None,
    counters: Any = None,
) -> Float[Array, "*m n"]:
    """The gated half of a SwiGLU-like MLP from one fused weight.

        gate, up = split(norm(x) @ weight.T + bias, 2, axis=-1)
        y = activation(gate) * up

    Args:
      weight: [2 * n, k], the gate's rows before the up rows.
      activation: "silu", "gelu", "gelu_tanh" or "relu".
      others: as for `linear`.

    Raises:
      ValueError: `x` and `weight` disagree on k, the weight has an odd number of rows, or no such activation.
      NotImplementedError: as for `linear`.
    """
    _check(x, weight, activation)
    if weight.shape[0] % 2:
        raise ValueError(f"x[..., k] needs a weight[2 * n, k]; got {x.shape} and {weight.shape}")

    def run(x: Array, weight: Any, bias: Array | None, norm: Norm | None) -> Array:
        name, launch = _choose("gated_linear", x, weight, valid_m, implementation, counters, segments=2)
        options = {"norm": norm, "activation": activation}
        if launch is None:
            return _PLAIN[name].gated_linear(x, weight, bias, **options)
        return _kernels().gated_linear(x, weight, bias, **options, valid_m=valid_m, launch=launch)

    if _is_plain(implementation, x):
        return run(x, weight, bias, norm)
    y = _foldable(run, counters, valid_m, rows=1)(x.reshape(-1, x.shape[-1]), weight, bias, norm)
    return y.reshape(*x.shape[:-1], weight.shape[0] // 2)


def qkv_linear(
    x: Float[Array, "m k"],
    weight: Float[Array, "n k"] | QuantizedWeight,
    bias: Float[Array, " n"] | None = None,
    *,
    rope: Rope | None,
    keys: Float[Array, "batch num_kv_heads max_len head_dim"],
    values: Float[Array, "batch num_kv_heads max_len head_dim"],
    lengths: Int[Array, " batch"],
    norm: Norm | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    implementation: str | None = None,
    counters: Any = None,
) -> tuple[
    Float[Array, "m num_heads head_dim"],
    Float[Array, "batch num_kv_heads max_len head_dim"],
    Float[Array, "batch num_kv_heads max_len head_dim"],
]:
    """Query, key and value of one new token a sequence; key and value go to slot `lengths` of the cache.

        query, key, value = split(norm(x) @ weight.T + bias)
        query, key = rope(q_norm(query)), rope(k_norm(key))
        keys[row, :, lengths[row]] = key; values[row, :, lengths[row]] = value

    Args:
      x: [m, k], m ≥ batch; rows past the batch are padding and are not stored.
      weight: [(num_heads + 2 * num_kv_heads) * head_dim, k]: queries' rows, then keys', then values'.
      rope: cos and sin [m, rotary_dim // 2] float32 for the pairs (i, i + rotary_dim // 2) of a head; None for none.
      lengths: [batch] int32, below max_len.
      others: as for `linear`.

    Returns:
      The queries, and the cache with the new tokens (the same buffers where the caller gave them up).

    Raises:
      ValueError: shapes that do not belong together.
      NotImplementedError: as for `linear`.
    """
    _check(x, weight, None)
    batch, num_kv_heads, _, head_dim = keys.shape
    if weight.shape[0] % head_dim or weight.shape[0] // head_dim <= 2 * num_kv_heads or x.shape[0] < batch:
        raise ValueError(
            f"a cache {keys.shape} needs x[m ≥ {batch}, k] and a weight with a row for each of {head_dim=} times "
            f"num_heads + {2 * num_kv_heads}; got {x.shape} and {weight.shape}"
        )
    heads = {
        "head_dim": head_dim,
        "rotary_dim": 0 if rope is None else 2 * rope[0].shape[-1],
        "head_norms": q_norm is not None or k_norm is not None,
    }

    def run(x, rope, keys, values, lengths, weight, bias, norms) -> tuple[Array, Array, Array]:
        options = dict(zip(("norm", "q_norm", "k_norm"), norms, strict=True)) | {"lengths": lengths}
        why_dense = _why_dense(x, keys, norms[1:])
        rows = keys.shape[0]
        name, launch = _choose("qkv_linear", x, weight, rows, implementation, counters, why_dense, segments=2, **heads)
        if launch is None:
            return _PLAIN[name].qkv_linear(x, weight, bias, rope=rope, keys=keys, values=values, **options)
        refs = {"keys": jax.new_ref(keys), "values": jax.new_ref(values)}
        cos, sin = rope or (None, None)
        query = _kernels().qkv_linear(x, weight, bias, cos=cos, sin=sin, **refs, **options, launch=launch)
        return query, jax.freeze(refs["keys"]), jax.freeze(refs["values"])

    norms = (norm, q_norm, k_norm)
    if _is_plain(implementation, x):
        return run(x, rope, keys, values, lengths, weight, bias, norms)
    valid_m = None if x.shape[0] == batch else batch
    return _foldable(run, counters, valid_m, rows=5)(x, rope, keys, values, lengths, weight, bias, norms)


def _is_plain(implementation: str | None, x: Array) -> bool:
    """Whether no kernel of ours can be meant: such a product needs no rule of its own for `vmap`."""
    return implementation in (None, *_PLAIN, "xla") and not runs_kernels(implementation, x.dtype)


def _why_dense(x: Array, keys: Array, head_norms: tuple[Norm | None, ...]) -> str | None:
    """What about a query, key and value product no kernel takes."""
    if keys.dtype != x.dtype:
        return f"the cache is {keys.dtype}, x {x.dtype}"
    if any(norm is not None and (norm.centered or norm.bias is not None) for norm in head_norms):
        return "the norms of heads are no RMSNorms without bias"
    if jax.typeof(keys).manual_axis_type.varying:  # pyright: ignore[reportAttributeAccessIssue]
        return "a kernel cannot write a cache in place that varies over checked axes of a shard_map"
    return None


def _choose(
    op: str,
    x: Array,
    weight: Weight,
    valid_m: int | None,
    implementation: str | None,
    counters: Any,
    why_dense: str | None = None,
    **shape: Any,
) -> tuple[str, Any]:
    """The implementation's name, and how to launch it if it is a kernel of ours."""
    n, k = weight.shape
    m = valid_m or x.size // k
    device = device_of(implementation)
    where = {"dtype": x.dtype, "device": device}
    if why_dense is None and isinstance(weight, Array) and weight.dtype != x.dtype:
        why_dense = f"the weight is {weight.dtype}, x {x.dtype}"
    choice = Choice("dense", f"rule: {why_dense}")
    if why_dense is None:
        choice = choose_implementation(op, m=m, n=n, k=k, weight_format=weight_format(weight), **where, **shape)
    name = resolve(op, implementation, (*_PLAIN, "flat_gemm", "gemv"), choice, **where)
    if name in _PLAIN:
        return name, None
    if not isinstance(weight, Array):
        raise NotImplementedError(f"{name} takes no {weight_format(weight)} weights: use dense")
    launch = {"target": device, "counters": counters, "interpret": interpreter(implementation)}
    return name, _kernels().Launch(implementation=name, **launch)


def _kernels() -> Any:
    """The kernels' module: it needs Mosaic, which costs a second to import."""
    from pallas_kernels.flat_gemm import mosaic_gpu

    return mosaic_gpu


def _foldable(run: Callable[..., Any], counters: Any, valid_m: int | None, *, rows: int) -> Callable[..., Any]:
    """`vmap` folds the first `rows` arguments into m; with counters or padded rows the caller does without it."""
    return fold_batch(run, rows=rows) if counters is None and valid_m is None else run


def _check(x: Array, weight: Weight, activation: str | None) -> None:
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x[..., k] and weight[n, k] must agree on k; got {x.shape} and {weight.shape}")
    if activation is not None and activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}; got {activation!r}")
