"""Files that strangers wrote: opened only if they are files, JSON of bounded size and depth."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

MAX_DEPTH = 64  # of lists and objects in one another


def open_plain(path: str | Path) -> IO[bytes]:
    """Open a file to read; a pipe, which might never answer, a device, which might never end, or a folder is refused.

    Raises:
      ValueError: it is no plain file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no plain file")
    return open(descriptor, "rb")


def read_plain(path: str | Path, most: int) -> bytes:
    """The bytes of a plain file.

    Raises:
      ValueError: it is no plain file, or has more than `most` bytes.
    """
    with open_plain(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} has more than {most:,} bytes")
    return data


def parse_json(text: bytes, *, most_values: int, unique: bool = True) -> Any:
    """A JSON text's value.

    An empty list takes 60 bytes of memory for 3 of text, so values are counted (too high, if strings hold commas).

    Args:
      unique: refuse an object that says a name twice.

    Raises:
      ValueError: not JSON in UTF-8, more values or deeper than allowed, a name twice.
    """
    values = sum(text.count(mark) for mark in (b",", b":", b"[", b"{"))
    if values > most_values:
        raise ValueError(f"it holds some {values:,} values; at most {most_values:,} are read")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    level, depth = [value], 0
    while level := [child for parent in level for child in _children(parent)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return value


def _children(value: Any) -> Any:
    """The lists and objects right inside a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in inner if isinstance(child, dict | list)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r:.200} appears twice")
            seen.add(name)
    return fields
