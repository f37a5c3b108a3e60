"""What a fuzzed input is: files in a small world around the converter, and sound bases to damage."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
import made
from made import tiny_hf

DEEP = "@deep@"  # in a JSON text, stands for a value nested hundreds or hundred thousands of times
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@dataclasses.dataclass(frozen=True)
class Special:
    """Something other than a file with bytes: "link", "hard", "fifo", "socket", "folder" or "sparse"."""

    kind: str
    target: str = ""
    size: int = 0


Files = dict[str, bytes | Special]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """One input of `convert`.

    Attributes:
      files: what lies in the world besides the bystanders; "source/config.json" -> bytes.
      source: what is converted, relative to the world.
      dtype, extend_positions: options of `convert`.
      note: what was done to it, for a reader.
    """

    files: Files
    source: str = "source"
    dtype: str | None = None
    extend_positions: int | None = None
    note: str = ""

    def write(self, world: Path) -> Path:
        """Lay the input out in an empty folder; returns the source."""
        for folder in ("here", "out", "source", "bystander"):
            (world / folder).mkdir()
        (world / "bystander" / "secret.txt").write_text("secret")
        (world / "bystander" / "folder").mkdir()
        (world / "bystander" / "weights.safetensors").write_bytes(base("llama").files["model.safetensors"])
        for name, content in self.files.items():
            _write(world / name, content)
        return world / self.source


def _write(path: Path, content: bytes | Special) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    match content.kind:
        case "link":
            path.symlink_to(content.target)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir(exist_ok=True)
        case "socket":
            _bind(path)
        case "sparse":
            with path.open("wb") as file:
                file.write(content.target.encode())
                file.truncate(content.size)
        case _:
            raise AssertionError(content)


def _bind(path: Path) -> None:
    """A socket in the file system; its path must be short, so it is made from within its folder."""
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as made_socket:
            made_socket.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


@dataclasses.dataclass(frozen=True)
class Base:
    """A sound model directory as bytes, and its config.json as an object."""

    config: dict[str, Any]
    files: dict[str, bytes]


@functools.cache
def base(case: str, kind: str = "directory") -> Base:
    """A one-layer model of `tiny_hf.CASES`, written by the function `made.write_<kind>`."""
    layers = "num_layers" if tiny_hf.CASES[case]["model_type"] == "chatglm" else "num_hidden_layers"
    config = tiny_hf.CASES[case] | {layers: 1}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = getattr(made, f"write_{kind}")(Path(scratch) / "made", config)
        return Base(config, {file.name: file.read_bytes() for file in folder.iterdir()})


def placed(files: dict[str, Any], folder: str = "source") -> Files:
    """Files by name -> files by place in the world."""
    return {f"{folder}/{name}": content for name, content in files.items()}


def dumps(value: Any, depth: int = 500) -> bytes:
    """JSON, with NaN and numbers of any size, and `DEEP` replaced by lists in lists."""
    return json.dumps(value).replace(f'"{DEEP}"', "[" * depth + "]" * depth).encode()


NUMBERS = [
    -1, 0, 1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 255, 1000, 2**15, 2**24, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63,
    2**64, 10**9, 10**15, 10**30, 10**400, -(2**63), -(10**400), 0.0, -0.0, 0.5, 1.0, 1.5, 4.0, 1e-45, 5e-324, 1e-5,
    1e38, 1e39, 1e308, -1e308, float("inf"), float("-inf"), float("nan"),
]  # fmt: skip
TEXTS = [
    "", " ", "x", "llama", "silu", "true", "1", "auto", "\0", "\n", "\x1b[2J\x1b]0;owned\x07", "\ud800", "\u202egnp",
    "../../etc/passwd", "a" * 10_000, "ä" * 300, "[" * 200, "%s%n{0}{0.__class__}", DEEP,
]  # fmt: skip
scalars = st.one_of(
    st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.sampled_from([None, True, False]), st.integers(-3, 80)
)
odd = st.one_of(
    scalars,
    scalars,
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(TEXTS[:8]), inner, max_size=3),
        max_leaves=6,
    ),
)


@st.composite
def changed(draw: st.DrawFn, fields: dict[str, Any], keys: list[str], most: int = 4, values=odd) -> dict[str, Any]:
    """An object with up to `most` of its keys (or of `keys`) set to something else, removed, copied or renamed."""
    fields = dict(fields)
    known = sorted({*fields, *keys})
    for _ in range(draw(st.integers(0, most))):
        key, how = draw(st.sampled_from(known)), draw(st.integers(0, 9))
        value = fields.get(key)
        if how == 0:
            fields.pop(key, None)
        elif how == 1:
            fields[key] = fields.get(draw(st.sampled_from(known)))
        elif how == 2 and isinstance(value, int | float) and abs(value) < 1e300:
            fields[key] = draw(st.sampled_from([value + 1, value - 1, value * 2, value // 2, -value, float(value)]))
        elif how == 3:
            fields[key] = draw(st.sampled_from([[value], {"a": value}, str(value), [value] * 3]))
        elif how == 4:
            fields[draw(st.sampled_from(TEXTS))] = fields.pop(key, None)
        else:
            fields[key] = draw(values)
    return fields


_INTEGERS = [0, 1, 7, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1]


@st.composite
def damaged(draw: st.DrawFn, data: bytes, begin: int = 0, end: int | None = None, most: int = 3) -> bytes:
    """Bytes with up to `most` places from `begin` to `end` overwritten, cut out, doubled, filled, or all cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, most))):
        last = max(begin, min(len(changed), len(data) if end is None else end) - 1)
        place, length = draw(st.integers(begin, last)), draw(st.integers(1, 24))
        match draw(st.integers(0, 7)):
            case 0:
                changed[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                changed[place : place + 8] = draw(st.sampled_from(_INTEGERS)).to_bytes(8, "little")
            case 2:
                changed[place : place + 4] = (draw(st.sampled_from(_INTEGERS)) % 2**32).to_bytes(4, "little")
            case 3:
                del changed[place : place + length]
            case 4:
                changed[place:place] = changed[place : place + length]
            case 5:
                changed[place:place] = random.Random(draw(st.integers(0, 999))).randbytes(length)
            case 6:
                del changed[place:]
            case 7 if place < len(changed):
                changed[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)
