"""Fuzzed tokenizer.model files: of a ChatGLM, whose tokenizer is rebuilt from one."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import made
from hypothesis import strategies as st
from inputs import LFS_POINTER, TEXTS, Input, Special, changed, damaged, placed
from json_inputs import json_texts
from sentencepiece_models import train

_SETTINGS = {"name_or_path": "THUDM/chatglm2-6b", "tokenizer_class": "ChatGLMTokenizer", "remove_space": False}
_PIECES = [*(text for text in TEXTS if text.isprintable()), "▁", "▁▁", "<0x00>", "<unk>", "sop", "a", "a" * 2_000]
_SCORES = [0.0, -1.0, 1.0, 1e38, -1e38, float("inf"), float("-inf"), float("nan"), -17.0]
_FIELDS = {
    "trainer_spec": {"unk_id": [-1, 5, 10**6], "bos_id": [-1, 0, 2**31 - 1], "eos_id": [-(2**31), 899, 900],
                     "byte_fallback": [False], "model_type": [1, 3], "treat_whitespace_as_suffix": [True]},
    "normalizer_spec": {"add_dummy_prefix": [False], "escape_whitespaces": [False], "precompiled_charsmap": [b"x"]},
}  # fmt: skip


@functools.cache
def sound() -> dict[str, bytes]:
    """A one-layer ChatGLM with the tokenizer that its publisher would put beside it."""
    config = made.tiny_hf.CASES["chatglm"] | {"num_layers": 1, "padded_vocab_size": 920}
    with tempfile.TemporaryDirectory() as scratch:
        folder = made.write_directory(Path(scratch) / "made", config)
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return files | {"tokenizer.model": train(), "tokenizer_config.json": json.dumps(_SETTINGS).encode()}


@st.composite
def _edited(draw: st.DrawFn) -> bytes:
    """The sound model with pieces and fields set to something else; mostly still a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto.FromString(train())
    pieces = model.pieces
    for _ in range(draw(st.integers(0, 3))):
        piece = pieces[draw(st.integers(0, len(pieces) - 1))]
        match draw(st.integers(0, 5)):
            case 0:
                piece.piece = draw(st.sampled_from(_PIECES))
            case 1:
                piece.score = draw(st.sampled_from(_SCORES))
            case 2:
                piece.type = draw(st.integers(1, 6))
            case 3:
                pieces.add().CopyFrom(piece)
            case 4:
                pieces.add(piece=draw(st.sampled_from(_PIECES)), score=-1e4, type=draw(st.integers(1, 6)))
            case 5:
                del pieces[draw(st.integers(1, len(pieces))) :]
    if draw(st.integers(0, 2)) == 0:
        spec = draw(st.sampled_from(sorted(_FIELDS)))
        name = draw(st.sampled_from(sorted(_FIELDS[spec])))
        setattr(getattr(model, spec), name, draw(st.sampled_from(_FIELDS[spec][name])))
    return model.SerializeToString()


@st.composite
def sentencepiece_files(draw: st.DrawFn) -> Input:
    """A whole ChatGLM but for its tokenizer.model, and now and then the files beside it."""
    files: dict[str, bytes | Special] = dict(sound())
    files["tokenizer.model"] = draw(
        st.one_of(
            _edited(),
            _edited(),
            damaged(train()),
            st.sampled_from([b"", b"\n\0" * 100_000, b"\n\x03\n\x01a" * 10_000, LFS_POINTER, Special("fifo"),
                             Special("folder"), Special("sparse", size=3 << 30), Special("link", "config.json")]),
        )
    )  # fmt: skip
    if draw(st.integers(0, 3)) == 0:
        fields = draw(changed(_SETTINGS, ["name_or_path", "tokenizer_class", "auto_map"]))
        files["tokenizer_config.json"] = draw(json_texts(fields))
    if draw(st.integers(0, 7)) == 0:
        files["tokenization_chatglm.py"] = draw(
            st.sampled_from([Special("fifo"), Special("link", "/dev/zero"), Special("sparse", size=3 << 30), b"\xff",
                             b"import os; os.system('touch canary')  # <|observation|>"])
        )  # fmt: skip
    return Input(files=placed(files))
