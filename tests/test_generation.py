"""The laws of generation, on small random models."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdecode import generation, sampling
from jaxdecode.config import ModelConfig, RopeConfig
from jaxdecode.decoding import Run
from jaxdecode.engine import step
from jaxdecode.generation import Generation, jit_generate, read_prompt, score, stream
from jaxdecode.models import abstract_params, build, init_params
from tests.tiny import FAMILIES, OPT, prompts, tiny_config, tiny_model

KEY = jax.random.key(7)
DRAW = sampling.sampler(temperature=0.9, top_k=20, top_p=0.95)
LENGTHS = [1, 40, 33, 17]


def same(left: Generation, right: Generation, atol=1e-5):
    for name in ("tokens", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    np.testing.assert_allclose(left.logprobs, right.logprobs, atol=atol)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@functools.cache
def full_logits(config):
    return jax.jit(lambda params, tokens: build(config, params)(tokens))


def test_greedy_tokens_and_logprobs_are_those_of_the_whole_sequence(model):
    params, config = model
    tokens, lengths = prompts(LENGTHS)
    out = jit_generate(params, config, tokens, lengths, KEY, max_new_tokens=12)
    assert not out.finished.any() and (out.lengths == 12).all()
    for row, n in enumerate(LENGTHS):
        sequence = np.concatenate([tokens[row, :n], out.tokens[row]])
        logits = full_logits(config)(params, sequence[None])[0]
        np.testing.assert_array_equal(logits.argmax(-1)[n - 1 : -1], out.tokens[row])
        logprobs = jax.nn.log_softmax(logits)[np.arange(n - 1, n + 11), sequence[n:]]
        np.testing.assert_allclose(out.logprobs[row], logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sampler"),
    [({}, sampling.Greedy()), ({}, DRAW), *((changes, DRAW) for changes in FAMILIES.values())],
    ids=["greedy", "drawn", *FAMILIES],
)
def test_stream_gives_what_generate_gives(changes, sampler):
    params, config = tiny_model(**changes)
    tokens, lengths = prompts(LENGTHS)
    options = dict(sampler=sampler, max_new_tokens=9, eos_token_ids=list(range(8)))
    out = jit_generate(params, config, tokens, lengths, KEY, **options)
    columns = list(stream(params, config, tokens, lengths, KEY, **options))
    assert len(columns) == int(out.lengths.max())
    streamed, logprobs, ended = (np.stack(part, axis=1) for part in zip(*columns, strict=True))
    np.testing.assert_array_equal(streamed, out.tokens[:, : len(columns)])
    np.testing.assert_allclose(logprobs, out.logprobs[:, : len(columns)], atol=1e-6)
    assert ended[:, -1].all() and not ended[:, 0].all()


@pytest.mark.parametrize(
    "changes",
    [{}, {"layer_windows": (None, 8)}, {"qk_norm": True, "qkv_bias": True}, *FAMILIES.values()],
    ids=["full", "windows", "norms", *FAMILIES],
)
def test_prefill_then_step_is_prefill_of_one_more(changes):
    params, config = tiny_model(max_position=512, **changes)
    tokens, lengths = prompts([1, 31, 32, 33, 290], prompt_len=291)

    @jax.jit
    def read(lengths):
        x, cache, _ = read_prompt(params, config, tokens, lengths, 300)
        return generation.logits(params, config, x), cache

    _, cache = read(lengths)
    rows = jnp.arange(len(lengths))
    stepped, *_ = jax.jit(lambda cache: step(params, config, cache, tokens[rows, lengths]))(cache)
    whole, _ = read(lengths + 1)
    np.testing.assert_allclose(stepped, whole, atol=2e-5)
    np.testing.assert_allclose(whole, full_logits(config)(params, tokens)[rows, lengths], atol=2e-5)


def test_padding_room_and_neighbours_never_change_a_row(model):
    params, config = model
    tokens, lengths = prompts(LENGTHS)
    keys = jax.random.split(KEY, 4)
    options = dict(sampler=DRAW, max_new_tokens=10)
    out = jit_generate(params, config, tokens, lengths, keys, **options)
    wider, _ = prompts(LENGTHS, prompt_len=70, seed=5)
    wider = jnp.where(jnp.arange(70) < lengths[:, None], jnp.pad(tokens, ((0, 0), (0, 30))), wider)
    same(out, jit_generate(params, config, wider, lengths, keys, max_len=900, **options))
    for row in range(4):
        alone = jit_generate(
            params, config, tokens[row : row + 1], lengths[row : row + 1], keys[row : row + 1], **options
        )
        same(jax.tree.map(lambda x, row=row: x[row : row + 1], out), alone)


def test_a_finished_row_stays_finished(model):
    params, config = model
    tokens, lengths = prompts(LENGTHS)
    free = jit_generate(params, config, tokens, lengths, KEY, max_new_tokens=12, pad_token_id=5)
    end = int(free.tokens[2, 4])
    out = jit_generate(
        params, config, tokens, lengths, KEY, max_new_tokens=12, pad_token_id=5, eos_token_ids=[end, 999]
    )
    for row in range(4):
        hits = np.flatnonzero(free.tokens[row] == end)
        n = hits[0] + 1 if len(hits) else 12
        assert out.lengths[row] == n and out.finished[row] == bool(len(hits))
        np.testing.assert_array_equal(out.tokens[row, :n], free.tokens[row, :n])
        assert (out.tokens[row, n:] == 5).all() and (out.logprobs[row, n:] == 0).all()
    assert out.finished[2]


def test_stop_sequences_end_rows_where_they_were_generated(model):
    params, config = model
    tokens, lengths = prompts(LENGTHS)
    free = jit_generate(params, config, tokens, lengths, KEY, max_new_tokens=12)
    stops = [free.tokens[1, 3:6].tolist(), [int(free.tokens[3, 7])], tokens[0, :1].tolist() * 2]
    out = jit_generate(params, config, tokens, lengths, KEY, max_new_tokens=12, stop_sequences=stops)
    for row in range(4):
        generated = free.tokens[row].tolist()
        ends = [i + 1 for i in range(12) if any(generated[: i + 1][-len(s) :] == s for s in stops)]
        assert out.lengths[row] == min([*ends, 12]) and bool(out.finished[row]) == bool(ends)
    assert out.finished[1] and out.lengths[1] <= 6 and out.finished[3]


def test_token_limits_stop_rows_without_finishing_them(model):
    params, config = model
    tokens, lengths = prompts(LENGTHS)
    out = jit_generate(params, config, tokens, lengths, KEY, max_new_tokens=6, token_limits=jnp.asarray([1, 6, 3, 99]))
    np.testing.assert_array_equal(out.lengths, [1, 6, 3, 6])
    assert not out.finished.any()


def test_a_row_depends_on_its_own_key_only(model):
    params, config = model
    tokens, lengths = prompts([9, 9, 9])
    tokens = jnp.broadcast_to(tokens[:1], tokens.shape)
    keys = jax.random.split(KEY, 3)[jnp.asarray([0, 1, 0])]
    out = jit_generate(params, config, tokens, lengths, keys, sampler=DRAW, max_new_tokens=16)
    np.testing.assert_array_equal(out.tokens[0], out.tokens[2])
    assert (out.tokens[0] != out.tokens[1]).any()
    from_one = jit_generate(params, config, tokens, lengths, KEY, sampler=DRAW, max_new_tokens=16)
    assert (from_one.tokens[0] != from_one.tokens[2]).any()
    legacy = jit_generate(params, config, tokens, lengths, jax.random.key_data(keys), sampler=DRAW, max_new_tokens=16)
    same(out, legacy)


def test_score_is_the_log_softmax_of_the_model(model):
    params, config = model
    tokens, lengths = prompts([1, 2, 41, 300])
    scored = jax.jit(score, static_argnums=1)(params, config, tokens, lengths)
    assert scored.shape == (4, 299)
    for row, n in enumerate(lengths.tolist()):
        logprobs = jax.nn.log_softmax(full_logits(config)(params, tokens[row : row + 1])[0])
        expected = logprobs[np.arange(n - 1), tokens[row, 1:n]]
        np.testing.assert_allclose(scored[row, : n - 1], expected, atol=2e-5)
        assert (scored[row, n - 1 :] == 0).all()


def test_a_users_own_sampler_is_two_functions(model):
    @jax.tree_util.register_static
    class Alternate:
        """Takes the best and the second best token in turn."""

        def init_(self, batch):
            return jnp.zeros(batch, jnp.int32)

        def sample(self, state, logits, key):
            best = jax.lax.top_k(logits, 2)[1]
            return jnp.take_along_axis(best, state[:, None] % 2, axis=1)[:, 0], state + 1

    params, config = model
    tokens, lengths = prompts([5, 8])
    out = jit_generate(params, config, tokens, lengths, KEY, sampler=Alternate(), max_new_tokens=6)
    for row, n in enumerate([5, 8]):
        sequence = np.concatenate([tokens[row, :n], out.tokens[row]])
        order = np.argsort(-full_logits(config)(params, sequence[None])[0], axis=-1)
        np.testing.assert_array_equal(out.tokens[row], order[np.arange(n - 1, n + 5), [0, 1, 0, 1, 0, 1]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_half_precision_stays_near_float32(model, dtype):
    params, config = model
    tokens, lengths = prompts(LENGTHS)
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    scored = jax.jit(score, static_argnums=1)
    difference = scored(half, config, tokens, lengths) - scored(wide, config, tokens, lengths)
    assert np.abs(difference).max() < {jnp.bfloat16: 0.15, jnp.float16: 0.02}[dtype]
    out = jit_generate(half, config, tokens, lengths, KEY, max_new_tokens=4)
    assert out.logprobs.dtype == jnp.float32 and np.isfinite(out.logprobs).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_weights_are_never_widened_all_at_once(dtype):
    """A CPU multiplies in float32; a copy of every layer's weights in that type would not fit beside them."""

    def temporary(num_layers: int) -> int:
        config = tiny_config(num_layers=num_layers, mlp_dim=4096)
        shapes = jax.ShapeDtypeStruct((1, 40), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        lowered = jit_generate.lower(abstract_params(config, dtype), config, *shapes, KEY, max_new_tokens=8)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    layer = 3 * 4096 * tiny_config().embed_dim * 4  # bytes of its MLP in float32
    assert temporary(9) - temporary(3) < layer


def test_dynamic_rope_reads_each_rows_own_length():
    """One row beyond the trained context does not change the positions of a row inside it."""
    rope = RopeConfig(kind="dynamic", factor=4.0, original_max_len=16)
    params, config = tiny_model(rope=rope)
    plain = tiny_config()
    tokens, lengths = prompts([6, 60])
    out = jit_generate(params, config, tokens, lengths, KEY, max_new_tokens=4)
    unscaled = jit_generate(params, plain, tokens, lengths, KEY, max_new_tokens=4)
    np.testing.assert_allclose(out.logprobs[0], unscaled.logprobs[0], atol=1e-5)
    assert np.abs(out.logprobs[1] - unscaled.logprobs[1]).max() > 1e-3


def test_learned_positions_end_and_say_so():
    params, config = tiny_model(max_position=40, **OPT)
    tokens, lengths = prompts([38, 5])
    out = jit_generate(params, config, tokens, lengths, KEY, max_new_tokens=3)  # the last is never fed
    assert (out.lengths == 3).all()
    sequence = jnp.concatenate([tokens, out.tokens[:, :2]], axis=1)
    logits = full_logits(config)(params, sequence)[0]
    np.testing.assert_array_equal(logits.argmax(-1)[37:], out.tokens[0])
    for call in (
        lambda: generation.generate(params, config, tokens, lengths, KEY, max_new_tokens=4),
        lambda: generation.prefill(params, config, tokens, lengths, KEY, max_new_tokens=4),
        lambda: score(params, config, *prompts([41])),
        lambda: build(config, params)(prompts([41])[0]),
    ):
        with pytest.raises(ValueError, match="the model has 40 learned positions; 41 were asked for"):
            call()
    padded = jnp.pad(tokens, ((0, 0), (0, 2)))
    for call, said in {
        generation.generate: "prompts padded to 40 tokens, the longest of which has 38, and 2 new ones: cut the pad",
        jit_generate: "prompts of 40 tokens, padding counted, and 2 new ones: cut the padding, take a shorter prompt",
    }.items():
        with pytest.raises(ValueError, match=f"41 were asked for, for {said}"):
            call(params, config, padded, lengths, KEY, max_new_tokens=2)
    short = tiny_config(max_position=40)  # a rope has positions for any length
    jax.eval_shape(lambda: generation.generate(init_params(short, KEY), short, tokens, lengths, KEY, max_new_tokens=9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope": RopeConfig(rotary_dim=3)},
            "rotary_dim or else head_dim must be even, and at most head_dim; got 3 of 8",
        ),
        ({"rope": RopeConfig(rotary_dim=10)}, "at most head_dim; got 10 of 8"),
        ({"head_dim": 5}, "got 5 of 5"),
        ({"position_offset": 2}, "belongs to learned positions; got 2 beside a rope"),
        ({"rope": None, "position_offset": -1}, "must not be negative; got -1"),
        ({"token_dim": 0}, "token_dim must be a positive integer; got 0"),
        ({"norm": "batch"}, "norm must be one of rms, layer; got 'batch'"),
    ],
)
def test_what_a_config_cannot_mean_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)


@pytest.mark.parametrize("changes", [{}, {"head_dim": 5, "rope": None}, *FAMILIES.values()])
def test_a_config_survives_json_and_needs_no_field_that_has_a_default(changes):
    config = tiny_config(**changes)
    fields = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(fields) == config
    added = ("norm", "post_norm", "final_norm", "gated_mlp", "position_offset", "token_dim")
    older = {name: value for name, value in fields.items() if name not in added}
    if not changes:
        del older["rope"]["rotary_dim"]
        assert ModelConfig.from_dict(older) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": jnp.zeros((2, 0), int)}, "neither of them 0"),
        ({"lengths": jnp.ones(3, int)}, r"lengths must be \[batch\]"),
        ({"max_new_tokens": 0}, "at least 1; got 0"),
        ({"max_len": 9}, r"prompt_len \+ max_new_tokens = 12; got 9"),
        ({"key": jax.random.split(KEY, 3)}, r"one a row, \[2\]"),
        ({"stop_sequences": [[]]}, "at least one token"),
        ({"config": tiny_config(model_type="gpt9")}, "no model for model_type 'gpt9'; there are chatglm"),
    ],
)
def test_bad_arguments_are_named(as_users_call_it, model, change, message):
    params, config = model
    tokens, lengths = prompts([8, 8])
    arguments = dict(params=params, config=config, tokens=tokens, lengths=lengths, key=KEY, max_new_tokens=4) | change
    with pytest.raises((ValueError, NotImplementedError), match=message):
        generation.generate(**arguments)


def test_params_are_plain_dicts_and_lists(model):
    params, config = model

    def walk(node):
        if isinstance(node, dict | list):
            return all(walk(child) for child in (node.values() if isinstance(node, dict) else node))
        return isinstance(node, jax.Array)

    assert type(params) is dict and walk(params)
    abstract = jax.eval_shape(lambda: init_params(config, KEY))
    assert jax.tree.map(lambda leaf: leaf.shape, abstract) == jax.tree.map(lambda leaf: leaf.shape, params)


def test_the_module_can_be_differentiated(model):
    """Policy gradients need it: the same parameters, teacher-forced, in reverse mode."""
    params, config = model
    tokens, _ = prompts([600, 600])
    config = tiny_config(max_position=1024)

    def loss(params):
        logprobs = jax.nn.log_softmax(build(config, params)(tokens))
        return -jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], -1).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    direction = jax.tree.map(lambda leaf: leaf / 1e3, gradient)
    nudged = jax.tree.map(lambda leaf, step: leaf - step, params, direction)
    drop = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose(loss(params) - loss(nudged), drop, rtol=0.1)


@pytest.mark.usefixtures("as_users_call_it")
def test_a_sequence_does_not_grow_past_what_a_longrope_was_chosen_for():
    params, config = tiny_model(**FAMILIES["phi3"])
    tokens, _ = prompts([1, 1], prompt_len=310)
    lengths = np.asarray([301, 290])
    fits = jit_generate(params, config, tokens, lengths, KEY, max_new_tokens=11)
    assert (fits.tokens == generation.generate(params, config, tokens, lengths, KEY, max_new_tokens=11).tokens).all()
    refused = r"beyond 300 tokens: a sequence cannot grow from 290 to 301; ask for fewer"
    with pytest.raises(ValueError, match=refused):
        generation.generate(params, config, tokens, lengths, KEY, max_new_tokens=12)
    with pytest.raises(ValueError, match=refused):
        next(stream(params, config, tokens, lengths, KEY, max_new_tokens=12))
    with pytest.raises(ValueError, match=refused):
        Run(params, config, [[1] * 290], seeds=[(0, 0)], sampler=DRAW, max_new_tokens=12, eos_token_ids=[])
    generation.generate(params, config, tokens[:, :302], lengths[:1].repeat(2), KEY, max_new_tokens=12)


def test_scaled_embeddings_are_rounded_as_the_embeddings_are():
    params, config = tiny_model(dtype=jnp.bfloat16, **FAMILIES["gemma2"] | {"embed_scale": 55.4256})
    rows = build(config, params).embed(jnp.arange(4))
    np.testing.assert_array_equal(rows, params["embed"]["weight"][:4] * jnp.bfloat16(55.5))
