"""Our models against what transformers + torch computed: the golden files of tests/golden/make_golden.py."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import GOLDEN, load_converted, our_stages, ragged, tiny_hf

from jaxdecode.generation import jit_generate, jit_score
from jaxdecode.models import build

STAGES = ("embed", "layer_0", "layers", "norm", "logits")


# Every case goes through the prompt path stage by stage; what changes the decode step, through the loop too.
DECODED = ["llama_tied", "llama_mqa", "llama_bias", "llama_head_dim", "mistral_window", "qwen2_layer_types",
           "qwen3_windows", "rope_dynamic_above", "rope_llama3", "rope_yarn_mscale", "opt", "opt_350m",
           "opt_bare", "chatglm", "chatglm_ratio", "glm", "glm_bare",
           "gpt_neox", "gpt_neox_sequential", "gpt_neox_bare", "phi3", "phi3_longrope", "phi3_longrope_long",
           "phi3_longrope_part", "gemma2", "gemma2_uncapped", "gemma3", "gemma3_parameters"]  # fmt: skip
SCORED = ["llama", "mistral_window", "qwen3_head_dim", "rope_dynamic_above", "opt_350m", "chatglm", "glm_bare",
          "gpt_neox", "phi3_longrope_long", "gemma2", "gemma3"]  # fmt: skip


@pytest.fixture(scope="module")
def golden(request, tmp_path_factory):
    """(params, config, golden arrays, prompts) of one case."""
    case = request.param
    arrays = dict(np.load(GOLDEN / f"{case}.npz"))
    header = json.loads(str(arrays.pop("header")))
    assert header["config"] == tiny_hf.CASES[case], (
        f"{case} has changed since its golden file was made: make it again"
    )
    params, config = load_converted(tmp_path_factory.mktemp(case), case)
    return params, config, arrays, tiny_hf.prompts(tiny_hf.CASES[case])


def assert_close(ours, golden, what: str) -> None:
    assert ours.shape == golden.shape, what
    np.testing.assert_allclose(ours, golden, rtol=0, atol=tiny_hf.TOLERANCE, err_msg=what)


@pytest.mark.parametrize("golden", list(tiny_hf.CASES), indirect=True)
def test_every_stage(golden):
    params, config, arrays, prompts = golden
    ours = our_stages(params, config, *ragged(prompts))
    assert set(ours) == {stage for stage in STAGES if f"{stage}/0" in arrays}
    for stage in ours:
        for index, prompt in enumerate(prompts):
            assert_close(
                ours[stage][index, : len(prompt)], arrays[f"{stage}/{index}"], f"{stage} of prompt {index}"
            )


@pytest.mark.parametrize("golden", SCORED, indirect=True)
def test_module_gives_the_same_logits(golden):
    params, config, arrays, prompts = golden
    longest = len(prompts) - 1
    logits = jax.jit(lambda params, tokens: build(config, params)(tokens))(
        params, jnp.asarray([prompts[longest]])
    )
    assert_close(logits[0], arrays[f"logits/{longest}"], "logits")


@pytest.mark.parametrize("golden", DECODED, indirect=True)
def test_greedy_tokens_and_logprobs_of_a_ragged_batch(golden):
    params, config, arrays, prompts = golden
    tokens, lengths = ragged(prompts)
    made = jit_generate(params, config, tokens, lengths, jax.random.key(0), max_new_tokens=tiny_hf.NEW_TOKENS)
    for index in range(len(prompts)):
        assert made.tokens[index].tolist() == arrays[f"tokens/{index}"].tolist(), f"prompt {index}"
        assert_close(made.logprobs[index], arrays[f"step_logprobs/{index}"], f"prompt {index}")


@pytest.mark.parametrize("golden", SCORED, indirect=True)
def test_scores_of_a_ragged_batch(golden):
    params, config, arrays, prompts = golden
    tokens, lengths = ragged(prompts)
    ours = np.asarray(jit_score(params, config, tokens, lengths))
    for index, prompt in enumerate(prompts):
        assert_close(ours[index, : len(prompt) - 1], arrays[f"logprobs/{index}"], f"prompt {index}")
        assert not ours[index, len(prompt) - 1 :].any()


def test_golden_files_stay_small_and_belong_to_cases():
    files = {file.stem: file.stat().st_size for file in GOLDEN.glob("*.npz")}
    assert set(files) == set(tiny_hf.CASES)
    assert sum(files.values()) < 1_500_000  # 20 kB for each case of each family: each is a rule that may go wrong
