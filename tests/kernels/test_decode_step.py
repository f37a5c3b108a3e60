"""The kernels inside `generate`, interpreted on the CPU: the same tokens as the definition of every operation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdecode.config import ModelConfig, RopeConfig, UnifiedMax
from jaxdecode.generation import jit_generate, stream
from jaxdecode.models import init_params
from tests.tiny import CHATGLM, GEMMA2, GEMMA3, GLM, GPT_NEOX, OPT, OPT_350M, lively_params

LLAMA = ModelConfig(
    model_type="llama", vocab_size=256, embed_dim=128, mlp_dim=192, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=64, max_position=128,
)  # fmt: skip
# the second layer's range is left by some rows of attention: those are computed again
RANGES = UnifiedMax(value=0.0, lowest=-20.0, highest=20.0), UnifiedMax(value=0.0, lowest=-20.0, highest=0.5)
CALIBRATED = dataclasses.replace(LLAMA, unified_max=RANGES)
LONGROPE = RopeConfig(
    kind="longrope", original_max_len=30, attention_factor=1.2, short_factors=(1.5,) * 32, long_factors=(4.0,) * 32
)
CONFIGS = {
    "online": LLAMA,
    "unified": CALIBRATED,
    "opt": dataclasses.replace(LLAMA, **OPT),
    "opt-350m": dataclasses.replace(LLAMA, **OPT_350M | {"token_dim": 64}),
    "chatglm": dataclasses.replace(LLAMA, **CHATGLM | {"head_dim": 128, "rope": RopeConfig(rotary_dim=64)}),
    "gpt-neox": dataclasses.replace(LLAMA, **GPT_NEOX | {"head_dim": 128, "rope": RopeConfig(rotary_dim=64)}),
    "pythia": dataclasses.replace(LLAMA, **GPT_NEOX | {"rope": RopeConfig(rotary_dim=32)}),
    "phi3": dataclasses.replace(LLAMA, model_type="phi3", layer_windows=(16, 16), rope=LONGROPE),
    "gemma2": dataclasses.replace(LLAMA, **GEMMA2 | {"layer_windows": (16, None)}),
    "gemma3": dataclasses.replace(LLAMA, **GEMMA3 | {"layer_windows": (16, None)}),
    "glm": dataclasses.replace(LLAMA, **GLM | {"head_dim": 128, "rope": RopeConfig(rotary_dim=64)}),
}
INTERPRET = "mosaic_gpu_interpret"


def prompts() -> tuple[jax.Array, jax.Array]:
    return jax.random.randint(jax.random.key(1), (3, 40), 0, LLAMA.vocab_size), jnp.asarray([40, 1, 17])


@pytest.mark.parametrize("name", CONFIGS)
def test_interpreted_kernels_generate_the_same_tokens(name):
    config = CONFIGS[name]
    params = lively_params(config, jax.random.key(0), jnp.bfloat16)
    made = {
        name: jit_generate(params, config, *prompts(), jax.random.key(0), max_new_tokens=6, implementation=name)
        for name in ("reference", INTERPRET)
    }
    np.testing.assert_array_equal(made[INTERPRET].tokens, made["reference"].tokens)
    np.testing.assert_allclose(made[INTERPRET].logprobs, made["reference"].logprobs, atol=0.02)
    again, expected = (np.asarray(made[name].recomputed) for name in (INTERPRET, "reference"))
    assert (expected > 0).all() == bool(config.unified_max)
    # a score beside the end of the range may round to either side
    np.testing.assert_allclose(again, expected, rtol=0.05)


def test_interpreted_kernels_stream_what_they_generate():
    params = init_params(LLAMA, jax.random.key(0), jnp.bfloat16)
    options = {"max_new_tokens": 3, "implementation": INTERPRET}
    whole = jit_generate(params, LLAMA, *prompts(), jax.random.key(0), **options)
    steps = [tokens for tokens, _, _ in stream(params, LLAMA, *prompts(), jax.random.key(0), **options)]
    np.testing.assert_array_equal(np.stack(steps, axis=1), whole.tokens)


def test_kernels_are_refused_where_they_cannot_run():
    params = init_params(LLAMA, jax.random.key(0), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="there is no NVIDIA GPU here"):
        jit_generate(params, LLAMA, *prompts(), jax.random.key(0), max_new_tokens=2, implementation="mosaic_gpu")
    wide = init_params(LLAMA, jax.random.key(0), jnp.float32)
    with pytest.raises(NotImplementedError, match="float16 and bfloat16; got float32"):
        jit_generate(wide, LLAMA, *prompts(), jax.random.key(0), max_new_tokens=2, implementation=INTERPRET)
