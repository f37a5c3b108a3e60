"""Conversion keeps every bit: there and back, from every container, resumed or not."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import made
import numpy as np
import pytest
from made import tiny_hf

import jaxdecode
from convert import convert, export
from convert.hf_config import FAMILIES, find_family, parse_config
from convert.sources import open_source
from convert.weights import chunks, make_plan
from jaxdecode import checkpoint, safetensors_file

BIG_ENOUGH = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}


def hf_weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory's safetensors files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        mapped = safetensors_file.map_file(file)
        found |= {name: safetensors_file.view(mapped, e) for name, e in safetensors_file.read_header(file).items()}
    return found


def assert_same_bytes(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def hashes(folder: Path) -> dict[str, str]:
    return {name: row["sha256"] for name, row in checkpoint.load_manifest(folder)["tensors"].items()}


@pytest.mark.parametrize("case", tiny_hf.CASES)
def test_there_and_back(case, tmp_path):
    config = tiny_hf.CASES[case]
    made.write_directory(tmp_path / "hf", config)
    convert(tmp_path / "hf", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert_same_bytes(hf_weights(tmp_path / "back"), tiny_hf.hf_weights(config))
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert parse_config(again, {}) == parse_config(config, {}) == checkpoint.load_config(tmp_path / "ours")


def test_every_family_is_among_the_cases():
    assert {case["model_type"] for case in tiny_hf.CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("write", [made.write_sharded, made.write_bin])
@pytest.mark.parametrize("case", ["llama_bias", "qwen3_bias", "opt_350m", "chatglm", "glm", "gpt_neox"])
def test_other_containers_give_the_same_hashes(write, case, tmp_path):
    config = tiny_hf.CASES[case]
    convert(made.write_directory(tmp_path / "plain", config), tmp_path / "a")
    convert(write(tmp_path / "other", config), tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


@pytest.mark.parametrize("chunk", [1, 1000, 5000])  # bytes: one row, and sizes that do not divide
def test_chunks_add_up(chunk, tmp_path, monkeypatch):
    config = tiny_hf.CASES["qwen3_bias"]
    gguf_config = tiny_hf.CASES["llama"] | BIG_ENOUGH
    sources = {
        "plain": made.write_directory(tmp_path / "plain", config),
        "bin": made.write_bin(tmp_path / "bin", config),
        "opt": made.write_directory(tmp_path / "opt", tiny_hf.CASES["opt_350m"]),
        "chatglm": made.write_directory(tmp_path / "chatglm", tiny_hf.CASES["chatglm_ratio"]),
        "glm": made.write_directory(tmp_path / "glm", tiny_hf.CASES["glm"]),
        "neox": made.write_directory(tmp_path / "neox", tiny_hf.CASES["gpt_neox"]),
        "gguf": made.write_gguf(tmp_path / "model.gguf", gguf_config, "Q8_0"),
    }
    for name, source in sources.items():
        convert(source, tmp_path / f"{name}-whole", dtype="bfloat16")
    for name in ("plain", "chatglm", "glm", "neox"):
        export(tmp_path / f"{name}-whole", tmp_path / f"{name}-back-whole")
    monkeypatch.setattr("convert.weights.CHUNK_BYTES", chunk)
    monkeypatch.setattr(sys.modules["convert.export"], "CHUNK_BYTES", chunk)  # convert.export is the function
    for name, source in sources.items():
        convert(source, tmp_path / f"{name}-chunks", dtype="bfloat16")
        assert hashes(tmp_path / f"{name}-chunks") == hashes(tmp_path / f"{name}-whole")
    for name in ("plain", "chatglm", "glm", "neox"):
        export(tmp_path / f"{name}-chunks", tmp_path / f"{name}-back-chunks")
        expected = hf_weights(tmp_path / f"{name}-back-whole")
        assert_same_bytes(hf_weights(tmp_path / f"{name}-back-chunks"), expected)


def test_no_chunk_is_larger_than_it_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.weights.CHUNK_BYTES", 1000)
    source = open_source(made.write_gguf(tmp_path / "model.gguf", tiny_hf.CASES["llama"] | BIG_ENOUGH, "Q8_0"))
    config = parse_config(source.config, {})
    plan, problems = make_plan(source, config, find_family(source.config), None)
    assert not problems
    for target in plan.targets:
        row = 4 * int(np.prod(target.shape[1:]))
        assert all(chunk.nbytes <= max(1000, row) for chunk in chunks(target)), target.name


def test_export_in_shards(tmp_path):
    config = made.small_case()
    convert(made.write_directory(tmp_path / "hf", config), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", shard_bytes=10_000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert_same_bytes(hf_weights(tmp_path / "back"), tiny_hf.hf_weights(config))
    convert(tmp_path / "back", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "ours")


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16", "float16"])
def test_dtypes(stored, asked, tmp_path):
    config = made.small_case()
    weights = tiny_hf.hf_weights(config)
    made.write_directory(tmp_path / "hf", config, dtype=stored)
    result = convert(tmp_path / "hf", tmp_path / "ours", dtype=asked)
    expected = asked or {"float64": "float32"}.get(stored, stored)
    assert result.dtype == expected
    view = checkpoint.tensor_views(tmp_path / "ours")["layers.0.mlp.down.weight"]
    source = weights["model.layers.0.mlp.down_proj.weight"].astype(safetensors_file.numpy_dtype(stored))
    np.testing.assert_array_equal(view, source.astype(safetensors_file.numpy_dtype(expected)))


def test_own_dtype_is_that_of_the_matrices(tmp_path):
    weights = tiny_hf.hf_weights(made.small_case())
    half = {name: a.astype(np.float16) if a.ndim > 1 else a for name, a in weights.items()}
    folder = made.write_directory(tmp_path / "hf")
    from safetensors.numpy import save_file

    save_file(half, folder / "model.safetensors")
    assert convert(folder, tmp_path / "ours").dtype == "float16"
    assert checkpoint.tensor_views(tmp_path / "ours")["norm.weight"].dtype == np.float16


def test_ignored_and_tied_tensors(tmp_path):
    config = made.small_case(tie_word_embeddings=True)
    weights = tiny_hf.hf_weights(config)
    extra = {
        "lm_head.weight": weights["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    made.write_directory(tmp_path / "hf", config, weights | extra)
    convert(tmp_path / "hf", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert_same_bytes(hf_weights(tmp_path / "back"), weights)


def test_torch_file_with_views(tmp_path):
    """A file that torch wrote: shared storages, a transposed view, an offset, a parameter."""
    from convert.torch_bin import read_torch_file

    tensors = read_torch_file(Path(__file__).parent / "data" / "torch.bin")
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {"base": base, "transposed": base.T, "rows": base[2:], "column": base[:, 3]}
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name].read(0, 99), array)
        np.testing.assert_array_equal(tensors[name].read(1, 2), array[1:2])
    np.testing.assert_array_equal(tensors["half"].read(0, 9), np.arange(5).astype(np.float16))
    assert tensors["brain"].dtype == "bfloat16" and tensors["brain"].read(0, 3)[2] == 2
    assert tensors["parameter"].shape == (2, 2) and tensors["integers"].dtype == "int64"


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3_bias"])
@pytest.mark.parametrize("quantised", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_gguf(case, quantised, tmp_path):
    import gguf

    config = tiny_hf.CASES[case] | BIG_ENOUGH
    made.write_gguf(tmp_path / "model.gguf", config, quantised)
    result = convert(tmp_path / "model.gguf", tmp_path / "ours")
    assert result.dtype == {"F16": "float16", "BF16": "bfloat16"}.get(quantised, "float32")
    parsed = parse_config(config, {})
    assert result.config == parsed
    export(tmp_path / "ours", tmp_path / "back")
    kind = gguf.GGMLQuantizationType[quantised]
    found = hf_weights(tmp_path / "back")
    for name, array in tiny_hf.hf_weights(config).items():
        if array.ndim == 2:  # rows are quantised one by one, so their order does not matter
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        np.testing.assert_array_equal(
            found[name].astype(np.float32), array.astype(found[name].dtype).astype(np.float32)
        )


def test_gguf_llama3_positions(tmp_path):
    config = tiny_hf.CASES["llama"] | BIG_ENOUGH | {"rope_theta": 500000.0}
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip

    def extra(writer):
        # the loop of llama.cpp's convert_hf_to_gguf.py
        factors, dim = [], config["head_dim"]
        for frequency in 1.0 / (500000.0 ** (np.arange(0, dim, 2) / dim)):
            wavelen = 2 * np.pi / frequency
            if wavelen < 8192 / 4.0:
                factors.append(1.0)
            elif wavelen > 8192 / 1.0:
                factors.append(32.0)
            else:
                smooth = (8192 / wavelen - 1.0) / (4.0 - 1.0)
                factors.append(1 / ((1 - smooth) / 32.0 + smooth))
        assert 1.0 in factors and 32.0 in factors
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))

    made.write_gguf(tmp_path / "model.gguf", config, extra=extra)
    assert convert(tmp_path / "model.gguf", tmp_path / "ours").config == parse_config(
        config | {"rope_scaling": scaling}, {}
    )


def test_dry_run_writes_nothing(tmp_path):
    source = made.write_directory(tmp_path / "hf")
    plan = convert(source, tmp_path / "deep" / "ours", dry_run=True)
    weights = tiny_hf.hf_weights(made.small_case())
    assert sorted(os.listdir(tmp_path)) == ["hf"]
    assert plan.parameters == sum(array.size for array in weights.values())
    assert plan.tensors == 9  # of 12 in the source: q, k and v are one, gate and up are one
    convert(source, tmp_path / "deep" / "ours")
    written = sum(file.stat().st_size for file in (tmp_path / "deep" / "ours").rglob("*") if file.is_file())
    assert plan.disk_bytes * 0.5 < written + (1 << 20) and written < plan.disk_bytes


def test_progress_reaches_the_end(tmp_path):
    calls = []
    convert(made.write_directory(tmp_path / "hf"), tmp_path / "ours", progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert (
        done == sorted(done) and done[-1] == calls[0][1] == checkpoint.load_manifest(tmp_path / "ours")["total_bytes"]
    )


def test_generation_config_and_tokenizer_files(tmp_path):
    source = made.write_directory(tmp_path / "hf")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    tokenizer = json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})
    (source / "tokenizer.json").write_text(tokenizer)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (source / "modeling_evil.py").write_text("raise SystemExit")
    assert convert(source, tmp_path / "ours").config.eos_token_ids == (5, 2)
    copied = sorted(file.name for file in (tmp_path / "ours" / "tokenizer").iterdir())
    assert copied == ["tokenizer.json", "tokenizer_config.json"]
    export(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {"eos_token_id": [5, 2]}
    assert (tmp_path / "back" / "tokenizer.json").read_text() == tokenizer


def test_loaded_weights_are_the_mapped_file(tmp_path):
    convert(made.write_directory(tmp_path / "hf"), tmp_path / "ours")
    params, config = checkpoint.load_params(tmp_path / "ours")
    views = checkpoint.tensor_views(tmp_path / "ours")
    flat = checkpoint.flatten(params)
    assert set(flat) == set(views) and isinstance(params["layers"], list) and len(params["layers"]) == config.num_layers
    for name, array in flat.items():
        assert array.shape == views[name].shape
        np.testing.assert_array_equal(np.asarray(array), views[name])
    maps = Path("/proc/self/maps").read_text().splitlines()
    pointer = flat["layers.0.attention.qkv.weight"].unsafe_buffer_pointer()
    spans = [line.split() for line in maps if "layer_00000.safetensors" in line]
    assert any(int(a, 16) <= pointer < int(b, 16) for a, b in (span[0].split("-") for span in spans))


def test_a_source_without_tokenizer_loads_without_one(tmp_path):
    convert(made.write_directory(tmp_path / "source"), tmp_path / "out")
    model = jaxdecode.load(tmp_path / "out")
    assert model.tokenizer is None
