"""The safetensors container: a strict header reader and a writer of aligned headers.

Layout: 8 bytes little-endian header length, a JSON header, then the tensors end to end without holes. We pad
the header to `ALIGNMENT` bytes and put tensors whose size is a multiple of it first, so that a mapped file
can be used in place.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxdecode.foreign_files import open_plain, parse_json

ALIGNMENT = 64  # bytes; what XLA needs to use a host buffer without copying it
MAX_HEADER_BYTES = 32 << 20  # a third of the official library's limit; 90,000 tensors take 10 MB
MAX_HEADER_VALUES = 1_500_000  # names, numbers and lists: a tensor has eleven
MAX_RANK = 16
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_NAMES = {name: code for code, name in DTYPES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file; `start` and `stop` are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a name such as "float32" or "bfloat16"."""
    return np.dtype(getattr(ml_dtypes, name, name))


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * numpy_dtype(dtype).itemsize


def read_header(path: str | Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file by name, checked against the file's size.

    Raises:
      ValueError: the file is not a complete, well-formed safetensors file; the message names it.
    """
    path = Path(path)
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            raise ValueError(f"{path}: truncated: {size} bytes are too few for a safetensors header")
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path}: not a safetensors file: its header claims {length} bytes, over the limit of "
                f"{MAX_HEADER_BYTES}"
            )
        text = file.read(length)
    if len(text) < length:
        raise ValueError(f"{path}: truncated: the header needs {length + 8} bytes, the file has {size}")
    entries = _parse(path, text, 8 + length)
    _check_extents(path, entries, 8 + length, size)
    return entries


def _parse(path: Path, text: bytes, data_start: int) -> dict[str, Entry]:
    try:
        header = parse_json(text, most_values=MAX_HEADER_VALUES)
    except ValueError as error:
        raise ValueError(f"{path}: not a safetensors file: the header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a safetensors file: the header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, fields, data_start) for name, fields in header.items()}


def _entry(path: Path, name: str, fields: Any, data_start: int) -> Entry:
    def natural(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62

    where = f"{path}: tensor {name!r:.200}"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= set(fields):
        raise ValueError(f"{where}: the header entry needs dtype, shape and data_offsets; got {fields!r:.200}")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{where}: unknown dtype {code!r:.80}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(natural, shape)):
        raise ValueError(
            f"{where}: the shape must be a list of natural numbers, at most {MAX_RANK}; got {shape!r:.200}"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(natural, offsets)):
        raise ValueError(f"{where}: data_offsets must be two natural numbers; got {offsets!r:.200}")
    expected = tensor_bytes(tuple(shape), DTYPES[code])
    if offsets[1] - offsets[0] != expected:
        raise ValueError(
            f"{where}: {code}{shape} takes {expected} bytes, data_offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    if math.prod(size or 1 for size in shape) >= 1 << 60:  # a dimension of 0 makes room for any other
        raise ValueError(f"{where}: {shape} is no shape of an array")
    start, stop = (data_start + offset for offset in offsets)
    return Entry(dtype=DTYPES[code], shape=tuple(shape), start=start, stop=stop)


def _check_extents(path: Path, entries: dict[str, Entry], data_start: int, size: int) -> None:
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            how = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise ValueError(
                f"{path}: tensor {name!r:.200} {how}: it starts at byte {entry.start}, expected {position}"
            )
        position = entry.stop
    if position > size:
        raise ValueError(f"{path}: truncated: its tensors need {position} bytes, the file has {size}")
    if position < size:
        raise ValueError(
            f"{path}: {size - position} bytes follow the last tensor; expected {position} in all, got {size}"
        )


def plan_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file of `tensors` (name -> dtype name, shape), and where each tensor goes."""
    sizes = {name: tensor_bytes(shape, dtype) for name, (dtype, shape) in tensors.items()}
    order = sorted(tensors, key=lambda name: (sizes[name] % ALIGNMENT != 0, -sizes[name], name))
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        offsets = [position, position + sizes[name]]
        fields[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        position += sizes[name]
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    start = 8 + len(text)
    entries = {
        name: Entry(
            dtype=tensors[name][0],
            shape=tuple(tensors[name][1]),
            start=start + fields[name]["data_offsets"][0],
            stop=start + fields[name]["data_offsets"][1],
        )
        for name in order
    }
    return len(text).to_bytes(8, "little") + text, entries


def map_file(path: str | Path) -> np.ndarray:
    """The bytes of a plain file as a read-only uint8 array backed by the page cache."""
    with open_plain(path) as file:
        if not os.fstat(file.fileno()).st_size:
            return np.zeros(0, np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def view(mapped: np.ndarray, entry: Entry) -> np.ndarray:
    """One tensor of a mapped file, without copying it."""
    return mapped[entry.start : entry.stop].view(numpy_dtype(entry.dtype)).reshape(entry.shape)
