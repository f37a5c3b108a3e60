"""The prefill attention kernel in the form for Hopper, interpreted with race detection, against its definition.

Faults that were put into the kernel, and what turned red: listed in `test_prefill_attention_ptx`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from test_prefill_attention_cases import SMALL, UNIFIED, Case

from pallas_kernels.interpret import interpret_params
from pallas_kernels.prefill_attention import mosaic_gpu, reference
from pallas_kernels.prefill_attention.config import PrefillAttentionConfig, choose_config
from pallas_kernels.targets import TARGETS, find_target

INTERPRET = interpret_params()
MODES = {"online": {}, "unified": UNIFIED}
LARGE = PrefillAttentionConfig(block_kv=64, num_stages=2, max_columns=64)

CASES = {
    "one-query": Case(q_len=1, starts=(0, 60)),
    "one-query-mqa32": Case(q_len=1, starts=(9, 127), q_per_kv=32, num_kv_heads=1, dtype="bfloat16"),
    "three-queries": Case(q_len=3, starts=(0, 61), q_per_kv=4),
    "three-queries-gqa12": Case(q_len=3, starts=(30, 61), q_per_kv=12, num_kv_heads=1),
    "mha": Case(),
    "mha-tail": Case(q_len=33, starts=(0, 95)),
    "mha-bf16-64-columns": Case(q_len=33, config=LARGE, dtype="bfloat16"),
    "gqa3-tail": Case(q_len=33, q_per_kv=3, dtype="bfloat16"),
    "gqa4": Case(q_per_kv=4, head_dim=128),
    "mqa16": Case(q_per_kv=16, num_kv_heads=1, config=LARGE, head_dim=128),
    "gqa9-runs-that-overlap": Case(q_len=3, q_per_kv=9, config=LARGE, dtype="bfloat16"),
    "head80": Case(head_dim=80, q_per_kv=2),
    "head80-more-columns-than-queries": Case(head_dim=80, q_len=9, q_per_kv=3, dtype="bfloat16"),
    "head96": Case(head_dim=96, q_len=17, dtype="bfloat16", num_kv_heads=1),
    "head256": Case(head_dim=256, num_kv_heads=1, q_len=9),
    "whole-cache": Case(q_len=32, starts=(0, 96), max_len=128),
    "block-edges": Case(q_len=8, starts=(24, 25, 56, 57)),
    "ragged": Case(q_len=33, ragged=((0, 0), (0, 5), *((1, q) for q in range(20, 33)))),
    "ragged-all": Case(ragged=tuple((1, q) for q in range(16)), q_per_kv=8),
    "shuffled": Case(q_len=33, shuffled=True, q_per_kv=2, window=20),
    "window": Case(q_len=33, starts=(90, 10), window=37, q_per_kv=3),
    "window-in-a-block": Case(starts=(100, 40), window=3, q_per_kv=8),
    "window-one": Case(starts=(31, 40), window=1),
    "window-ragged": Case(q_len=33, starts=(90, 10), window=9, ragged=((0, 0), (0, 1), (1, 32))),
    "soft-cap": Case(soft_cap=2.0, q_per_kv=2, size=3.0),
    "odd-cache": Case(max_len=72, q_len=9, starts=(63, 30)),
    "large-scores": Case(size=60.0, q_per_kv=2, q_len=9),
}


def run(case: Case) -> tuple[np.ndarray, np.ndarray]:
    arrays = [jnp.asarray(array) for array in case.arrays()]
    out, recomputed = mosaic_gpu.prefill_attention(*arrays, **case.options, interpret=INTERPRET)
    return np.asarray(out), np.asarray(recomputed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, mode):
    case = dataclasses.replace(CASES[name], **MODES[mode])
    case.check(*run(case))


@pytest.mark.parametrize("name", ["ragged", "window", "three-queries-gqa12"])
def test_answer_is_the_reference(name):
    case = dataclasses.replace(CASES[name], dtype="bfloat16")
    options = {name: value for name, value in case.options.items() if name != "config"}
    out, _ = reference.prefill_attention(*(jnp.asarray(array) for array in case.arrays()), **options)
    np.testing.assert_allclose(np.asarray(out, np.float64), case.answer()[0], atol=1e-2)


ROWS = tuple(np.ndindex(2, 9, 6))
OVERFLOW = {"0": (), "1": ((0, 8, 1),), "some": ((0, 8, 0), (1, 7, 4), (1, 8, 5)), "all": "all"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rows", OVERFLOW)
def test_interpreted_only_overflowed_rows_are_recomputed(rows, dtype):
    # a key that gives one row its large score gives the others of its head one, too, unless it is past them
    base = Case(q_len=9, q_per_kv=3, starts=(0, 60), dtype=dtype, **UNIFIED)
    if rows == "all":
        case = dataclasses.replace(base, unified_max=-70.0, safe_range=(-90.0, -50.0))
    else:
        case = dataclasses.replace(base, overflow=OVERFLOW[rows])
    out, recomputed = run(case)
    case.check(out, recomputed)
    again = case.answer()[1]
    assert again.all() if rows == "all" else again.sum() == len(OVERFLOW[rows])
    # with a range that nothing leaves, and room for exp, the same rows are never computed again
    calm, none = run(dataclasses.replace(case, unified_max=0.0, safe_range=(-60.0, 60.0)))
    assert none.sum() == 0
    assert (out[~again] == calm[~again]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("options", [{"q_per_kv": 4}, {"num_kv_heads": 8, "window": 60}], ids=["gqa4", "mha-window"])
def test_interpreted_heavy_tails_are_recomputed(dtype, options):
    case = Case(dtype=dtype, tail=200.0, q_len=9, starts=(60, 119), **UNIFIED, **options)
    out, recomputed = run(case)
    case.check(out, recomputed)  # the counter is the number of rows, too
    low, high = case.answer()[2]
    assert low < -300 and high > 300, (low, high)
    assert 40 <= recomputed.sum() <= 140


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_interpreted_maximum_at_the_lower_end_does_not_overflow(dtype):
    case = Case(dtype=dtype, unified_max=-16.8, safe_range=(-16.8, 6.5), size=1.3)
    out, recomputed = run(case)
    case.check(out, recomputed)
    assert recomputed.sum() == 0


def test_interpreted_vanished_denominators_are_recomputed():
    case = Case(q_len=9, unified_max=200.0, safe_range=(180.0, 220.0), ragged=((0, 3),), num_kv_heads=1)
    out, recomputed = run(case)
    case.check(out, recomputed)
    assert recomputed.tolist() == [[8], [9]]


@pytest.mark.parametrize("q_per_kv", [1, 2, 3, 7, 8, 9, 12, 16, 31, 32])
@pytest.mark.parametrize("q_len", [8, 9, 32, 33, 256])
def test_every_query_has_one_column(q_per_kv, q_len):
    for head_dim in (64, 80, 96):
        config = PrefillAttentionConfig()
        lay = config.columns(q_len, q_per_kv, head_dim)
        found = []
        for block in range(config.reread_factor(q_len, q_per_kv, head_dim)):
            q, head, real = mosaic_gpu.query_of(lay, jnp.int32(block * lay.block_q), jnp.arange(lay.columns))
            assert (np.asarray(head)[real] < q_per_kv).all()
            found += [(int(a), int(b)) for a, b in zip(np.asarray(q)[real], np.asarray(head)[real], strict=True)]
        assert sorted(found) == sorted(np.ndindex(q_len, q_per_kv))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_rule_fits_the_card(target, head_dim):
    card = find_target(target)
    for q_per_kv in (1, 3, 8, 32):
        for max_len in (32, 128, 32768):
            config = choose_config(q_per_kv=q_per_kv, max_len=max_len, head_dim=head_dim, target=card)
            assert config.block_kv <= max_len
            assert config.shared_bytes(q_per_kv, head_dim) <= card.shared_per_block


def test_reread_factor():
    config = PrefillAttentionConfig(max_columns=64)
    assert [config.reread_factor(256, q_per_kv, 128) for q_per_kv in (1, 4, 16, 32)] == [4, 16, 64, 128]
    assert [config.reread_factor(q_len, 1, 128) for q_len in (1, 8, 64, 65)] == [1, 1, 1, 2]


@pytest.mark.parametrize(
    "case, error, message",
    [
        (Case(unified_max=0.0), ValueError, "safe_range"),
        (Case(q_per_kv=33), NotImplementedError, "at most 32"),
        (Case(head_dim=72), NotImplementedError, "multiple of 16"),
        (Case(max_len=100), NotImplementedError, "multiple of 8"),
        (Case(config=None), NotImplementedError, "no NVIDIA GPU"),
        (Case(max_len=24, q_len=1, starts=(3,)), NotImplementedError, "block_kv"),
    ],
)
def test_refusals_say_what_would_work(case, error, message):
    arguments = [jnp.asarray(array) for array in case.arrays()]
    with pytest.raises(error, match=message):
        mosaic_gpu.prefill_attention(*arguments, **case.options, interpret=INTERPRET)


def test_float32_is_refused():
    query, keys, values, positions = (jnp.asarray(array) for array in Case().arrays())
    query, keys, values = (array.astype(jnp.float32) for array in (query, keys, values))
    with pytest.raises(NotImplementedError, match="float16 or bfloat16"):
        mosaic_gpu.prefill_attention(query, keys, values, positions, scale=1.0, config=SMALL, interpret=INTERPRET)
