"""Every implementation of every operation gives the definition's answer."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels.dataflow import choose_attention, choose_implementation
from pallas_kernels.decode_attention import config as decode_config
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flat_gemm import gated_linear, linear, qkv_linear
from pallas_kernels.flat_gemm.config import choose_config
from pallas_kernels.fold import fold_batch
from pallas_kernels.heads import append_token
from pallas_kernels.norm import Norm
from pallas_kernels.prefill_attention import config as prefill_config
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.targets import TARGETS, find_target
from pallas_kernels.weights import QuantizedWeight

A100 = find_target("a100-80gb")
IMPLEMENTATIONS = ["reference", "xla"]
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2, jnp.float16: 3e-3}


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def attention_by_hand(query, keys, values, positions, scale, window):
    """Softmax over exactly the visible slots of each query, in float64."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    out = np.zeros(query.shape)
    group = query.shape[2] // keys.shape[1]
    for b, q, h in np.ndindex(query.shape[:3]):
        last = int(positions[b, q])
        first = 0 if window is None else max(0, last - window + 1)
        if last < 0:
            continue
        scores = keys[b, h // group, first : last + 1] @ query[b, q, h] * scale
        weights = np.exp(scores - scores.max())
        out[b, q, h] = weights / weights.sum() @ values[b, h // group, first : last + 1]
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    ("q_len", "max_len", "start", "window", "q_per_kv"),
    [
        (1, 16, 9, None, 1),
        (5, 16, 11, None, 4),
        (7, 700, 600, None, 2),
        (7, 1100, 1000, 40, 3),
        (3, 515, 0, 2, 2),
    ],
)
def test_prefill_attention_is_the_softmax_over_visible_slots(
    implementation, dtype, q_len, max_len, start, window, q_per_kv
):
    query = normal(0, 2, q_len, 2 * q_per_kv, 16, dtype=dtype)
    keys, values = normal(1, 2, 2, max_len, 16, dtype=dtype), normal(2, 2, 2, max_len, 16, dtype=dtype)
    positions = jnp.stack([start + jnp.arange(q_len), start // 2 + jnp.arange(q_len)]).astype(jnp.int32)
    out, _ = prefill_attention(query, keys, values, positions, scale=0.25, window=window, implementation=implementation)
    expected = attention_by_hand(query, keys, values, positions, 0.25, window)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("max_len", [20, 600])
def test_decode_attention_ignores_unused_slots_even_nan(implementation, window, max_len):
    lengths = jnp.asarray([0, 1, 13, 20])
    query, keys, values = normal(0, 4, 6, 16), normal(1, 4, 2, max_len, 16), normal(2, 4, 2, max_len, 16)
    unused = (jnp.arange(max_len) >= lengths[:, None])[:, None, :, None]
    dirty = [jnp.where(unused, bad, x) for bad, x in ((jnp.nan, keys), (jnp.inf, values))]
    out, _ = decode_attention(query, *dirty, lengths, scale=0.25, window=window, implementation=implementation)
    expected = attention_by_hand(query[:, None], keys, values, lengths[:, None] - 1, 0.25, window)[:, 0]
    np.testing.assert_allclose(out, expected, atol=4e-6)
    assert (out[0] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("m", [(), (1,), (8,), (2, 5)])
def test_linear(implementation, dtype, m):
    x, weight, bias = (
        normal(0, *m, 64, dtype=dtype),
        normal(1, 24, 64, dtype=dtype),
        normal(2, 24, dtype=dtype),
    )
    residual = normal(3, *m, 24, dtype=dtype)
    out = linear(x, weight, bias, residual=residual, implementation=implementation)
    wide = [np.asarray(part, np.float64) for part in (x, weight, bias, residual)]
    expected = wide[0] @ wide[1].T + wide[2] + wide[3]
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=8 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert linear(x, weight, out_dtype=jnp.float32, implementation=implementation).dtype == jnp.float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("activation", "by_hand"),
    [("silu", lambda g: g / (1 + np.exp(-g))), ("relu", lambda g: np.maximum(g, 0))],
)
def test_gated_linear(implementation, activation, by_hand):
    x, weight, bias = normal(0, 3, 32), normal(1, 20, 32), normal(2, 20)
    out = gated_linear(x, weight, bias, activation=activation, implementation=implementation)
    gate, up = np.split(np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T + bias, 2, axis=-1)
    np.testing.assert_allclose(out, by_hand(gate) * up, atol=2e-5)


def test_a_mapped_activation_axis_leaves_the_weights_alone():
    """vmap over activations gives one product in which the weight has no mapped axis, not a batch of them."""
    x, weight = normal(0, 4, 2, 64), normal(1, 24, 64)
    jaxpr = jax.make_jaxpr(jax.vmap(lambda x: linear(x, weight)))(x)
    (product,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general")
    (_, _), (batched_left, batched_right) = product.params["dimension_numbers"]
    assert (batched_left, batched_right) == ((), ())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_mapped_axis_of_attention_becomes_more_rows(implementation):
    """The loop over cache blocks stays one loop with a scalar bound, so it carries no selects."""
    query, lengths = normal(0, 3, 2, 4, 16), jnp.asarray([[5, 600], [0, 1], [1100, 70]])
    keys, values = normal(1, 3, 2, 2, 1100, 16), normal(2, 3, 2, 2, 1100, 16)

    def attend(query, keys, values, lengths):
        return decode_attention(query, keys, values, lengths, scale=0.25, implementation=implementation)[0]

    mapped = jax.vmap(attend, in_axes=(0, None, 0, 0))
    out = mapped(query, keys[0], values, lengths)
    for group in range(3):
        expected = attend(query[group], keys[0], values[group], lengths[group])
        np.testing.assert_allclose(out[group], expected, atol=1e-6)
    flat = [x.reshape(6, *x.shape[2:]) for x in (query, keys, values, lengths)]
    loops = [
        jax.jit(f).lower(*a).as_text().count("stablehlo.select")
        for f, a in ((attend, flat), (jax.vmap(attend), (query, keys, values, lengths)))
    ]
    assert loops[0] == loops[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(jnp.ones((2, 3)), jnp.ones((4, 5))), r"agree on k; got \(2, 3\) and \(4, 5\)"),
        (lambda: gated_linear(jnp.ones((2, 3)), jnp.ones((5, 3))), r"weight\[2 \* n, k\]"),
        (
            lambda: decode_attention(jnp.ones((2, 3, 8)), *[jnp.ones((2, 2, 4, 8))] * 2, jnp.ones(2, int), scale=1),
            "multiple of num_kv_heads; got 3 and 2",
        ),
        (
            lambda: decode_attention(jnp.ones((2, 4, 8)), *[jnp.ones((3, 2, 4, 8))] * 2, jnp.ones(2, int), scale=1),
            "batch ≤ 2",
        ),
        (
            lambda: decode_attention(jnp.ones((2, 4, 8)), *[jnp.ones((2, 2, 4, 8))] * 2, jnp.ones(3, int), scale=1),
            "lengths must be",
        ),
        (lambda: linear(jnp.ones((2, 3)), jnp.ones((4, 3)), activation="swish"), "one of silu, gelu, .*; got 'swish'"),
        (
            lambda: qkv_linear(
                jnp.ones((1, 3)), jnp.ones((24, 3)), rope=None, lengths=jnp.ones(2, int),
                keys=jnp.ones((2, 1, 4, 8)), values=jnp.ones((2, 1, 4, 8)),
            ),
            r"needs x\[m ≥ 2, k\]",
        ),
        (
            lambda: decode_attention(
                jnp.ones((2, 4, 8)), *[jnp.ones((2, 2, 4, 8))] * 2, jnp.ones(2, int), scale=1, unified_max=0.0
            ),
            "needs the safe_range",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(as_users_call_it, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("centered", "offset"), [(False, 0.0), (False, 1.0), (True, 0.0)], ids=["rms", "one", "layer"])
def test_a_norm_before_a_product(implementation, centered, offset):
    x, weight = 3 + normal(0, 2, 3, 64), normal(1, 24, 64)
    bias = normal(3, 64) if centered else None
    norm = Norm(weight=normal(2, 64), bias=bias, eps=1e-5, centered=centered, offset=offset)
    wide = np.asarray(x, np.float64)
    wide = wide - wide.mean(-1, keepdims=True) if centered else wide
    wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * (norm.weight + offset)
    wide = wide + bias if bias is not None else wide
    y = linear(x, weight, norm=norm, activation="relu", implementation=implementation)
    np.testing.assert_allclose(y, np.maximum(wide @ np.asarray(weight, np.float64).T, 0), atol=2e-4)
    gated = gated_linear(x, weight, norm=norm, activation="relu", implementation=implementation)
    gate, up = np.split(wide @ np.asarray(weight, np.float64).T, 2, axis=-1)
    np.testing.assert_allclose(gated, np.maximum(gate, 0) * up, atol=2e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rotary_dim", [0, 8, 16])
def test_qkv_linear_rotates_and_stores_one_token_a_row(implementation, rotary_dim):
    x, weight, bias = normal(0, 5, 32), normal(1, 6 * 16, 32), normal(2, 6 * 16)  # 2 query, 2 key, 2 value heads
    caches, lengths = (normal(3, 3, 2, 7, 16), normal(4, 3, 2, 7, 16)), jnp.asarray([0, 6, 3])
    angles = normal(5, 5, rotary_dim // 2)
    rope, norm = (jnp.cos(angles), jnp.sin(angles)) if rotary_dim else None, Norm(weight=normal(6, 16))
    query, keys, values = qkv_linear(
        x, weight, bias, rope=rope, keys=caches[0], values=caches[1], lengths=lengths, q_norm=norm, k_norm=norm,
        implementation=implementation,
    )  # fmt: skip
    heads = np.asarray(x @ weight.T + bias, np.float64).reshape(5, 6, 16)
    turned = heads[:, :4] / np.sqrt((heads[:, :4] ** 2).mean(-1, keepdims=True) + 1e-6) * norm.weight
    half, turn = rotary_dim // 2, np.exp(1j * np.asarray(angles, np.float64))[:, None]
    pairs = (turned[..., :half] + 1j * turned[..., half : 2 * half]) * turn
    turned = np.concatenate([pairs.real, pairs.imag, turned[..., 2 * half :]], axis=-1)
    np.testing.assert_allclose(query, turned[:, :2], atol=1e-4)
    for before, after, new in zip(caches, (keys, values), (turned[:, 2:4], heads[:, 4:]), strict=True):
        expected = np.array(before)
        for row, length in enumerate(lengths):
            expected[row, :, length] = new[row]
        np.testing.assert_allclose(after, expected, atol=1e-4)


def test_a_quantised_weight_is_its_values_times_their_scales():
    values = jax.random.randint(jax.random.key(0), (24, 64), -127, 128, jnp.int8)
    weight = QuantizedWeight(values, jnp.abs(normal(1, 24, 4)) + 0.1)
    x = normal(2, 3, 64)
    whole = np.asarray(values, np.float64) * np.repeat(weight.scales, 16, axis=1)
    for implementation in (None, *IMPLEMENTATIONS):
        y = linear(x, weight, implementation=implementation)
        np.testing.assert_allclose(y, np.asarray(x, np.float64) @ whole.T, rtol=1e-4, atol=1e-2)
    with pytest.raises(NotImplementedError, match="flat_gemm takes no int8 weights: use dense"):
        linear(x.astype(jnp.float16), weight, implementation="flat_gemm")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_soft_cap_bounds_the_scores(implementation):
    query, keys, values = 9 * normal(0, 2, 4, 16), normal(1, 2, 2, 20, 16), normal(2, 2, 2, 20, 16)
    lengths = jnp.asarray([20, 7])
    options = {"scale": 0.25, "implementation": implementation}
    out, _ = decode_attention(query, keys, values, lengths, soft_cap=1.5, **options)
    for row, length in enumerate(lengths):
        for head in range(4):
            scores = np.asarray(keys[row, head // 2, :length] @ query[row, head], np.float64)
            weights = np.exp(1.5 * np.tanh(0.25 * scores / 1.5))
            weights /= weights.sum()
            np.testing.assert_allclose(out[row, head], weights @ values[row, head // 2, :length], atol=1e-5)


def test_the_definition_counts_rows_outside_the_range():
    keys = jnp.zeros((2, 1, 8, 16)).at[0, 0, 3, 0].set(10.0).at[1, 0, 6, 0].set(10.0)  # the second past its length
    query, values = jnp.zeros((2, 3, 16)).at[:, :2, 0].set(4.0), normal(0, 2, 1, 8, 16)
    options = {"scale": 1.0, "unified_max": 0.0, "implementation": "reference"}
    lengths = jnp.asarray([5, 5])
    _, recomputed = decode_attention(query, keys, values, lengths, safe_range=(-30.0, 30.0), **options)
    assert recomputed.tolist() == [[2], [0]]
    _, recomputed = decode_attention(query, keys, values, lengths, safe_range=(-30.0, 50.0), **options)
    assert not recomputed.any()


def test_mapped_weights_run_one_after_the_other():
    """What a kernel's rule for `vmap` does, on an operation that has none of its own."""
    run = fold_batch(lambda x, w: x @ w.T, rows=1)
    x, weights = normal(0, 3, 2, 8), normal(1, 3, 4, 8)
    np.testing.assert_allclose(jax.vmap(run)(x, weights), jnp.einsum("gmk,gnk->gmn", x, weights), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(run, (0, None))(x, weights[0]), x @ weights[0].T, atol=1e-5)


def test_unknown_implementation_names_those_that_exist():
    with pytest.raises(NotImplementedError, match="no implementation 'cuda'; available: dense, flat_gemm, gemv"):
        linear(jnp.ones((2, 3)), jnp.ones((4, 3)), implementation="cuda")


def test_the_choice_states_its_reason():
    shape = {"n": 4096, "k": 4096, "dtype": "float16"}
    for m, device, name in ((1, None, "dense"), (1, A100, "gemv"), (8, A100, "flat_gemm"), (65, A100, "dense")):
        choice = choose_implementation("linear", m=m, device=device, **shape)
        assert choice.implementation == name and choice.reason.startswith("rule: ")


def test_what_a_kernel_does_not_take_is_left_to_xla(monkeypatch):
    monkeypatch.setattr("pallas_kernels.dataflow.this_device", lambda: A100)
    monkeypatch.setattr("pallas_kernels.flat_gemm.api._kernels", lambda: pytest.fail("a kernel was called"))
    x, weight = normal(0, 8, 64, dtype=jnp.float16), normal(1, 128, 64)
    linear(x, weight)  # another type
    linear(x.astype(jnp.float32), weight)
    linear(x, QuantizedWeight(jnp.ones((128, 64), jnp.int8), jnp.ones((128, 1))))
    linear(x[:, :40], weight[:, :40].astype(jnp.float16))  # k % 32
    cache, lengths = normal(2, 8, 1, 32, 64), jnp.zeros(8, jnp.int32)
    heads = {"rope": None, "lengths": lengths}
    weight = normal(3, 4 * 64, 64, dtype=jnp.float16)
    qkv_linear(x, weight, keys=cache, values=cache, **heads)  # a cache of another type
    narrow, norm = cache.astype(jnp.float16), Norm(weight=jnp.ones(64, jnp.float16), centered=True)
    qkv_linear(x, weight, keys=narrow, values=narrow, q_norm=norm, **heads)  # a LayerNorm of heads


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", ["decode_attention", "prefill_attention"])
def test_what_attention_is_chosen_to_be_has_blocks(target, op):
    configs = {"decode_attention": decode_config, "prefill_attention": prefill_config}
    for head_dim in (16, 64, 80, 96, 128, 256):
        for q_per_kv in range(1, 33):
            shape = {"head_dim": head_dim, "q_per_kv": q_per_kv, "max_len": 4096}
            choice = choose_attention(op, **shape, dtype="bfloat16", device=TARGETS[target])
            if choice.implementation == "mosaic_gpu":
                more = {"batch": 1, "num_kv_heads": 1} if op == "decode_attention" else {}
                configs[op].choose_config(**shape, **more, target=TARGETS[target])
            else:
                assert "do not fit" in choice.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("n", "k", "segments"), [(12288, 4096, 2), (4096, 11008, 1), (32000, 4096, 1), (576, 1536, 1)])
def test_rows_padded_to_eight_are_padded_no_further(target, n, k, segments):
    for m in range(8, 65, 8):
        config = choose_config(m, n, k, "float16", TARGETS[target], segments=segments)
        assert config.pad_m(m) == m


def test_the_shapes_in_signatures_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError, match="num_kv_heads"):
        append_token(jnp.ones((2, 3, 8, 4)), jnp.ones((2, 5, 4)), jnp.ones(2, int))


@pytest.mark.parametrize("target", TARGETS)
def test_a_small_weight_is_fetched_with_a_deep_ring(target):
    """Where a grid leaves multiprocessors empty; a large weight's blocks share them, two and two."""
    small, large = (choose_config(8, n, 576, "float16", TARGETS[target]) for n in (576, 49152))
    assert small.num_stages == 6 and large.num_stages <= 4
    assert choose_config(8, 576, 96, "float16", TARGETS[target]).num_stages == 96 // 32 + 1  # one less is in flight
