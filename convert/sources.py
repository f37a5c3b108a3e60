"""Where weights come from: one lazy view of any source, under Hugging Face names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConversionError

Read = Callable[[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """One tensor that is read a few rows at a time.

    Attributes:
      stored: what the file calls its type ("bfloat16", "Q4_1").
      dtype: numpy name of what `read` returns; quantised types come out as float32.
      where: file name, for messages.
      read: `read(start, stop)` gives rows [start, stop) of the first axis.
    """

    name: str
    stored: str
    dtype: str
    shape: tuple[int, ...]
    where: str
    read: Read


@dataclasses.dataclass(kw_only=True)
class Source:
    """An opened checkpoint.

    Attributes:
      kind: "safetensors", "torch .bin" or "GGUF".
      config, generation_config: as in `config.json` and `generation_config.json`.
      tensors: by Hugging Face name.
      problems: what was wrong with files and index; the engine adds its own and reports all at once.
      fingerprint: changes when the files do.
      write_tokenizer: writes the tokenizer's files into an empty directory.
      tokenizer_bytes: room that they take, at most.
    """

    path: Path
    kind: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    problems: list[str]
    fingerprint: str
    write_tokenizer: Callable[[Path], None]
    tokenizer_bytes: int


def open_source(src: str | Path) -> Source:
    """Open a Hugging Face directory, a GGUF file, or a name on the Hugging Face hub.

    Raises:
      ConversionError: `src` is none of these, or cannot be read at all.
    """
    from convert.gguf_source import open_gguf
    from convert.hf_directory import open_directory

    path = Path(src)
    try:
        if path.is_dir():
            return open_directory(path)
        if path.is_file():
            return open_gguf(path)
        if path.exists():
            raise ConversionError(f"{src} is neither a file nor a directory")
    except OSError as error:
        raise ConversionError(f"{src} cannot be read: {error}") from error
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(src)) and not str(src).startswith("."):
        from convert.hub import download

        return open_directory(download(str(src)))
    raise ConversionError(
        f"{src} does not exist; expected a Hugging Face model directory (config.json and *.safetensors or "
        "pytorch_model*.bin), a .gguf file, or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def fingerprint(files: list[Path], *texts: str) -> str:
    """A hash of names, sizes and modification times of files, and of texts."""
    rows = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]
    return hashlib.sha256(json.dumps([rows, texts]).encode()).hexdigest()
