"""Samplers against their definitions, written with sorting in numpy; draws against their distribution."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdecode import sampling
from jaxdecode.sampling import Chain, Greedy, categorical, sampler

VOCAB = 700  # not a multiple of the block of `categorical`


def logits_of(seed, batch=4, vocab=VOCAB, ties=False):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(batch, vocab)) * 3
    return np.asarray(np.round(logits) if ties else logits, np.float32)


def softmax(logits):
    mass = np.exp(np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True))
    return mass / mass.sum(-1, keepdims=True)


def keep_top_k(row, k):
    return row >= np.sort(row)[::-1][min(k, len(row)) - 1]


def keep_top_p(row, p):
    mass = softmax(row)
    order = np.argsort(-row, kind="stable")
    better = np.concatenate([[0.0], np.cumsum(mass[order])[:-1]])
    last = order[np.flatnonzero(better < p)[-1]]  # the last that is needed to reach p
    return row >= row[last]


def keep_min_p(row, min_p):
    mass = softmax(row)
    return mass >= min_p * mass.max()


def kept(transform, logits):
    return np.isfinite(jax.jit(lambda t, x: t.apply((), x))(transform, jnp.asarray(logits)))


def keys(seed, batch):
    return jax.random.split(jax.random.key(seed), batch)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 2, 50, VOCAB - 1, VOCAB, 10 * VOCAB])
def test_top_k_keeps_what_sorting_keeps(k, ties):
    logits = logits_of(k, ties=ties)
    expected = np.stack([keep_top_k(row, k) for row in logits])
    np.testing.assert_array_equal(kept(sampling.TopK(k), logits), expected)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_sorting_keeps(p, ties):
    logits = logits_of(7, ties=ties)
    expected = np.stack([keep_top_p(row, p) for row in logits])
    np.testing.assert_array_equal(kept(sampling.TopP(p), logits), expected)


@pytest.mark.parametrize("min_p", [0.0, 1e-3, 0.1, 1.0])
def test_min_p_keeps_what_the_definition_keeps(min_p):
    logits = logits_of(3)
    expected = np.stack([keep_min_p(row, min_p) for row in logits])
    np.testing.assert_array_equal(kept(sampling.MinP(min_p), logits), expected)


def test_top_p_one_keeps_everything_and_tiny_p_keeps_the_best():
    logits = logits_of(1)
    assert kept(sampling.TopP(1.0), logits).all()
    best = kept(sampling.TopP(0.0), logits)
    np.testing.assert_array_equal(np.argmax(best, -1), np.argmax(logits, -1))
    assert (best.sum(-1) == 1).all()


@pytest.mark.parametrize(
    "row",
    [
        [0.0, -0.0, 1.0, -1.0],
        [3.4e38, -3.4e38, 0.0, 1e-45],
        [-np.inf, 2.0, -np.inf, 1.0],
        [5.0, 5.0, 5.0, 5.0],
        [-1.0, -2.0, -3.0, -1e-30],
    ],
)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_threshold_is_exact_at_the_edges_of_float32(row, k):
    # XLA on a CPU flushes subnormal numbers to zero, so 1e-45 equals 0 there; numpy is told the same.
    row = np.where(np.abs(np.asarray(row)) < 1e-38, 0.0, row).astype(np.float32)
    expected = keep_top_k(row, k) & np.isfinite(row)
    np.testing.assert_array_equal(kept(sampling.TopK(k), row[None])[0], expected)


def test_neighbouring_numbers_are_told_apart():
    one = np.float32(1)
    row = np.asarray([one, np.nextafter(one, np.float32(2)), np.nextafter(one, np.float32(0)), -3e38], np.float32)
    for k in (1, 2, 3, 4):
        np.testing.assert_array_equal(kept(sampling.TopK(k), row[None])[0], keep_top_k(row, k))


def test_inverting_a_cdf_picks_only_what_has_mass():
    mass = jnp.asarray([[0.0, 0.25, 0.0, 0.5, 0.0]] * 5)
    index, before = sampling._invert_cdf(mass, jnp.asarray([-1e-6, 0.0, 0.25, 0.75, 1.0]))
    np.testing.assert_array_equal(index, [1, 1, 3, 3, 3])  # rounded out of the total: the heaviest
    np.testing.assert_allclose(before, [0.0, 0.0, 0.25, 0.25, 0.25])


def test_no_filter_sorts_the_vocabulary():
    chain = sampler(0.7, top_k=5, top_p=0.9, min_p=0.1)
    text = jax.jit(chain.sample).lower(chain.init_(2), jnp.zeros((2, VOCAB)), keys(0, 2)).as_text()
    assert not re.search(r"\bsort|top_k", text)


def test_temperature_zero_takes_the_best_and_the_first_of_equals():
    logits = logits_of(5, ties=True)
    for chain in (sampler(0.0), sampler(0, top_k=9, top_p=0.5, min_p=0.2)):
        token, _ = chain.sample(chain.init_(4), jnp.asarray(logits), keys(0, 4))
        np.testing.assert_array_equal(token, np.argmax(logits, -1))
    token, _ = Greedy().sample((), jnp.asarray(logits), keys(0, 4))
    np.testing.assert_array_equal(token, np.argmax(logits, -1))
    assert token.dtype == jnp.int32


def test_repetition_penalty_counts_the_prompt_and_what_was_generated():
    logits = jnp.asarray([[2.0, -2.0, 4.0, 1.0, 1.0]] * 2)
    transform = sampling.RepetitionPenalty(2.0, 5)
    tokens = jnp.asarray([[0, 1, 2], [3, 2, 2]])
    state = transform.observe(transform.init_(2), tokens, jnp.asarray([2, 1]))  # padding: 2; 2, 2
    expected = [[1.0, -4.0, 4.0, 1.0, 1.0], [2.0, -2.0, 4.0, 0.5, 1.0]]
    np.testing.assert_array_equal(transform.apply(state, logits), expected)
    state = transform.update(state, jnp.asarray([2, 0]))
    expected = [[1.0, -4.0, 2.0, 1.0, 1.0], [1.0, -2.0, 4.0, 0.5, 1.0]]
    np.testing.assert_array_equal(transform.apply(state, logits), expected)


def test_presence_and_frequency_count_generated_tokens_only():
    chain = sampler(presence_penalty=0.5, frequency_penalty=0.25, vocab_size=4)
    transform = chain.transforms[0]
    state = chain.observe(chain.init_(1), jnp.asarray([[0, 1, 2, 3]]), jnp.asarray([4]))[0]
    for token in (2, 2, 1):
        state = transform.update(state, jnp.asarray([token]))
    np.testing.assert_array_equal(transform.apply(state, jnp.zeros((1, 4))), [[0.0, -0.75, -1.0, 0.0]])


def test_chain_updates_the_counts_with_the_token_it_drew():
    chain = sampler(0.0, frequency_penalty=1.0, vocab_size=3)
    state, tokens = chain.init_(1), []
    for _ in range(4):
        token, state = chain.sample(state, jnp.asarray([[2.5, 2.0, 0.0]]), keys(0, 1))
        tokens.append(int(token[0]))
    assert tokens == [0, 1, 0, 1]


@pytest.mark.parametrize("bias", [{1: 100.0}, [0, 100.0, 0, 0], [[0, 100.0, 0, 0]]])
def test_logit_bias_takes_a_dict_a_vector_or_a_row_each(bias):
    bias = bias if isinstance(bias, dict) else np.asarray(bias)
    chain = sampler(0.0, logit_bias=bias, vocab_size=4)
    token, _ = chain.sample(chain.init_(1), jnp.zeros((1, 4)), keys(0, 1))
    assert token[0] == 1


def test_the_features_are_applied_in_the_stated_order():
    chain = sampler(
        0.5, 5, 0.9, 0.1, repetition_penalty=1.1, presence_penalty=0.1, logit_bias={0: 1.0}, vocab_size=VOCAB
    )
    names = " ".join(type(transform).__name__ for transform in chain.transforms)
    assert names == "RepetitionPenalty PresenceFrequencyPenalty LogitBias Temperature TopK TopP MinP"
    logits = logits_of(11)
    masked = logits.copy()
    masked[:, 0] += 1
    masked = masked / np.float32(0.5)
    expected = []
    for row in masked:
        row = np.where(keep_top_k(row, 5), row, -np.inf)
        row = np.where(keep_top_p(row, 0.9), row, -np.inf)
        expected.append(keep_min_p(row, 0.1))
    drawn = jnp.asarray(logits)
    for transform, state in zip(chain.transforms, chain.init_(4), strict=True):
        drawn = transform.apply(state, drawn)
    np.testing.assert_array_equal(np.isfinite(drawn), expected)


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return np.sum((counts - expected) ** 2 / expected)


@pytest.mark.parametrize("vocab", [3, 256, 300, 1000])
def test_categorical_draws_from_the_distribution(vocab):
    draws = 40_000
    logits = np.random.default_rng(vocab).normal(size=(vocab,)).astype(np.float32)
    logits[vocab // 2] = -np.inf
    drawn = jax.jit(categorical)(keys(vocab, draws), jnp.broadcast_to(logits, (draws, vocab)))
    counts = np.bincount(np.asarray(drawn), minlength=vocab)
    assert counts[vocab // 2] == 0
    real = np.isfinite(logits)
    statistic = chi_square(counts[real], softmax(logits)[real])
    freedom = real.sum() - 1
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)  # 4 standard deviations, the key is fixed


def test_categorical_never_draws_a_forbidden_token():
    vocab, draws = 2048, 20_000
    logits = np.full((vocab,), -np.inf, np.float32)
    logits[[255, 256, 1999]] = [0.0, -12.0, -3.0]
    drawn = jax.jit(categorical)(keys(1, draws), jnp.broadcast_to(logits, (draws, vocab)))
    assert set(np.asarray(drawn).tolist()) <= {255, 256, 1999}


def test_the_filtered_chain_draws_from_the_filtered_distribution():
    draws, logits = 20_000, logits_of(2, batch=1)[0]
    filtered = np.where(keep_top_k(logits / np.float32(1.5), 8), logits / np.float32(1.5), -np.inf)
    filtered = np.where(keep_top_p(filtered, 0.9), filtered, -np.inf)
    chain = sampler(1.5, top_k=8, top_p=0.9)
    token, _ = jax.jit(chain.sample)(chain.init_(draws), jnp.broadcast_to(logits, (draws, VOCAB)), keys(3, draws))
    real = np.isfinite(filtered)
    counts = np.bincount(np.asarray(token), minlength=VOCAB)
    assert counts[~real].sum() == 0
    assert real.sum() > 3
    assert chi_square(counts[real], softmax(filtered)[real]) < real.sum() + 4 * np.sqrt(2 * real.sum())


def test_a_row_depends_on_its_own_key_and_logits_only():
    logits, key = jnp.asarray(logits_of(4, batch=6)), keys(9, 6)
    alone = [int(categorical(key[i : i + 1], logits[i : i + 1])[0]) for i in range(6)]
    np.testing.assert_array_equal(categorical(key, logits), alone)
    np.testing.assert_array_equal(categorical(key[::-1], logits[::-1]), alone[::-1])


NUMBERS = {
    "temperature": [0.0, 0.7, 1.0, 1.9],
    "top_k": [3, 40, 1, VOCAB],
    "top_p": [0.5, 0.9, 1.0, 0.2],
    "min_p": [0.0, 0.05, 0.3, 0.1],
    "repetition_penalty": [1.0, 1.2, 0.8, 2.0],
    "presence_penalty": [0.0, 0.4, -0.3, 1.0],
    "frequency_penalty": [0.1, 0.0, 0.7, -0.2],
}


def run(chain, logits, key, steps=5):
    state = chain.observe(chain.init_(len(logits)), jnp.argsort(logits)[:, -6:], jnp.full((len(logits),), 5))
    step, tokens = jax.jit(chain.sample), []
    for i in range(steps):
        token, state = step(state, logits, jax.vmap(jax.random.fold_in, (0, None))(key, i))
        tokens.append(token)
    return np.stack(tokens, axis=1)


def test_numbers_per_row_equal_a_run_of_each_row_with_scalars():
    logits, key = jnp.asarray(logits_of(8)), keys(5, 4)
    together = run(sampler(**NUMBERS, vocab_size=VOCAB), logits, key)
    for i in range(4):
        alone = sampler(**{name: values[i] for name, values in NUMBERS.items()}, vocab_size=VOCAB)
        np.testing.assert_array_equal(together[i], run(alone, logits[i : i + 1], key[i : i + 1])[0])
    assert len(set(map(tuple, together))) > 1


def test_vmap_over_a_group_of_samplers():
    logits, key = jnp.asarray(logits_of(8)), keys(5, 4)
    group = sampler(**NUMBERS, vocab_size=VOCAB)  # leaves [4]: under vmap, one scalar a group

    def one(chain, logits, key):
        return chain.sample(chain.init_(1), logits[None], key[None])[0][0]

    drawn = jax.vmap(one)(group, logits, key)
    np.testing.assert_array_equal(drawn, group.sample(group.init_(4), logits, key)[0])


def test_changed_numbers_compile_nothing():
    traced = []

    @jax.jit
    def step(chain, logits, key):
        traced.append(chain)
        return chain.sample(chain.init_(4), logits, key)[0]

    for temperature, k, bias in [(1, 5, {1: 1}), (0.0, 7, {2: -1.5}), (np.float64(2.5), np.int64(1), {})]:
        chain = sampler(temperature, top_k=k, logit_bias=bias, vocab_size=VOCAB)
        step(chain, jnp.zeros((4, VOCAB)), keys(0, 4))
    assert len(traced) == 1


def test_samplers_can_be_built_from_traced_numbers():
    @jax.jit
    def draw(temperature, k, logits, key):
        chain = sampler(temperature, top_k=k)
        return chain.sample(chain.init_(4), logits, key)[0]

    logits = jnp.asarray(logits_of(6))
    np.testing.assert_array_equal(draw(0.0, 3, logits, keys(0, 4)), jnp.argmax(logits, -1))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0; got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0; got nan"),
        ({"temperature": [1.0, float("inf")]}, "temperature must be at least 0"),
        ({"temperature": "hot"}, "temperature must be at least 0; got hot"),
        ({"top_k": 0}, "top_k must be a whole number, at least 1; got 0"),
        ({"top_k": 2.5}, "top_k must be a whole number, at least 1; got 2.5"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": [0.5, 1.5]}, r"top_p must be in \(0, 1\]; got \[0.5, 1.5\]"),
        ({"min_p": -0.5}, r"min_p must be in \[0, 1\]; got -0.5"),
        ({"repetition_penalty": 0, "vocab_size": 5}, "repetition_penalty must be above 0; got 0"),
        ({"presence_penalty": float("inf"), "vocab_size": 5}, "presence_penalty must be finite; got inf"),
        ({"frequency_penalty": float("nan"), "vocab_size": 5}, "frequency_penalty must be finite; got nan"),
        ({"repetition_penalty": 1.1}, "repetition_penalty counts tokens: pass vocab_size"),
        ({"logit_bias": {7: 1.0}, "vocab_size": 5}, "logit_bias names token 7, outside the vocabulary of 5"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        sampler(**numbers)


def test_shapes_that_do_not_fit_the_batch_are_refused():
    for chain, message in [
        (sampler([1.0, 2.0]), r"one per row; got shape \[2\] for a batch of 3"),
        (sampler(logit_bias=np.zeros((7,))), r"logit_bias must be \[vocab\] or \[batch, vocab\]; got \[7\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            chain.sample(chain.init_(3), jnp.zeros((3, VOCAB)), keys(0, 3))
    with pytest.raises(ValueError, match="key must be 3 typed keys"):
        categorical(jax.random.key(0), jnp.zeros((3, VOCAB)))


def test_the_sampler_of_the_module_docstring_works():
    source = (sampling.__doc__ or "").split("own takes a few lines:\n")[1]
    names = {
        "jax": jax,
        "jnp": jnp,
        "dataclasses": dataclasses,
        "jaxdecode": type("M", (), {"sampling": sampling}),
    }
    exec(re.sub(r"(?m)^    ", "", source), names)
    own = names["NoImmediateRepeat"](1.0)
    assert isinstance(own, sampling.Sampler)
    state, logits = own.init_(1), jnp.asarray([[3.0, 0.0, -50.0]])
    tokens = []
    for i in range(4):
        token, state = jax.jit(own.sample)(state, logits, keys(i, 1))
        tokens.append(int(token[0]))
    assert tokens in ([0, 1, 0, 1], [1, 0, 1, 0])


def test_an_empty_chain_is_a_plain_draw():
    logits, key = jnp.asarray(logits_of(4)), keys(2, 4)
    np.testing.assert_array_equal(Chain().sample((), logits, key)[0], categorical(key, logits))
    np.testing.assert_array_equal(sampler().sample(sampler().init_(4), logits, key)[0], categorical(key, logits))
