"""Which implementation of an operation runs (FlashDecoding++, arXiv 2311.01282, section 5): by stated rules.

Every operation takes `implementation=`: None for what the rules choose, a backend of `BACKENDS`, and for products also
one by name: "gemv", "flat_gemm" or "dense", the paper's A, B and C.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.targets import INTERPRETED, Target, this_device, why_none

INTERPRET = "mosaic_gpu_interpret"
BACKENDS = {
    "reference": "the definition, plain jnp in float32",
    "xla": "XLA's own code",
    "mosaic_gpu": "our kernels for NVIDIA GPUs, and XLA's dot for products with many rows",
    INTERPRET: "the same kernels interpreted on the CPU and watched for races: slow, for tests",
}
GEMV_MAX_M = 1  # the paper's illustrated tables leave the CUDA cores at 2 or 3; no card of ours has been measured
ROW_TILE = 8  # rows of activations that a tensor-core product works on at a time


class Choice(NamedTuple):
    """An implementation's name and the rule that picked it."""

    implementation: str
    reason: str


def choose_implementation(
    op: str,
    *,
    m: int,
    n: int,
    k: int,
    dtype: DTypeLike,
    device: Target | None,
    weight_format: str = "array",
    segments: int = 1,
    head_dim: int | None = None,
    rotary_dim: int = 0,
    head_norms: bool = False,
) -> Choice:
    """The product to run for x [m, k] and a weight [n, k]: "gemv", "flat_gemm" or "dense".

    Args:
      op: "linear", "gated_linear" or "qkv_linear".
      device: the card; None where there is no NVIDIA GPU.
      weight_format: see `pallas_kernels.weights`.
      segments: parts of the weight that a block takes equal shares of: 2 for gate and up, and for partners in a
        rotation.
      head_dim, rotary_dim, head_norms: of a "qkv_linear".
    """
    from pallas_kernels.flat_gemm.config import MAX_M, choose_config

    if why := no_kernels(dtype, device):
        return Choice("dense", f"rule: {why}")
    if weight_format != "array":
        return Choice("dense", f"rule: no kernel for {weight_format} weights yet")
    if m > MAX_M:
        return Choice("dense", f"rule: m > {MAX_M}")
    gemv = m <= GEMV_MAX_M
    unit, whole = None if head_dim is None else math.gcd(head_dim, rotary_dim), head_dim if head_norms else None
    try:
        assert device is not None  # no_kernels has seen it
        choose_config(m, n, k, dtype, device, segments=segments, unit=unit, block_n=whole, gemv=gemv)
    except NotImplementedError as error:
        return Choice("dense", f"rule: {error}")
    if gemv:
        return Choice("gemv", f"rule: m ≤ {GEMV_MAX_M}, not measured")
    return Choice("flat_gemm", f"rule: {GEMV_MAX_M} < m ≤ {MAX_M}, not measured")


def choose_attention(
    op: str, *, head_dim: int, q_per_kv: int, max_len: int, dtype: DTypeLike, device: Target | None
) -> Choice:
    """What "decode_attention" or "prefill_attention" runs as: "mosaic_gpu" or "xla"."""
    from pallas_kernels.decode_attention.config import choose_config as choose_decode
    from pallas_kernels.prefill_attention.config import choose_config as choose_prefill

    if why := no_kernels(dtype, device):
        return Choice("xla", f"rule: {why}")
    if head_dim % 16 or head_dim > 256 or q_per_kv > 32 or max_len % 8:
        return Choice("xla", "rule: the kernels take head_dim % 16 = 0 up to 256, q_per_kv ≤ 32 and max_len % 8 = 0")
    try:
        assert device is not None  # no_kernels has seen it
        if op == "prefill_attention":
            choose_prefill(q_per_kv=q_per_kv, max_len=max_len, head_dim=head_dim, target=device)
        else:
            shape = {"q_per_kv": q_per_kv, "max_len": max_len, "head_dim": head_dim}
            choose_decode(batch=1, num_kv_heads=1, **shape, target=device)
    except NotImplementedError as error:
        return Choice("xla", f"rule: {error}")
    return Choice("mosaic_gpu", f"rule: {op} on a GPU, not measured")


def device_of(implementation: str | None) -> Target | None:
    """The card that an operation is traced for; None where there is no NVIDIA GPU."""
    return INTERPRETED if implementation == INTERPRET else this_device()


def padded_rows(batch: int, implementation: str | None, dtype: DTypeLike) -> int:
    """Rows to give the activations of a decode step, so that no product has to pad them."""
    from pallas_kernels.flat_gemm.config import MAX_M

    if batch > MAX_M or not runs_kernels(implementation, dtype):
        return batch
    return -(-batch // ROW_TILE) * ROW_TILE


def resolve_attention(op: str, implementation: str | None, query: Array, keys: Array) -> str:
    """`resolve` for query [..., num_heads, head_dim] and keys [batch, num_kv_heads, max_len, head_dim]."""
    shape = {"q_per_kv": query.shape[-2] // keys.shape[1], "max_len": keys.shape[2], "head_dim": query.shape[-1]}
    where = {"dtype": query.dtype, "device": device_of(implementation)}
    choice = choose_attention(op, **shape, **where)
    return resolve(op, implementation, ("reference", "xla", "mosaic_gpu"), choice, **where)


def resolve(
    op: str,
    implementation: str | None,
    names: tuple[str, ...],
    choice: Choice,
    *,
    dtype: DTypeLike,
    device: Target | None,
) -> str:
    """The name in `names` that `implementation=` means: one of them, or a backend, or None for the choice.

    Raises:
      NotImplementedError: no implementation of that name, or kernels were asked for where none can run; the message
        says what there is.
    """
    if implementation is None:
        return choice.implementation
    if implementation in ("mosaic_gpu", INTERPRET):
        why = no_kernels(dtype, device) or (choice.reason if choice.implementation == "xla" else None)
        if why:
            raise NotImplementedError(f"{op} cannot run as {implementation!r}: {why}")
        return choice.implementation
    if implementation == "xla" and "xla" not in names:
        return "dense"
    if implementation not in names:
        known = ", ".join(sorted({*names, *BACKENDS}))
        raise NotImplementedError(f"{op} has no implementation {implementation!r}; available: {known}")
    return implementation


def no_kernels(dtype: DTypeLike, device: Target | None) -> str | None:
    """Why no kernel of ours can run at all."""
    if device is None:
        return why_none()
    if jnp.dtype(dtype) not in (jnp.float16, jnp.bfloat16):
        return f"the kernels take float16 and bfloat16; got {jnp.dtype(dtype).name}"
    return None


def runs_kernels(implementation: str | None, dtype: DTypeLike) -> bool:
    """Whether any operation may run as a kernel of ours."""
    if implementation in ("reference", "xla", "dense"):
        return False
    return no_kernels(dtype, device_of(implementation)) is None
