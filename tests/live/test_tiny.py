"""Every tiny case against transformers + torch now: prompts the golden files do not hold, far past the prompt."""

from __future__ import annotations

import json

import numpy as np
import pytest
from golden_cases import load_converted, tiny_hf

from convert import export
from convert.hf_reference import run_reference
from convert.verify import judge, reference_job

NEW_TOKENS = 40  # several sliding windows long


def made_up_prompts(vocab_size: int) -> list[list[int]]:
    random = np.random.RandomState(7)
    # with the new tokens the last is as long as OPT's learned positions
    return [random.randint(vocab_size, size=length).tolist() for length in (1, 3, 33)]


@pytest.fixture(scope="module")
def compared(hf_python, tmp_path_factory):
    """folder, and the reference jobs by case, on the original and on our export of it, run in one process."""
    folder = tmp_path_factory.mktemp("tiny")
    originals, exports = {}, {}
    for case, config in tiny_hf.CASES.items():
        load_converted(folder / case, case)
        checkpoint, prompts = folder / case / "converted", made_up_prompts(tiny_hf.vocab_size(config))
        source, output = folder / case / "source", folder / case / "original.npz"
        job = reference_job(checkpoint, source, output, prompts=prompts, max_new_tokens=NEW_TOKENS)
        originals[case] = job | {"weight_hashes": True}
        exported = export(checkpoint, folder / case / "exported")
        exports[case] = originals[case] | {"source": str(exported), "output": str(folder / case / "exported.npz")}
    run_reference([*originals.values(), *exports.values()], python=hf_python)
    return folder, originals, exports


@pytest.mark.parametrize("case", tiny_hf.CASES)
def test_verify_passes(compared, case):
    folder, originals, _ = compared
    report = judge(folder / case / "converted", originals[case])
    print(f"\n{case}\n{report}")
    assert report.passed, str(report)
    assert all(row.greedy_equal == NEW_TOKENS for row in report.results), str(report)
    assert max(row.logit_difference for row in report.results) < tiny_hf.TOLERANCE, str(report)


@pytest.mark.parametrize("case", tiny_hf.CASES)
def test_export_is_the_same_model(compared, case):
    _, originals, exports = compared
    original, exported = (np.load(job[case]["output"]) for job in (originals, exports))
    hashes = [json.loads(str(arrays["meta"]))["weight_sha256"] for arrays in (original, exported)]
    assert hashes[0] == hashes[1]
    for name in original.files:
        if name != "meta":
            np.testing.assert_array_equal(original[name], exported[name], err_msg=name)
