"""Programs that XLA compiles to kernels of its own: what they compute, on which inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny import tiny_config

from jaxdecode.aot import Program
from jaxdecode.cache import KVCache, init_cache
from jaxdecode.engine import step
from jaxdecode.models import abstract_params, init_params

RANDOM = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(dtype)


def rms_norm(x, weight):
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-5)
    return ((wide * scale) * weight.astype(jnp.float32)).astype(x.dtype)


def rotate(x, positions):
    angles = positions[:, None] * 10000.0 ** (-jnp.arange(16) / 16)
    sin, cos = jnp.sin(angles)[:, None, :], jnp.cos(angles)[:, None, :]
    low, high = x[..., :16], x[..., 16:]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def count_down(x):
    return jax.lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, c[1] * 1.5 + 1), (jnp.int32(5), x))[1]


def write_row(x, row, at):
    return jax.lax.dynamic_update_slice(x, row, (at, 0)) * 2


# name: (function, arrays, largest difference allowed relative to the largest number)
FUNCTIONS = {
    "softmax": (lambda x: jax.nn.softmax(x, -1), [normal(37, 130)], 1e-6),
    "row sum": (lambda x: x.sum(-1), [normal(50, 700)], 1e-5),
    "column sum": (lambda x: x.sum(0), [normal(300, 70)], 1e-5),
    "largest": (lambda x: x.max(-1), [normal(6, 1000, dtype=jnp.bfloat16)], 0),
    "argmax": (lambda x: jnp.argmax(x, -1), [normal(8, 1000)], 0),
    "cumulative sum": (lambda x: jnp.cumsum(x, -1), [normal(3, 150)], 1e-5),
    "functions": (lambda x: jnp.tanh(x) + jax.nn.silu(x) + jnp.log1p(jnp.abs(x)) + jnp.sin(x), [normal(515) * 9], 1e-5),
    "transpose": (lambda x: jnp.swapaxes(x, 0, 1) + 1, [normal(100, 65)], 0),
    "gather": (lambda x, i: x[i], [normal(90, 64, dtype=jnp.bfloat16), np.array([3, 0, 89, 89, 17], np.int32)], 0),
    "write a row": (write_row, [normal(50, 64), normal(1, 64), np.int32(49)], 0),
    "sort": (lambda x: jnp.sort(x, -1), [normal(3, 100)], 0),
    "random bits": (lambda k: jax.random.bits(jax.random.wrap_key_data(k), (70,)), [np.array([1, 2], np.uint32)], 0),
    "RMSNorm": (rms_norm, [normal(5, 512, dtype=jnp.bfloat16), normal(512, dtype=jnp.bfloat16)], 8e-3),
    "rotary embedding": (rotate, [normal(4, 2, 32), np.array([0, 7, 300, 4095], np.float32)], 1e-4),
    "bfloat16 product": (
        lambda x, w: x @ w.T,
        [normal(8, 256, dtype=jnp.bfloat16), normal(96, 256, dtype=jnp.bfloat16)],
        8e-3,
    ),
    "float16 product": (
        lambda x, w: x @ w.T,
        [normal(64, 128, dtype=np.float16), normal(64, 128, dtype=np.float16)],
        2e-3,
    ),
    "int8 product": (
        lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32),
        [RANDOM.integers(-128, 128, (32, 128), np.int8), RANDOM.integers(-128, 128, (64, 128), np.int8)],
        0,
    ),
    "loop": (count_down, [normal(130)], 1e-6),
}


def build_function(name: str) -> Program:
    function, arrays, _ = FUNCTIONS[name]
    return Program(function=function, args=tuple(arrays))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A model small enough to run on the emulator, and a decode step of it in the middle of a text."""

    model_type: str
    dtype: str
    num_kv_heads: int
    max_len: int = 32

    def config(self):
        return tiny_config(model_type=self.model_type, num_layers=1, num_kv_heads=self.num_kv_heads)

    def inputs(self):
        """params, cache, tokens: two rows, 17 and 3 tokens long."""
        config, key = self.config(), jax.random.key(0)
        cache = init_cache(config, 2, self.max_len, self.dtype)
        fill = lambda buffers, seed: tuple(jnp.asarray(normal(*b.shape) * 0.5, b.dtype) for b in buffers)  # noqa: E731
        cache = KVCache(fill(cache.keys, 1), fill(cache.values, 2), jnp.array([17, 3], jnp.int32))
        return init_params(config, key, jnp.dtype(self.dtype)), cache, jnp.array([5, 90], jnp.int32)

    def function(self):
        config = self.config()

        def exact_step(params, cache, tokens):
            with jax.default_matmul_precision("float32"):  # else float32 products lose digits on the tensor cores
                return step(params, config, cache, tokens)

        return exact_step


def build_step(model: TinyModel) -> Program:
    """The whole decode step of a model of one layer."""
    config = model.config()
    params = abstract_params(config, jnp.dtype(model.dtype))
    cache = jax.eval_shape(lambda: init_cache(config, 2, model.max_len, model.dtype))
    return Program(
        function=model.function(),
        args=(params, cache, jax.ShapeDtypeStruct((2,), jnp.int32)),
        jit_options={"donate_argnums": 1},
    )
