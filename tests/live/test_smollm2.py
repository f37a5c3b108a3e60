"""SmolLM2-135M-Instruct, real weights in float32: our converter and engine against transformers + torch.

transformers loads the same GGUF file, its blocks unpacked to float32, and runs every prompt alone (eager attention).
No token may differ, near ties included.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smollm2_prompts import CHATS, PLAIN

from convert import convert, export
from convert.hf_reference import run_reference
from convert.verify import full_logits
from jaxdecode.checkpoint import load_params
from jaxdecode.generation import jit_generate, jit_score
from jaxdecode.tokenizer import encode_chat, encode_text, load_tokenizer

NEW_TOKENS = 64
TOLERANCE = 1e-3  # of logits and of log-probabilities
ALL_IN_ONE = 1024  # slots for the longest prompt
EXPORT_PROMPTS = (0, 3, 7, 11)


class Comparison:
    """Both sides' results; ours made when first asked for."""

    def __init__(self, gguf, hf_python, folder):
        self.checkpoint = folder / "checkpoint"
        convert(gguf, self.checkpoint, dtype="float32")
        self.params, self.config = load_params(self.checkpoint)
        tokenizer = load_tokenizer(self.checkpoint / "tokenizer")
        self.prompts = [encode_text(tokenizer, text) for text in PLAIN]
        self.prompts += [encode_chat(tokenizer, messages) for messages in CHATS]
        exported = export(self.checkpoint, folder / "exported")
        job = {
            "source": str(gguf), "output": str(folder / "original.npz"), "prompts": self.prompts,
            "max_new_tokens": NEW_TOKENS, "forward": "sequence", "weight_hashes": True,
        }  # fmt: skip
        again = {
            "source": str(exported), "output": str(folder / "exported.npz"), "weight_hashes": True,
            "prompts": [self.prompts[index] for index in EXPORT_PROMPTS], "forward": "prompt",
        }  # fmt: skip
        original = again | {"source": str(gguf), "output": str(folder / "short.npz")}
        run_reference([job, again, original], python=hf_python)
        self.theirs, self.exported, self.original = (np.load(part["output"]) for part in (job, again, original))

    def padded(self, rows: list[list[int]]):
        tokens = np.zeros((len(rows), ALL_IN_ONE), np.int32)
        for row, values in zip(tokens, rows, strict=True):
            row[: len(values)] = values
        return jnp.asarray(tokens), jnp.asarray([len(values) for values in rows], jnp.int32)

    def generate(self, rows: list[list[int]]):
        tokens, lengths = self.padded(rows)
        key = jax.random.key(0)
        made = jit_generate(self.params, self.config, tokens, lengths, key, max_new_tokens=NEW_TOKENS)
        return jax.device_get(made)

    def sequence(self, index: int) -> list[int]:
        return [*self.prompts[index], *self.theirs[f"tokens/{index}"].tolist()]

    def mismatch(self, index: int, tokens: np.ndarray) -> str | None:
        """Where the greedy tokens of a prompt part, and whether it was a tie."""
        expected = self.theirs[f"tokens/{index}"]
        if (tokens == expected).all():
            return None
        step = int((tokens != expected).argmax())
        best = np.sort(self.theirs[f"step_logits/{index}"][step])[-2:]
        gap = best[1] - best[0]
        return f"prompt {index} ({len(self.prompts[index])} tokens) differs at {step}, their two best {gap:.1e} apart"


@pytest.fixture(scope="module")
def compared(smollm2_gguf, hf_python, tmp_path_factory):
    return Comparison(smollm2_gguf, hf_python, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def batch(compared):
    return compared.generate(compared.prompts)


def test_prompts_are_short_and_long(compared):
    lengths = sorted(map(len, compared.prompts))
    print(f"\nprompt lengths {lengths}")
    assert len(lengths) == 20 and lengths[0] == 1 and lengths[-3] > 700 and 850 < lengths[-1] <= 960


def test_reference_unpacked_the_weights(compared):
    meta = json.loads(str(compared.theirs["meta"]))
    print(f"\ntransformers {meta['transformers']}, torch {meta['torch']}, {meta['attention']} attention")
    assert meta["job"]["dtype"] == "float32" and meta["attention"] == "eager"
    assert meta["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(compared.params)) == 134_515_008


def test_greedy_tokens_one_by_one(compared):
    made = [compared.generate([prompt]).tokens[0] for prompt in compared.prompts]
    assert not [found for index, tokens in enumerate(made) if (found := compared.mismatch(index, tokens))]


def test_greedy_tokens_of_one_ragged_batch(compared, batch):
    assert not [found for index, tokens in enumerate(batch.tokens) if (found := compared.mismatch(index, tokens))]


def test_logits_at_every_position(compared):
    worst = []
    for index in range(len(compared.prompts)):
        sequence, logits = compared.sequence(index), compared.theirs[f"logits/{index}"]
        ours = full_logits(compared.params, compared.config, sequence, range(len(sequence)))
        assert ours.shape == logits.shape
        worst.append(float(np.abs(ours - logits).max()))
    print("\nlargest logit difference by prompt:", " ".join(f"{value:.1e}" for value in worst))
    assert max(worst) < TOLERANCE


def test_logprobs_are_those_of_a_teacher_forced_pass(compared, batch):
    for index, prompt in enumerate(compared.prompts):
        tokens, lengths = compared.padded([compared.sequence(index)])
        scores = np.asarray(jit_score(compared.params, compared.config, tokens, lengths))[0]
        generated = slice(len(prompt) - 1, len(prompt) - 1 + NEW_TOKENS)
        theirs = compared.theirs[f"logprobs/{index}"]
        np.testing.assert_allclose(batch.logprobs[index], scores[generated], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(batch.logprobs[index], theirs[generated], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(scores[: len(theirs)], theirs, rtol=0, atol=TOLERANCE)
        step_logprobs = compared.theirs[f"step_logprobs/{index}"]
        np.testing.assert_allclose(batch.logprobs[index], step_logprobs, rtol=0, atol=TOLERANCE)


def test_export_has_the_same_bits_and_logits(compared):
    """transformers on the GGUF file and transformers on our export of our conversion of it."""
    hashes = [json.loads(str(side["meta"]))["weight_sha256"] for side in (compared.original, compared.exported)]
    assert len(hashes[0]) == 273 and hashes[0] == hashes[1]  # 272 tensors, and the tied head under its own name
    for index in range(len(EXPORT_PROMPTS)):
        name = f"logits/{index}"
        np.testing.assert_array_equal(compared.original[name], compared.exported[name])
