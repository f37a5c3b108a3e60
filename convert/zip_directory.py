"""The directory of a zip archive of plainly stored files, every number checked before it is believed."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np

MAX_DIRECTORY_BYTES = 8 << 20  # an entry takes about 70
_END = struct.Struct("<4s4H2LH")  # …, entries in all, size and place of the directory, length of a comment
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_IN_EXTRA = 0xFFFFFFFF  # stands for a number of 64 bits among the extra fields


@dataclasses.dataclass(frozen=True)
class ZipEntry:
    """A file of an archive.

    Attributes:
      plain: neither compressed nor encrypted.
      crc: what zlib.crc32 of its bytes should be.
      start, stop: its bytes in the archive.
    """

    plain: bool
    crc: int
    start: int
    stop: int


def read_directory(data: np.ndarray) -> dict[str, ZipEntry]:
    """Every file of a mapped zip archive by name.

    Raises:
      ValueError: truncated or damaged; or two files have one name.
    """
    count, begin, end = _find_directory(data)
    directory, place, entries = data[begin:end].tobytes(), 0, {}
    for _ in range(count):
        if place + _ENTRY.size > len(directory):
            raise ValueError("its directory ends early")
        mark, *fields = _ENTRY.unpack_from(directory, place)
        if mark != b"PK\1\2":
            raise ValueError("an entry of its directory does not begin like one")
        name_size, extra_size, comment_size = fields[9:12]
        place += _ENTRY.size
        name = directory[place : place + name_size]
        extra = directory[place + name_size : place + name_size + extra_size]
        place += name_size + extra_size + comment_size
        text = name.decode("utf-8", "replace")
        if text in entries:
            raise ValueError(f"two files are called {text!r:.80}")
        entries[text] = _entry(data, name, fields, extra)
    if place != len(directory):
        raise ValueError("its directory holds more or less than it says")
    return entries


def _find_directory(data: np.ndarray) -> tuple[int, int, int]:
    """How many entries there are, and where they begin and end."""
    tail_start = max(0, len(data) - _END.size - 0xFFFF)
    tail = data[tail_start:].tobytes()
    place = tail.rfind(b"PK\5\6", 0, max(0, len(tail) - _END.size + 4))
    if place < 0:
        raise ValueError("it has no directory at its end")
    *_, count, size, begin, comment = _END.unpack_from(tail, place)
    last = tail_start + place
    if last + _END.size + comment != len(data):
        raise ValueError("something follows its directory")
    if last >= _LOCATOR.size:
        mark, _, where, _ = _LOCATOR.unpack(data[last - _LOCATOR.size : last].tobytes())
        if mark == b"PK\6\7":
            count, size, begin, last = _find_large(data, where, last - _LOCATOR.size)
    if begin + size != last:
        raise ValueError(f"its directory should end at byte {last}, not at {begin + size}")
    if size > MAX_DIRECTORY_BYTES or count * _ENTRY.size > size:
        raise ValueError(f"its directory claims {count} entries in {size} bytes; {MAX_DIRECTORY_BYTES} are the limit")
    return count, begin, last


def _find_large(data: np.ndarray, where: int, end: int) -> tuple[int, int, int, int]:
    """What the record for large archives says, which ends where its locator begins."""
    if where + _END64.size > end:
        raise ValueError("its large directory is not where it says")
    mark, *_, count, size, begin = _END64.unpack(data[where : where + _END64.size].tobytes())
    if mark != b"PK\6\6":
        raise ValueError("its large directory does not begin like one")
    return count, size, begin, where


def _entry(data: np.ndarray, name: bytes, fields: list[int], extra: bytes) -> ZipEntry:
    flags, method, crc, packed, size, header = (fields[index] for index in (2, 3, 6, 7, 8, 15))
    if _IN_EXTRA in (packed, size, header):
        numbers = _large_numbers(extra)
        size, packed, header = (next(numbers) if value == _IN_EXTRA else value for value in (size, packed, header))
    local = data[header : header + _LOCAL.size].tobytes()
    if len(local) < _LOCAL.size or local[:4] != b"PK\3\4":
        raise ValueError(f"{name!r:.80} has no header where the directory says")
    name_size, extra_size = _LOCAL.unpack(local)[-2:]
    begin = header + _LOCAL.size
    if data[begin : begin + name_size].tobytes() != name:
        raise ValueError(f"{name!r:.80} has another name in its own header")
    start = begin + name_size + extra_size
    if start + packed > len(data):
        raise ValueError(f"{name!r:.80} ends after the file")
    return ZipEntry(method == 0 and not flags & 1 and packed == size, crc, start, start + packed)


def _large_numbers(extra: bytes):
    """The 64-bit numbers of an entry, in the order in which they are asked for."""
    place = 0
    while place + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, place)
        if kind == 1:
            body = extra[place + 4 : place + 4 + size]
            yield from (number for (number,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8]))
            break
        place += 4 + size
    raise ValueError("an entry lacks its 64-bit numbers")
