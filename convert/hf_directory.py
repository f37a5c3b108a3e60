"""A Hugging Face model directory: config.json, weights in one file or in indexed shards, tokenizer files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from convert.chatglm_version import with_version
from convert.errors import ConversionError
from convert.hf_config import parse_config
from convert.sources import Source, SourceTensor, fingerprint
from convert.tokenizer_files import missing_problems, shape_problems, write_model_type
from jaxdecode import safetensors_file
from jaxdecode.config import ModelConfig
from jaxdecode.foreign_files import open_plain, parse_json, read_plain

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
MAX_JSON_BYTES, MAX_JSON_VALUES = 64 << 20, 2_000_000  # of an index, where a tensor takes 100 and two
# The largest published tokenizer has 35 MB, half a million merges and a quarter of a million tokens. One character
# beyond 16 bits makes 8 bytes in memory of each byte of text.
MAX_TOKENIZER_BYTES, MAX_TOKENIZER_VALUES = 96 << 20, 4_000_000
MAX_TOKENIZER_CONFIG_BYTES = 8 << 20  # the largest published has 1.2 MB
_LFS_POINTER = b"version https://git-lfs"


def open_directory(path: Path) -> Source:
    """Open a model directory as transformers writes it.

    Raises:
      ConversionError: it holds no config.json or no weights.
    """
    problems: list[str] = []
    config = with_version(path, _required_config(path))
    generation = _optional_json(path, "generation_config.json", problems)
    chosen = next((name for name in WEIGHT_FILES if os.path.lexists(path / name)), None)
    if chosen is None:
        raise ConversionError(
            f"{path} holds no weights: expected one of {', '.join(WEIGHT_FILES)}; found {_listing(path)}"
        )
    files = _shards(path, chosen, problems)
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        _add_tensors(path / file, tensors, problems)
    _check_index(files, tensors, problems)
    write_tokenizer, tokenizer_bytes, generation = _tokenizer(path, config, generation, problems)
    return Source(
        path=path, kind="safetensors" if "safetensors" in chosen else "torch .bin", config=config,
        generation_config=generation, tensors=tensors, problems=problems,
        fingerprint=fingerprint([path / file for file in files], json.dumps(config), json.dumps(generation)),
        write_tokenizer=write_tokenizer, tokenizer_bytes=tokenizer_bytes,
    )  # fmt: skip


def _tokenizer(
    path: Path, config: dict[str, Any], generation: dict[str, Any], problems: list[str]
) -> tuple[Callable[[Path], None], int, dict[str, Any]]:
    """What writes the tokenizer's files, their size at most, the generation config with tokens to stop at."""
    before = len(problems)
    files = _tokenizer_files(path, problems)
    if config.get("model_type") == "chatglm" and len(problems) == before:
        from convert.chatglm_tokenizer import open_chatglm_tokenizer

        try:
            tokenizer = open_chatglm_tokenizer(path, config)
        except ConversionError as error:
            problems += error.problems
            tokenizer = None
        if tokenizer is not None:
            return tokenizer.write, tokenizer.written_bytes, tokenizer.with_stops(generation)
    problems += missing_problems(path, files)

    def write(target: Path) -> None:
        copy_tokenizer(path, files, target)
        write_model_type(config, target)

    return write, _copied_bytes(path, files) + len(json.dumps(config)) + 64, generation  # a part of it, indented


def read_config(file: Path) -> tuple[ModelConfig, str]:
    """The architecture and the dtype (float16 if it is not said) in a config.json; there need be no weights.

    Raises:
      ConversionError: everything that is missing, of the wrong type or not supported, at once.
    """
    problems: list[str] = []
    config = read_json(file, problems)
    if problems:
        raise ConversionError(problems)
    dtype = config.get("dtype", config.get("torch_dtype"))
    return parse_config(with_version(file.parent, config), {}), dtype if isinstance(dtype, str) else "float16"


def read_json(path: Path, problems: list[str], *, tokenizer: bool = False) -> dict[str, Any]:
    """A JSON object in a plain file; anything else becomes a problem and an empty dict."""
    try:
        if tokenizer:  # a vocabulary may say a token twice
            most = MAX_TOKENIZER_CONFIG_BYTES if path.name == "tokenizer_config.json" else MAX_TOKENIZER_BYTES
            value = parse_json(read_plain(path, most), most_values=MAX_TOKENIZER_VALUES, unique=False)
        else:
            value = parse_json(read_plain(path, MAX_JSON_BYTES), most_values=MAX_JSON_VALUES)
    except (OSError, ValueError) as error:
        problems.append(f"{path} is not readable JSON: {error}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path} must hold a JSON object; it holds a {type(value).__name__}")
        return {}
    return value


def copy_tokenizer(source: Path, names: list[str], target: Path) -> None:
    """Copy a tokenizer's files, which `_tokenizer_files` has looked at, and nothing that names code.

    What is written anew is not indented, which would multiply it, and in ASCII, which can say half of a character.
    """
    for name in names:
        shutil.copyfile(source / name, target / name)
    config = target / "tokenizer_config.json"
    if config.name in names and "auto_map" in (said := read_json(config, [], tokenizer=True)):
        del said["auto_map"]
        config.write_text(json.dumps(said, separators=(",", ":")) + "\n", encoding="utf-8")


def _copied_bytes(source: Path, names: list[str]) -> int:
    """Room that `copy_tokenizer` takes, at most: 1e15 and two-byte characters get longer when they are written anew."""
    sizes = {name: (source / name).stat().st_size for name in names}
    return sum(4 * size if name == "tokenizer_config.json" else size for name, size in sizes.items()) + 1


def _tokenizer_files(path: Path, problems: list[str]) -> list[str]:
    """Which files of a tokenizer there are, and nothing that could be code; what they hold is looked at roughly."""
    found = [name for name in TOKENIZER_FILES if os.path.lexists(path / name) and _usable(path, name, problems)]
    for name in found:
        file = path / name
        if name.endswith(".json"):
            before, said = len(problems), read_json(file, problems, tokenizer=True)
            if name == "tokenizer.json" and len(problems) == before:
                problems += shape_problems(file, said)
            continue
        try:
            content = read_plain(file, MAX_TOKENIZER_BYTES)
            if not name.endswith(".model"):
                content.decode("utf-8")
        except ValueError as error:
            problems.append(f"{file} is no part of a tokenizer: {error}")
    return found


def _optional_json(path: Path, name: str, problems: list[str]) -> dict[str, Any]:
    if not os.path.lexists(path / name) or not _usable(path, name, problems):
        return {}
    return read_json(path / name, problems)


def _required_config(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path / "config.json"):
        hints = {
            "adapter_config.json": "; this is an adapter: merge it into its base model first",
            "manifest": "; this looks like a jaxdecode checkpoint, which needs no conversion",
            "params.json": "; this looks like Meta's own format: convert it with transformers first",
        }
        hint = next((text for name, text in hints.items() if (path / name).exists()), "")
        gguf = sorted(file.name for file in path.glob("*.gguf"))
        if gguf:
            hint = f"; to convert a GGUF file name it itself: {path / gguf[0]}"
        raise ConversionError(
            f"{path} is not a Hugging Face model directory: it has no config.json; found {_listing(path)}{hint}"
        )
    problems: list[str] = []
    config = _optional_json(path, "config.json", problems)
    if problems:
        raise ConversionError(problems)
    return config


def _shards(path: Path, chosen: str, problems: list[str]) -> dict[str, list[str]]:
    """File names in order, each with the tensors the index places there (none without an index)."""
    if not chosen.endswith(".index.json"):
        return {chosen: []} if _usable(path, chosen, problems) else {}
    before = len(problems)
    index = _optional_json(path, chosen, problems)
    if len(problems) > before:
        return {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        problems.append(f"{path / chosen} has no weight_map from tensor names to file names")
        return {}
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, []).append(name)
    return {file: names for file, names in sorted(files.items()) if _shard_usable(path, chosen, file, names, problems)}


def _shard_usable(path: Path, index: str, file: str, names: list[str], problems: list[str]) -> bool:
    parts = PurePosixPath(file).parts
    if not parts or PurePosixPath(file).is_absolute() or ".." in parts or "\\" in file or "\0" in file:
        problems.append(f"{index} names the shard {file!r:.200}: shards must lie inside the model directory")
    elif not _exists(path / file):
        problems.append(
            f"missing shard: {index} names {file!s:.200} (for {names[0]!s:.100} and {len(names) - 1} other tensors), "
            "which does not exist"
        )
    else:
        return _usable(path, file, problems)
    return False


def _usable(path: Path, name: str, problems: list[str]) -> bool:
    """Whether something in a model directory is a file of its own to read; if not, a problem says what it is."""
    file = path / name
    if not _exists(file):
        problems.append(f"{file} is a link to nothing")
    elif not _inside(path, file):
        problems.append(f"{file} is a link that leads out of {path}")
    elif not file.is_file():
        kind = "a folder" if file.is_dir() else "a pipe, socket or device"
        problems.append(f"{file} is {kind}; expected a plain file")
    elif _begins_with(file, _LFS_POINTER):
        problems.append(f"{file} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its repository")
    else:
        return True
    return False


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _begins_with(file: Path, beginning: bytes) -> bool:
    with open_plain(file) as opened:
        return opened.read(len(beginning)) == beginning


def _inside(directory: Path, file: Path) -> bool:
    """Whether a file really lies in its directory; hub snapshots may link to their own repository's blobs."""
    roots = [directory.resolve()]
    if roots[0].parent.name == "snapshots" and not (blobs := roots[0].parent.parent / "blobs").is_symlink():
        roots.append(blobs)
    return any(file.resolve().is_relative_to(root) for root in roots)


def _add_tensors(file: Path, tensors: dict[str, SourceTensor], problems: list[str]) -> None:
    try:
        found = _torch_tensors(file) if file.suffix == ".bin" else _safetensors(file)
    except (ValueError, OSError) as error:
        own = error.problems if isinstance(error, ConversionError) else [str(error)]
        problems += [problem if str(file) in problem else f"{file}: {problem}" for problem in own]
        return
    for name, tensor in found.items():
        if name in tensors:
            problems.append(f"{name} is in both {tensors[name].where} and {tensor.where}")
        tensors[name] = tensor


def _torch_tensors(file: Path) -> dict[str, SourceTensor]:
    from convert.torch_bin import read_torch_file

    return read_torch_file(file)


def _safetensors(file: Path) -> dict[str, SourceTensor]:
    entries, mapped = safetensors_file.read_header(file), safetensors_file.map_file(file)
    return {
        name: SourceTensor(
            name=name, stored=entry.dtype, dtype=entry.dtype, shape=entry.shape, where=file.name,
            read=_reader(safetensors_file.view(mapped, entry)),
        )
        for name, entry in entries.items()
    }  # fmt: skip


def _reader(array: np.ndarray):
    return lambda start, stop: array[start:stop]


def _check_index(files: dict[str, list[str]], tensors: dict[str, SourceTensor], problems: list[str]) -> None:
    """Every tensor must be in the shard where the index places it; unreadable shards were reported."""
    readable = {tensor.where for tensor in tensors.values()}
    for file, names in files.items():
        if Path(file).name in readable:
            problems += [
                f"the index places {name} in {file}, which does not hold it"
                for name in names
                if name not in tensors or tensors[name].where != Path(file).name
            ]


def _listing(path: Path) -> str:
    names = sorted(child.name for child in path.iterdir())
    return ", ".join(names[:8]) + (f", … ({len(names)} entries)" if len(names) > 8 else "") if names else "nothing"
