"""Generation inside the caller's own jit, vmap and shard_map; what is compiled, copied and traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdecode import engine, generation, sampling
from jaxdecode.generation import generate, jit_decode, jit_generate, jit_prefill, jit_score
from tests.test_generation import DRAW, KEY, same
from tests.tiny import FAMILIES, prompts, tiny_model

LENGTHS = [1, 40, 33, 17, 9, 21, 40, 2]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def grouped(tree, groups=4):
    return jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), tree)


def flat(tree):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def test_generate_inside_the_callers_jit(model):
    params, config = model
    tokens, lengths = prompts(LENGTHS)

    @jax.jit
    def reward(params, tokens, lengths, key):
        out = generate(params, config, tokens, lengths, key, sampler=DRAW, max_new_tokens=6)
        return out, (out.logprobs.sum(axis=1) * 2, out.tokens + 1)

    out, (total, shifted) = reward(params, tokens, lengths, KEY)
    same(out, jit_generate(params, config, tokens, lengths, KEY, sampler=DRAW, max_new_tokens=6))
    np.testing.assert_allclose(total, out.logprobs.sum(axis=1) * 2, rtol=1e-5)
    np.testing.assert_array_equal(shifted, out.tokens + 1)


def test_vmap_folds_into_the_batch(model):
    params, config = model
    tokens, lengths = prompts(LENGTHS)
    keys = jax.random.split(KEY, 8)

    def run(tokens, lengths, keys):
        return generate(params, config, tokens, lengths, keys, sampler=DRAW, max_new_tokens=8, max_len=1024)

    mapped = jax.jit(jax.vmap(run)).lower(*grouped((tokens, lengths, keys))).compile()
    plain = jax.jit(run).lower(tokens, lengths, keys).compile()
    same(flat(mapped(*grouped((tokens, lengths, keys)))), plain(tokens, lengths, keys))
    mapped_bytes, plain_bytes = (compiled.memory_analysis().temp_size_in_bytes for compiled in (mapped, plain))
    assert mapped_bytes <= 1.05 * plain_bytes
    nested = jax.vmap(jax.vmap(run))(*grouped(grouped((tokens, lengths, keys)), 2))
    same(flat(flat(nested)), plain(tokens, lengths, keys))


@pytest.mark.parametrize("family", FAMILIES)
def test_vmap_folds_into_the_batch_of_other_families(family):
    params, config = tiny_model(**FAMILIES[family])
    tokens, lengths = prompts(LENGTHS[:4])
    keys = jax.random.split(KEY, 4)

    def run(tokens, lengths, keys):
        return generate(params, config, tokens, lengths, keys, sampler=DRAW, max_new_tokens=4)

    same(flat(jax.jit(jax.vmap(run))(*grouped((tokens, lengths, keys), 2))), jax.jit(run)(tokens, lengths, keys))


def test_vmap_over_keys_alone_shares_the_prompts(model):
    params, config = model
    tokens, lengths = prompts(LENGTHS[:2])
    keys = jax.random.split(KEY, 3)
    out = jax.vmap(lambda key: generate(params, config, tokens, lengths, key, sampler=DRAW, max_new_tokens=5))(keys)
    for index, key in enumerate(keys):
        one = jit_generate(params, config, tokens, lengths, key, sampler=DRAW, max_new_tokens=5)
        same(jax.tree.map(lambda x, index=index: x[index], out), one)


def test_vmap_over_a_samplers_numbers(model):
    params, config = model
    tokens, lengths = prompts(LENGTHS[:2])
    temperatures = jnp.asarray([0.0, 0.7, 1.5])

    def run(temperature):
        sampler = sampling.sampler(temperature=temperature, repetition_penalty=1.3, vocab_size=config.vocab_size)
        return generate(params, config, tokens, lengths, KEY, sampler=sampler, max_new_tokens=5)

    out = jax.vmap(run)(temperatures)
    for index, temperature in enumerate(temperatures):
        same(jax.tree.map(lambda x, index=index: x[index], out), run(temperature))


def test_vmap_over_parameters_runs_one_set_after_the_other(model):
    _, config = model
    tokens, lengths = prompts(LENGTHS[:2])
    sets = [tiny_model(seed)[0] for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sets)
    out = jax.vmap(lambda params: generate(params, config, tokens, lengths, KEY, max_new_tokens=5))(stacked)
    for index, params in enumerate(sets):
        one = jit_generate(params, config, tokens, lengths, KEY, max_new_tokens=5)
        same(jax.tree.map(lambda x, index=index: x[index], out), one)


def test_shard_map_over_two_devices_equals_one(model):
    params, config = model
    tokens, lengths = prompts(LENGTHS)
    keys = jax.random.split(KEY, 8)
    mesh = jax.make_mesh((2,), ("data",))

    def run(params, tokens, lengths, keys):
        return generate(params, config, tokens, lengths, keys, sampler=DRAW, max_new_tokens=8)

    def place(tree, spec):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)

    sharded = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data"), P("data"), P("data")), out_specs=P("data"))
    out = jax.jit(sharded)(place(params, P()), *place((tokens, lengths, keys), P("data")))
    assert len(out.tokens.sharding.device_set) == 2
    same(out, run(params, tokens, lengths, keys))


def test_a_step_copies_no_cache(as_users_call_it, model):
    params, config = model
    tokens, lengths = prompts(LENGTHS[:2])
    state = jit_prefill(params, config, tokens, lengths, KEY, max_new_tokens=4, max_len=20_000)
    one_buffer = state.cache.keys[0].nbytes
    memory = jit_decode.lower(params, config, state, 4).compile().memory_analysis()
    assert memory.temp_size_in_bytes < one_buffer / 2
    assert memory.alias_size_in_bytes >= 2 * config.num_layers * one_buffer
    before = state.cache.keys[0]
    jit_decode(params, config, state, 4)
    assert before.is_deleted()  # donated


class Compilations:
    """Counts programs compiled while it is open."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event, duration, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"


def test_another_length_temperature_seed_or_weight_set_compiles_nothing(model):
    params, config = model
    other, _ = tiny_model(seed=9)
    tokens, lengths = prompts([290, 3], prompt_len=300)
    more, fewer = prompts([7, 100], prompt_len=300, seed=4)

    def run(params, tokens, lengths, seed, temperature, ends):
        sampler = sampling.sampler(temperature=temperature, top_p=0.9)
        key = jax.random.key(seed)
        options = dict(sampler=sampler, max_new_tokens=6, eos_token_ids=ends)
        jit_generate(params, config, tokens, lengths, key, **options)
        state = jit_prefill(params, config, tokens, lengths, key, **options)
        jit_decode(params, config, state, 4, sampler=sampler)
        jit_score(params, config, tokens, lengths)

    run(params, tokens, lengths, 0, 0.5, [3])
    with Compilations() as compilations:
        run(other, more, fewer, 1, 0.9, [4])
        assert compilations.count == 0
        run(params, tokens[:1], lengths[:1], 0, 0.5, [3])  # another batch size does compile: the counter works
        assert compilations.count > 0


def test_a_layer_is_traced_once_for_all_layers(as_users_call_it, model, monkeypatch):
    params, config = model
    calls = []
    bind = engine.bind_layer
    monkeypatch.setattr(engine, "bind_layer", lambda *arguments: calls.append(1) or bind(*arguments))
    jax.clear_caches()
    state = jax.eval_shape(lambda: generation.prefill(params, config, *prompts([20]), KEY, max_new_tokens=2))
    assert config.num_layers == 2 and len(calls) == 1  # one chunk size
    jax.eval_shape(lambda state: generation.decode_step(params, config, state), state)
    assert len(calls) == 2
