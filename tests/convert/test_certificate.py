"""`jaxdecode verify` and its certificate: what passes, what is found, what is left behind. The reference is ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import made
import numpy as np
import pytest
from made import tiny_hf
from perfect_reference import answers

import convert.verify
from convert import ConversionError
from convert import convert as convert_model
from convert.certificate import FILE, certify, weights_sha256
from convert.hf_reference import PYTHON_VARIABLE, ReferenceUnavailable
from convert.source_weights import compare_weights
from convert.sources import open_source
from jaxdecode.checkpoint import load_manifest, verify_hashes
from jaxdecode.text import load

CASE = tiny_hf.CASES["qwen2"]
POSITIONS = CASE["max_position_embeddings"]


@pytest.fixture
def source(tmp_path) -> Path:
    return made.write_directory(tmp_path / "hf", CASE)


@pytest.fixture
def checkpoint(source, tmp_path) -> Path:
    convert_model(source, tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture(autouse=True)
def asked(monkeypatch, tmp_path) -> list[dict]:
    """The jobs that the reference was asked to do; it answers as the original of `source` does."""
    jobs: list[dict] = []

    def run_reference(batch: list[dict], *, python: str) -> None:
        original = tmp_path / "original"
        if not original.exists():
            convert_model(made.write_directory(tmp_path / "original_hf", CASE), original)
        for job in batch:
            np.savez(job["output"], **answers(original, job))
        jobs.extend(batch)

    monkeypatch.setattr(convert.verify, "run_reference", run_reference)
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    return jobs


def written(checkpoint: Path) -> dict:
    return json.loads((checkpoint / FILE).read_text())


def other_weights(folder: Path) -> Path:
    """A model of the same shape in which one number is another."""
    weights = tiny_hf.hf_weights(CASE)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5
    return made.write_directory(folder, CASE, weights)


def test_a_certificate_says_what_was_done(run, checkpoint, source, asked):
    before = {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()}
    code, out, _ = run("verify", checkpoint, "--against", source)
    assert code == 0 and "verify: PASS" in out and f"Wrote {checkpoint / FILE}" in out
    found, manifest = written(checkpoint), load_manifest(checkpoint)
    assert found["passed"] is True and found["problems"] == []
    assert found["hashes"]["tensors"] == len(manifest["tensors"])
    assert found["hashes"]["sha256"] == weights_sha256(manifest)
    assert found["source"]["name"] == str(source) and found["source"]["same_files_as_converted"] is True
    assert found["comparison"]["reference"].startswith("transformers 0 + torch 0")
    assert {"jaxdecode", "jax", "jaxlib", "python", "device"} <= set(found["versions"])
    assert found["date"].endswith("+00:00") and len(found["comparison"]["prompts"]) == len(asked[0]["prompts"])
    # nothing else in the checkpoint has changed, or was added
    assert {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file() and file.name != FILE} == before
    assert verify_hashes(checkpoint) == len(manifest["tensors"]) and load(checkpoint).config.max_position == POSITIONS


@pytest.mark.parametrize(("options", "last"), [({}, POSITIONS), ({"longest": 20}, 20)])
def test_the_last_position_is_compared(checkpoint, source, asked, options, last):
    assert certify(checkpoint, source, **options).passed
    reached = [len(prompt) + asked[0]["max_new_tokens"] for prompt in asked[0]["prompts"]]
    assert max(reached) == last and asked[0]["positions"][reached.index(last)][-1] == last - 1
    assert written(checkpoint)["positions"] == {"model": POSITIONS, "cap": options.get("longest", 2048)}


def test_a_prompt_too_long_to_share_a_batch_is_run_alone(checkpoint, source, monkeypatch, asked):
    monkeypatch.setattr(convert.verify, "_ALONE", 3)
    assert certify(checkpoint, source).passed
    assert sum(len(prompt) > 3 for prompt in asked[0]["prompts"]) > 1 and any(len(p) <= 3 for p in asked[0]["prompts"])


def test_a_flipped_bit_is_found_before_anything_is_compared(run, checkpoint, source, asked):
    run("verify", checkpoint, "--against", source)
    file = checkpoint / "weights" / "layer_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    asked.clear()
    code, out, _ = run("verify", checkpoint, "--against", source)
    assert code == 1 and "1 tensors differ from their recorded SHA-256: layers.1." in out and not asked
    found = written(checkpoint)
    assert found["passed"] is False and "layers.1." in found["problems"][0] and found["comparison"] is None


def test_a_wrong_weight_whose_hash_is_right_is_found(run, source, tmp_path):
    convert_model(other_weights(tmp_path / "other"), tmp_path / "ours")
    code, out, _ = run("verify", tmp_path / "ours", "--against", source)
    assert code == 1 and "verify: FAIL" in out and "logits differ by" in out
    found = written(tmp_path / "ours")
    assert found["passed"] is False and any("logits differ by" in problem for problem in found["problems"])
    assert found["source"]["same_files_as_converted"] is False
    assert max(row["logit_difference"] for row in found["comparison"]["prompts"]) > 1e-2


def spoil(folder: Path, case: dict, name: str, where) -> Path:
    """The model of a case in which one number is another."""
    weights = tiny_hf.hf_weights(case)
    weights[name][where] += 0.5
    return made.write_directory(folder, case, weights)


def test_a_row_that_no_prompt_uses_is_compared_too(run, source, tmp_path, asked):
    case = CASE | {"vocab_size": 4000, "tie_word_embeddings": False}
    source = made.write_directory(tmp_path / "large", case)
    convert_model(source, tmp_path / "original")  # whose answers the reference gives
    assert certify(tmp_path / "original", source).passed
    used = {token for job in asked for prompt in job["prompts"] for token in prompt}
    row = min(set(range(1000, 4000)) - used)
    convert_model(spoil(tmp_path / "other", case, "model.embed_tokens.weight", (row, 1)), tmp_path / "ours")
    code, out, _ = run("verify", tmp_path / "ours", "--against", source)
    tensors = len(load_manifest(tmp_path / "ours")["tensors"])
    assert code == 1 and out.count("verify: ") == 1 and "verify: FAIL" in out and "logits differ" not in out
    assert f"{tensors - 1} of {tensors} tensors equal the source's bit by bit" in out
    assert f"1 tensors differ from {source}: embed.weight (first in row {row})" in out
    found = written(tmp_path / "ours")
    assert found["passed"] is False and found["weights"] == {
        "compared": tensors, "equal": tensors - 1, "first_different": [f"embed.weight (first in row {row})"],
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["qwen2", "chatglm", "gpt_neox", "opt", "opt_350m", "phi3", "gemma3"])
def test_numbers_are_compared_in_the_type_and_order_they_were_written(case, dtype, tmp_path, monkeypatch):
    config = tiny_hf.CASES[case]
    source, ours = made.write_directory(tmp_path / "hf", config), tmp_path / "ours"
    extended = {"extend_positions": 200} if case.startswith("opt") else {}
    convert_model(source, ours, dtype=dtype, **extended)
    monkeypatch.setattr("convert.weights.CHUNK_BYTES", 500)  # so that a tensor comes in several
    read: list[int] = []
    record, problems = compare_weights(ours, open_source(source), read.append)
    assert not problems and record["equal"] == record["compared"] == len(load_manifest(ours)["tensors"])
    assert read == sorted(read) and read[-1] == load_manifest(ours)["total_bytes"]
    name = next(name for name in tiny_hf.hf_weights(config) if "layers.1." in name and "norm" not in name)
    other = open_source(spoil(tmp_path / "other", config, name, -1))
    record, problems = compare_weights(ours, other)
    assert record["equal"] == record["compared"] - 1 and "1 tensors differ from" in problems[0]


def test_a_source_without_some_tensor_is_no_verdict(checkpoint, tmp_path):
    weights = tiny_hf.hf_weights(CASE)
    del weights["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(ConversionError, match=r"(?s)cannot read .*missing tensor model.layers.1.mlp.down_proj"):
        certify(checkpoint, made.write_directory(tmp_path / "less", CASE, weights))


def test_the_source_of_another_model_is_found(run, checkpoint, tmp_path, asked):
    other = made.write_directory(tmp_path / "other", tiny_hf.CASES["llama"])
    code, out, _ = run("verify", checkpoint, "--against", other)
    assert code == 1 and f"{other} is another model: model_type is qwen2 here and llama there" in out and not asked
    assert written(checkpoint)["passed"] is False and "is another model" in written(checkpoint)["problems"][0]


def test_what_is_no_number_is_still_json(checkpoint, source, monkeypatch):
    whole = convert.verify.run_reference

    def spoilt(batch: list[dict], *, python: str) -> None:
        whole(batch, python=python)
        with np.load(batch[0]["output"]) as arrays:
            changed = dict(arrays)
        changed["logits/0"] = np.full_like(changed["logits/0"], np.nan)
        np.savez(batch[0]["output"], **changed)

    monkeypatch.setattr(convert.verify, "run_reference", spoilt)
    assert not certify(checkpoint, source).passed
    text = (checkpoint / FILE).read_text()
    assert "NaN" not in text and json.loads(text)["comparison"]["prompts"][0]["logit_difference"] == "nan"


@pytest.mark.parametrize("missing", ["python", "process", "source", "checkpoint"])
def test_where_nothing_could_be_compared_nothing_is_certified(run, checkpoint, source, tmp_path, monkeypatch, missing):
    certify(checkpoint, source)
    before, arguments = (checkpoint / FILE).read_bytes(), [checkpoint, "--against", source]

    def fails(*_, **__):
        raise ReferenceUnavailable("the reference process ended with code 1: torch is too old")

    if missing == "python":
        monkeypatch.setenv(PYTHON_VARIABLE, "/no/such/python")
        message = "JAXDECODE_HF_PYTHON names '/no/such/python', which is not an executable file"
    elif missing == "process":
        monkeypatch.setattr(convert.verify, "run_reference", fails)
        message = "torch is too old"
    elif missing == "source":
        arguments[2], message = tmp_path / "absent", "does not exist"
    else:
        arguments[0], message = source, "is not a jaxdecode checkpoint"
    code, _, err = run("verify", *arguments)
    assert code == 1 and message in err and err.count("error: ") == 1 and "Traceback" not in err
    assert (checkpoint / FILE).read_bytes() == before


def test_no_torch_at_all_is_explained(run, checkpoint, source, monkeypatch):
    monkeypatch.delenv(PYTHON_VARIABLE)
    monkeypatch.setattr("convert.hf_reference.importlib.util.find_spec", lambda name: None)
    code, _, err = run("verify", checkpoint, "--against", source)
    assert code == 1 and "pip install 'jaxdecode[verify]'" in err and PYTHON_VARIABLE in err
    assert not (checkpoint / FILE).exists()


def test_a_certificate_appears_whole_or_not_at_all(checkpoint, source, monkeypatch):
    certify(checkpoint, source)
    before = (checkpoint / FILE).read_bytes()
    monkeypatch.setattr("convert.certificate.os.replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        certify(checkpoint, source, longest=20)
    assert (checkpoint / FILE).read_bytes() == before


def test_too_few_positions_to_compare(checkpoint, source):
    with pytest.raises(ValueError, match=r"at least 2 positions.*got 1"):
        certify(checkpoint, source, longest=1)


def test_a_damaged_source_is_no_verdict_on_the_checkpoint(checkpoint, source):
    (source / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConversionError, match="cannot read"):
        certify(checkpoint, source)
    assert not (checkpoint / FILE).exists()


def test_convert_verifies_in_the_same_way(run, source, tmp_path, monkeypatch):
    code, out, _ = run("convert", source, tmp_path / "new", "--verify", "--dtype", "float32")
    assert code == 0 and "verify: PASS" in out and written(tmp_path / "new")["passed"] is True
    code, out, _ = run("convert", other_weights(tmp_path / "other"), tmp_path / "wrong", "--verify")
    assert code == 1 and written(tmp_path / "wrong")["passed"] is False

    def fails(*_, **__):
        raise ReferenceUnavailable("torch is too old")

    monkeypatch.setattr(convert.verify, "run_reference", fails)
    code, _, err = run("convert", source, tmp_path / "third", "--verify")
    assert code == 1 and "was converted, but not compared: torch is too old" in err and (tmp_path / "third").exists()
