"""Fuzzed `pytorch_model.bin`: pickles with foreign and mutated instructions, and zip archives that lie."""

from __future__ import annotations

import io
import pickletools
import struct
import warnings
import zipfile

import made
from hypothesis import strategies as st
from inputs import Input, base, damaged, placed
from made import tiny_hf

_CASE = "llama"
_WEIGHTS = tiny_hf.hf_weights(base(_CASE).config)
EVIL = [
    ("posix", "system"), ("os", "popen"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"),
    ("builtins", "__import__"), ("subprocess", "Popen"), ("importlib", "import_module"), ("torch", "load"),
    ("torch.serialization", "load"), ("torch._utils", "_rebuild_tensor"), ("collections", "OrderedDict.fromkeys"),
    ("operator", "attrgetter"), ("numpy", "load"), ("torch", "FloatStorage.from_file"), ("", ""),
    ("convert.torch_bin", "map_file"), ("shutil", "rmtree"), ("torch", "x" * 5_000), ("__main__", "x"),
]  # fmt: skip


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """Instructions that call a global."""
    return made.named(module, name) + b"(" + b"".join(arguments) + b"tR"


_TENSOR = (
    made.named("torch._utils", "_rebuild_tensor_v2") + b"((" + made.text("storage")
    + made.named("torch", "FloatStorage") + made.text("0") + made.text("cpu") + made.number(4)
)  # fmt: skip
# Instructions that none of our archives holds, or holds otherwise.
PIECES = [
    *(call(module, name, made.text("touch canary")) for module, name in EVIL),
    *(b"\x8c" + bytes([len(m)]) + m.encode() + b"\x8c" + bytes([len(n) % 256]) + n.encode()[:255] + b"\x93"
      for m, n in EVIL),
    b"iposix\nsystem\n", b"(cposix\nsystem\n" + made.text("touch canary") + b"o", b"\x81", b"\x92", b"\x82\x01",
    b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"Ppid\n", b"Q", b"R", b"b", b"}b", b"}" + made.text("shape") + b"]sb",
    b"}}" + made.text("items") + made.number(1) + b"s\x86b", b"r\xff\xff\xff\x7f", b"r\xff\xff\xff\xff", b"q\xff",
    b"h\xff", b"j\xff\xff\xff\xff", b"p99999999999999999999\n", b"g0\n", b"\x94", b"0", b"1", b"2", b"2\x86" * 80,
    b"2\x862\x86" + b"Q", b"]2a", b"}2" + made.text("x") + b"s", b")" * 50, b"\x85" * 5_000, b"(" * 5_000, b"t", b"l",
    b"d", b"a", b"e", b"s", b"u", b"N", b".", b"\x88", b"\x89", b"I01\n", b"I" + b"9" * 5_000 + b"\n", b"L1L\n",
    b"\x8b\xff\xff\xff\x7f", b"\x8a\xff" + b"\xff" * 255, b"F1e999\n", b"Gabcdefgh", b"S'x'\n", b"Vx\n",
    b"\x8d" + struct.pack("<Q", 2**62), b"\x8e" + struct.pack("<Q", 2**62), b"\x8e" + struct.pack("<Q", 2**33),
    b"\x96" + struct.pack("<Q", 2**40), b"\x95" + struct.pack("<Q", 2**62), b"\x97", b"\x98", b"\x90", b"\x91",
    b"\x80\x05", b"\x80\x09", b"X\xff\xff\xff\xff", b"X\x04\0\0\0\xed\xa0\x80x", made.number(-1),
    b"\x8a\x09" + (2**70).to_bytes(9, "little"), b"ccollections\nOrderedDict\n)R", b"ctorch\nFloatStorage\n",
    b"ctorch\nFloatStorage\n)R", b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    _TENSOR + b"tQ" + made.number(0) + made.numbers([2, 2]) + made.numbers([2, 1]) + b"\x89NtR",
    _TENSOR + b"tQ" + made.number(0) + made.numbers([2**30, 2**30]) + made.numbers([0, 0]) + b"\x89NtR",
    _TENSOR + b"tQ" + made.number(3) + made.numbers([2, 0]) + made.numbers([2**30, 2**30]) + b"\x89NtR",
    _TENSOR + b"tQ" + made.number(0) + made.numbers([1] * 100) + made.numbers([1] * 100) + b"\x89NtR",
]  # fmt: skip


def instructions(data: bytes) -> list[bytes]:
    """A pickle cut into its instructions."""
    starts = [place for *_, place in pickletools.genops(data) if place is not None]
    return [data[start:stop] for start, stop in zip(starts, [*starts[1:], len(data)], strict=True)]


@st.composite
def _pickles(draw: st.DrawFn) -> bytes:
    code = instructions(made.pickle_of(_WEIGHTS))
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(b"".join(code)))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(code) - 1))
        match draw(st.integers(0, 5)):
            case 0:
                del code[place]
            case 1:
                code.insert(place, draw(st.sampled_from(code)))
            case 2:
                code[place] = draw(st.sampled_from(code))
            case 3:
                code[place] = draw(st.sampled_from(PIECES))
            case _:
                code.insert(place, draw(st.sampled_from(PIECES)))
        code = code or [b"."]
    return b"".join(code)


@st.composite
def torch_files(draw: st.DrawFn) -> Input:
    """A whole model but for its pytorch_model.bin."""
    pickled = draw(_pickles()) if draw(st.integers(0, 2)) else made.pickle_of(_WEIGHTS)
    data = draw(_archives(pickled))
    if draw(st.integers(0, 3)) == 0:  # the directory of a zip archive is at its end
        data = draw(damaged(data, *draw(st.sampled_from([(0, 200), (max(0, len(data) - 1500), len(data))]))))
    return Input(files=placed({"config.json": base(_CASE).files["config.json"], "pytorch_model.bin": data}))


@st.composite
def _archives(draw: st.DrawFn, pickled: bytes) -> bytes:
    entries = [("archive/data.pkl", pickled), ("archive/byteorder", b"little"), ("archive/version", b"3\n")]
    entries += [(f"archive/data/{index}", array.tobytes()) for index, array in enumerate(_WEIGHTS.values())]
    packing = zipfile.ZIP_STORED
    match draw(st.integers(0, 15)):
        case 0:
            entries.append(draw(st.sampled_from(entries)))
        case 1:
            entries.append((draw(st.sampled_from(["../../evil", "/evil", "a\0b", "x" * 60_000, "", "data.pkl"])), b"x"))
        case 2:
            del entries[draw(st.integers(0, len(entries) - 1))]
        case 3:
            packing = draw(st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
        case 4:
            place = draw(st.integers(0, len(entries) - 1))
            entries[place] = entries[place][0], draw(st.sampled_from([b"", b"big", b"\0" * 100_000]))
        case 5:
            entries = [(f"../{name}", content) for name, content in entries]
    return archive(entries, packing)


def archive(entries: list[tuple[str, bytes]], packing: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive, names and duplicates as they come."""
    with io.BytesIO() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names
        with zipfile.ZipFile(file, "w", packing) as out:
            for name, content in entries:
                out.writestr(zipfile.ZipInfo(name), content, packing)
        return file.getvalue()
