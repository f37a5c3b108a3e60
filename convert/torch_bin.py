"""Read `pytorch_model.bin` without torch and without running anything in it.

A torch zip archive holds `data.pkl`, a pickled dict of tensors, and one stored entry per storage. A pickle is
a program; here it may only name the few globals that build a dict of tensors, each replaced by an inert
function.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.sources import SourceTensor
from jaxdecode.safetensors_file import map_file, numpy_dtype

MAX_PICKLE_BYTES = 256 << 20  # names and shapes only; the largest models need a few MB
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_MALFORMED = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OverflowError,
    ImportError,
    RecursionError,
    struct.error,
)


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_file(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a torch zip archive by name, as views of the mapped file.

    Raises:
      ConversionError: not such an archive, damaged, or its pickle asks for anything but tensors.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:2] == b"\x80\x02" or not magic.startswith(b"PK"):
        kind = "torch's legacy format (before 1.6)" if magic[:1] == b"\x80" else "no zip archive"
        raise ConversionError(
            f"{path} is {kind}; expected torch's zip format. Load and save it again with a current torch, or "
            "better, save the model as safetensors"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(path, archive)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        RuntimeError,
    ) as error:  # RuntimeError: features that zipfile lacks
        raise ConversionError(f"{path} is a truncated or damaged torch archive: {error}") from error


def _read_archive(path: Path, archive: zipfile.ZipFile) -> dict[str, SourceTensor]:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(names) != 1:
        raise ConversionError(f"{path} is no torch archive: it holds {len(names)} files named data.pkl; expected one")
    root = names[0].removesuffix("data.pkl")
    if archive.getinfo(names[0]).file_size > MAX_PICKLE_BYTES:
        raise ConversionError(
            f"{path}: its data.pkl claims {archive.getinfo(names[0]).file_size} bytes; the limit is {MAX_PICKLE_BYTES}"
        )
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ConversionError(f"{path} was written on a big-endian machine; only little-endian archives are read")
    records = _unpickle(path, archive.read(names[0]))
    mapped, tensors = map_file(path), {}
    for name, record in records.items():
        if not isinstance(name, str) or not isinstance(record, _Tensor):
            raise ConversionError(
                f"{path}: expected a dict from names to tensors; {name!r:.80} is a {type(record).__name__}"
            )
        try:
            tensors[name] = _locate(path, archive, root, mapped, name, record)
        except _MALFORMED as error:
            if isinstance(error, ConversionError):
                raise
            raise ConversionError(f"{path}: tensor {name!r} is malformed: {error!r:.200}") from error
    return tensors


def _unpickle(path: Path, data: bytes) -> dict[Any, Any]:
    try:
        records = _TensorUnpickler(path, data).load()
    except ConversionError:
        raise
    except _MALFORMED as error:
        raise ConversionError(f"{path}: its pickle is malformed: {error!r:.200}") from error
    if not isinstance(records, dict):
        raise ConversionError(f"{path} holds a {type(records).__name__}; expected a dict from names to tensors")
    return records


class _TensorUnpickler(pickle.Unpickler):
    """Resolves the globals of a dict of tensors to functions of ours, refuses every other."""

    def __init__(self, path: Path, data: bytes):
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:  # called by pickle for every global it meets
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        raise ConversionError(
            f"{self._path} is refused: its pickle asks for {module}.{name}, which a dict of tensors does "
            "not need and which could run code"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        tag, kind, key, _location, count = pid
        if tag != "storage" or not isinstance(kind, _StorageType):
            raise pickle.UnpicklingError(f"unknown persistent id {pid!r:.100}")
        return _Storage(kind.dtype, str(key), _natural(count))


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError("a tensor needs a storage, and as many strides as dimensions")
    return _Tensor(storage, _natural(offset), tuple(map(_natural, shape)), tuple(map(_natural, strides)))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a natural number, got {value!r:.60}")
    return value


def _locate(
    path: Path, archive: zipfile.ZipFile, root: str, mapped: np.ndarray, name: str, record: _Tensor
) -> SourceTensor:
    start, size = _entry_extent(path, archive, f"{root}data/{record.storage.key}", mapped)
    dtype = numpy_dtype(record.storage.dtype)
    needed = record.offset + 1 + sum((n - 1) * s for n, s in zip(record.shape, record.strides, strict=True))
    if 0 in record.shape:
        needed = 0
    if needed > record.storage.count or record.storage.count * dtype.itemsize > size:
        raise ConversionError(
            f"{path}: truncated: {name} needs {needed} elements; its storage claims {record.storage.count} "
            f"of {dtype} and holds {size} bytes"
        )
    flat = mapped[start : start + record.storage.count * dtype.itemsize].view(dtype)[record.offset :]
    strides = tuple(stride * dtype.itemsize for stride in record.strides)
    array = np.lib.stride_tricks.as_strided(flat, record.shape, strides, writeable=False)
    return SourceTensor(
        name=name,
        stored=record.storage.dtype,
        dtype=record.storage.dtype,
        shape=record.shape,
        where=path.name,
        read=lambda first, last: array[first:last],
    )


def _entry_extent(path: Path, archive: zipfile.ZipFile, entry: str, mapped: np.ndarray) -> tuple[int, int]:
    """Where a stored zip entry's bytes are in the file: (start, size)."""
    try:
        info = archive.getinfo(entry)
    except KeyError as error:
        raise ConversionError(f"{path}: truncated: the archive has no entry {entry}") from error
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ConversionError(f"{path}: entry {entry} is compressed or encrypted; torch stores tensors plainly")
    header = mapped[info.header_offset : info.header_offset + 30].tobytes()
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ConversionError(f"{path}: entry {entry} has no header where the archive says")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length
    if start + info.file_size > len(mapped):
        raise ConversionError(f"{path}: truncated: entry {entry} ends after the file")
    return start, info.file_size
