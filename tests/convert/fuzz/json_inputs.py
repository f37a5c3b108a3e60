"""Fuzzed JSON: config.json of every family, generation_config.json, the weight index, tokenizer files."""

from __future__ import annotations

import json
import random
from typing import Any

from hypothesis import strategies as st
from inputs import DEEP, LFS_POINTER, TEXTS, Files, Input, Special, base, changed, damaged, dumps, odd, placed
from made import tiny_hf

_ROPE_KINDS = ["default", "linear", "dynamic", "llama3", "yarn", "longrope", "su", None, 3]
_ROPE_KEYS = [
    "rope_type", "type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim", "rope_theta",
    "full_attention", "sliding_attention", "partial_rotary_factor", "short_factor", "long_factor",
]  # fmt: skip
_CONFIG_KEYS = [
    *sorted({key for case in tiny_hf.CASES.values() for key in case}),
    "rope_parameters", "partial_rotary_factor", "quantization_config", "layer_types", "sliding_window",
    "max_window_layers", "use_sliding_window", "head_dim", "rope_ratio", "_name_or_path", "dtype", "auto_map",
]  # fmt: skip


@st.composite
def _rope(draw: st.DrawFn) -> Any:
    scaling = {"rope_type": draw(st.sampled_from(_ROPE_KINDS)), "factor": draw(st.sampled_from([1.0, 4.0, 8, 1e308]))}
    return draw(changed(scaling | {"original_max_position_embeddings": 32}, _ROPE_KEYS))


_layer_types = st.lists(st.sampled_from(["full_attention", "sliding_attention", [], {}, None, "x"]), max_size=3)


@st.composite
def configs(draw: st.DrawFn) -> Input:
    """A whole model but for its config.json."""
    case = draw(st.sampled_from(sorted(tiny_hf.CASES)))
    sound = base(case)
    fields = draw(changed(sound.config, _CONFIG_KEYS))
    if draw(st.integers(0, 3)) == 0:
        fields[draw(st.sampled_from(["rope_scaling", "rope_parameters"]))] = draw(_rope())
    if draw(st.integers(0, 7)) == 0:
        fields["layer_types"] = draw(_layer_types)
    return Input(
        files=placed(sound.files | {"config.json": draw(json_texts(fields))}),
        dtype=draw(st.sampled_from([None, None, None, "float32", "bfloat16", "float16", "int8", ""])),
        extend_positions=draw(st.sampled_from([None] * 8 + [-1, 0, 74, 200, 10**5])),
        note=case,
    )


@st.composite
def json_texts(draw: st.DrawFn, value: Any) -> bytes:
    """The text of a JSON value; now and then in another encoding, with a key twice, damaged, or of something else."""
    text = dumps(value, draw(st.sampled_from([50, 500, 900, 5_000, 200_000])))
    match draw(st.integers(0, 19)):
        case 0:
            return draw(damaged(text))
        case 1:
            return text.decode("utf-8", "replace").encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig"])))
        case 2:
            return text[:-1] + b"," + text[1:]  # every key twice
        case 3:
            return dumps(draw(odd), 100_000)
        case 4:
            return draw(st.sampled_from([b"", b"\0" * 64, b"\xff\xfe", b"{" * 100_000, b'{"a":' * 50_000, LFS_POINTER]))
    return text


@st.composite
def generation_configs(draw: st.DrawFn) -> Input:
    """A whole model but for its generation_config.json."""
    sound = base(draw(st.sampled_from(["llama", "opt", "chatglm", "qwen3"])))
    fields = {"eos_token_id": [2, 3], "bos_token_id": 1, "do_sample": True, "temperature": 0.7}
    text = draw(json_texts(draw(changed(fields, ["eos_token_id", "pad_token_id"]))))
    return Input(files=placed(sound.files | {"generation_config.json": text}))


_SHARD_NAMES = [
    "../bystander/weights.safetensors", "/etc/passwd", "", ".", "..", "/", "a" * 5_000, "a" * 255 + "/b", "\0",
    "model\ud800.safetensors", "config.json", "sub/../../x.safetensors", "link.safetensors", "loop.safetensors",
    "dangling.safetensors", "pipe.safetensors", "folder", "folder/inner", "..\\x.safetensors", "zero.safetensors",
    "./model-00001-of-00003.safetensors", "config.json/x", "model.safetensors.index.json", "x.bin", "pipe.bin",
    "\x1b[2J.safetensors", "folder.bin", "inside.safetensors", "model-00001-of-00003.safetensors/", "socket.bin",
]  # fmt: skip
_AROUND: Files = {
    "source/link.safetensors": Special("link", "../bystander/weights.safetensors"),
    "source/loop.safetensors": Special("link", "loop.safetensors"),
    "source/dangling.safetensors": Special("link", "nowhere"),
    "source/zero.safetensors": Special("link", "/dev/zero"),
    "source/inside.safetensors": Special("link", "model-00001-of-00003.safetensors"),
    "source/pipe.safetensors": Special("fifo"),
    "source/pipe.bin": Special("fifo"),
    "source/socket.bin": Special("socket"),
    "source/folder": Special("folder"),
    "source/folder.bin": Special("folder"),
}


@st.composite
def indexes(draw: st.DrawFn) -> Input:
    """A model in shards, its index changed, among links, pipes and folders that the index may name."""
    sound = base(draw(st.sampled_from(["llama", "opt"])), "sharded")
    index = json.loads(sound.files["model.safetensors.index.json"])
    map_ = index["weight_map"]
    shards = sorted(set(map_.values()))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([*sorted(map_), "extra.weight", "model.layers.9.x"]))
        where = draw(st.one_of(st.sampled_from(_SHARD_NAMES), st.sampled_from(shards), odd))
        if draw(st.integers(0, 4)) == 0:
            map_.pop(name, None)
        else:
            map_[name] = where
    index = draw(changed(index, ["weight_map"], most=1)) if draw(st.integers(0, 5)) == 0 else index
    files = placed(sound.files | {"model.safetensors.index.json": draw(json_texts(index))})
    if draw(st.integers(0, 5)) == 0:
        files.pop(f"source/{draw(st.sampled_from(shards))}")
    return Input(files=files | _AROUND)


_TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
]  # fmt: skip
_TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "unk_token": None},
}  # fmt: skip
_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
    "chat_template": "{{ ''.__class__.__mro__ }}", "eos_token": "</s>", "added_tokens_decoder": {"0": {"content": "x"}},
}  # fmt: skip


@st.composite
def tokenizer_files(draw: st.DrawFn) -> Input:
    """A whole model with files of a tokenizer that are damaged, of another kind, or no files."""
    files: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(_TOKENIZER_FILES), min_size=1, max_size=4, unique=True)):
        sound = _TOKENIZER_CONFIG if "config" in name else _TOKENIZER
        files[name] = draw(
            st.one_of(
                json_texts(draw(changed(sound, TEXTS[:4]))),
                st.binary(max_size=64),
                st.integers(0, 99).map(lambda seed: random.Random(seed).randbytes(2_000)),
                st.sampled_from([b"", LFS_POINTER, b"a b\nc", b"\n\x07\n\x05<unk>\x15", dumps(DEEP, 10**5)]),
                st.sampled_from([
                    Special("fifo"), Special("folder"), Special("socket"), Special("link", "../bystander/secret.txt"),
                    Special("link", "config.json"), Special("link", "nowhere"), Special("link", name),
                    Special("link", "/dev/zero"), Special("sparse", size=3 << 30),
                ]),
            )
        )  # fmt: skip
    return Input(files=placed(base("llama").files | files), note=", ".join(files))
