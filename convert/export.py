"""A jaxdecode checkpoint back to a Hugging Face directory that transformers loads."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.hf_config import FAMILIES, to_hf_config
from convert.weights import CHUNK_BYTES, DTYPES
from jaxdecode.checkpoint import load_config, load_manifest, tensor_views
from jaxdecode.checkpoint_journal import sync_dir
from jaxdecode.checkpoint_writer import refuse_existing
from jaxdecode.config import ModelConfig
from jaxdecode.safetensors_file import numpy_dtype, plan_header, tensor_bytes

SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A Hugging Face tensor: rows of one of our mapped ones, in another order if one is given."""

    view: np.ndarray
    order: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    def dtype_name(self, asked: str | None) -> str:
        return asked or self.view.dtype.name

    def nbytes(self, dtype: str | None) -> int:
        return tensor_bytes(self.shape, self.dtype_name(dtype))

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.view[start:stop] if self.order is None else self.view[self.order[start:stop]]


_Pieces = dict[str, _Piece]  # by Hugging Face name


def export(
    checkpoint: str | Path,
    outdir: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Write a directory that transformers loads (or ChatGLM's own code); OUTDIR appears whole or not at all.

    Args:
      dtype: cast the weights; None keeps them bit for bit.
      shard_bytes: begin another file beyond this size.
      progress: called with (bytes done, bytes in all, file).

    Raises:
      ConversionError: not a checkpoint, damaged, an existing OUTDIR, no room, or a config that a config.json
        cannot express.
    """
    checkpoint, outdir = Path(checkpoint), Path(outdir)
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"unknown dtype {dtype!r}; supported are {', '.join(DTYPES)}", "cannot export")
    try:
        refuse_existing(outdir)
        config, views, manifest = load_config(checkpoint), tensor_views(checkpoint), load_manifest(checkpoint)
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(str(error), "cannot export") from error
    stored = dtype or manifest["dtype"]
    hf_config = to_hf_config(config, stored)
    pieces = {name: piece for ours, view in views.items() for name, piece in _split(config, ours, view).items()}
    _check_room(pieces, dtype, outdir)
    with _appearing(outdir) as folder:
        _write_weights(folder, pieces, dtype, shard_bytes, progress)
        for file in sorted((checkpoint / "tokenizer").glob("*")):
            shutil.copyfile(file, folder / file.name)
        _write_json(folder / "config.json", _beside(folder / "config.json") | hf_config)
        _write_json(folder / "generation_config.json", {"eos_token_id": hf_config["eos_token_id"]})
    return outdir


def _beside(file: Path) -> dict[str, Any]:
    """What a tokenizer keeps of its source's config.json."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


@contextlib.contextmanager
def _appearing(outdir: Path) -> Iterator[Path]:
    """A scratch directory beside `outdir` that takes its name in the end, or is removed."""
    parent = outdir.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{outdir.name}.", dir=parent))
    try:
        scratch.chmod(0o755)  # mkdtemp's own is private
        yield scratch
        refuse_existing(outdir)
        os.rename(scratch, outdir)
        sync_dir(parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _split(config: ModelConfig, target: str, view: np.ndarray) -> _Pieces:
    """The Hugging Face tensors that stand in one of ours."""
    pieces, start = {}, 0
    for name, rows, order in FAMILIES[config.model_type].parts(config, target, view.shape[0]):
        pieces[name] = _Piece(view[start : start + rows], None if order is None else np.argsort(order(np.arange(rows))))
        start += rows
    return pieces


def _check_room(pieces: _Pieces, dtype: str | None, outdir: Path) -> None:
    parent = outdir.absolute().parent
    while not parent.exists():
        parent = parent.parent
    needed, free = (
        sum(piece.nbytes(dtype) for piece in pieces.values()) + (8 << 20),
        shutil.disk_usage(parent).free,
    )
    if needed > free:
        raise ConversionError(
            f"not enough disk: {outdir} needs {needed:,} bytes, {parent} has {free:,} free", "cannot export"
        )


def _write_weights(
    folder: Path,
    pieces: _Pieces,
    dtype: str | None,
    shard_bytes: int,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    shards: list[_Pieces] = [{}]
    for name, piece in pieces.items():
        held = sum(other.nbytes(dtype) for other in shards[-1].values())
        if shards[-1] and held + piece.nbytes(dtype) > shard_bytes:
            shards.append({})
        shards[-1][name] = piece
    done, total = 0, sum(piece.nbytes(dtype) for piece in pieces.values())
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        for written in _write_shard(folder / file, shard, dtype):
            done += written
            if progress:
                progress(done, total, file)
    if len(shards) > 1:
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )


def _write_shard(path: Path, shard: _Pieces, dtype: str | None) -> Iterator[int]:
    """Write one file; yields the bytes of each chunk."""
    specs = {name: (piece.dtype_name(dtype), piece.shape) for name, piece in shard.items()}
    header, entries = plan_header(specs, {"format": "pt"})  # transformers loads no file that does not say so
    with path.open("wb") as file:
        file.write(header)
        for name, entry in entries.items():
            piece = shard[name]
            step = max(1, CHUNK_BYTES // max(1, piece.view[:1].nbytes))
            for start in range(0, piece.shape[0], step):
                rows = piece.rows(start, min(start + step, piece.shape[0]))
                chunk = np.ascontiguousarray(rows).astype(numpy_dtype(entry.dtype), copy=False)
                file.write(chunk.reshape(-1).view(np.uint8).data)
                yield chunk.nbytes
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
