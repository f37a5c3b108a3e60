"""Which ChatGLM a directory is, 2 or 3: they share everything but some special tokens, the chat and `rope_ratio`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdecode.foreign_files import open_plain

NAME_KEYS = ("name_or_path", "_name_or_path")
_MARKS = {"chatglm2": 2, "codegeex2": 2, "chatglm3": 3}
_THIRD = "<|observation|>"  # a token that only ChatGLM3 has
_MOST_CODE = 1 << 20  # bytes of it that are looked at


def version_of_names(*configs: Mapping[str, Any]) -> int | None:
    """What the first name that says it says; folders above the model's own do not count."""
    names = [str(fields.get(key)).lower().rstrip("/") for fields in configs for key in NAME_KEYS]
    for name in names:
        found = {version for mark, version in _MARKS.items() if mark in name.rpartition("/")[2]}
        if len(found) == 1:
            return found.pop()
    return None


def find_version(path: Path, tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """The version by what the tokenizer's settings, the names and the publisher's code, read as text, say.

    Raises:
      ValueError: the code is no plain file.
    """
    if _THIRD in str(tokenizer_config):
        return 3
    code = path / "tokenization_chatglm.py"
    if found := version_of_names(tokenizer_config, config):
        return found
    if not code.is_file():
        return None
    with open_plain(code) as opened:
        return 3 if _THIRD.encode() in opened.read(_MOST_CODE) else 2


def with_version(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose name says the version, where positions depend on it and the files beside it tell."""
    from convert.hf_directory import read_json

    if config.get("model_type") != "chatglm" or config.get("rope_ratio", 1) in (None, 1):
        return config
    settings = path / "tokenizer_config.json"
    said = read_json(settings, []) if settings.exists() else {}  # what is wrong with it is reported elsewhere
    found = find_version(path, said, config)
    return config if found is None else config | {"_name_or_path": f"chatglm{found}"}
