"""Fuzzed safetensors and GGUF files."""

from __future__ import annotations

import functools
import json
import struct
from typing import Any

import numpy as np
from hypothesis import strategies as st
from inputs import TEXTS, Input, base, damaged, dumps, odd, placed
from made import gguf_name, permuted, tiny_hf

_DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I8", "U8", "BOOL", "F4", "C64", "f32", "", "F32 "]
_SHAPES = [
    [], [0], [0, 2**61], [2**61, 0], [True], [-1], [1.0], [float("nan")], [2**62], [2**31, 2**31], [10**400],
    [1] * 33, [1] * 70, [2**61] * 2_000, [32], [16, 2], [1, 32], [[32]], ["32"], None, 32, {},
]  # fmt: skip
_OFFSETS = [
    [0, 0], [0, 128], [-128, 0], [0, 2**62], [2**61, 2**61 + 128], [128, 0], [0.0, 128.0], [True, 128], [0], [0, 1, 2],
    [0, 10**30], None, "0", [float("nan"), 1],
]  # fmt: skip


def safetensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A file of a header and what follows it; `length` is what it claims."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a sound safetensors file."""
    length = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + length]), file[8 + length :]


@st.composite
def safetensors_files(draw: st.DrawFn) -> Input:
    """A whole model but for its model.safetensors."""
    sound = base(draw(st.sampled_from(["llama", "llama_tied", "opt", "chatglm", "qwen3"])))
    file = sound.files["model.safetensors"]
    header, data = split(file)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
        _change_entry(draw, header)
    text = dumps(header)
    match draw(st.integers(0, 19)):
        case 0:
            text = draw(damaged(text))
        case 1:
            text = text[:-1] + b"," + text[1:]
        case 2:
            text = text.decode().encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig"])))
        case 3:
            text += b" " * draw(st.sampled_from([1, 7, 1000]))
        case 4:
            text = dumps(draw(odd), 10**5)
    length = draw(st.sampled_from([None] * 40 + [0, 1, 8, 2**27, 2**63, 2**64 - 1]))
    data = draw(st.sampled_from([data] * 30 + [data[:-1], data + b"\0", b"", data * 2]))
    made = safetensors(text, data, length)
    if draw(st.integers(0, 11)) == 0:
        made = draw(damaged(made, 0, 8 + len(text)))
    return Input(files=placed(sound.files | {"model.safetensors": made}))


def _change_entry(draw: st.DrawFn, header: dict[str, Any]) -> None:
    name = draw(st.sampled_from(sorted(header)))
    entry = header[name]
    match draw(st.integers(0, 8)):
        case 0:
            del header[name]
        case 1:
            header[draw(st.one_of(st.sampled_from(TEXTS), st.sampled_from(sorted(header))))] = header.pop(name)
        case 2:
            header[name] = draw(odd)
        case 3 | 4 if isinstance(entry, dict):
            entry["shape"] = draw(st.one_of(st.sampled_from(_SHAPES), odd))
        case 5 if isinstance(entry, dict):
            entry["data_offsets"] = draw(st.one_of(st.sampled_from(_OFFSETS), odd))
        case 6 if isinstance(entry, dict):
            entry["dtype"] = draw(st.one_of(st.sampled_from(_DTYPES), odd))
        case 7 if isinstance(entry, dict) and entry:
            entry.pop(draw(st.sampled_from(sorted(entry))))
        case 8:
            header[draw(st.sampled_from(["__metadata__", "extra"]))] = {
                "dtype": "F32", "shape": [draw(st.integers(0, 2))], "data_offsets": [0, 0]
            }  # fmt: skip


# GGUF. A pair is (key, type, value); an array's value is (type, [values]); a tensor (name, dims, type, offset).

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
Pair = tuple[str, int, Any]
Row = tuple[str, list[int], int, int]


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if kind in _CODES:
        return struct.pack(f"<{_CODES[kind]}", value)
    if kind == _STRING:
        return _text(value)
    if kind == _ARRAY:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(_value(inner, element) for element in values)
    return b""


def gguf(pairs: list[Pair], rows: list[Row], data: bytes, counts: tuple[int, int] | None = None) -> bytes:
    """A GGUF file, version 3, its data aligned to 32 bytes."""
    tensors, keys = counts or (len(rows), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)
    head += b"".join(_text(key) + struct.pack("<I", kind) + _value(kind, value) for key, kind, value in pairs)
    for name, dims, kind, offset in rows:
        head += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head + b"\0" * (-len(head) % 32) + data


@functools.cache
def sound_gguf(case: str, model: str) -> tuple[tuple[Pair, ...], tuple[Row, ...], bytes]:
    """The parts of a GGUF file of a one-layer model with a tokenizer of the kind "gpt2" or "llama"."""
    config = base(case).config
    kind, heads, kv_heads = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    numbers = {
        "block_count": 1, "context_length": 64, "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"], "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
    }  # fmt: skip
    pairs: list[Pair] = [("general.architecture", _STRING, kind)]
    pairs += [(f"{kind}.{key}", 4, value) for key, value in numbers.items()]
    pairs += [(f"{kind}.attention.layer_norm_rms_epsilon", 6, 1e-5), (f"{kind}.rope.freq_base", 6, 1e4)]
    pairs += tokenizer_pairs(model, config["vocab_size"])
    rows, data = [], b""
    for name, array in tiny_hf.hf_weights(config).items():
        if kind == "llama" and (".q_proj" in name or ".k_proj" in name):
            array = permuted(array, heads if ".q_proj" in name else kv_heads)
        rows.append((gguf_name(name), list(reversed(array.shape)), 0, len(data)))
        data += array.tobytes() + b"\0" * (-array.nbytes % 32)
    return tuple(pairs), tuple(rows), data


def tokenizer_pairs(model: str, size: int) -> list[Pair]:
    """Metadata of a tokenizer of `size` tokens."""
    letters = [chr(ord("!") + index) for index in range(size - 5)]
    prefix = "tokenizer.ggml."
    pairs: list[Pair] = [
        (f"{prefix}model", _STRING, model), (f"{prefix}pre", _STRING, "gpt-2"),
        (f"{prefix}tokens", _ARRAY, (_STRING, ["<unk>", "<s>", "</s>", *letters, "ab", "abc"])),
        (f"{prefix}token_type", _ARRAY, (5, [2, 3, 3, *[1] * (size - 3)])),
        (f"{prefix}bos_token_id", 4, 1), (f"{prefix}eos_token_id", 4, 2), (f"{prefix}unknown_token_id", 4, 0),
        ("tokenizer.chat_template", _STRING, "{{ x }}"),
    ]  # fmt: skip
    if model == "gpt2":
        return [*pairs, (f"{prefix}merges", _ARRAY, (_STRING, ["a b", "ab c"]))]
    return [*pairs, (f"{prefix}scores", _ARRAY, (6, [float(-index) for index in range(size)]))]


_numbers = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 48, 64, 255])
_floats = st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-5, 1e30, float("nan"), float("inf"), float("-inf")])
_words = st.sampled_from(["", "x", "ab", "a b", "$A", "<s>:1", "llama", "linear", "yarn", "none", " ", "\0", "\ud800",
                          "a" * 3_000, "a  b", "qwen2", "tekken", "smollm", "gemma", "\x1b[2J"])  # fmt: skip


@st.composite
def _typed(draw: st.DrawFn, depth: int = 0) -> tuple[int, Any]:
    """A metadata value of any type."""
    kind = draw(st.sampled_from([*_CODES, _STRING, _STRING, _ARRAY, _ARRAY, 13, 2**31]))
    if kind == _STRING:
        return kind, draw(_words)
    if kind == _ARRAY:
        inner = draw(st.sampled_from([0, 4, 6, 11, _STRING, _ARRAY] if depth < 6 else [4]))
        size = draw(st.sampled_from([0, 1, 2, 72]))
        if inner == _ARRAY:
            return kind, (inner, [draw(_typed(depth + 1).filter(lambda made: made[0] == _ARRAY))[1]] * min(size, 2))
        return kind, (inner, [draw(_words if inner == _STRING else _floats if inner == 6 else _numbers)] * size)
    if kind in (6, 12):
        return kind, draw(_floats)
    if kind in (10, 11):
        return kind, draw(st.sampled_from([0, 1, 4, 32, 2**31, 2**62, 2**63 - 1]))
    return kind, min(draw(_numbers), 1 if kind == 7 else 127)


_KEYS = [
    "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.scaling.type",
    "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.original_context_length", "attention.sliding_window", "expert_count", "vocab_size",
]  # fmt: skip
_OTHER_KEYS = [
    "general.alignment", "split.count", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.scores",
    "tokenizer.ggml.merges", "",
]  # fmt: skip


@st.composite
def _pairs(draw: st.DrawFn, sound: tuple[Pair, ...], kind: str) -> list[Pair]:
    pairs = list(sound)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2, 3]))):
        place = draw(st.integers(0, len(pairs) - 1))
        lists = [index for index, pair in enumerate(pairs) if pair[1] == _ARRAY]
        how = draw(st.integers(0, 9))
        if how > 6 and lists:
            place, how = draw(st.sampled_from(lists)), 5
        match how:
            case 0:
                del pairs[place]
            case 1 | 2:
                pairs[place] = (pairs[place][0], *draw(_typed()))
            case 3:
                pairs.append((f"{kind}.{draw(st.sampled_from(_KEYS))}", *draw(_typed())))
            case 4:
                pairs.append((draw(st.sampled_from(_OTHER_KEYS)), *draw(_typed())))
            case 5 if pairs[place][1] == _ARRAY:
                pairs[place] = (*pairs[place][:2], draw(_arrays(pairs[place][2])))
            case 6:
                pairs.append((pairs[place][0], *draw(_typed())))
    return pairs


@st.composite
def _arrays(draw: st.DrawFn, array: tuple[int, list[Any]]) -> tuple[int, list[Any]]:
    inner, values = array[0], list(array[1])
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(values)))
        element = draw(_words if inner == _STRING else _floats if inner == 6 else _numbers)
        values[place : place + draw(st.integers(0, 1))] = [element] if inner != 9 else []
    return inner, values


_NAMES = [
    "rope_freqs.weight", "blk.0.attn_q.bias", "blk." + "9" * 5000 + ".attn_q.weight", "blk.00.attn_q.weight",
    "output.weight", "blk.٠.attn_q.weight",
]  # fmt: skip


@st.composite
def _rows(draw: st.DrawFn, sound: tuple[Row, ...]) -> list[Row]:
    rows = list(sound)
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
        place = draw(st.integers(0, max(len(rows) - 1, 0)))
        name, dims, kind, offset = rows[place]
        match draw(st.integers(0, 6)):
            case 0:
                kind = draw(st.integers(0, 42))
            case 1:
                dims = draw(st.lists(st.sampled_from([0, 1, 2, 31, 32, 48, 72, 256, 2**32, 2**63]), max_size=6))
            case 2:
                offset = draw(st.sampled_from([0, 1, 32, 2**20, 2**62, 2**64 - 32, offset + 1, offset + 32]))
            case 3:
                name = draw(st.sampled_from([*TEXTS[:10], *_NAMES, rows[0][0]]))
            case 4:
                rows.append(("rope_freqs.weight", [draw(st.sampled_from([1, 4, 8, 32]))], 0, offset))
            case 5:
                rows.append((draw(st.sampled_from(_NAMES)), dims, kind, offset))
            case 6:
                kind, dims = draw(st.integers(2, 30)), [256 * dims[0] // 32, *dims[1:]]
        rows[place] = (name, dims, kind, offset)
    return rows


@st.composite
def gguf_files(draw: st.DrawFn) -> Input:
    """A GGUF file with changed metadata, tokenizer and tensor table, or damaged."""
    case, model = draw(st.sampled_from(["llama", "qwen2", "qwen3"])), draw(st.sampled_from(["gpt2", "llama"]))
    pairs, rows, data = sound_gguf(case, model)
    counts = None
    if draw(st.integers(0, 19)) == 0:
        counts = draw(st.tuples(*[st.sampled_from([0, 1, 10, 12, 2**32, 2**60, 2**64 - 1])] * 2))
    file = gguf(draw(_pairs(pairs, base(case).config["model_type"])), draw(_rows(rows)), data, counts)
    if draw(st.integers(0, 9)) == 0:
        file = draw(damaged(file, 0, len(file) - len(data)))
    data_cut = draw(st.sampled_from([0] * 30 + [1, 100]))
    return Input(files={"source/model.gguf": file[: len(file) - data_cut]}, source="source/model.gguf", note=model)


assert np.little_endian
