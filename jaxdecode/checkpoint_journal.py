"""The journal of an unfinished checkpoint: JSON lines, the first says of what, each other names a finished item."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

Line = dict[str, Any]


def read_journal(path: Path) -> list[Line]:
    """The whole lines of a journal; empty if there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # half a line: its run was killed while writing it
            break
    return lines


def begin_journal(path: Path, lines: list[Line]) -> IO[str]:
    """Replace the journal by `lines`, on the disk, and return it open at its end."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        sync(file)
    os.replace(temporary, path)
    return path.open("a")


def append_line(journal: IO[str], line: Line) -> None:
    """Add a line; it is on the disk when this returns."""
    journal.write(json.dumps(line) + "\n")
    sync(journal)


def sync(file: IO[Any]) -> None:
    """Put what was written to a file on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_dir(path: Path) -> None:
    """Put a directory's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
