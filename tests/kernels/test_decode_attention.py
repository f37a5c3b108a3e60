"""The decode attention kernel in the form for Hopper, interpreted with race detection, against its definition.

Faults that were put into the kernel, and what turned red: listed in `test_decode_attention_ptx`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode_attention_cases import SMALL, WIDE, Case

from pallas_kernels.decode_attention import mosaic_gpu, reference
from pallas_kernels.decode_attention.config import DecodeAttentionConfig, choose_config
from pallas_kernels.interpret import interpret_params
from pallas_kernels.targets import TARGETS, find_target

INTERPRET = interpret_params()
UNIFIED = {"unified_max": 0.0, "safe_range": WIDE}
MODES = {"online": {}, "unified": UNIFIED}

CASES = {
    "mha": Case(),
    "gqa3": Case(q_per_kv=3),
    "gqa8-bf16": Case(q_per_kv=8, dtype="bfloat16"),
    "mqa16": Case(q_per_kv=16, num_kv_heads=1),
    "mqa32": Case(q_per_kv=32, num_kv_heads=1, dtype="bfloat16"),
    "head80": Case(head_dim=80, q_per_kv=2),
    "head96": Case(head_dim=96, dtype="bfloat16"),
    "head128": Case(head_dim=128, q_per_kv=4),
    "head256": Case(head_dim=256, num_kv_heads=1),
    "empty-one-full": Case(lengths=(0, 1, 128)),
    "block-edges": Case(lengths=(32, 63, 64, 65)),
    "window": Case(lengths=(128, 40, 10), window=37, q_per_kv=2),
    "window-in-a-block": Case(lengths=(100, 97), window=3),
    "soft-cap": Case(soft_cap=2.0, q_per_kv=2, size=3.0),
    "odd-cache": Case(max_len=72, lengths=(72, 65, 9)),
    "one-split": Case(config=DecodeAttentionConfig(block_kv=64, num_stages=2, split_kv=1)),
    "more-splits-than-blocks": Case(config=DecodeAttentionConfig(block_kv=32, num_stages=2, split_kv=7)),
    "more-rows": Case(rows=8, q_per_kv=3),
    "more-rows-one-split": Case(rows=7, lengths=(70,), config=DecodeAttentionConfig(block_kv=32, split_kv=1)),
    "heavy-tailed": Case(size=60.0, q_per_kv=2),
}


def run(case: Case) -> tuple[np.ndarray, np.ndarray]:
    arrays = [jnp.asarray(array) for array in case.arrays()]
    out, recomputed = mosaic_gpu.decode_attention(*arrays, **case.options, interpret=INTERPRET)
    return np.asarray(out), np.asarray(recomputed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, mode):
    case = dataclasses.replace(CASES[name], **MODES[mode])
    case.check(*run(case))


def test_answer_is_the_reference():
    case = dataclasses.replace(CASES["window"], dtype="bfloat16")
    arrays = [jnp.asarray(array) for array in case.arrays()]
    out, _ = reference.decode_attention(*arrays, **{k: v for k, v in case.options.items() if k != "config"})
    np.testing.assert_allclose(np.asarray(out, np.float64), case.answer()[0], atol=1e-2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("overflow", [(), ((0, 1),), ((0, 0), (1, 4), (1, 5)), "all"], ids=["0", "1", "some", "all"])
def test_interpreted_only_overflowed_rows_are_recomputed(overflow, dtype):
    rows = tuple(np.ndindex(2, 6)) if overflow == "all" else overflow
    case = Case(q_per_kv=3, dtype=dtype, overflow=rows, **UNIFIED)
    out, recomputed = run(case)
    case.check(out, recomputed)
    # with a range that nothing leaves, and room for exp, the same rows are never computed again
    calm, none = run(dataclasses.replace(case, safe_range=(-60.0, 60.0)))
    assert none.sum() == 0
    untouched = [row for row in np.ndindex(2, 6) if row not in rows]
    assert all((out[row] == calm[row]).all() for row in untouched)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_interpreted_maximum_at_the_lower_end_does_not_overflow(dtype):
    case = Case(dtype=dtype, unified_max=-16.8, safe_range=(-16.8, 6.5), size=1.5)
    out, recomputed = run(case)
    case.check(out, recomputed)
    assert recomputed.sum() == 0


def test_interpreted_vanished_denominators_are_recomputed():
    case = Case(q_per_kv=2, unified_max=200.0, safe_range=(180.0, 220.0), lengths=(100, 0))
    out, recomputed = run(case)
    case.check(out, recomputed)
    assert recomputed.tolist() == [[2, 2], [0, 0]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"window": 60}, {"q_per_kv": 1, "num_kv_heads": 8}], ids=["", "window", "mha"])
def test_interpreted_heavy_tails_are_recomputed(dtype, options):
    options = {"q_per_kv": 4, "lengths": (100, 33, 128), **UNIFIED, **options}
    case = Case(dtype=dtype, tail=180.0, **options)
    out, recomputed = run(case)
    case.check(out, recomputed)  # the counter is the number of rows, too
    assert case.spread[0] < -300 and case.spread[1] > 300, case.spread
    assert 5 <= recomputed.sum() <= 20


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("batch", [1, 32])
def test_rule_fits_the_card(target, head_dim, batch):
    card = find_target(target)
    for q_per_kv, num_kv_heads in ((1, 32), (8, 8), (32, 1)):
        shape = {"q_per_kv": q_per_kv, "head_dim": head_dim}
        for max_len in (32, 128, 32768):
            config = choose_config(batch=batch, num_kv_heads=num_kv_heads, max_len=max_len, target=card, **shape)
            assert config.block_kv <= max_len
            assert config.shared_bytes(**shape) <= card.shared_per_block
            assert config.split_kv * config.block_kv <= max_len


@pytest.mark.parametrize(
    "case, error, message",
    [
        (Case(unified_max=0.0), ValueError, "safe_range"),
        (Case(unified_max=0.0, safe_range=(-1.0, 99.0)), ValueError, "60"),
        (Case(q_per_kv=33), NotImplementedError, "at most 32"),
        (Case(head_dim=72), NotImplementedError, "multiple of 16"),
        (Case(max_len=100), NotImplementedError, "multiple of 8"),
        (Case(config=None), NotImplementedError, "no NVIDIA GPU"),
        (Case(max_len=24, lengths=(3,)), NotImplementedError, "block_kv"),
    ],
)
def test_refusals_say_what_would_work(case, error, message):
    arguments = [jnp.asarray(array) for array in case.arrays()]
    with pytest.raises(error, match=message):
        mosaic_gpu.decode_attention(*arguments, **case.options, interpret=INTERPRET)


def test_too_few_counters_or_rows_are_refused():
    arguments = [jnp.asarray(array) for array in Case().arrays()]
    counters = jax.new_ref(jnp.zeros((3,), jnp.int32))
    with pytest.raises(ValueError, match=r"4 entries; got \(3,\)"):
        mosaic_gpu.decode_attention(*arguments, **Case().options, interpret=INTERPRET, counters=counters)
    with pytest.raises(ValueError, match="each of the 2 sequences; got 1"):
        mosaic_gpu.decode_attention(arguments[0][:1], *arguments[1:], **Case().options, interpret=INTERPRET)


def test_float32_is_refused():
    arguments = [jnp.asarray(array) for array in Case().arrays()]
    query, keys, values = (array.astype(jnp.float32) for array in arguments[:3])
    with pytest.raises(NotImplementedError, match="float16 or bfloat16"):
        mosaic_gpu.decode_attention(query, keys, values, arguments[3], scale=1.0, config=SMALL, interpret=INTERPRET)
