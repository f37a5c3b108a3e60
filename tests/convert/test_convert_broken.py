"""Broken inputs: exit code 1, one clear message on stderr, nothing at the destination."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import made
import numpy as np
import pytest
from made import tiny_hf

from jaxdecode.cli import main

ROOT = Path(__file__).resolve().parents[2]
Breaker = Callable[[Path], list[str] | None]
BROKEN: dict[str, tuple[Breaker, list[str]]] = {}


def broken(*phrases: str):
    """Registers a case: it makes a source in an empty folder and returns the arguments after `convert`."""

    def register(breaker: Breaker) -> Breaker:
        BROKEN[breaker.__name__] = (breaker, list(phrases))
        return breaker

    return register


def edit_json(file: Path, **changes) -> None:
    """Sets keys of a JSON file; ... removes one."""
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def config_case(name: str, changes: dict, *phrases: str, base: str = "llama") -> None:
    """A source that is whole but for its config.json."""

    def breaker(folder: Path) -> None:
        source = made.write_directory(folder / "hf", tiny_hf.CASES[base] | {"num_hidden_layers": 1})
        edit_json(source / "config.json", **changes)

    BROKEN[name] = (breaker, ["config.json", *phrases])


# What the source is


@broken("does not exist", "expected a Hugging Face model directory", ".gguf")
def no_such_path(folder):
    return [str(folder / "nothing")]


@broken("no config.json", "found nothing")
def empty_directory(folder):
    (folder / "hf").mkdir()


@broken("no config.json", "found README.md", "model directory")
def directory_of_something_else(folder):
    (folder / "hf").mkdir()
    (folder / "hf" / "README.md").write_text("hello")


@broken("no config.json", "name it itself", "model.gguf")
def directory_with_a_gguf_file(folder):
    (folder / "hf").mkdir()
    (folder / "hf" / "model.gguf").write_bytes(b"GGUF")


@broken("adapter", "merge it")
def adapter_directory(folder):
    (folder / "hf").mkdir()
    (folder / "hf" / "adapter_config.json").write_text("{}")


@broken("holds no weights", "model.safetensors", "pytorch_model.bin", "found config.json")
def no_weights(folder):
    (made.write_directory(folder / "hf") / "model.safetensors").unlink()


@broken("not a GGUF file", "expected a .gguf file or a model directory")
def some_other_file(folder):
    (folder / "hf").write_text("weights, honest")


@broken("neither a file nor a directory")
def a_pipe(folder):
    os.mkfifo(folder / "hf")


@broken("no local path", "hub cannot be reached")
def hub_name_without_a_network(folder):
    return ["nobody/no-such-model"]


# The destination and the options


@broken("exists already", "choose another")
def existing_destination(folder):
    made.write_directory(folder / "hf")
    return [str(folder / "hf"), str(folder / "hf")]


@broken("unknown dtype 'int8'", "float32, bfloat16, float16")
def unknown_dtype(folder):
    made.write_directory(folder / "hf")
    return [str(folder / "hf"), str(folder / "ours"), "--dtype", "int8"]


@broken("not an unfinished checkpoint", "move it")
def partial_of_somebody_else(folder):
    made.write_directory(folder / "hf")
    (folder / "ours.partial").mkdir()
    (folder / "ours.partial" / "precious").write_text("mine")


@broken("float16", "cannot hold 1 of its values", "mlp.down_proj.weight", "70000", "bfloat16")
def float16_overflow(folder):
    weights = tiny_hf.hf_weights(made.small_case())
    weights["model.layers.0.mlp.down_proj.weight"][3, 4] = -70000
    made.write_directory(folder / "hf", weights=weights)
    return [str(folder / "hf"), str(folder / "ours"), "--dtype", "float16"]


# config.json

config_case("unknown_model_type", {"model_type": "lama"}, "unknown model_type 'lama'", "qwen3", "the nearest is llama")
config_case(
    "nothing_near", {"model_type": "t5"}, "unknown model_type 't5'", "supported are llama, mistral, qwen2, qwen3"
)
config_case("no_model_type", {"model_type": ...}, "model_type must be a string")
config_case("no_hidden_size", {"hidden_size": ...}, "hidden_size must be a positive integer", "is missing")
config_case("text_for_a_number", {"vocab_size": "many"}, "vocab_size", "'many'")
config_case("negative_layers", {"num_hidden_layers": -1}, "num_hidden_layers", "-1")
config_case("fractional_heads", {"num_attention_heads": 4.5}, "num_attention_heads", "4.5")
config_case("boolean_number", {"intermediate_size": True}, "intermediate_size", "True")
config_case("zero_epsilon", {"rms_norm_eps": 0}, "rms_norm_eps must be a positive number")
config_case("text_for_a_flag", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false", "'no'")
config_case(
    "heads_do_not_divide", {"num_attention_heads": 3, "num_key_value_heads": 1}, "hidden_size must be a multiple"
)
config_case("groups_do_not_divide", {"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads")
config_case("odd_head_dim", {"head_dim": 7}, "head_dim must be even")
config_case("unknown_activation", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'", "silu")
config_case("unknown_rope", {"rope_scaling": {"rope_type": "shortrope"}}, "rope_type 'shortrope'", "yarn")
config_case("rope_type_is_a_list", {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type ['yarn'] is not supported")
config_case("longrope_without_factors", {"rope_scaling": {"rope_type": "longrope", "long_factor": [1, 10**400]}},
            "short_factor must be a list of positive numbers; it is None", "long_factor must be a list")  # fmt: skip
config_case("longrope_from_nothing", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1],
            "original_max_position_embeddings": 1}}, "original_max_position_embeddings of a longrope")  # fmt: skip
config_case("rope_without_factor", {"rope_scaling": {"type": "linear"}}, "factor must be a positive number", "missing")
config_case("rope_is_a_list", {"rope_scaling": [1]}, "rope_scaling must be an object or null")
config_case("partial_rotary", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5")
config_case("bad_eos", {"eos_token_id": "</s>"}, "eos_token_id must be a token or a list of tokens")
config_case("quantised", {"quantization_config": {"quant_method": "gptq"}}, "quantised ('gptq')")
config_case("short_layer_types", {"layer_types": ["full_attention"] * 5}, "layer_types", "1 layers", base="qwen2")
config_case("window_switched_off", {"layer_types": ["sliding_attention"]}, "use_sliding_window is false", base="qwen2")
config_case("two_rules", {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}}},
            "differs between layer types")  # fmt: skip


@broken("config.json", "not readable JSON")
def config_is_not_json(folder):
    (made.write_directory(folder / "hf") / "config.json").write_text('{"model_type": "llama",')


@broken("config.json", "must hold a JSON object", "list")
def config_is_a_list(folder):
    (made.write_directory(folder / "hf") / "config.json").write_text("[]")


@broken("4 problems", "hidden_act", "vocab_size", "rms_norm_eps", "quick_gelu", "exists already")
def all_problems_at_once(folder):
    source = made.write_directory(folder / "hf")
    edit_json(source / "config.json", hidden_act="quick_gelu", vocab_size=None, rms_norm_eps="tiny")
    return [str(source), str(source)]


# Tensors


def without(*names: str):
    return {name: a for name, a in tiny_hf.hf_weights(made.small_case()).items() if name not in names}


@broken("missing tensor model.layers.0.self_attn.k_proj.weight[16, 32]", "layers.0.attention.qkv.weight[64, 32]")
def missing_tensor(folder):
    made.write_directory(folder / "hf", weights=without("model.layers.0.self_attn.k_proj.weight"))


@broken("unexpected tensor model.layers.7.extra.weight[3]", "model.safetensors")
def unexpected_tensor(folder):
    extra = {"model.layers.7.extra.weight": np.ones(3, np.float32)}
    made.write_directory(folder / "hf", weights=without() | extra)


@broken("unexpected tensor model.layers.0.self_attn.q_proj.bias")
def biases_the_config_denies(folder):
    config = made.small_case(attention_bias=True, mlp_bias=True)
    source = made.write_directory(folder / "hf", config)
    edit_json(source / "config.json", attention_bias=False)


@broken("misshaped tensor model.norm.weight: the source holds [31]", "needs [32]")
def misshaped_tensor(folder):
    weights = without() | {"model.norm.weight": np.ones(31, np.float32)}
    made.write_directory(folder / "hf", weights=weights)


@broken("misshaped", "the source holds [32, 72]", "needs [72, 32]")
def transposed_tensor(folder):
    weights = without()
    made.write_directory(folder / "hf", weights=weights | {"lm_head.weight": weights["lm_head.weight"].T.copy()})


@broken("misshaped tensor model.embed_tokens.weight", "[72, 32]", "[73, 32]")
def vocabulary_of_another_size(folder):
    edit_json(made.write_directory(folder / "hf") / "config.json", vocab_size=73)


@broken("3 problems", "missing tensor lm_head.weight", "unexpected tensor odd", "misshaped tensor model.norm.weight")
def three_kinds_at_once(folder):
    changes = {"odd": np.ones(2, np.float32), "model.norm.weight": np.ones(5, np.float32)}
    made.write_directory(folder / "hf", weights=without("lm_head.weight") | changes)


@broken("missing tensor model.layers.4.", "2700 problems", "… and 2670 more problems")
def very_many_problems(folder):
    edit_json(made.write_directory(folder / "hf") / "config.json", num_hidden_layers=301)


@broken("dtype int32", "not supported", "model.norm.weight")
def integer_weights(folder):
    made.write_directory(folder / "hf", weights=without() | {"model.norm.weight": np.ones(32, np.int32)})


@broken("ties lm_head.weight to model.embed_tokens.weight", "they differ")
def tied_but_different(folder):
    edit_json(made.write_directory(folder / "hf") / "config.json", tie_word_embeddings=True)


# safetensors files


def safetensors_case(name: str, damage: Callable[[bytes], bytes], *phrases: str) -> None:
    def breaker(folder: Path) -> None:
        file = made.write_directory(folder / "hf") / "model.safetensors"
        file.write_bytes(damage(file.read_bytes()))

    BROKEN[name] = (breaker, ["model.safetensors", *phrases])


def with_header(data: bytes, change: Callable[[dict], dict | None]) -> bytes:
    """The file with its header changed in place."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def entry_case(name: str, changes: dict, *phrases: str) -> None:
    def change(header: dict) -> None:
        header["model.norm.weight"] |= changes

    safetensors_case(name, lambda data: with_header(data, change), *phrases)


def first_and_last_overlap(header: dict) -> None:
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    first, second = sorted(entry["data_offsets"] for entry in entries)[:2]
    second[:] = [first[0], first[0] + second[1] - second[0]]


safetensors_case("empty_file", lambda data: b"", "truncated", "0 bytes")
safetensors_case("truncated_data", lambda data: data[:-100], "truncated", "its tensors need")
safetensors_case("truncated_header", lambda data: data[:50], "truncated", "the header needs")
safetensors_case("bytes_after_the_end", lambda data: data + b"\0" * 9, "9 bytes follow the last tensor")
safetensors_case("huge_header", lambda data: b"\xff" * 8 + data[8:], "not a safetensors file", "over the limit")
safetensors_case("header_is_not_json", lambda data: data[:8] + b"\xfe" * 20 + data[28:], "not valid JSON")
safetensors_case("header_is_a_list", lambda data: with_header(data, lambda h: [1]), "the header is a list")  # pyright: ignore
safetensors_case(
    "overlapping_tensors", lambda data: with_header(data, first_and_last_overlap), "overlaps the tensor before"
)
safetensors_case("deep_header", lambda data: struct.pack("<Q", 200_000) + b"[" * 200_000, "not valid JSON")
entry_case("negative_offset", {"data_offsets": [-128, 0]}, "'model.norm.weight'", "natural numbers")
entry_case("offsets_of_another_size", {"data_offsets": [0, 4]}, "'model.norm.weight'", "takes 128 bytes")
entry_case("unknown_safetensors_dtype", {"dtype": "F7"}, "'model.norm.weight'", "unknown dtype 'F7'", "BF16")
entry_case("dtype_of_another_width", {"dtype": "F64"}, "'model.norm.weight'", "takes 256 bytes")
entry_case("negative_shape", {"shape": [-32]}, "'model.norm.weight'", "list of natural numbers")
entry_case("gigantic_shape", {"shape": [1 << 40, 1 << 40]}, "'model.norm.weight'", "takes")


# Shards


def shard_case(*phrases: str):
    def register(change: Callable[[Path, dict], None]) -> None:
        def breaker(folder: Path) -> None:
            source = made.write_sharded(folder / "hf")
            index = json.loads((source / "model.safetensors.index.json").read_text())
            change(source, index)
            (source / "model.safetensors.index.json").write_text(json.dumps(index))

        BROKEN[change.__name__] = (breaker, list(phrases))

    return register


@shard_case("missing shard", "model-00002-of-00003.safetensors")
def missing_shard(source, index):
    (source / "model-00002-of-00003.safetensors").unlink()


@shard_case("truncated", "model-00003-of-00003.safetensors")
def truncated_shard(source, index):
    file = source / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@shard_case("has no weight_map")
def index_without_a_map(source, index):
    index.clear()


@shard_case("has no weight_map")
def index_with_numbers(source, index):
    index["weight_map"] = {"lm_head.weight": 3}


@shard_case("../secret.safetensors", "must lie inside")
def shard_outside(source, index):
    (source.parent / "secret.safetensors").write_bytes((source / "model-00001-of-00003.safetensors").read_bytes())
    index["weight_map"]["lm_head.weight"] = "../secret.safetensors"


@shard_case("/etc/passwd", "must lie inside")
def absolute_shard(source, index):
    index["weight_map"]["lm_head.weight"] = "/etc/passwd"


@shard_case("link that leads out")
def linked_shard(source, index):
    file = source / "model-00001-of-00003.safetensors"
    file.rename(source.parent / "elsewhere.safetensors")
    file.symlink_to(source.parent / "elsewhere.safetensors")


@shard_case("the index places model.norm.weight in", "does not hold it")
def tensor_in_another_shard(source, index):
    files = sorted(set(index["weight_map"].values()))
    held = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = next(file for file in files if file != held)


@shard_case("model.norm.weight is in both")
def tensor_in_two_shards(source, index):
    for number in (1, 2):
        made.write_directory(source / f"{number}", weights=without())
    (source / "1" / "model.safetensors").rename(source / "model-00001-of-00003.safetensors")


# pytorch_model.bin


def bin_case(name: str, make: Callable[[Path], None], *phrases: str) -> None:
    def breaker(folder: Path) -> None:
        make(made.write_bin(folder / "hf") / "pytorch_model.bin")

    BROKEN[name] = (breaker, ["pytorch_model.bin", *phrases])


def pickled(data: bytes) -> Callable[[Path], None]:
    return lambda file: made.write_torch_zip(file, without(), pickled=data)


def storage_too_small(file: Path) -> None:
    weights = without()
    data = made.pickle_of(weights)
    made.write_torch_zip(file, {name: array[:1] for name, array in weights.items()}, pickled=data)


def compressed(file: Path) -> None:
    import zipfile

    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", made.pickle_of(without()))
        for index, array in enumerate(without().values()):
            archive.writestr(f"archive/data/{index}", array.tobytes())


EVIL = b"\x80\x02" + made.named("posix", "system") + b"(" + made.text("touch evil") + b"tR."
bin_case("bin_runs_a_command", pickled(EVIL), "refused", "posix.system", "could run code")
bin_case("bin_evaluates", pickled(b"\x80\x02" + made.named("builtins", "eval") + b"("
                                  + made.text("1") + b"tR."), "refused", "builtins.eval")  # fmt: skip
bin_case("bin_of_a_module", pickled(b"\x80\x02" + made.named("torch.nn.modules.linear", "Linear") + b"."),
         "refused", "torch.nn.modules.linear.Linear")  # fmt: skip
bin_case("bin_of_a_number", pickled(b"\x80\x02" + made.number(3) + b"."), "holds a int", "expected a dict")
bin_case("bin_of_numbers", pickled(b"\x80\x02}" + made.text("a") + made.number(3) + b"s."), "'a' is a int")
bin_case("bin_pickle_cut", pickled(made.pickle_of(without())[:200]), "its pickle is malformed")
bin_case("bin_legacy", lambda file: file.write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."),  # type: ignore
         "legacy format", "safetensors")  # fmt: skip
bin_case("bin_truncated", lambda file: file.write_bytes(file.read_bytes()[:-2000]), "truncated or damaged")  # type: ignore
bin_case("bin_is_text", lambda file: file.write_text("weights, honest"), "no zip archive")  # type: ignore
bin_case("bin_not_fetched", lambda file: file.write_text("version https://git-lfs"), "pointer of Git LFS")  # type: ignore
bin_case("bin_storage_too_small", storage_too_small, "truncated", "model.embed_tokens.weight needs 2304 elements")
bin_case("bin_compressed", compressed, "compressed or encrypted")


# GGUF files


def gguf_case(name: str, damage: Callable[[bytes], bytes] | None, *phrases: str, **options) -> None:
    def breaker(folder: Path) -> list[str]:
        file = made.write_gguf(folder / "model.gguf", tiny_hf.CASES["llama"] | options.pop("config", {}), **options)
        if damage:
            file.write_bytes(damage(file.read_bytes()))
        return [str(file)]

    BROKEN[name] = (breaker, ["model.gguf", *phrases])


gguf_case("gguf_truncated", lambda data: data[:-1000], "truncated", "ends at byte")
gguf_case("gguf_truncated_metadata", lambda data: data[:300], "truncated")
gguf_case("gguf_version", lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "GGUF version 9")
gguf_case("gguf_tensor_count", lambda data: data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "truncated")
gguf_case("gguf_huge_string", lambda data: data[:24] + struct.pack("<Q", 1 << 62) + data[32:], "truncated")
gguf_case(
    "gguf_architecture", lambda data: data.replace(b"llama", b"gemma"), "architecture 'gemma'", "llama, qwen2, qwen3"
)
gguf_case("gguf_missing_key", None, "metadata lacks llama.feed_forward_length", skip=("feed_forward_length",))
gguf_case("gguf_missing_tensor", None, "missing tensor model.norm.weight", skip=("model.norm.weight",))
gguf_case("gguf_without_tokenizer", None, "tokenizer model None is not supported", tokens=False)
gguf_case(
    "gguf_pre_tokenizer", lambda data: data.replace(b"gpt-2", b"vikin"), "pre-tokenizer 'vikin'", "smollm, llama-bpe"
)
gguf_case("gguf_merges", lambda data: data.replace(b"ab c", b"ab z"), "merge 'ab z'")
gguf_case("gguf_experts", None, "mixture of 8 experts", extra=lambda writer: writer.add_expert_count(8))
gguf_case("gguf_split", None, "one of 3 parts", "merge", extra=lambda writer: writer.add_uint16("split.count", 3))
gguf_case("gguf_longrope", None, "rope scaling 'longrope'",
          extra=lambda writer: writer.add_string("llama.rope.scaling.type", "longrope"))  # fmt: skip
gguf_case("gguf_odd_frequencies", None, "does not follow Llama 3's rule",
          extra=lambda writer: writer.add_tensor("rope_freqs.weight", np.arange(1, 5, dtype=np.float32)))  # fmt: skip


def run_cli(arguments: list[str], monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["jaxdecode", "convert", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_there_are_at_least_forty_broken_inputs():
    assert len(BROKEN) >= 40


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input(name, tmp_path, monkeypatch, capsys):
    breaker, phrases = BROKEN[name]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # where a command of the source would leave its traces
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = breaker(tmp_path) or [str(tmp_path / "hf")]
    if len(arguments) == 1:
        arguments.append(str(tmp_path / "ours"))
    before = listing(tmp_path)
    code, message = run_cli(arguments, monkeypatch, capsys)
    assert code == 1
    assert "Traceback" not in message and message.startswith("error: "), message
    for phrase in phrases:
        assert phrase in message, f"{phrase!r} is not in: {message}"
    assert listing(tmp_path) == before, "a refused conversion changed files"


@pytest.mark.parametrize("name", ["bin_runs_a_command", "truncated_data", "all_problems_at_once"])
def test_broken_input_in_a_process_of_its_own(name, tmp_path):
    breaker, phrases = BROKEN[name]
    arguments = breaker(tmp_path) or [str(tmp_path / "hf")]
    if len(arguments) == 1:
        arguments.append(str(tmp_path / "ours"))
    command = [sys.executable, "-c", "from jaxdecode.cli import main; main()", "convert", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(phrase in done.stderr for phrase in phrases), done.stderr
    assert not (tmp_path / "ours").exists() and not (tmp_path / "evil").exists()


def test_not_enough_disk(tmp_path, monkeypatch, capsys):
    made.write_directory(tmp_path / "hf")
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
    before = listing(tmp_path)
    code, message = run_cli([str(tmp_path / "hf"), str(tmp_path / "ours")], monkeypatch, capsys)
    assert code == 1 and "not enough disk" in message and "1,000 free" in message
    assert listing(tmp_path) == before


def test_the_good_source_converts(tmp_path, monkeypatch, capsys):
    """The cases above are broken by what they change, not by what they start from."""
    for index, write in enumerate([made.write_directory, made.write_sharded, made.write_bin]):
        source = write(tmp_path / f"hf{index}")
        monkeypatch.setattr(sys, "argv", ["jaxdecode", "convert", str(source), str(tmp_path / f"ours{index}")])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
        assert (tmp_path / f"ours{index}" / "manifest" / "metadata").exists()
    source = made.write_gguf(tmp_path / "model.gguf", tiny_hf.CASES["llama"])
    monkeypatch.setattr(sys, "argv", ["jaxdecode", "convert", str(source), str(tmp_path / "ours")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and (tmp_path / "ours" / "tokenizer" / "tokenizer.json").exists()
