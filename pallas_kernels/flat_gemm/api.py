"""`linear` and `gated_linear`: the weight products of a decoder layer."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from pallas_kernels.dataflow import find_implementation, import_when_called
from pallas_kernels.flat_gemm import reference, xla


def linear(
    x: Float[Array, "*m k"],
    weight: Float[Array, "n k"],
    bias: Float[Array, " n"] | None = None,
    *,
    residual: Float[Array, "*m n"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*m n"]:
    """Product with a weight matrix as checkpoints store it, accumulated in float32.

        y = x @ weight.T + bias + residual

    Args:
      out_dtype: type of the result; None means that of `x`.
      implementation: "reference", "xla", "mosaic_gpu" (x [m, k] with m ≤ 64, float16 or bfloat16; see
        `mosaic_gpu.py`), or None for `choose_implementation`.

    Raises:
      ValueError: `x` and `weight` disagree on k.
      NotImplementedError: unknown implementation.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x[..., k] and weight[n, k] must agree on k; got {x.shape} and {weight.shape}")
    table = {"reference": reference.linear, "xla": xla.linear, "mosaic_gpu": _mosaic_gpu("linear")}
    run = find_implementation("linear", implementation, table)
    return run(x, weight, bias, residual=residual, out_dtype=out_dtype or x.dtype)


def gated_linear(
    x: Float[Array, "*m k"],
    weight: Float[Array, "n_gate_up k"],
    bias: Float[Array, " n_gate_up"] | None = None,
    *,
    activation: str = "silu",
    implementation: str | None = None,
) -> Float[Array, "*m n"]:
    """The gated half of a SwiGLU-like MLP from one fused weight.

        gate, up = split(x @ weight.T + bias, 2, axis=-1)
        y = activation(gate) * up

    Args:
      weight: [2 * n, k], the gate's rows before the up rows.
      activation: "silu", "gelu", "gelu_tanh" or "relu".
      implementation: "reference", "xla", "mosaic_gpu" (x [m, k] with m ≤ 64, float16 or bfloat16; see
        `mosaic_gpu.py`), or None for `choose_implementation`.

    Raises:
      ValueError: `x` and `weight` disagree on k, or the weight has an odd number of rows.
      NotImplementedError: unknown implementation.
    """
    if x.shape[-1] != weight.shape[-1] or weight.shape[0] % 2:
        raise ValueError(f"x[..., k] needs a weight[2 * n, k]; got {x.shape} and {weight.shape}")
    table = {"reference": reference.gated_linear, "xla": xla.gated_linear, "mosaic_gpu": _mosaic_gpu("gated_linear")}
    return find_implementation("linear", implementation, table)(x, weight, bias, activation=activation)


def _mosaic_gpu(name: str) -> Callable[..., Array]:
    return import_when_called("pallas_kernels.flat_gemm.mosaic_gpu", name)
