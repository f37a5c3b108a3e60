"""Read `pytorch_model.bin` without torch and without running anything in it.

A torch zip archive holds `data.pkl`, a pickled dict of tensors, and one stored entry per storage.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np

from convert.errors import ConversionError
from convert.sources import SourceTensor
from convert.torch_pickle import TensorRecord, read_pickle
from convert.zip_directory import ZipEntry, read_directory
from jaxdecode.safetensors_file import map_file, numpy_dtype

MAX_PICKLE_BYTES = 64 << 20  # names and shapes only; the largest models need a few MB
MAX_SHARING = 4  # how many times the file's size its tensors may be; a tied head makes less than two


def read_torch_file(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a torch zip archive by name, as views of the mapped file.

    Raises:
      ConversionError: not such an archive, damaged, or its pickle asks for anything but tensors.
    """
    mapped = map_file(path)
    magic = mapped[:4].tobytes()
    if magic[:2] == b"\x80\x02" or not magic.startswith(b"PK"):
        kind = "torch's legacy format (before 1.6)" if magic[:1] == b"\x80" else "no zip archive"
        raise ConversionError(
            f"{path} is {kind}; expected torch's zip format. Load and save it again with a current torch, or "
            "better, save the model as safetensors"
        )
    try:
        entries = read_directory(mapped)
    except ValueError as error:
        raise ConversionError(f"{path} is a truncated or damaged torch archive: {error}") from error
    return _read_archive(path, mapped, entries)


def _read_archive(path: Path, mapped: np.ndarray, entries: dict[str, ZipEntry]) -> dict[str, SourceTensor]:
    names = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(names) != 1:
        raise ConversionError(f"{path} is no torch archive: it holds {len(names)} files named data.pkl; expected one")
    root = names[0].removesuffix("data.pkl")
    if f"{root}byteorder" in entries and _content(path, mapped, entries, f"{root}byteorder", 16) != b"little":
        raise ConversionError(f"{path} was written on a big-endian machine; only little-endian archives are read")
    try:
        records = read_pickle(_content(path, mapped, entries, names[0], MAX_PICKLE_BYTES))
    except ConversionError as error:
        raise ConversionError([f"{path}: {problem}" for problem in error.problems]) from error
    except ValueError as error:
        raise ConversionError(f"{path}: its pickle is malformed: {error}") from error
    tensors = {name: _locate(path, mapped, entries, root, name, record) for name, record in records.items()}
    claimed = sum(math.prod(tensor.shape) * numpy_dtype(tensor.dtype).itemsize for tensor in tensors.values())
    if claimed > MAX_SHARING * len(mapped):
        raise ConversionError(f"{path}: its tensors claim {claimed:,} bytes; the file has {len(mapped):,}")
    return tensors


def _content(path: Path, mapped: np.ndarray, entries: dict[str, ZipEntry], name: str, most: int) -> bytes:
    """The bytes of a small entry."""
    entry = _plain_entry(path, entries, name)
    if entry.stop - entry.start > most:
        raise ConversionError(f"{path}: its {name!r:.80} has {entry.stop - entry.start} bytes; the limit is {most}")
    content = mapped[entry.start : entry.stop].tobytes()
    if zlib.crc32(content) != entry.crc:
        raise ConversionError(f"{path} is a truncated or damaged torch archive: the checksum of {name!r:.80} is wrong")
    return content


def _plain_entry(path: Path, entries: dict[str, ZipEntry], name: str) -> ZipEntry:
    if name not in entries:
        raise ConversionError(f"{path}: truncated: the archive has no entry {name!r:.80}")
    if not entries[name].plain:
        raise ConversionError(f"{path}: entry {name!r:.80} is compressed or encrypted; torch stores it plainly")
    return entries[name]


def _locate(
    path: Path, mapped: np.ndarray, entries: dict[str, ZipEntry], root: str, name: str, record: TensorRecord
) -> SourceTensor:
    storage, shape = record.storage, record.shape
    entry = _plain_entry(path, entries, f"{root}data/{storage.key}")
    dtype, size = numpy_dtype(storage.dtype), entry.stop - entry.start
    needed = record.offset + 1 + sum((n - 1) * s for n, s in zip(shape, record.strides, strict=True))
    if 0 in shape:
        needed = 0
    if needed > storage.count or storage.count * dtype.itemsize > size:
        raise ConversionError(
            f"{path}: truncated: {name} needs {needed} elements; its storage claims {storage.count} "
            f"of {dtype} and holds {size} bytes"
        )
    if math.prod(n or 1 for n in shape) > max(storage.count, 1):
        raise ConversionError(
            f"{path}: {name!r:.80} is a view {list(shape)!s:.80} that repeats elements of its storage, which has "
            f"{storage.count}"
        )
    flat = mapped[entry.start : entry.start + storage.count * dtype.itemsize].view(dtype)[record.offset :]
    strides = tuple(s * dtype.itemsize if n > 1 else 0 for n, s in zip(shape, record.strides, strict=True))
    array = np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)
    return SourceTensor(
        name=name,
        stored=storage.dtype,
        dtype=storage.dtype,
        shape=shape,
        where=path.name,
        read=lambda first, last: array[first:last],
    )
