"""Inputs that once broke a law of `laws.py`, and hostile ones of great size: each with what must be said of it.

A case makes its input when it is run, so nothing large is stored. `CASES` maps its name to (input, phrases of the
refusal); no phrases mean that it is converted.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import made
from binary_inputs import gguf, safetensors, sound_gguf, split
from inputs import LFS_POINTER, Files, Input, Special, base, dumps, placed
from made import tiny_hf
from sentencepiece_inputs import sound as sound_chatglm
from sentencepiece_models import train
from torch_inputs import archive

from convert.hf_config import FAMILIES

CASES: dict[str, tuple[Callable[[], Input], tuple[str, ...]]] = {}


def case(*phrases: str):
    """Registers a function that makes an input."""

    def register(make: Callable[[], Input]) -> Callable[[], Input]:
        CASES[make.__name__] = (make, phrases)
        return make

    return register


def directory(changes: Files | None = None, model: str = "llama", kind: str = "directory", **options: Any) -> Input:
    return Input(files=placed(base(model, kind).files) | (changes or {}), **options)


def config_case(name: str, changes: dict[str, Any], *phrases: str, model: str = "llama") -> None:
    CASES[name] = (lambda: directory({"source/config.json": dumps(base(model).config | changes)}, model), phrases)


# config.json and its like

config_case("billion_layers", {"num_hidden_layers": 10**9}, "num_hidden_layers", "at most 10,000", "1000000000")
config_case("billion_windows", {"num_hidden_layers": 10**9}, "num_hidden_layers", "at most 10,000", model="mistral")
config_case("billion_layer_types", {"num_hidden_layers": 10**9}, "num_hidden_layers", model="qwen2")
config_case("most_layers", {"num_hidden_layers": 10_000}, "missing tensor model.layers.1.", "more problems")
config_case("huge_vocabulary", {"vocab_size": 10**15}, "vocab_size", "at most 16,777,216")
config_case("huge_heads", {"head_dim": 1 << 24}, "misshaped tensor", "67108864")
config_case("number_beyond_floats", {"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number")
config_case("number_beyond_digits", {"rms_norm_eps": 10**4000}, "rms_norm_eps must be a positive number")
config_case("theta_beyond_floats", {"rope_ratio": 1e38, "_name_or_path": "chatglm3-6b"}, "rope_ratio", "float32",
            model="chatglm")  # fmt: skip
config_case("rope_of_no_number", {"rope_scaling": {"type": "yarn", "factor": 1e38, "mscale": 3e38,
            "mscale_all_dim": 1e-3}}, "attention_factor must be a float32")  # fmt: skip
config_case("layer_types_of_lists", {"layer_types": [[]]}, "layer_types", model="qwen2")
config_case("end_token_beyond_integers", {"eos_token_id": 1 << 40}, "eos_token_id")
config_case("deep_field", {"rms_norm_eps": "@deep@"}, "nested more than 64 deep")
config_case("terminal_codes", {"model_type": "\x1b[2Jllama"}, "unknown model_type")
config_case("long_model_type", {"model_type": "x" * 10_000_000}, "unknown model_type")


def size_cases(case: str) -> None:
    """Sizes far beyond the tensors that are there, which must be seen before anything is made of them."""
    config = tiny_hf.CASES[case]
    names = FAMILIES[config["model_type"]].names
    heads, hidden, head_dim = (
        names.get(name, name) for name in ("num_attention_heads", "hidden_size", "head_dim")
    )
    sizes = {"hidden": {hidden: 1 << 24}, "heads": {heads: 1 << 23, hidden: 1 << 24}}
    if head_dim is not None:
        sizes["head_dim"] = {heads: 1024, head_dim: 1 << 24}
    for name, changes in sizes.items():
        config_case(f"huge_{name}_of_{case}", changes, "cannot convert", model=case)


for _name in tiny_hf.CASES:
    size_cases(_name)
config_case("huge_heads_in_many_layers", {"kv_channels": 1 << 21, "num_layers": 10_000}, "misshaped tensor",
            "more problems", model="chatglm")  # fmt: skip


def text_case(name: str, file: str, make: Callable[[], bytes | Special], *phrases: str) -> None:
    CASES[name] = (lambda: directory({f"source/{file}": make()}), phrases)


_MODEL = b'{"model":{"type":"BPE","vocab":{"a":0},"merges":[]},'  # a tokenizer.json begins so


def settings_case(name: str, make: Callable[[], bytes]) -> None:
    """A tokenizer_config.json beside a tokenizer."""
    files = {"source/tokenizer.json": _MODEL + b'"version":"1.0"}'}
    CASES[name] = (lambda: directory(files | {"source/tokenizer_config.json": make()}), ())


text_case("config_in_utf16", "config.json", lambda: dumps(base("llama").config).decode().encode("utf-16"), "utf-8")
text_case("config_says_a_field_twice", "config.json",
          lambda: dumps(base("llama").config)[:-1] + b',"vocab_size":72}', "'vocab_size' appears twice")  # fmt: skip
text_case("config_of_lists", "config.json", lambda: b"[" + b"[]," * 20_000_000 + b"[]]", "values")
text_case("config_of_spaces", "config.json", lambda: b" " * (65 << 20), "has more than 67,108,864 bytes")
text_case("config_is_a_pipe", "config.json", lambda: Special("fifo"), "a pipe, socket or device")
text_case("config_is_endless", "config.json", lambda: Special("link", "/dev/zero"), "a link that leads out")
text_case("config_is_a_folder_elsewhere", "config.json", lambda: Special("link", "../bystander/folder"), "leads out")
text_case("config_of_a_process", "config.json", lambda: Special("link", "/proc/self/environ"), "leads out")
text_case("config_is_sparse", "config.json", lambda: Special("sparse", "{", 5 << 30), "has more than")
text_case("generation_is_a_pipe", "generation_config.json", lambda: Special("fifo"), "a pipe, socket or device")
text_case("generation_is_deep", "generation_config.json", lambda: b'{"a":' * 10**6, "nested more than")
text_case("weights_are_a_pipe", "model.safetensors", lambda: Special("fifo"), "a pipe, socket or device")
text_case("weights_are_a_socket", "model.safetensors", lambda: Special("socket"), "a pipe, socket or device")
text_case("weights_were_not_fetched", "model.safetensors", lambda: LFS_POINTER, "git lfs pull")
text_case("tokenizer_is_a_pipe", "tokenizer.json", lambda: Special("fifo"), "a pipe, socket or device")
text_case("tokenizer_leads_out", "vocab.json", lambda: Special("link", "../bystander/secret.txt"), "leads out")
text_case("tokenizer_is_sparse", "tokenizer.model", lambda: Special("sparse", "", 3 << 30), "has more than")
text_case("tokenizer_is_no_json", "tokenizer.json", lambda: b"garbage", "not readable JSON")
text_case("tokenizer_was_not_fetched", "tokenizer.model", lambda: LFS_POINTER, "git lfs pull")
text_case("tokenizer_of_lists", "tokenizer.json", lambda: _MODEL + b'"a":[' + b"[]," * 30_000_000 + b"[]]}", "values")
text_case("tokenizer_of_wide_text", "tokenizer.json", lambda: _MODEL + '"a":"😀'.encode() + b"x" * (95 << 20) + b'"}')
text_case("tokenizer_of_wide_texts", "tokenizer.json",
          lambda: _MODEL + b'"a":[' + ",".join(f'"{n:018}😀"' for n in range(3_900_000)).encode() + b"]}")  # fmt: skip
text_case("tokenizer_of_short_wide_texts", "tokenizer.json",
          lambda: _MODEL + b'"a":[' + ",".join(f'"{n:06}😀"' for n in range(7_000_000)).encode() + b"]}",
          "values; at most")  # fmt: skip
text_case("tokenizer_of_wide_names", "tokenizer.json",
          lambda: _MODEL + ",".join(f'"{n:040}😀":{{}}' for n in range(1_300_000)).encode() + b"}")  # fmt: skip
text_case("tokenizer_is_too_long", "tokenizer.json", lambda: _MODEL + b'"a":"' + b"x" * (96 << 20) + b'"}', "bytes")
text_case("merges_of_wide_text", "merges.txt", lambda: "😀".encode() + b"x" * (95 << 20))
text_case("tokenizer_of_many_bytes", "tokenizer.json", lambda: _MODEL + b'"a":"' + b"x" * (30 << 20) + b'"}')
settings_case("tokenizer_config_grows", lambda: b'{"auto_map":{},"a":' + b"[" * 60
              + b",".join([b"1e15"] * 1_500_000) + b"]" * 60 + b"}")  # fmt: skip
settings_case("tokenizer_config_of_half_a_character", lambda: b'{"auto_map":{},"a":"\\ud800"}')
text_case("tokenizer_config_is_long", "tokenizer_config.json", lambda: b'{"a":"' + b"x" * (9 << 20) + b'"}',
          "has more than 8,388,608 bytes")  # fmt: skip
text_case("largest_tokenizer", "tokenizer.json", lambda: _MODEL + b'"a":[' + b"[]," * 1_900_000 + b"[]]}")
text_case("tokenizer_of_garbage", "tokenizer.model", lambda: bytes(range(256)) * 40)


# A ChatGLM's tokenizer.model


def sentencepiece_case(name: str, make: Callable[[], bytes | Special], *phrases: str) -> None:
    CASES[name] = (lambda: Input(files=placed(sound_chatglm() | {"tokenizer.model": make()})), phrases)


def _piece(**changes: Any) -> bytes:
    """The sound model with one ordinary piece changed."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto.FromString(train())
    for name, value in changes.items():
        setattr(model.pieces[300], name, value)
    return model.SerializeToString()


def _family(letters: str, longest: int) -> bytes:
    """The sound model and c, cc, ccc and so on of every letter, in which every cut is a merge."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto.FromString(train())
    known, rows = {piece.piece for piece in model.pieces}, [c * n for c in letters for n in range(1, longest + 1)]
    for count, row in enumerate(row for row in rows if row not in known):
        model.pieces.add(piece=row, score=-1e5 - count, type=1)
    return model.SerializeToString()


def _chain() -> bytes:
    """The sound model and the beginnings of long texts, none of whose ends is a piece."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto.FromString(train())
    for count, letter in enumerate("αβγδεζηθικλμνξο"):
        text = letter + "π" * 998
        for length in range(2, 1000):
            model.pieces.add(piece=text[:length], score=-1e5 - 1000 * count - length, type=1)
    return model.SerializeToString()


sentencepiece_case("pieces_sound", train)
sentencepiece_case("pieces_join_everywhere", lambda: _family("αβγδεζηθικ", 1_000), "are the limits")
sentencepiece_case("pieces_join_often", lambda: _family("α", 250), "padded_vocab_size")
sentencepiece_case("pieces_join_nowhere", _chain, "padded_vocab_size")
sentencepiece_case("pieces_end_is_a_template", lambda: train().replace(b"</s>", b"a b<"), "no template can name")
sentencepiece_case("pieces_begin_is_a_template", lambda: train().replace(b"<s>", b"x:9"), "no template can name")
sentencepiece_case("pieces_of_no_text", lambda: train().replace("▁".encode(), b"\xff\x96\x81", 1), "no UTF-8")
sentencepiece_case("pieces_score_nan", lambda: _piece(score=float("nan")), "no finite numbers")
sentencepiece_case("pieces_one_is_long", lambda: _piece(piece="a" * 4_000_000), "longest token has 4000000 characters")
sentencepiece_case("pieces_are_many", lambda: b"\n\0" * 7_000_000, "7,000,000 pieces; at most 1,000,000")
sentencepiece_case("pieces_are_very_many", lambda: b"\n\0" * 9_000_000, "more than 16,777,216 bytes")


def index_case(name: str, shard: str, *phrases: str, around: Files | None = None) -> None:
    def make() -> Input:
        index = json.loads(base("llama", "sharded").files["model.safetensors.index.json"])
        index["weight_map"]["model.norm.weight"] = shard
        return directory({"source/model.safetensors.index.json": dumps(index)} | (around or {}), kind="sharded")

    CASES[name] = (make, phrases)


index_case("shard_of_a_long_name", "a" * 5_000, "missing shard")
index_case("shard_of_half_a_character", "\ud800.safetensors", "missing shard", "ud800")
index_case("shard_above", "../bystander/weights.safetensors", "must lie inside")
index_case("shard_is_a_pipe", "x.bin", "a pipe, socket or device", around={"source/x.bin": Special("fifo")})
index_case("shard_is_a_loop", "x.bin", "missing shard", around={"source/x.bin": Special("link", "x.bin")})


@case("values")
def index_of_a_million():
    names = ",".join(f'"{number}":"x.safetensors"' for number in range(1_100_000))
    index = f'{{"weight_map":{{{names}}}}}'.encode()
    return directory({"source/model.safetensors.index.json": index}, kind="sharded")


def _snapshot(blobs: Files) -> Input:
    """A hub's repository, whose merges.txt is a link to a blob."""
    files = placed(base("llama").files, "source/snapshots/main")
    link = {"source/snapshots/main/merges.txt": Special("link", "../../blobs/secret.txt")}
    return Input(files=files | link | blobs, source="source/snapshots/main")


@case()
def snapshot_of_blobs():
    return _snapshot({"source/blobs/secret.txt": b"a b"})


@case("merges.txt is a link that leads out")
def snapshot_of_blobs_elsewhere():
    return _snapshot({"source/blobs": Special("link", "../bystander")})


@case("merges.txt is a link that leads out")
def snapshot_of_a_blob_elsewhere():
    return _snapshot({"source/blobs/secret.txt": Special("link", "../../bystander/secret.txt")})


# safetensors


def header_case(name: str, make: Callable[[], bytes], *phrases: str, claim: int | None = None) -> None:
    def input_of() -> Input:
        return directory({"source/model.safetensors": safetensors(make(), b"", claim)})

    CASES[name] = (input_of, phrases)


header_case("header_of_100_mb", lambda: b"[" + b"{}," * 33_000_000 + b"{}]", "over the limit of 33554432")
header_case("header_of_objects", lambda: b"[" + b"{}," * 11_000_000 + b"{}]", "values")
header_case("header_of_most_objects", lambda: b"[" + b"{}," * 740_000 + b"{}]", "the header is a list")
header_case("header_of_one_name", lambda: b"{" + b'"a":1,' * 700_000 + b'"b":1}', "'a' appears twice")
header_case("header_that_ends_with_a_twin", lambda: b"{" + b",".join(b'"%d":1' % n for n in range(700_000))
            + b',"699999":1}', "appears twice")  # fmt: skip
header_case("header_of_digits", lambda: b'{"a":' + b"9" * 30_000_000 + b"}", "not valid JSON")
header_case("header_of_brackets", lambda: b"[" * 1_900_000, "not valid JSON")
header_case("header_of_text", lambda: b'{"' + b"x" * 33_000_000 + b'":1}', "needs dtype, shape and data_offsets")
header_case("header_of_dimensions", lambda: dumps({"a": {"dtype": "F32", "data_offsets": [0, 4],
            "shape": [2**61] * 200_000}}), "at most 16")  # fmt: skip
header_case("header_hides_a_dimension", lambda: dumps({"a": {"dtype": "F32", "data_offsets": [0, 0],
            "shape": [0, 2**61]}}), "no shape of an array")  # fmt: skip
header_case("header_in_utf16", lambda: "{}".encode("utf-16"), "not valid JSON")
header_case("header_of_half_a_page", lambda: b"{}", "truncated", claim=1 << 24)


@case("tensor model.layers.0", "\\x1b[2J")
def tensor_name_that_clears_the_screen():
    header, data = split(base("llama").files["model.safetensors"])
    header["model.layers.0\x1b[2J"] = header.pop("model.norm.weight")
    return directory({"source/model.safetensors": safetensors(dumps(header), data)})


@case("unexpected tensor", "more problems")
def very_many_tensors():
    entry = '"%d":{"dtype":"F32","shape":[],"data_offsets":[%d,%d]}'
    entries = ",".join(entry % (number, number * 4, number * 4 + 4) for number in range(136_000))
    return directory({"source/model.safetensors": safetensors(f"{{{entries}}}".encode(), b"\0" * 544_000)})


# torch

_WEIGHTS = tiny_hf.hf_weights(base("llama").config)


def torch_case(name: str, make: Callable[[], bytes], *phrases: str) -> None:
    def input_of() -> Input:
        config = base("llama").files["config.json"]
        return Input(files=placed({"config.json": config, "pytorch_model.bin": make()}))

    CASES[name] = (input_of, phrases)


def pickled_case(name: str, pickled: Callable[[], bytes], *phrases: str) -> None:
    torch_case(name, lambda: archive([("archive/data.pkl", pickled()), *_storages()]), *phrases)


def _storages() -> list[tuple[str, bytes]]:
    return [(f"archive/data/{index}", array.tobytes()) for index, array in enumerate(_WEIGHTS.values())]


def _tensor(offset: int, shape: list[int], strides: list[int], after: bytes = b"") -> bytes:
    """A dict of one tensor in the first storage, which `after` then changes."""
    return (
        b"\x80\x02}" + made.text("a") + made.named("torch._utils", "_rebuild_tensor_v2") + b"((" + made.text("storage")
        + made.named("torch", "FloatStorage") + made.text("0") + made.text("cpu") + made.number(72 * 32) + b"tQ"
        + made.number(offset) + made.numbers(shape) + made.numbers(strides) + b"\x89NtR" + after + b"s."
    )  # fmt: skip


_SOUND = made.pickle_of(_WEIGHTS)
pickled_case("pickle_with_attributes", lambda: b"\x80\x02" + made.named("collections", "OrderedDict") + b")R"
             + _SOUND[3:-1] + b"}" + made.text("_metadata") + b"}sb.")  # fmt: skip
pickled_case("pickle_runs_a_command", lambda: b"\x80\x02" + made.named("posix", "system") + b"("
             + made.text("touch canary") + b"tR.", "refused", "posix.system")  # fmt: skip
pickled_case("pickle_runs_a_command_by_stack", lambda: b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01x\x85R.",
             "refused", "posix.system")  # fmt: skip
pickled_case("pickle_runs_a_command_by_instance", lambda: b"\x80\x02(" + made.text("x") + b"iposix\nsystem\n.",
             "refused", "posix.system")  # fmt: skip
pickled_case("pickle_asks_for_a_long_name", lambda: made.named("torch", "x" * 100_000) + b".", "refused", "torch.xxx")
pickled_case("pickle_moves_a_tensor", lambda: _tensor(0, [4], [1], b"}" + made.text("offset") + made.number(-4096)
             + b"sb"), "malformed", "TensorRecord where a dict belongs")  # fmt: skip
pickled_case("pickle_replaces_a_method", lambda: b"\x80\x02" + made.named("collections", "OrderedDict") + b")RN}"
             + made.text("items") + made.number(1) + b"s\x86b.", "missing tensor")  # fmt: skip
pickled_case("pickle_repeats_an_element", lambda: _tensor(0, [2**30, 32], [0, 0]), "repeats elements of its storage")
pickled_case("pickle_strides_away", lambda: _tensor(0, [2, 2], [2**31 - 1, 1]), "needs 2147483649 elements")
pickled_case("pickle_of_many_dimensions", lambda: _tensor(0, [1] * 100, [1] * 100), "has 100 dimensions; at most 16")
pickled_case("pickle_notes_far_away", lambda: b"\x80\x02}r\xff\xff\xff\x7f.", "missing tensor")
pickled_case("pickle_doubles_forty_times", lambda: b"\x80\x02" + made.text("x") + b"q\0" + b"h\0h\0\x86q\0" * 40
             + b"Q.", "malformed")  # fmt: skip
pickled_case("pickle_doubles_and_refers", lambda: b"\x80\x02" + made.text("storage") + b"N" + made.text("x") + b"q\0"
             + b"h\0h\0\x86q\0" * 40 + b"NN\x85\x85\x85Q.", "malformed")  # fmt: skip
pickled_case("pickle_nests_deeply", lambda: b"\x80\x02})" + b"\x85" * 999_000 + b"Ns.", "a tuple where a str belongs")
pickled_case("pickle_claims_a_large_array", lambda: b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b".", "malformed")
pickled_case("pickle_claims_large_bytes", lambda: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".", "malformed")
pickled_case("pickle_of_lists", lambda: b"]" * (64 << 20), "more than 1,000,000 instructions")
pickled_case("pickle_over_the_limit", lambda: b"]" * (65 << 20), "the limit is 67108864")
pickled_case("pickle_of_digits", lambda: b"L" + b"9" * 60_000_000 + b"L\n.", "malformed")
pickled_case("pickle_of_a_large_number", lambda: b"\x8b" + struct.pack("<i", 60_000_000) + b"\x7f" * 60_000_000 + b".",
             "holds a int")  # fmt: skip


def _again(arguments: bytes, function: bytes, times: int) -> bytes:
    """Makes one tuple of arguments, and calls a function with it again and again."""
    return b"\x80\x02" + function + b"q\0" + arguments + b"q\x01" + b"h\0h\x01R0" * times + b"}."


_ORDERED, _REBUILD = made.named("collections", "OrderedDict"), made.named("torch._utils", "_rebuild_tensor_v2")
_STORAGE = (b"(" + made.text("storage") + made.named("torch", "FloatStorage") + made.text("0") + made.text("cpu")
            + made.number(1) + b"tQ")  # fmt: skip
pickled_case("pickle_repeats_a_long_list", lambda: _again(b"](" + b"N" * 300_000 + b"e\x85", _ORDERED, 1_000),
             "a dict takes a name and a value at a time")  # fmt: skip
pickled_case("pickle_repeats_many_pairs", lambda: _again(
             b"](" + b"".join(made.text(f"{n}") + b"N\x86" for n in range(100_000)) + b"e\x85", _ORDERED, 5_000),
             "more than 1,000,000 instructions and elements")  # fmt: skip
pickled_case("pickle_repeats_a_long_shape", lambda: _again(
             b"(" + _STORAGE + b"K\0(" + b"K\x01" * 100_000 + b"tq\x02h\x02t", _REBUILD, 5_000),
             "has 100,000 dimensions; at most 16")  # fmt: skip
pickled_case("pickle_repeats_a_short_shape", lambda: _again(
             b"(" + _STORAGE + b"K\0(" + b"K\x01" * 16 + b"tq\x02h\x02t", _REBUILD, 100_000),
             "more than 1,000,000 instructions and elements")  # fmt: skip


def _shared() -> bytes:
    row = _tensor(0, [72, 32], [32, 1])[3:-2]
    return b"\x80\x02}(" + b"".join(made.text(f"{n}") + row[len(made.text("a")) :] for n in range(5_000)) + b"u."


pickled_case("pickle_shares_one_storage", _shared, "its tensors claim 46,080,000 bytes")
torch_case("zip_bomb", lambda: archive([("archive/data.pkl", b"\0" * (1 << 29)), *_storages()], zipfile.ZIP_DEFLATED),
           "compressed or encrypted")  # fmt: skip
torch_case("zip_holds_a_file_twice", lambda: archive([("archive/data.pkl", _SOUND), *_storages(), _storages()[0]]),
           "two files are called 'archive/data/0'")  # fmt: skip
torch_case("zip_of_names_above", lambda: archive([("../../data.pkl", _SOUND)] + [
           (name.replace("archive", "../.."), content) for name, content in _storages()]))  # fmt: skip
torch_case("zip_of_many_files", lambda: archive([(str(n), b"") for n in range(150_000)]), "0 files named data.pkl")
torch_case("zip_of_too_many_files", lambda: archive([(str(n), b"") for n in range(170_000)]), "its directory claims")
torch_case("zip_with_a_wrong_checksum", lambda: archive([("archive/data.pkl", _SOUND), *_storages()]).replace(
           made.text("lm_head.weight"), made.text("lm_haed.weight")), "checksum")  # fmt: skip


# GGUF


def gguf_case(name: str, changes: dict[str, tuple[int, Any]], *phrases: str, model: str = "gpt2", rows=(), counts=None):
    def make() -> Input:
        pairs, sound_rows, data = sound_gguf("llama", model)
        kept = [pair for pair in pairs if pair[0] not in changes]
        kept += [(key, *value) for key, value in changes.items()]
        places = {row[0]: row[3] for row in sound_rows}
        by_name = {row[0]: row for row in sound_rows}
        for name, dims, kind, place in rows:  # None: where it was, or at the end
            by_name[name] = (name, dims, kind, places.get(name, len(data)) if place is None else place)
        file = gguf(kept, list(by_name.values()), data + b"\0" * 64, counts)
        return Input(files={"source/model.gguf": file}, source="source/model.gguf")

    CASES[name] = (make, phrases)


_TOKENS = ["<unk>", "<s>", "</s>", *map(chr, range(33, 100)), "ab", "abc"]
gguf_case("gguf_sound", {})
gguf_case("gguf_sound_sentencepiece", {}, model="llama")
gguf_case("gguf_of_2_60_tensors", {}, "truncated", "tensors claimed", counts=(1 << 60, 10))
gguf_case("gguf_of_2_60_pairs", {}, "truncated", "metadata pairs claimed", counts=(10, 1 << 60))
gguf_case("gguf_end_token_is_a_list", {"tokenizer.ggml.eot_token_id": (9, (4, [1]))}, "eos_token_id")
gguf_case("gguf_pre_tokenizer_is_a_list", {"tokenizer.ggml.pre": (9, (4, [1]))}, "pre-tokenizer [1]")
gguf_case("gguf_scores_are_text", {"tokenizer.ggml.scores": (9, (8, ["x"] * 72))}, "scores", model="llama")
gguf_case("gguf_heads_are_nan", {"llama.attention.head_count": (6, float("nan"))}, "head_count is nan")
gguf_case("gguf_theta_beyond_floats", {"llama.rope.freq_base": (12, 1e300)}, "rope_theta must be a positive number")
gguf_case("gguf_huge_rope_table", {"llama.attention.key_length": (10, 1 << 62)}, "rope_freqs.weight",
          rows=[("rope_freqs.weight", [4], 0, None)])  # fmt: skip
gguf_case("gguf_layer_of_many_digits", {}, "unexpected tensor model.layers.999",
          rows=[("blk." + "9" * 5_000 + ".attn_q.weight", [1], 0, None)])  # fmt: skip
gguf_case("gguf_layer_twice", {}, "unexpected tensor blk.00.", rows=[("blk.00.attn_q.weight", [1], 0, None)])
gguf_case("gguf_type_without_a_reader", {}, "I8", "not supported", rows=[("output_norm.weight", [32], 24, None)])
gguf_case("gguf_tensors_overlap", {}, "overlap", rows=[("output.weight", [32, 72], 0, 0)])
gguf_case("gguf_long_token", {"tokenizer.ggml.tokens": (9, (8, [*_TOKENS[:-1], "a" * 1_000_000]))},
          "longest token has 1000000 characters", model="llama")  # fmt: skip
gguf_case("gguf_long_key", {"k" * 1_000_000: (4, 1)})
gguf_case("gguf_of_strings", {"x": (9, (8, [""] * 3_100_000))}, "array elements; at most 3,000,000")
gguf_case("gguf_of_most_strings", {"x": (9, (8, ["ab"] * 2_900_000))})
gguf_case("gguf_of_lists", {"x": (9, (9, [(4, [])] * 1_000_000))})
gguf_case("gguf_of_bytes", {"x": (9, (0, [7] * 3_100_000))}, "array elements")
_JOINED = ["<unk>", "<s>", "</s>", *(letter * n for letter in "abcdefghi" for n in range(1, 1_001))]
gguf_case("gguf_joins_everywhere", {"tokenizer.ggml.tokens": (9, (8, _JOINED)),
          "tokenizer.ggml.scores": (9, (6, [float(-n) for n in range(len(_JOINED))])),
          "tokenizer.ggml.token_type": (9, (5, [1] * len(_JOINED)))},
          "are the limits", model="llama")  # fmt: skip
_ROOM = ["<unk>", "<s>", "</s>", *(chr(0x4E00 + n // 50) * (n % 50 + 1) for n in range(10_000))]
gguf_case("gguf_takes_room", {"tokenizer.ggml.tokens": (9, (8, _ROOM)),
          "tokenizer.ggml.scores": (9, (6, [float(-n) for n in range(len(_ROOM))])),
          "tokenizer.ggml.token_type": (9, (5, [3] * len(_ROOM)))}, model="llama")  # fmt: skip
gguf_case("gguf_bos_is_a_template", {"tokenizer.ggml.tokens": (9, (8, ["<unk>", "$A:9 x", *_TOKENS[2:]]))},
          "bos token '$A:9 x' cannot be put in front", model="llama")  # fmt: skip


# Destinations


def destination_case(name: str, files: Files, *phrases: str) -> None:
    CASES[name] = (lambda: directory(files), phrases)


destination_case("partial_leads_elsewhere", {"out/ours.partial": Special("link", "../bystander/folder")}, "in the way")
destination_case("partial_is_a_pipe", {"out/ours.partial": Special("fifo")}, "in the way")
destination_case("partial_lock_leads_elsewhere",
                 {"out/ours.partial/lock": Special("link", "../../bystander/secret.txt")}, "in the way")  # fmt: skip
destination_case("partial_lock_is_a_pipe", {"out/ours.partial/lock": Special("fifo")}, "in the way")
destination_case("partial_checkpoint_leads_elsewhere", {"out/ours.partial/lock": b"", "out/ours.partial/checkpoint":
                 Special("link", "../../bystander/folder")}, "in the way")  # fmt: skip
destination_case("partial_journal_is_garbage", {"out/ours.partial/lock": b"", "out/ours.partial/journal.jsonl":
                 b"\xff"})  # fmt: skip
destination_case("destination_is_a_dangling_link", {"out/ours": Special("link", "nowhere")}, "exists already")
CASES["many_positions"] = (lambda: directory(model="opt", extend_positions=10**9), ("at most 16,777,216",))
