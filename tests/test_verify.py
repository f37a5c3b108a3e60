"""`convert --verify` must be able to fail: judged against doctored answers, without torch."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from golden_cases import load_converted, tiny_hf
from perfect_reference import answers

from convert import hf_reference, verify

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """(checkpoint, job, arrays): a job and what a perfect reference would answer, which is what we compute."""
    folder = tmp_path_factory.mktemp("verify")
    load_converted(folder, "qwen2")
    checkpoint, source, output = folder / "converted", folder / "source", folder / "reference.npz"
    prompts = [[5, 6, 7], list(range(3, 40))]
    job = verify.reference_job(checkpoint, source, output, prompts=prompts, max_new_tokens=NEW_TOKENS)
    return checkpoint, job, answers(checkpoint, job)


def judged(answered, **changes) -> verify.Report:
    checkpoint, job, arrays = answered
    np.savez(job["output"], **(arrays | {name.replace("__", "/"): value for name, value in changes.items()}))
    return verify.judge(checkpoint, job)


def other_token(arrays, step: int, gap: float) -> dict[str, np.ndarray]:
    """The second prompt's answer with another token at a step, as if their logit had led by `gap`."""
    tokens, steps = arrays["tokens/1"].copy(), arrays["step_logits/1"].copy()
    best = tokens[step]
    tokens[step] = (best + 1) % steps.shape[1]
    steps[step, tokens[step]] = steps[step, best] + gap
    return {"tokens__1": tokens, "step_logits__1": steps}


def test_equal_answers_pass(answered):
    report = judged(answered)
    assert report.passed and report.problems == [] and "verify: PASS" in str(report)
    assert [row.greedy_equal for row in report.results] == [NEW_TOKENS] * 2
    assert [row.top_agreement for row in report.results] == [1, 1]


@pytest.mark.parametrize("bad", [0.01, np.nan, np.inf])
def test_one_wrong_logit_fails(answered, bad):
    logits = answered[2]["logits/1"].copy()
    logits[7, 3] += bad
    report = judged(answered, logits__1=logits)
    assert not report.passed and "verify: FAIL" in str(report)
    assert any("prompt of 37 tokens: logits differ" in problem for problem in report.problems)


def test_other_best_ids_fail(answered):
    report = judged(answered, top_ids__0=answered[2]["top_ids/0"][::-1])
    assert any("top-10 agreement" in problem for problem in report.problems)


def test_other_logprobs_fail(answered):
    report = judged(answered, step_logprobs__0=answered[2]["step_logprobs/0"] + 0.01)
    assert any("log-probabilities differ" in problem for problem in report.problems)


def test_another_greedy_token_fails_and_names_its_place(answered):
    # logits would differ too, since the sequence does; the token itself must be a problem
    report = judged(answered, **other_token(answered[2], 2, gap=0.5))
    assert report.results[1].greedy_equal == 2
    assert any("greedy token 3 differs, their two best 5.00e-01 apart" in problem for problem in report.problems)


def test_a_tie_is_told(answered):
    # at the last token nothing follows that would differ
    report = judged(answered, **other_token(answered[2], NEW_TOKENS - 1, gap=1e-5))
    assert not any("greedy token" in problem for problem in report.problems)
    assert report.results[1].tie_gap == pytest.approx(1e-5, rel=0.1)


def test_largest_kl():
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.5, 0.5], [0.6, 0.4]])
    assert verify.largest_kl(p + 3, q - 7) == pytest.approx(0.9 * np.log(1.5) + 0.1 * np.log(0.25))
    assert verify.largest_kl(p, p) == 0


def test_no_python_with_torch(monkeypatch):
    monkeypatch.delenv(hf_reference.PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(hf_reference.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(hf_reference.ReferenceUnavailable, match=r"pip install 'jaxdecode\[verify\]'.*HF_PYTHON"):
        hf_reference.find_python()


def test_variable_names_no_program(monkeypatch, tmp_path):
    monkeypatch.setenv(hf_reference.PYTHON_VARIABLE, str(tmp_path / "python"))
    with pytest.raises(hf_reference.ReferenceUnavailable, match="not an executable file"):
        hf_reference.find_python()


def test_a_failing_reference_process_is_quoted(tmp_path):
    job = {"source": str(tmp_path), "output": str(tmp_path / "out.npz"), "prompts": [[1]], "no_such_key": 1}
    with pytest.raises(hf_reference.ReferenceUnavailable, match=r"ended with code 1:(.|\n)*(no_such_key|torch)"):
        hf_reference.run_reference([job], python=sys.executable)


@pytest.mark.parametrize("case", ["qwen2", "rope_yarn"])
def test_narrow_checkpoint_asks_for_rounded_weights(tmp_path, case):
    load_converted(tmp_path, case, dtype="bfloat16")
    job = verify.reference_job(tmp_path / "converted", tmp_path / "source", tmp_path / "out.npz")
    assert job["weights_dtype"] == "bfloat16"
    longest = tiny_hf.CASES[case]["max_position_embeddings"]
    assert all(len(prompt) + job["max_new_tokens"] <= longest + 1 for prompt in job["prompts"])
