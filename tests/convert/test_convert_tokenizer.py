"""Tokenizers rebuilt from GGUF metadata give the tokens that llama.cpp's rules give."""

from __future__ import annotations

import json
from pathlib import Path

import made
import pytest
from made import tiny_hf

from convert import ConversionError, convert
from convert.gguf_file import read_gguf
from convert.tokenizer import tokenizer_problems, write_gguf_tokenizer
from jaxdecode.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / ".cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"  # `make weights` puts it there
GOLDEN = json.loads((Path(__file__).parent / "data" / "smollm2_tokens.json").read_text())


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    write_gguf_tokenizer(read_gguf(SMOLLM2).metadata, folder)
    return load_tokenizer(folder)


def test_smollm2_tokens(smollm2):
    assert len(GOLDEN["rows"]) > 200
    for row in GOLDEN["rows"]:
        assert smollm2.encode(row["text"]) == row["ids"], row["text"]


def test_smollm2_decodes_what_it_encoded(smollm2):
    for row in GOLDEN["rows"]:
        assert smollm2.decode(row["ids"]) == row["text"]


def test_smollm2_chat(smollm2):
    text = smollm2.apply_chat_template(GOLDEN["chat"], tokenize=False, add_generation_prompt=True)
    assert text == GOLDEN["chat_text"] and smollm2.encode(text) == GOLDEN["chat_ids"]


def test_smollm2_special_tokens(smollm2):
    assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (smollm2.pad_token, smollm2.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert smollm2.decode([1, 2, 0], skip_special_tokens=True) == "" and smollm2.model_max_length == 8192


def byte_level(pre: str, **changes) -> dict:
    """Metadata of a tokenizer over the bytes' letters and a few words."""
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    from make_data import byte_letters

    tokens = ["<s>", "</s>", *byte_letters(), "12", "123", "1234", "ab", "Ġab"]
    return {
        "general.architecture": "llama", "llama.context_length": 64, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2)],
        "tokenizer.ggml.merges": ["1 2", "12 3", "123 4", "a b", "Ġ ab"], "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab 1234", ["ab", "Ġ", "1234"]),
        ("smollm", "ab 1234", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", "ab 1234", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", "ab1234", ["<s>", "ab", "123", "4"]),
        ("tekken", "ab 12", ["<s>", "ab", "Ġ", "1", "2"]),
        ("llama-bpe", "ab ab", ["<s>", "ab", "Ġab"]),
        ("qwen2", "e\u0301", ["Ã", "©"]),  # composed first
        ("gpt-2", "e\u0301", ["e", "Ì", "ģ"]),
    ],
)
def test_pre_tokenizers(pre, text, pieces, tmp_path):
    write_gguf_tokenizer(byte_level(pre), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None and tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == pieces


def test_bos_as_the_file_says(tmp_path):
    for add, pieces in ((True, ["<s>", "ab"]), (False, ["ab"])):
        folder = tmp_path / str(add)
        folder.mkdir()
        write_gguf_tokenizer(byte_level("gpt-2", **{"tokenizer.ggml.add_bos_token": add}), folder)
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None and tokenizer.convert_ids_to_tokens(tokenizer.encode("ab")) == pieces


def sentencepiece(**changes) -> dict:
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{byte:02X}>" for byte in range(256)],
        "▁",
        "a",
        "b",
        "ab",
        "▁a",
        "▁ab",
        "ba",
    ]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -3.0, -2.0, -5.0, -1.0]
    return {
        "general.architecture": "llama", "llama.context_length": 64, "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 7], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    } | changes  # fmt: skip


def test_sentencepiece(tmp_path):
    write_gguf_tokenizer(sentencepiece(), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    for text, pieces in {
        "ab": ["▁ab"],
        "b ab": ["▁", "b", "▁ab"],
        "bab": ["▁", "ba", "b"],  # the best score joins first, wherever it stands
        "é": ["▁", "<0xC3>", "<0xA9>"],
        "ab</s>": ["▁ab", "</s>"],
    }.items():
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == ["<s>", *pieces], text
        assert tokenizer.decode(tokenizer.encode(text)[1:]) == text


def test_sentencepiece_without_the_prefix(tmp_path):
    write_gguf_tokenizer(sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None and tokenizer.convert_ids_to_tokens(tokenizer.encode("ba")) == ["<s>", "ba"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "model 'bert' is not supported"),
        ({"pre": "viking"}, "pre-tokenizer 'viking'"),
        ({"pre": None}, "pre-tokenizer None"),
        ({"tokens": []}, "no list of tokens"),
        ({"tokens": ["a", "a"], "token_type": [1, 1], "merges": []}, "2 tokens hold 1 duplicates"),
        ({"token_type": [1]}, "another length"),
        ({"merges": None}, "no usable list of merges"),
        ({"merges": ["1 2 3"]}, "merge '1 2 3'"),
        ({"bos_token_id": 99999}, "bos_token_id 99999 is outside"),
    ],
)
def test_unusable_metadata(changes, message, tmp_path):
    metadata = byte_level("gpt-2", **{f"tokenizer.ggml.{name}": value for name, value in changes.items()})
    assert tokenizer_problems(byte_level("gpt-2")) == []
    with pytest.raises(ConversionError, match=message):
        write_gguf_tokenizer(metadata, tmp_path)


def test_tokenizer_of_a_converted_gguf_file(tmp_path):
    convert(made.write_gguf(tmp_path / "model.gguf", tiny_hf.CASES["llama"]), tmp_path / "ours")
    tokenizer = load_tokenizer(tmp_path / "ours" / "tokenizer")
    assert tokenizer is not None and tokenizer.convert_ids_to_tokens(tokenizer.encode("abcab")) == ["abc", "ab"]
