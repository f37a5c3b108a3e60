"""The files of a source's tokenizer: whether they can be one at all, and what must lie beside them to be read alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_FROM_CONFIG = ("model_type", "tokenizer_class", "transformers_version")  # by which transformers chooses a class


def shape_problems(file: Path, said: Mapping[str, Any]) -> list[str]:
    """Why a tokenizer.json is none, by its outline; empty if it may be one."""
    model = said.get("model")
    if not isinstance(model, dict):
        return [f"{file} is no tokenizer: model must be an object; it is {model!r:.80}"]
    kind, vocab = model.get("type"), model.get("vocab")
    if kind is not None and kind not in _KINDS:  # older files do not say it
        return [f"{file} is no tokenizer: the type of its model must be one of {', '.join(_KINDS)}; it is {kind!r:.80}"]
    if not isinstance(vocab, dict | list) or not vocab:
        return [f"{file} is no tokenizer: its model must have a vocab; it is {vocab!r:.80}"]
    return []


def missing_problems(path: Path, found: list[str]) -> list[str]:
    """What a directory with parts of a tokenizer lacks to have one; empty if nothing, or if there is no part."""
    remedy = "get it from where the model was published, or remove the tokenizer's files to convert without it"
    if "vocab.json" in found and not {"merges.txt", "tokenizer.json", "tokenizer.model"} & set(found):
        return [f"{path} has vocab.json, but no merges.txt: {remedy}"]
    if "tokenizer_config.json" not in found or set(found) & set(VOCABULARIES):
        return []
    return [f"{path} has tokenizer_config.json, but no vocabulary ({', '.join(VOCABULARIES)}): {remedy}"]


def write_model_type(config: Mapping[str, Any], target: Path) -> None:
    """Beside a tokenizer that does not name its class, the part of config.json by which transformers finds it."""
    settings = target / "tokenizer_config.json"
    said = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    if said.get("tokenizer_class") or not any((target / name).exists() for name in VOCABULARIES):
        return
    kept = {key: config[key] for key in _FROM_CONFIG if isinstance(config.get(key), str)}
    (target / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
