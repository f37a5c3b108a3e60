"""A source's own tokenizer: what is copied is read as transformers reads the source, what is none is refused."""

from __future__ import annotations

import json
from pathlib import Path

import made
import pytest
from made import tiny_hf
from tiny_tokenizer import byte_level_tokenizer
from tokenizers import pre_tokenizers

from convert import ConversionError, convert, export
from jaxdecode.text import load
from jaxdecode.tokenizer import load_tokenizer

TEXTS = ["hello he", " the fox", "naïve 10 €"]


def write_vocabulary(folder: Path) -> int:
    """vocab.json and merges.txt as OPT has them; returns the number of tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, "he", "Ġhe"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nĠ he\n")
    return len(tokens)


@pytest.mark.parametrize("family", ["opt", "qwen2"])
@pytest.mark.parametrize("settings", [{"unk_token": "</s>", "bos_token": "</s>", "add_bos_token": True}, {}, None])
@pytest.mark.parametrize("named", [{}, {"tokenizer_class": "GPT2Tokenizer"}])
def test_a_tokenizer_known_by_its_models_type(family, settings, named, tmp_path):
    """Without tokenizer_class, transformers goes by the config.json beside the tokenizer."""
    from transformers import AutoTokenizer

    source = tmp_path / "hf"
    source.mkdir()
    made.write_directory(source, tiny_hf.CASES[family] | {"vocab_size": write_vocabulary(source)} | named)
    if settings is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    theirs, ours = AutoTokenizer.from_pretrained(str(source)), load(tmp_path / "ours").tokenizer
    again = AutoTokenizer.from_pretrained(str(tmp_path / "back"))
    assert type(ours) is type(theirs) is type(again)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"] == again(text)["input_ids"]
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_hidden_layers"] == 2


def test_a_tokenizer_that_names_its_class_needs_no_model_type(tmp_path):
    source = made.write_directory(tmp_path / "hf", made.small_case(vocab_size=320))
    byte_level_tokenizer().save_pretrained(source)
    convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours" / "tokenizer" / "config.json").exists()


BROKEN = {
    "no model": ({"tokenizer.json": {"hello": 1}}, "model must be an object; it is None"),
    "a model's type": (
        {"tokenizer.json": {"model": {"type": "Magic", "vocab": {"a": 0}}}}, "one of BPE, Unigram, .*; it is 'Magic'",
    ),
    "no vocab": ({"tokenizer.json": {"model": {"type": "BPE"}}}, "must have a vocab; it is None"),
    "an empty vocab": ({"tokenizer.json": {"model": {"type": "BPE", "vocab": {}}}}, "must have a vocab; it is {}"),
    "settings alone": (
        {"tokenizer_config.json": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}},
        r"has tokenizer_config.json, but no vocabulary \(tokenizer.json, .*remove the tokenizer's files",
    ),
    "half a vocabulary": ({"vocab.json": {"a": 0}}, "has vocab.json, but no merges.txt: get it from where"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_tokenizer_is_refused(name, tmp_path):
    files, message = BROKEN[name]
    source = made.write_directory(tmp_path / "hf", made.small_case())
    for file, content in files.items():
        (source / file).write_text(json.dumps(content))
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


UNREADABLE = {
    "no model": {"tokenizer.json": {"hello": 1}},
    "a vocabulary of nothing": {"tokenizer.json": {"model": {"type": "BPE", "vocab": "x", "merges": 3}}},
    "settings alone": {"tokenizer_config.json": {"tokenizer_class": "OwnTokenizer"}},
    "settings that are none": {"tokenizer_config.json": [1]},
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_tokenizer_that_cannot_be_read_is_one_error(name, tmp_path, run):
    """As a checkpoint of an older conversion may hold it."""
    convert(made.write_directory(tmp_path / "hf", made.small_case()), tmp_path / "ours")
    folder = tmp_path / "ours" / "tokenizer"
    for file, content in UNREADABLE[name].items():
        (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"the tokenizer in {folder} cannot be read .*empty that folder"):
        load_tokenizer(folder)
    code, out, err = run("generate", tmp_path / "ours", "--prompt", "x")
    assert (code, out) == (1, "") and err.count("error: ") == 1 and "Traceback" not in err
    for file in folder.iterdir():
        file.unlink()
    assert load(tmp_path / "ours").tokenizer is None
