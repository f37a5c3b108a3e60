"""The products of a decode step, compiled for cards that are not here: their PTX executed, and looked at.

Faults that were put into the kernels, and what turned red:

    wait for one copy less (`plan.copies * newer + 1`)       all, gemv too: "in-flight"
    copy into the wrong slot (`i + ahead + 1`)               all, gemv too: "in-flight"
    no barrier in `arrive` after the count is told           split: "race"
    `relaxed` instead of `acq_rel` in `arrive`                split, gemv split: "race"
    the first split one step short (interpreted, it hangs)   split, gemv split
    counters not reset                                       test_products_share_counters_and_leave_them_at_zero
    the last block starts where it would without a tail      tail, gemv tail: "out-of-bounds"

Not found: `arrive` without its barrier before the atomic, for Mosaic puts one of its own behind a store.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import check_kernel, compile_wanted
from needs import needs_compiler
from ptx.chain import Chain
from test_flat_gemm_cases import Case, blocks, build

from jaxdecode.aot import Job, Program
from pallas_kernels.flat_gemm.config import FlatGemmConfig
from pallas_kernels.targets import find_target

EXECUTED = {
    "plain": Case(n=128, k=512, config=FlatGemmConfig(num_stages=4)),
    "bfloat16": Case(m=16, dtype="bfloat16", bias=True, activation="gelu"),
    "deep ring": Case(m=8, n=64, k=576, norm="rms", config=FlatGemmConfig(num_stages=6, block_k=64)),
    "one step": Case(k=128, config=FlatGemmConfig(num_stages=2), bias=True, activation="relu"),
    "unpadded": Case(m=3, residual=True, activation="gelu_tanh"),
    "narrow": Case(m=16, n=96, k=320, residual=True, config=blocks(block_n=32, block_k=64)),
    "narrow bias": Case(m=5, n=32, k=96, bias=True, config=FlatGemmConfig(num_stages=4, block_n=32, block_k=32)),
    "norm": Case(norm="rms", k=640),
    "norm wide": Case(m=64, n=128, norm="rms", dtype="bfloat16", config=FlatGemmConfig(block_n=128, num_stages=2)),
    "layer norm": Case(m=40, norm="layer", k=640, mean=30.0, size=4.0),
    "layer norm bias": Case(norm="layer bias", k=320, dtype="bfloat16", config=blocks(block_k=64), residual=True),
    "gated": Case(gated=True, norm="rms", dtype="bfloat16"),
    "gated gelu": Case(m=40, n=96, gated=True, activation="gelu", bias=True),
    "gated layer norm": Case(gated=True, norm="layer bias", n=72),
    "tail": Case(n=104, residual=True, bias=True),
    "small tail": Case(n=72, k=640, config=blocks(split_k=2)),
    "split": Case(n=128, k=896, residual=True, config=blocks(split_k=3)),
    "split norm": Case(m=16, k=640, norm="rms", config=blocks(block_k=64, split_k=4)),
    "split layer norm": Case(k=640, norm="layer bias", config=blocks(split_k=2)),
    "split gated": Case(k=512, gated=True, norm="rms", config=blocks(split_k=2), dtype="bfloat16"),
    "gemv 1": Case(implementation="gemv", m=1, padding=7, n=128, config=FlatGemmConfig(num_stages=4)),
    "gemv deep ring": Case(implementation="gemv", m=1, padding=7, k=576, config=blocks(num_stages=6, block_k=64)),
    "gemv 2": Case(implementation="gemv", m=2, dtype="bfloat16", bias=True, activation="gelu", residual=True),
    "gemv 3": Case(implementation="gemv", m=3, padding=5, norm="rms", k=640),
    "gemv 4": Case(implementation="gemv", m=4, padding=4, norm="layer bias", dtype="bfloat16", mean=30.0),
    "gemv narrow": Case(implementation="gemv", m=3, n=96, k=320, config=blocks(block_n=32, block_k=64), norm="layer"),
    "gemv short": Case(implementation="gemv", m=1, k=96, config=blocks(block_k=32), norm="rms"),
    "gemv wide": Case(
        implementation="gemv", m=4, n=128, norm="layer bias", config=FlatGemmConfig(block_n=128, block_k=64)
    ),
    "gemv tail": Case(implementation="gemv", m=2, padding=6, n=104, bias=True),
    "gemv gated": Case(implementation="gemv", m=2, padding=6, gated=True, norm="rms", dtype="bfloat16"),
    "gemv gated tail": Case(implementation="gemv", m=4, n=88, gated=True, bias=True),
    "gemv split": Case(implementation="gemv", m=1, padding=7, n=128, k=896, residual=True, config=blocks(split_k=3)),
    "gemv split norm": Case(implementation="gemv", m=3, k=640, norm="layer", gated=True, config=blocks(split_k=2)),
}
CARDS = {name: "a100-80gb" for name in EXECUTED} | {
    "plain 86": "rtx3090",
    "gated 86": "rtx3090",
    "split norm 86": "rtx3090",
    "gemv 3 86": "rtx3090",
    "gemv gated 86": "rtx3090",
    "norm 89": "rtx4090",
    "split 89": "rtx4090",
    "gated 89": "rtx4090",
    "gemv 4 89": "rtx4090",
    "gemv gated 89": "rtx4090",
}


def case_of(name: str) -> Case:
    return EXECUTED.get(name) or EXECUTED[name.rpartition(" ")[0]]


def build_chain(case: Case, card: str) -> Program:
    """Two products that count with the same counters, which are kept."""

    def run(counters, arrays):
        ref = jax.new_ref(counters)
        first = case.run(arrays, target=find_target(card), counters=ref)
        second = case.run(arrays | {"residual": first}, target=find_target(card), counters=ref)
        return second, jax.freeze(ref)

    counters = jax.ShapeDtypeStruct((case.n // case.config.block_n + 1,), jnp.int32)
    return Program(function=run, args=(counters, case.shapes()), jit_options={"donate_argnums": 0})


@pytest.fixture(scope="module")
def executed(request):
    jobs = {n: Job(build=build, target=find_target(c), args=(case_of(n), c)) for n, c in CARDS.items()}
    a100 = CARDS["split"]
    for name in ("split", "gemv split"):
        jobs[f"{name} chain"] = Job(build=build_chain, target=find_target(a100), args=(EXECUTED[name], a100))
    return compile_wanted(request, jobs)


@needs_compiler
@pytest.mark.parametrize("name", CARDS)
def test_executed_ptx(executed, name):
    case = case_of(name)
    arrays = case.arrays()
    inputs = [np.asarray(a) for a in jax.tree.leaves(arrays)]
    if case.config.split_k > 1:
        inputs.insert(0, np.zeros(1024, np.int32))
    seeds = (0, 1, 2) if case.config.split_k > 1 else (None,)
    found = [Chain(executed[name], inputs, seed=seed).outputs[0] for seed in seeds]
    case.check(found[0], arrays)
    for other in found[1:]:  # whoever arrives last adds in the same order
        np.testing.assert_array_equal(other, found[0])
    check_kernel(executed[name], tensor_cores=case.implementation == "flat_gemm", narrow_copies=True)


@needs_compiler
@pytest.mark.parametrize("name", ["split", "gemv split"])
def test_products_share_counters_and_leave_them_at_zero(executed, name):
    case = dataclasses.replace(EXECUTED[name])
    arrays = case.arrays()
    zeros = np.zeros(case.n // case.config.block_n + 1, np.int32)
    for seed in (0, 1):
        chain = Chain(executed[f"{name} chain"], [zeros, *(np.asarray(a) for a in jax.tree.leaves(arrays))], seed=seed)
        assert len(chain.launched) == 2  # nothing but the two products
        np.testing.assert_array_equal(chain.outputs[1], zeros)
        once = np.zeros_like(np.asarray(arrays["residual"]))
        once[: case.m] = case.expected(arrays)
        case.check(chain.outputs[0], arrays | {"residual": jnp.asarray(once)})


@needs_compiler
@pytest.mark.parametrize(
    "name", ["plain", "norm", "layer norm", "gated", "gemv 1", "gemv 3", "gemv gated", "gemv tail"]
)
def test_a_product_of_padded_rows_is_one_kernel(executed, name):
    assert [thunk.kind for thunk in executed[name].thunks] == ["custom_call"]
