"""What compiled kernels ask of memory, counted byte by byte in execution, is what the arithmetic says."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import test_decode_attention_ptx as attention
from needs import needs_compiler
from ptx.chain import Chain
from test_decode_attention_cases import Case as AttentionCase
from test_flat_gemm_cases import Case, blocks, build

from jaxdecode.aot import compile_program
from jaxdecode.aot.traffic import attention_traffic, product_traffic
from pallas_kernels.decode_attention.config import DecodeAttentionConfig

pytestmark = needs_compiler

A100 = "a100-80gb"
PRODUCTS = {
    "flat_gemm": Case(m=8, n=192, k=512),
    "flat_gemm split": Case(m=16, n=128, k=896, config=blocks(split_k=3)),
    "flat_gemm norm": Case(m=8, n=128, k=640, norm="rms"),
    "flat_gemm tail": Case(m=8, n=104, k=512),
    "gemv": Case(implementation="gemv", m=1, padding=7, n=128, k=640),
    "gemv split": Case(implementation="gemv", m=3, padding=5, n=128, k=896, config=blocks(split_k=3)),
    "gemv gated": Case(implementation="gemv", m=2, padding=6, gated=True, n=64, k=512, config=blocks(block_k=64)),
}
ATTENTION = {
    "two splits": AttentionCase(lengths=(100, 33), q_per_kv=4, head_dim=128),
    "ragged": AttentionCase(lengths=(0, 1, 128, 65), num_kv_heads=1, q_per_kv=16, head_dim=128),
    "window": AttentionCase(lengths=(128, 40), window=37),
    "a split with nothing": AttentionCase(lengths=(40,), config=DecodeAttentionConfig(split_kv=3)),
}


def requests(program, inputs: list[np.ndarray]) -> dict[int, np.ndarray]:
    sparse = [kernel.name for kernel in program.kernels.values() if kernel.kind == "mosaic"]
    return Chain(program, inputs, sparse=sparse, count_requests=True).requests


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    case = PRODUCTS[name]
    program, arrays = compile_program(build, case, A100, target=A100), case.arrays()
    counters = [] if case.config.split_k == 1 else [np.zeros(1024, np.int32)]
    counts = requests(program, [*counters, *(np.asarray(leaf) for leaf in jax.tree.leaves(arrays))])
    place = {array: len(counters) + index for index, array in enumerate(sorted(arrays))}
    rows, gemv = case.n * (2 if case.gated else 1), case.implementation == "gemv"
    traffic = product_traffic(
        blocks=-(-rows // case.config.block_n),
        block_rows=case.config.block_n,
        rows_of_x=case.m if gemv else case.config.pad_m(case.m),
        n=rows,
        k=case.k,
        itemsize=2,
    )
    weights, x = counts[place["weight"]], counts[place["x"]]
    assert weights.min() == 1  # all of it
    assert weights.sum() == traffic.requested
    assert weights.size == traffic.least
    if rows % case.config.block_n == 0:
        assert weights.max() == 1
    valid = x.reshape(case.m + case.padding, -1)[: case.m]
    assert (valid == valid[0, 0]).all()
    # on CUDA cores each of the four warps asks for its own copy of x, which the multiprocessor's cache answers; a norm
    # in float16 reads x once more beforehand
    assert x.sum() == traffic.activations * (WARPS if gemv else 2 if case.norm else 1)


WARPS = 4


@pytest.mark.parametrize("name", ATTENTION)
def test_decode_attention(name):
    case = ATTENTION[name]
    program = compile_program(attention.build, case, A100, target=A100)
    inputs = [*case.arrays(), attention.counters(case)]
    counts = requests(program, inputs)
    config = case.config
    traffic, busy = attention_traffic(
        case.lengths,
        block_kv=config.block_kv,
        split_kv=config.split_kv,
        num_kv_heads=case.num_kv_heads,
        num_heads=case.num_kv_heads * case.q_per_kv,
        head_dim=case.head_dim,
        itemsize=2,
        window=case.window,
    )
    caches = [counts[i].reshape(len(case.lengths), case.num_kv_heads, case.max_len, -1) for i in (1, 2)]
    assert sum(int(cache.sum()) for cache in caches) == traffic.requested
    assert max(int(cache.max()) for cache in caches) == 1
    # warps that need the same queries each ask for their own copy, which the multiprocessor's cache answers
    copies = 2 if case.q_per_kv == 16 else WARPS
    assert counts[0].sum() == copies * traffic.activations
    valid = 0
    for cache in caches:
        for row, length in enumerate(case.lengths):
            seen = cache[row, :, max(0, length - case.window) if case.window else 0 : length]
            assert (seen == 1).all()
            valid += seen.size
    assert valid == traffic.least
    assert busy <= len(case.lengths) * case.num_kv_heads * config.split_kv


def test_an_overflowed_row_reads_its_sequence_once_more():
    case = AttentionCase(lengths=(100, 33), unified_max=0.0, safe_range=(-30.0, 30.0), overflow=((1, 0),))
    program = compile_program(attention.build, case, A100, target=A100)
    calm = dataclasses.replace(case, overflow=())
    for one, twice in ((calm, ()), (case, ((1, 0),))):
        cache = requests(program, [*one.arrays(), attention.counters(one)])[1]
        cache = cache.reshape(2, case.num_kv_heads, case.max_len, -1)
        for row, head in np.ndindex(2, case.num_kv_heads):
            assert (cache[row, head, : case.lengths[row]] == (2 if (row, head) in twice else 1)).all()
