"""The GGUF container: metadata and tensor table, every length checked before it is believed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConversionError
from jaxdecode.safetensors_file import map_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # ggml's own limit
MAX_PAIRS, MAX_TENSORS = 10_000, 200_000  # published files have some 50 and 2,000
MAX_ELEMENTS = 3_000_000  # of all arrays together; the largest published tokenizers have 1.3 million
_Info = tuple[str, tuple[int, ...], int, int]  # name, shape, type code, offset in the data section


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor: `rows` is [rows, bytes per row] uint8 in the mapped file; `shape` has rows first."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class GgufFile:
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Parse a GGUF file; tensors stay on disk.

    Raises:
      ConversionError: not a GGUF file of a known version, truncated, or malformed.
    """
    cursor = _Cursor(path, map_file(path))
    if cursor.take(4) != MAGIC:
        raise ConversionError(
            f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}; expected a .gguf file or "
            "a model directory"
        )
    (version,) = cursor.unpack("I")
    if version not in VERSIONS:
        raise ConversionError(
            f"{path} is GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read "
            "(a big-endian file shows a huge version)"
        )
    tensor_count, pair_count = cursor.unpack("QQ")
    cursor.require("tensors", tensor_count, MAX_TENSORS, 24)
    cursor.require("metadata pairs", pair_count, MAX_PAIRS, 13)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        if key in metadata:
            raise ConversionError(f"{path}: metadata key {key!r:.80} appears twice")
        metadata[key] = cursor.value(cursor.unpack("I")[0])
    table = [cursor.tensor_info() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        raise ConversionError(f"{path}: general.alignment must be a positive multiple of 8; got {alignment!r:.80}")
    return GgufFile(metadata, _tensors(path, cursor.data, table, -(-cursor.position // alignment) * alignment))


def _tensors(path: Path, data: np.ndarray, table: list[_Info], data_start: int) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    problems: list[str] = []
    extents: list[tuple[int, int, str]] = []  # first byte, the byte after the last, name
    for name, shape, type_code, offset in table:
        if name in tensors:
            problems.append(f"{path}: tensor {name!r:.80} appears twice")
            continue
        try:
            tensors[name] = _tensor(path, data, name, shape, type_code, data_start + offset)
        except ConversionError as error:
            problems += error.problems
        else:
            extents.append((data_start + offset, data_start + offset + tensors[name].rows.size, name))
    for (_, stop, before), (start, _, name) in itertools.pairwise(sorted(extents)):
        if start < stop:
            problems.append(f"{path}: tensors {before!r:.80} and {name!r:.80} overlap at byte {start}")
    if problems:
        raise ConversionError(problems)
    return tensors


def _tensor(path: Path, data: np.ndarray, name: str, shape: tuple[int, ...], type_code: int, start: int) -> GgufTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(type_code)
    except ValueError as error:
        raise ConversionError(f"{path}: tensor {name!s:.80} has unknown GGML type {type_code}") from error
    if kind not in GGML_QUANT_SIZES:
        raise ConversionError(f"{path}: tensor {name!s:.80} has GGML type {kind.name}, which is not supported")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or 0 in shape or shape[-1] % block:
        raise ConversionError(
            f"{path}: tensor {name!s:.80} of type {kind.name} has shape {list(shape)}: rows must be whole blocks of "
            f"{block}"
        )
    row_bytes = shape[-1] // block * block_bytes
    size = math.prod(shape[:-1]) * row_bytes
    if start + size > len(data):
        raise ConversionError(
            f"{path}: truncated: tensor {name!s:.80} ends at byte {start + size}, the file has {len(data)}"
        )
    return GgufTensor(name, kind.name, shape, data[start : start + size].reshape(-1, row_bytes))


class _Cursor:
    """Reads little-endian values one after another, never past the end."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.position, self.elements = path, data, 0, 0
        self._bytes = memoryview(data)

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise ConversionError(
                f"{self.path}: truncated: {size} bytes wanted at byte {self.position}, the file has {len(self.data)}"
            )
        self.position += size
        return bytes(self._bytes[self.position - size : self.position])

    def require(self, what: str, count: int, most: int, least_bytes: int) -> None:
        """Refuses a count of things that take at least `least_bytes` each."""
        if count * least_bytes > len(self.data) - self.position:
            raise ConversionError(
                f"{self.path}: truncated: {count} {what} claimed at byte {self.position}, the file has {len(self.data)}"
            )
        if count > most:
            raise ConversionError(f"{self.path} claims {count} {what}; at most {most:,} are read")

    def unpack(self, codes: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{codes}", self.take(struct.calcsize(f"<{codes}")))

    def string(self) -> str:
        return str(self.take(int.from_bytes(self.take(8), "little")), "utf-8", "replace")

    def strings(self, count: int) -> list[str]:
        found, data, place, end = [], self._bytes, self.position, len(self.data)
        for _ in range(count):
            start = place + 8
            place = start + int.from_bytes(data[place:start], "little")
            if place > end:
                raise ConversionError(f"{self.path}: truncated: a string ends at byte {place}, the file has {end}")
            found.append(str(data[start:place], "utf-8", "replace"))
        self.position = place
        return found

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 4:
            raise ConversionError(f"{self.path}: unknown metadata type {kind} at byte {self.position}")
        inner, count = self.unpack("IQ")
        self.elements += count
        self.require("array elements", self.elements, MAX_ELEMENTS, 0)
        if inner in _SCALARS:
            dtype = np.dtype(f"<{_SCALARS[inner]}")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        self.require("array elements", count, MAX_ELEMENTS, 8)
        if inner == _STRING:
            return self.strings(count)
        return [self.value(inner, depth + 1) for _ in range(count)]

    def tensor_info(self) -> _Info:
        name = self.string()
        (dimensions,) = self.unpack("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ConversionError(
                f"{self.path}: tensor {name!r:.80} claims {dimensions} dimensions; at most {_MAX_DIMENSIONS}"
            )
        shape = self.unpack(f"{dimensions}Q")
        kind, offset = self.unpack("IQ")
        return name, tuple(reversed(shape)), kind, offset
