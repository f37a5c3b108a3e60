"""The decode attention kernel as compiled for cards that are not here: its report, and its PTX executed.

Faults that were put into the kernel, and what turned red (I: `test_decode_attention`, P: here):

    `row <= high` in the mask                        I test_interpreted
    a split ends one block later                     I test_interpreted
    heads of another KV head                         I test_interpreted
    window one slot short                            I test_interpreted[window-*]
    values past the length not zeroed                I test_interpreted
    float16 weights under the unified maximum        I test_interpreted_maximum_at_the_lower_end_…[float16]
    no rescale in the online softmax                 I test_interpreted[*-online], test_interpreted_only_overflowed_…
    all rows of a group written after recomputing    I test_interpreted_only_overflowed_…
    copy into the slot being read (ahead + 1)        I test_interpreted: race; P test_executed_ptx: "uninitialised"
    wait for one step less (num_stages - 1)          P test_executed_ptx: "in-flight"
    no barriers around shared memory                 P test_executed_ptx: "race" (`unsafe_no_auto_barriers`)
    counter without acquire and release              P test_executed_ptx: "race"
    no barrier after the arrival is told             P test_executed_ptx: "race"
    the last but one arrival combines                P test_executed_ptx: "uninitialised"
    counters not set back                            P test_executed_ptx: "not zero again"
    one counter for two KV heads                     P test_executed_ptx: "race", "never-written"
    rows past the batch not cleared, or one too few  I test_interpreted[more-rows-*]; P "never-written"
    scores above the range not noticed               I test_interpreted_only_overflowed_…

The barrier before an arrival can go unnoticed: every store of Mosaic's ends with one.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from compiled import check_kernel, our_kernel
from needs import needs_compiler
from ptx.chain import Chain
from test_decode_attention_cases import WIDE, Case

from jaxdecode.aot import CompiledProgram, Program, compile_program
from pallas_kernels.decode_attention import mosaic_gpu
from pallas_kernels.decode_attention.config import DecodeAttentionConfig
from pallas_kernels.targets import find_target

pytestmark = needs_compiler

UNIFIED = {"unified_max": 0.0, "safe_range": WIDE}
A100 = "a100-80gb"
RING = DecodeAttentionConfig(block_kv=64, num_stages=3, split_kv=3)
# config None: the rule's
EXECUTED = {
    "llama-unified": (Case(head_dim=128, max_len=512, lengths=(300, 77), config=None, **UNIFIED), A100),
    "llama-online": (Case(head_dim=128, max_len=512, lengths=(512, 0), config=RING, rows=8), A100),
    "chatglm-bf16": (Case(head_dim=128, q_per_kv=16, max_len=256, lengths=(200, 1), dtype="bfloat16", **UNIFIED), A100),
    "window-soft-cap": (Case(q_per_kv=7, max_len=200, lengths=(200, 70), window=90, soft_cap=3.0, config=RING), A100),
    "head80": (Case(head_dim=80, q_per_kv=2, config=RING, max_len=256, lengths=(200, 77)), A100),
    "head96-unified": (Case(head_dim=96, config=RING, max_len=256, lengths=(200, 77), **UNIFIED), "rtx3090"),
    "head256": (Case(head_dim=256, q_per_kv=4, max_len=128, config=None, **UNIFIED), "rtx4090"),
}
COMPILED = EXECUTED | {
    "chatglm-calm": (dataclasses.replace(EXECUTED["chatglm-bf16"][0], safe_range=(-60.0, 60.0)), A100),
    "hopper": (Case(head_dim=128, max_len=512, lengths=(300, 77), config=None, **UNIFIED), "h100"),
}
OVERFLOW = {"0": (), "1": ((0, 1),), "some": ((0, 0), (1, 1)), "all": tuple(np.ndindex(2, 2))}


def build(case: Case, target: str) -> Program:
    def function(query, keys, values, lengths, counters):
        ref = jax.new_ref(counters)
        out, recomputed = mosaic_gpu.decode_attention(
            query, keys, values, lengths, **case.options, target=find_target(target), counters=ref
        )
        return out, recomputed, jax.freeze(ref)

    arrays = [*case.arrays(), counters(case)]
    args = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
    return Program(function=function, args=args, jit_options={"donate_argnums": 4})


def counters(case: Case) -> np.ndarray:
    return np.zeros((len(case.lengths) * case.num_kv_heads + 3,), np.int32)


@functools.cache
def compiled(name: str) -> CompiledProgram:
    case, target = COMPILED[name]
    return compile_program(build, case, target, target=target)


def execute(name: str, case: Case, seed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    program = compiled(name)
    # splits without blocks write no partial result
    sparse = [our_kernel(program).name]
    chain = Chain(program, [*case.arrays(), counters(case)], seed=seed, sparse=sparse)
    out, recomputed, left = chain.outputs
    assert not left.any(), "the counters are not zero again"
    return out, recomputed


@pytest.mark.parametrize("name", COMPILED)
def test_report(name):
    case, program = COMPILED[name][0], compiled(name)
    check_kernel(program)
    if case.config is not None:
        assert our_kernel(program).launch.shared_bytes <= case.config.shared_bytes(case.q_per_kv, case.head_dim)


@pytest.mark.parametrize("name", EXECUTED)
def test_executed_ptx(name):
    case, _ = EXECUTED[name]
    case.check(*execute(name, case))


@pytest.mark.parametrize("name", ["llama-unified", "llama-online"])
def test_any_interleaving_gives_the_same_bits(name):
    case, _ = EXECUTED[name]
    results = [execute(name, case, seed)[0] for seed in (0, 1, 2)]
    case.check(results[0], execute(name, case)[1])
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()


@pytest.mark.parametrize("rows", OVERFLOW)
def test_only_overflowed_rows_are_recomputed(rows):
    name, overflow = "llama-unified", OVERFLOW[rows]
    case = dataclasses.replace(EXECUTED[name][0], overflow=overflow)
    out, recomputed = execute(name, case, seed=0)
    case.check(out, recomputed)
    calm = execute(name, EXECUTED[name][0])[0]
    assert all((out[row] == calm[row]).all() for row in np.ndindex(2, 2) if row not in overflow)


def test_overflow_of_one_head_leaves_its_group_alone():
    overflow = ((0, 3), (0, 20))
    case = dataclasses.replace(EXECUTED["chatglm-bf16"][0], overflow=overflow)
    out, recomputed = execute("chatglm-bf16", case, seed=1)
    case.check(out, recomputed)
    calm, none = execute("chatglm-calm", case)
    assert recomputed.tolist() == [[1, 1], [0, 0]] and not none.any()
    assert all((out[row] == calm[row]).all() for row in np.ndindex(2, 32) if row not in overflow)
