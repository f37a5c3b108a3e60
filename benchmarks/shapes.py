"""The models of the paper's figure as shapes, and the operations of one of their layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecode.aot import Program
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flat_gemm import gated_linear, linear, qkv_linear
from pallas_kernels.norm import Norm
from pallas_kernels.prefill_attention import prefill_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What fixes a model's kernels.

    Attributes:
      gated: gate and up instead of one matrix; RMSNorm instead of LayerNorm goes with it in these models.
      biases: of the products: "none", "qkv" or "all".
      softmax: (unified_max, safe_range) of the paper, None where its technique is off.
      parameters: published number of them.
    """

    embed_dim: int
    mlp_dim: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    gated: bool
    biases: str
    softmax: tuple[float, tuple[float, float]] | None
    parameters: int

    def cache_bytes(self, batch: int, kv_len: int) -> int:
        """Keys and values of all layers in float16."""
        return 4 * self.num_layers * batch * self.num_kv_heads * kv_len * self.head_dim

    def products(self) -> dict[str, tuple[int, int]]:
        """n and k of each weight of a layer, and of the output head."""
        heads = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        up = self.mlp_dim * (2 if self.gated else 1)
        return {
            "qkv": (heads, self.embed_dim),
            "out": (self.embed_dim, self.num_heads * self.head_dim),
            "up": (up, self.embed_dim),
            "down": (self.embed_dim, self.mlp_dim),
            "logits": (self.vocab_size, self.embed_dim),
        }


_7B = {"embed_dim": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 32, "head_dim": 128}
MODELS = {
    "llama2-7b": ModelShape(
        **_7B,
        mlp_dim=11008,
        vocab_size=32000,
        rotary_dim=128,
        gated=True,
        biases="none",
        softmax=(-16.8, (-16.8, 6.5)),
        parameters=6_738_415_616,
    ),
    "opt-6.7b": ModelShape(
        **_7B,
        mlp_dim=16384,
        vocab_size=50272,
        rotary_dim=0,
        gated=False,
        biases="all",
        softmax=None,
        parameters=6_658_473_984,
    ),
    "chatglm2-6b": ModelShape(
        **_7B | {"num_layers": 28, "num_kv_heads": 2},
        mlp_dim=13696,
        vocab_size=65024,
        rotary_dim=64,
        gated=True,
        biases="qkv",
        softmax=(-10.5, (-10.5, 13.7)),
        parameters=6_243_584_000,
    ),
}


def product(model: str, name: str, batch: int, max_len: int, dtype: str) -> Program:
    """One product of a decode step with what is fused to it, as the engine calls it: rows padded to 8."""
    shape, of = MODELS[model], functools.partial(_of, dtype)
    n, k = shape.products()[name]
    m = -(-batch // 8) * 8
    arrays: dict[str, Any] = {"x": of(m, k), "weight": of(n, k)}
    if (shape.biases == "all" and name != "logits") or (shape.biases == "qkv" and name == "qkv"):
        arrays["bias"] = of(n)
    if name in ("qkv", "up", "logits"):
        centered = not shape.gated
        arrays["norm"] = Norm(weight=of(k), bias=of(k) if centered else None, eps=1e-5, centered=centered)
    if name in ("out", "down"):
        arrays["residual"] = of(m, n)
    counters = jax.ShapeDtypeStruct((-(-n // 32),), jnp.int32)
    options: dict[str, Any] = {"valid_m": batch if batch < m else None}
    run = linear
    if name == "qkv":
        return _qkv(shape, arrays, counters, batch, max_len)
    if name == "up" and shape.gated:
        run = gated_linear
    elif name == "up":
        options["activation"] = "relu"
    if name == "logits":
        options["out_dtype"] = jnp.float32

    def function(counters: jax.Array, arrays: dict[str, Any]) -> Any:
        ref = jax.new_ref(counters)
        return run(**arrays, counters=ref, **options), jax.freeze(ref)

    return Program(function=function, args=(counters, arrays), jit_options={"donate_argnums": 0})


def _qkv(shape: ModelShape, arrays: dict[str, Any], counters: Any, batch: int, max_len: int) -> Program:
    m, half = arrays["x"].shape[0], shape.rotary_dim // 2
    angles = jax.ShapeDtypeStruct((m, half), jnp.float32)
    arrays |= {"rope": (angles, angles) if half else None, "lengths": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    cache = _of(arrays["x"].dtype, batch, shape.num_kv_heads, max_len, shape.head_dim)

    def function(keys: jax.Array, values: jax.Array, counters: jax.Array, arrays: dict[str, Any]) -> Any:
        ref = jax.new_ref(counters)
        return qkv_linear(**arrays, keys=keys, values=values, counters=ref), jax.freeze(ref)

    args = cache, cache, counters, arrays
    return Program(function=function, args=args, jit_options={"donate_argnums": (0, 1, 2)})


def attention(model: str, batch: int, max_len: int, dtype: str, q_len: int | None = None) -> Program:
    """Attention of a decode step, or of a chunk of q_len prompt tokens, with the paper's softmax for the model."""
    shape, of = MODELS[model], functools.partial(_of, dtype)
    cache = of(batch, shape.num_kv_heads, max_len, shape.head_dim)
    options: dict[str, Any] = {"scale": shape.head_dim**-0.5}
    if shape.softmax:
        options |= {"unified_max": shape.softmax[0], "safe_range": shape.softmax[1]}
    heads = (shape.num_heads, shape.head_dim)
    if q_len is not None:
        positions = jax.ShapeDtypeStruct((batch, q_len), jnp.int32)

        def chunk(query: Any, keys: Any, values: Any, positions: Any) -> Any:
            return prefill_attention(query, keys, values, positions, **options)[: 2 if shape.softmax else 1]

        return Program(function=chunk, args=(of(batch, q_len, *heads), cache, cache, positions))
    counters = jax.ShapeDtypeStruct((batch * shape.num_kv_heads,), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def function(counters: Any, *arrays: Any) -> Any:
        ref = jax.new_ref(counters)
        out = decode_attention(*arrays, counters=ref, **options)
        return out[: 2 if shape.softmax else 1], jax.freeze(ref)

    args = counters, of(-(-batch // 8) * 8, *heads), cache, cache, lengths
    return Program(function=function, args=args, jit_options={"donate_argnums": 0})


def _of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
