"""Things that are no plain files where files are expected, and destinations that are taken or lead elsewhere."""

from __future__ import annotations

from hypothesis import strategies as st
from inputs import LFS_POINTER, Input, Special, base, placed

_NAMES = [
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "merges.txt",
]  # fmt: skip
_SPECIALS = [
    Special("fifo"), Special("socket"), Special("folder"), Special("link", "nowhere"), Special("link", "config.json"),
    Special("link", "../bystander/secret.txt"), Special("link", "../bystander/weights.safetensors"),
    Special("link", "../bystander/folder"), Special("link", "/dev/zero"), Special("link", "/dev/null"),
    Special("link", "/dev/full"), Special("link", "/proc/self/environ"), Special("link", "/proc/self/mem"),
    Special("link", "."), Special("link", ".."), Special("sparse", size=5 << 30), Special("sparse", "PK\3\4", 1 << 30),
    Special("sparse", "{", 5 << 30), Special("sparse", "\0\0\0\x06\0\0\0\0{", 5 << 30), b"", b"\0", LFS_POINTER,
]  # fmt: skip
_DESTINATIONS = [
    {"out/ours.partial": Special("link", "../bystander/folder")},
    {"out/ours.partial": Special("link", "nowhere")},
    {"out/ours.partial": Special("link", "ours.partial")},
    {"out/ours.partial": b"a file"},
    {"out/ours.partial": Special("fifo")},
    {"out/ours": Special("link", "nowhere")},
    {"out/ours": Special("fifo")},
    {"out/ours.partial/lock": Special("link", "../../bystander/secret.txt")},
    {"out/ours.partial/lock": Special("fifo")},
    {"out/ours.partial/lock": Special("folder")},
    {"out/ours.partial/lock": b"", "out/ours.partial/checkpoint": Special("link", "../../bystander/folder")},
    {"out/ours.partial/lock": b"", "out/ours.partial/journal.jsonl": Special("link", "../../bystander/secret.txt")},
    {"out/ours.partial/lock": b"", "out/ours.partial/journal.jsonl": Special("fifo")},
    {"out/ours.partial/lock": b"", "out/ours.partial/journal.jsonl": b'[]\n{"item": 3}\n'},
    {"out/ours.partial/lock": b"", "out/ours.partial/journal.jsonl": b"\xff\xfe"},
    {"out/ours.partial/lock": b"", "out/ours.partial/journal.tmp": Special("link", "../../bystander/secret.txt")},
]


@st.composite
def odd_files(draw: st.DrawFn) -> Input:
    """A model some of whose files are pipes, folders, links or devices; or such a thing in its place."""
    source = draw(st.sampled_from([("llama", "directory"), ("llama", "sharded"), ("llama", "bin")]))
    files = placed(base(*source).files)
    if draw(st.integers(0, 2)) == 0:
        return Input(files=files | draw(st.sampled_from(_DESTINATIONS)), note="destination")
    if draw(st.integers(0, 9)) == 0:
        return Input(files={"thing": draw(st.sampled_from(_SPECIALS))}, source="thing", note="the source itself")
    for name in draw(st.lists(st.sampled_from(_NAMES), min_size=1, max_size=2, unique=True)):
        files[f"source/{name}"] = draw(st.sampled_from(_SPECIALS))
    return Input(files=files)
