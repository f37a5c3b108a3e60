"""The products of a decode step against their definition, interpreted as Hopper runs them; and what is refused.

One body for both implementations. Faults that were put into the kernels, and the cases that turned red:

    copy into the wrong slot (`i + ahead + 1`)               all: race
    mean of squares over a step instead of k                 norm, gated, in bfloat16
    statistics without the loads left over by eight          layer norm, and gemv's norm
    LayerNorm without the shift by the first element,        layer norm; a mean far from zero
      or without the mean
    a norm's gain without its offset                         norm with an offset
    LayerNorm without its bias                               layer norm bias
    gemv drops its first row, or multiplies one twice        gemv: plain, residual
    gemv leaves padding what bias and residual make of it    gemv: bias, residual
    the last block starts 8 rows early                       tail
    the last block starts where it would without a tail      tail: race, wrong results
    the last block stores all its columns                    tail: race
    gate without up                                          gated
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest
from test_flat_gemm_cases import NORMS, Case, blocks
from tolerance import PRODUCT

from pallas_kernels.flat_gemm.config import FlatGemmConfig, choose_config
from pallas_kernels.interpret import interpret_params
from pallas_kernels.targets import TARGETS, find_target

INTERPRET = interpret_params()

OPTIONS = {
    "plain": {},
    "bias": {"bias": True, "activation": "relu"},
    "residual": {"residual": True, "n": 96, "config": blocks(block_n=32, block_k=64)},
    "gelu": {"bias": True, "activation": "gelu", "residual": True},
    "gelu_tanh": {"activation": "gelu_tanh", "k": 160, "config": blocks(block_k=32)},
    "norm": {"norm": "rms", "k": 192, "config": blocks(block_k=64)},
    "norm with an offset": {"norm": "rms offset", "k": 192, "config": blocks(block_k=64)},
    "layer norm": {"norm": "layer", "k": 192, "config": blocks(block_k=64), "mean": 5.0},
    "layer norm bias": {"norm": "layer bias", "bias": True, "residual": True},
    "gated": {"gated": True, "bias": True, "norm": "rms", "k": 160, "config": blocks(block_k=32)},
    "gated layer norm": {"gated": True, "norm": "layer bias", "activation": "gelu", "n": 96},
    "wide": {"n": 128, "config": blocks(block_n=128, block_k=64), "norm": "rms", "bias": True},
    "split": {"k": 640, "config": blocks(split_k=2), "residual": True},
    "split norm": {"k": 640, "config": blocks(block_k=64, split_k=4), "norm": "rms", "n": 128},
    "split layer norm": {"k": 640, "config": blocks(split_k=2), "norm": "layer bias", "gated": True},
    "tail": {"n": 104, "residual": True, "bias": True},
    "small tail": {"n": 72, "activation": "silu", "config": blocks(split_k=2), "k": 640},
    "gated tail": {"n": 88, "gated": True, "bias": True, "norm": "rms"},
}
ROWS = {"flat_gemm": [(1, 0), (9, 0), (17, 7), (40, 0)], "gemv": [(1, 0), (2, 6), (3, 5), (4, 0)]}
MORE_ROWS = {"flat_gemm": [(2, 6), (3, 0), (4, 4), (8, 0), (64, 0)], "gemv": [(1, 7), (3, 0), (4, 4)]}
INTERPRETED = [
    *((name, "flat_gemm", *ROWS["flat_gemm"][(i + j) % 4], i + j) for i, name in enumerate(OPTIONS) for j in (0, 1, 2)),
    *((name, "gemv", *ROWS["gemv"][(i + j) % 4], i + j) for i, name in enumerate(OPTIONS) for j in (0, 1, 2)),
    *((name, of, *rows, i) for of in MORE_ROWS for i, rows in enumerate(MORE_ROWS[of]) for name in ("plain", "norm")),
]


@pytest.mark.parametrize(("name", "implementation", "m", "padding", "number"), INTERPRETED)
def test_interpreted(name, implementation, m, padding, number):
    dtype = list(PRODUCT)[number % 2]
    case = Case(implementation=implementation, m=m, padding=padding, dtype=dtype, **OPTIONS[name])
    arrays = case.arrays()
    found = case.run(arrays, interpret=INTERPRET)
    case.check(found, arrays)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("size", "gain"), [(1e-3, 0.02), (1e4, 128.0)])
@pytest.mark.parametrize(("implementation", "m"), [("flat_gemm", 8), ("flat_gemm", 64), ("gemv", 3)])
def test_a_norm_bears_small_and_large_activations_interpreted(implementation, m, size, gain, norm):
    """x times the gain alone would leave float16 at either end, and the squares of x do so by far."""
    case = Case(implementation=implementation, m=m, norm=norm, size=size)
    arrays = case.arrays() | {"gain": jnp.full(case.k, gain, case.dtype)}
    case.check(case.run(arrays, interpret=INTERPRET), arrays)


@pytest.mark.parametrize(("implementation", "m"), [("flat_gemm", 9), ("gemv", 2)])
def test_a_layer_norm_bears_a_mean_far_from_zero_interpreted(implementation, m):
    """Squares less the mean's square would keep no digit of what x is about its mean."""
    case = Case(implementation=implementation, m=m, norm="layer", mean=2000.0, size=4.0)
    arrays = case.arrays()
    case.check(case.run(arrays, interpret=INTERPRET), arrays)


@pytest.mark.parametrize("card", TARGETS)
@pytest.mark.parametrize("m", [1, 8, 17, 32, 64])
@pytest.mark.parametrize(
    ("n", "k"), [(4096, 4096), (4096, 11008), (50272, 4096), (65024, 4096), (576, 1536), (4608, 4096), (72, 32)]
)
def test_a_chosen_config_fits(card, m, n, k):
    target = find_target(card)
    config = choose_config(m, n, k, "bfloat16", target)
    config.check(m, n, k, "bfloat16")
    assert config.shared_bytes(m, "bfloat16") <= target.shared_per_block
    assert config.block_n >= 64 or m >= 32


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(m=65), "1 to 64 rows of x; got m = 65: use dense"),
        (Case(m=5, implementation="gemv"), "gemv takes 1 to 4 rows of x; got m = 5: use flat_gemm"),
        (Case(implementation="gemm"), "implementation is one of"),
        (Case(dtype="float32"), "takes float16 or bfloat16; got float32: use dense"),
        (Case(n=40), "n >= block_n; got n = 40, block_n = 64: use dense"),
        (Case(k=200), "k as a multiple of block_k; got k = 200, block_k = 128: use dense"),
        (Case(k=200, config=None), "k as a multiple of 32; got k = 200: use dense"),
        (
            Case(m=1, implementation="gemv", n=128, config=blocks(block_n=128)),
            "and 8192 weights a step; got block_n = 128",
        ),
        (
            Case(m=4, implementation="gemv", n=256, config=blocks(block_n=256, block_k=32)),
            "up to 128, and 8192 weights",
        ),
        (Case(gated=True, n=48, config=FlatGemmConfig(block_n=32)), "2 segments of 32 rows need block_n >= 64"),
        (Case(n=77, config=None), "n as a multiple of 8; got n = 77: use dense"),
        (Case(n=77), "n as a multiple of 8; got n = 77: use dense"),
        (Case(n=24, config=None), "needs n >= 32; got n = 24: use dense"),
    ],
    ids=lambda value: None if isinstance(value, Case) else value,
)
def test_what_it_does_not_take_is_named(case, message):
    with pytest.raises(NotImplementedError, match=message):
        case.run(case.arrays(), target=find_target("a10"), interpret=INTERPRET)


def test_rows_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="1 to 8; got 9"):
        dataclasses.replace(Case(), m=9).run(Case().arrays(), interpret=INTERPRET)


def test_blocks_that_cannot_be_are_refused():
    for wrong in ({"block_n": 48}, {"block_k": 96}, {"num_stages": 1}, {"split_k": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FlatGemmConfig(**wrong)
    with pytest.raises(ValueError, match="too few for split_k = 2"):
        FlatGemmConfig(split_k=2).check(8, 64, 512, "float16")
