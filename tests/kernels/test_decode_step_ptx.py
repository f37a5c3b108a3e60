"""Whole decode steps compiled for cards that are not here: executed where small, and their programs looked at."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_step import loop, one_step
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from needs import needs_compiler
from ptx.chain import Chain
from tolerance import STEP

from jaxdecode.aot import CompiledProgram, Program, compile_program
from jaxdecode.aot.program import walk
from jaxdecode.cache import KVCache, init_cache
from jaxdecode.config import ModelConfig, RopeConfig, UnifiedMax
from jaxdecode.engine import step
from jaxdecode.generation import generate
from jaxdecode.models import Params, abstract_params, init_params
from jaxdecode.models.known import KNOWN
from tests.tiny import CHATGLM, OPT, lively_params

pytestmark = needs_compiler

LLAMA = ModelConfig(
    model_type="llama", vocab_size=256, embed_dim=256, mlp_dim=192, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=64, max_position=192,
)  # fmt: skip
OPT_SHAPED = dataclasses.replace(LLAMA, **OPT | {"tied_embeddings": False})  # which keeps the logits around 1
CHATGLM_SHAPED = dataclasses.replace(
    LLAMA, **CHATGLM | {"num_heads": 16, "head_dim": 128, "rope": RopeConfig(rotary_dim=64)}
)
# of the second layer's attention some rows leave the range
RANGES = UnifiedMax(value=0.0, lowest=-20.0, highest=20.0), UnifiedMax(value=0.0, lowest=-20.0, highest=1.5)
EXECUTED = {
    "one row": (LLAMA, 1, "float16", "a100-80gb"),
    "three rows 86": (LLAMA, 3, "float16", "rtx3090"),
    "ragged": (dataclasses.replace(LLAMA, unified_max=RANGES), 3, "float16", "a100-80gb"),
    "ragged 86": (dataclasses.replace(LLAMA, unified_max=RANGES), 3, "bfloat16", "rtx3090"),
    "biases and norms 89": (
        dataclasses.replace(LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True, model_type="qwen3", qk_norm=True),
        9,
        "float16",
        "rtx4090",
    ),
    "opt": (OPT_SHAPED, 3, "float16", "a100-80gb"),
    "opt one row 86": (OPT_SHAPED, 1, "bfloat16", "rtx3090"),
    "chatglm": (CHATGLM_SHAPED, 3, "float16", "a100-80gb"),
    "chatglm one row 89": (CHATGLM_SHAPED, 1, "bfloat16", "rtx4090"),
}
LLAMA2_7B = dataclasses.replace(
    KNOWN["llama2-7b"], unified_max=(UnifiedMax(value=-16.8, lowest=-16.8, highest=6.5),) * 32
)
LOOPS = {
    f"llama2-7b {card} batch={batch}": (LLAMA2_7B, card, batch)
    for card in ("a100-80gb", "rtx3090")
    for batch in (1, 8)
} | {f"{name} batch=1": (KNOWN[name], "a100-80gb", 1) for name in ("opt-6.7b", "chatglm2-6b")}
BLOCK_KV = 64


def filled_cache(config: ModelConfig, batch: int, dtype: str) -> KVCache:
    """Sequences of different length; NaN in every slot past them."""
    cache, random = init_cache(config, batch, config.max_position, dtype), np.random.default_rng(0)
    lengths = random.integers(0, config.max_position, batch)
    used = (np.arange(config.max_position) < lengths[:, None])[:, None, :, None]

    def fill(slots: jax.Array) -> jax.Array:
        return jnp.asarray(np.where(used, 2 * random.standard_normal(slots.shape), np.nan), slots.dtype)

    keys, values = (tuple(map(fill, part)) for part in (cache.keys, cache.values))
    return KVCache(keys, values, jnp.asarray(lengths, jnp.int32))


@pytest.mark.parametrize("name", EXECUTED)
def test_executed_step(name):
    config, batch, dtype, card = EXECUTED[name]
    program = compile_program(one_step, config, batch, config.max_position, dtype, target=card)
    params, cache = lively_params(config, jax.random.key(0), dtype), filled_cache(config, batch, dtype)
    tokens = jax.random.randint(jax.random.key(1), (batch,), 0, config.vocab_size)
    definition = functools.partial(step, implementation="reference")
    expected = jax.tree.leaves(jax.jit(definition, static_argnums=1)(params, config, cache, tokens))
    sparse = [kernel.name for kernel in program.kernels.values() if kernel.kind == "mosaic"]
    for seed in (None, 0):
        chain = Chain(
            program, [np.asarray(a) for a in jax.tree.leaves((cache, params, tokens))], seed=seed, sparse=sparse
        )
        assert sum("mosaic" in kernel for kernel in chain.launched) >= 5 * config.num_layers
        for ours, theirs in zip(chain.outputs[:-1], expected[:-1], strict=True):
            ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
            np.testing.assert_allclose(ours, theirs, atol=STEP[dtype], rtol=STEP[dtype])
        again = np.asarray(expected[-1])
        assert again.any() == bool(config.unified_max)
        np.testing.assert_array_equal(chain.outputs[-1], again)


@pytest.mark.parametrize("name", ["one row", "three rows 86"])
def test_each_byte_of_weights_and_cache_is_asked_for_once(name):
    config, batch, dtype, card = EXECUTED[name]
    program = compile_program(one_step, config, batch, config.max_position, dtype, target=card)
    params, cache = init_params(config, jax.random.key(0), dtype), filled_cache(config, batch, dtype)
    arguments = cache, params, jnp.zeros(batch, jnp.int32)
    sparse = [kernel.name for kernel in program.kernels.values() if kernel.kind == "mosaic"]
    inputs = [np.asarray(leaf) for leaf in jax.tree.leaves(arguments)]
    requests = Chain(program, inputs, sparse=sparse, count_requests=True).requests
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(arguments)]
    checked = {"weight": 0, "cache": 0}
    for index, (path, array) in enumerate(zip(paths, inputs, strict=True)):
        if array.ndim == 2 and "embed" not in path:
            checked["weight"] += 1
            assert (requests[index] == 1).all(), path
        if array.ndim == 4:
            checked["cache"] += 1
            counts = requests[index].reshape(*array.shape[:3], -1)
            for row, length in enumerate(np.asarray(cache.lengths) + 1):
                assert (counts[row, :, :length] == 1).all(), path
                assert (counts[row, :, length:] <= 1).all(), path  # the rest of the last block
                block = BLOCK_KV * -(-length // BLOCK_KV)
                assert not counts[row, :, block:].any(), path
    assert checked == {"weight": 4 * config.num_layers + 1, "cache": 2 * config.num_layers}


@functools.cache
def compiled_loop(name: str) -> CompiledProgram:
    config, card, batch = LOOPS[name]
    return compile_program(loop, config, batch, 1024, "float16", target=card)


def sharded(check_vma: bool) -> Program:
    """`generate` under `shard_map`, each shard with its own rows."""
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))
    rows, all_of_it = PartitionSpec("data"), PartitionSpec()

    def rollout(params: Params, tokens: jax.Array) -> jax.Array:
        lengths = jnp.full(tokens.shape[0], tokens.shape[1])
        return generate(params, LLAMA, tokens, lengths, jax.random.key(0), max_new_tokens=3).tokens

    specs = {"in_specs": (all_of_it, rows), "out_specs": rows, "check_vma": check_vma}
    function = jax.shard_map(rollout, mesh=mesh, **specs)
    args = abstract_params(LLAMA, "bfloat16"), jax.ShapeDtypeStruct((2, 8), jnp.int32)
    return Program(function=function, args=args)


@pytest.mark.parametrize("check_vma", [True, False])
def test_generate_under_shard_map_compiles(check_vma):
    """With checked axes a kernel cannot write the cache in place, so XLA's product does."""
    program = compile_program(sharded, check_vma, target="a100-80gb")
    [loop_thunk] = [thunk for thunk in program.thunks if thunk.kind == "while"][-1:]
    kinds = [program.kernels[step.kernel].kind for step in walk(loop_thunk.children["body"]) if step.kernel]
    assert kinds.count("mosaic") == (4 if check_vma else 5) * LLAMA.num_layers + 1


@pytest.mark.parametrize("name", LOOPS)
def test_a_step_is_one_graph_of_few_kernels(name):
    program, num_layers = compiled_loop(name), LOOPS[name][0].num_layers
    [outer] = [node for node in program.graphs if node.kind == "while"]
    [graph] = outer.children["body"]
    assert graph.kind == "command_buffer"
    [thunk] = [thunk for thunk in program.thunks if thunk.kind == "while"]
    body = [step for step in walk(thunk.children["body"]) if step.kind != "sequential"]
    assert all(step.kernel for step in body), [step.kind for step in body]
    kinds = [program.kernels[step.kernel].kind for step in body if step.kernel]
    assert kinds.count("mosaic") == 5 * num_layers + 1
    assert len(kinds) <= 6 * num_layers


@pytest.mark.parametrize("name", LOOPS)
def test_a_step_copies_no_weight_and_no_cache(name):
    program, (config, _, batch) = compiled_loop(name), LOOPS[name]
    cache_bytes = 2 * config.num_layers * batch * 1024 * config.num_kv_heads * config.head_dim * 2
    assert program.memory.temporaries < 32 << 20
    assert program.memory.aliased >= cache_bytes
    largest = 2 << 20  # the smallest weight has 32 MiB; a layer's keys 8 MiB a sequence, ChatGLM2's half of one
    for thunk in program.walk():
        if thunk.kind == "device_to_device_copy":
            assert thunk.argument("destination").size < largest, thunk
        elif thunk.kernel and program.kernels[thunk.kernel].kind != "mosaic":
            written = [part.slice.size for part in thunk.arguments if part.written and part.slice]
            assert max(written, default=0) < largest, thunk
