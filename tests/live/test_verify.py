"""`jaxdecode verify` with the real reference: sound checkpoints pass, planted faults are found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_cases import tiny_hf

from convert import convert
from convert.certificate import FILE, certify
from jaxdecode.checkpoint import load_params, save


def source_of(folder: Path, case: str) -> Path:
    return tiny_hf.write_hf_directory(folder / f"{case}-hf", tiny_hf.CASES[case])


@pytest.mark.parametrize("case", ["llama", "opt", "chatglm"])
def test_sound_and_corrupted(case, hf_python, tmp_path):
    source = source_of(tmp_path, case)
    convert(source, tmp_path / "sound")
    assert certify(tmp_path / "sound", source, python=hf_python).passed
    assert "transformers" in json.loads((tmp_path / "sound" / FILE).read_text())["comparison"]["reference"]
    params, config = load_params(tmp_path / "sound")
    weight = np.array(params["layers"][1]["mlp"]["down"]["weight"])
    weight[0, 0] += 0.5  # of numbers of order 0.2
    params["layers"][1]["mlp"]["down"]["weight"] = weight
    save(tmp_path / "wrong", params, config)
    wrong = certify(tmp_path / "wrong", source, python=hf_python)
    assert not wrong.passed and any("logits differ by" in problem for problem in wrong.problems)


def test_another_model_of_the_same_shape(hf_python, tmp_path, monkeypatch):
    """The weights of a sister model: only arithmetic can tell."""
    convert(source_of(tmp_path, "qwen2"), tmp_path / "ours")
    weights = tiny_hf.hf_weights
    monkeypatch.setattr(tiny_hf, "hf_weights", lambda config: {k: v[::-1].copy() for k, v in weights(config).items()})
    sister = tiny_hf.write_hf_directory(tmp_path / "sister", tiny_hf.CASES["qwen2"])
    assert not certify(tmp_path / "ours", sister, python=hf_python).passed


def test_the_command(hf_python, tmp_path, monkeypatch, capsys):
    from jaxdecode.cli import main

    source = source_of(tmp_path, "qwen3")
    ours = tmp_path / "ours"
    for arguments in (["convert", source, ours, "--verify"], ["verify", ours, "--against", source]):
        monkeypatch.setattr(sys, "argv", ["jaxdecode", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code and "verify: PASS" in capsys.readouterr().out
        assert json.loads((ours / FILE).read_text())["passed"] is True
        (ours / FILE).unlink()
