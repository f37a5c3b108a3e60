"""The prefill attention kernel as compiled for cards that are not here: its report, and its PTX executed.

Faults that were put into the kernel, and what turned red (I: `test_prefill_attention`, P: here):

    `row < newest`, `row <= newest + 1` in the mask  I test_interpreted; P test_executed_ptx
    window one slot long                             I test_interpreted[window-*]
    first block of the window skipped                I test_interpreted[window-*]
    last block, not whole, skipped                   I test_interpreted
    query heads in reverse order                     I test_interpreted[gqa3-tail-*, window-*]
    heads of another KV head                         I test_interpreted[gqa*]
    float16 weights under the unified maximum        I test_interpreted_only_overflowed_…[*-float16], heavy tails
    no rescale in the online softmax                 I test_interpreted[*-online]; P test_executed_ptx
    all rows of a block written after recomputing    I, P test_[interpreted_]only_overflowed_rows_are_recomputed
    scores above the range not noticed               I, P test_[interpreted_]only_overflowed_rows_are_recomputed
    values that no query sees not zeroed             I test_interpreted; P test_executed_ptx
    queries that see nothing divided by zero         I test_interpreted[ragged*]
    queries in two columns written twice             I test_interpreted_only_overflowed_…: counted twice
    columns counted that are not written             I test_interpreted_only_overflowed_…
    a run of queries past the chunk's end            I test_interpreted: out of bounds; P test_executed_ptx: the same
    copy into the slot being read (ahead + 1)        I test_interpreted: race; P test_executed_ptx: "in-flight"
    wait for one step less (num_stages - 1)          P test_executed_ptx: "in-flight"
    no barriers around shared memory                 P test_executed_ptx: "race" (`unsafe_no_auto_barriers`)
    no fence for the copy engine, in a step          I test_interpreted: race
    no fence before recomputing                      I test_interpreted_only_overflowed_…[all-*]: race
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
from test_prefill_attention_cases import UNIFIED, Case

from jaxdecode.aot import CompiledProgram, Program, compile_program
from pallas_kernels.prefill_attention import mosaic_gpu
from pallas_kernels.prefill_attention.config import PrefillAttentionConfig
from pallas_kernels.targets import find_target

pytestmark = needs_compiler

A100 = "a100-80gb"
RING = PrefillAttentionConfig(block_kv=32, num_stages=3, max_columns=16)
WIDE_RING = PrefillAttentionConfig(block_kv=64, num_stages=2, max_columns=32)
# config None: the rule's
EXECUTED = {
    "mha-unified": (Case(q_len=16, num_kv_heads=1, starts=(100, 3), max_len=160, config=RING, **UNIFIED), A100),
    "mha-online-tail": (Case(q_len=33, num_kv_heads=1, starts=(60, 0), config=RING), A100),
    "chatglm-window-bf16": (
        Case(q_len=3, q_per_kv=16, head_dim=128, starts=(90,), window=40, dtype="bfloat16", config=RING, **UNIFIED),
        A100,
    ),
    "llama": (Case(q_len=16, head_dim=128, num_kv_heads=1, starts=(112, 9), config=None, **UNIFIED), A100),
    "gqa9-soft-cap-ragged": (
        Case(q_len=3, q_per_kv=9, num_kv_heads=1, ragged=((0, 0), (1, 2)), soft_cap=3.0, config=RING, max_len=120),
        "rtx3090",
    ),
    "head80-gqa3": (
        Case(q_len=9, q_per_kv=3, head_dim=80, num_kv_heads=1, dtype="bfloat16", config=WIDE_RING, **UNIFIED),
        "rtx4090",
    ),
    "head96": (Case(q_len=9, head_dim=96, num_kv_heads=1, starts=(40,), config=RING), "rtx4090"),
    "head256": (Case(q_len=8, head_dim=256, num_kv_heads=1, starts=(50,), config=None, **UNIFIED), "rtx3090"),
}
COMPILED = EXECUTED | {
    "hopper": (Case(q_len=32, head_dim=128, max_len=512, config=None, **UNIFIED), "h100"),
}
OVERFLOW = {"0": (), "1": ((1, 15, 0),), "some": ((0, 14, 0), (0, 15, 0), (1, 15, 0)), "all": "all"}


def build(case: Case, target: str) -> Program:
    def function(query, keys, values, positions):
        return mosaic_gpu.prefill_attention(query, keys, values, positions, **case.options, target=find_target(target))

    args = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in case.arrays())
    return Program(function=function, args=args)


@functools.cache
def compiled(name: str) -> CompiledProgram:
    case, target = COMPILED[name]
    return compile_program(build, case, target, target=target)


def execute(name: str, case: Case, seed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    out, recomputed = Chain(compiled(name), case.arrays(), seed=seed).outputs
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


@pytest.mark.parametrize("name", ["mha-unified", "mha-online-tail"])
def test_any_interleaving_gives_the_same_bits(name):
    case, _ = EXECUTED[name]
    results = [execute(name, case, seed)[0] for seed in (0, 1)]
    assert (results[0] == results[1]).all() and (results[0] == execute(name, case)[0]).all()


@pytest.mark.parametrize("rows", OVERFLOW)
def test_only_overflowed_rows_are_recomputed(rows):
    name = "mha-unified"
    base, _ = EXECUTED[name]
    case = dataclasses.replace(base, **({"size": 60.0} if rows == "all" else {"overflow": OVERFLOW[rows]}))
    out, recomputed = execute(name, case, seed=0)
    case.check(out, recomputed)
    again = case.answer()[1]
    if rows == "all":
        assert again.sum() > 0.9 * again.size
        return
    assert again.sum() == len(OVERFLOW[rows])
    # the keys of the last two positions are others; all rows of a sequence stand in one block
    calm = execute(name, base)[0]
    assert (out[:, :14] == calm[:, :14]).all()


def test_heavy_tails_are_recomputed():
    name = "chatglm-window-bf16"
    case = dataclasses.replace(EXECUTED[name][0], tail=200.0)
    out, recomputed = execute(name, case, seed=1)
    case.check(out, recomputed)
    assert 20 <= recomputed.sum() <= 80
