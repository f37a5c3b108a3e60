"""SentencePiece's tokenizer.model without SentencePiece: its pieces, and what `tokenizers` must do to encode alike.

The file is one protocol buffer (google/sentencepiece, sentencepiece_model.proto); the fields that are read here are
declared below. Encoding by SentencePiece's BPE means: a space becomes ▁, one more ▁ is put in front, the two neighbours
whose union has the highest score are joined first, and a character that is no piece becomes the bytes of its UTF-8.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from pathlib import Path
from typing import Any

from convert.errors import ConversionError
from convert.tokenizer import (
    fits_template,
    length_problems,
    merge_problems,
    merges_bytes,
    merges_from_scores,
    sentencepiece_bpe,
    vocab_bytes,
)
from jaxdecode.foreign_files import read_plain

_MOST_BYTES, _MOST_PIECES = 16 << 20, 1_000_000  # the largest published has 4 MB and a quarter of a million
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # types of a piece
_UNIGRAM, _BPE = 1, 2
_STRING, _FLOAT, _INT32, _BOOL, _BYTES, _MESSAGE = 9, 2, 5, 8, 12, 11  # google.protobuf's numbers of field types
# message -> (field, its number, type, default or, for a message, which one)
_FIELDS = {
    "Piece": [("piece", 1, _STRING, ""), ("score", 2, _FLOAT, "0"), ("type", 3, _INT32, str(_NORMAL))],
    "Trainer": [
        ("model_type", 3, _INT32, str(_UNIGRAM)), ("treat_whitespace_as_suffix", 24, _BOOL, "false"),
        ("byte_fallback", 35, _BOOL, "false"), ("unk_id", 40, _INT32, "0"), ("bos_id", 41, _INT32, "1"),
        ("eos_id", 42, _INT32, "2"),
    ],
    "Normalizer": [
        ("precompiled_charsmap", 2, _BYTES, ""), ("add_dummy_prefix", 3, _BOOL, "true"),
        ("remove_extra_whitespaces", 4, _BOOL, "true"), ("escape_whitespaces", 5, _BOOL, "true"),
    ],
    "Model": [
        ("pieces", 1, _MESSAGE, "Piece"), ("trainer_spec", 2, _MESSAGE, "Trainer"),
        ("normalizer_spec", 3, _MESSAGE, "Normalizer"),
    ],
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """A BPE model with byte fallback.

    Attributes:
      pieces: by id.
      scores: one a piece; only those of ordinary pieces mean something.
      ordinary: ids of the pieces that text is made of, bytes not counted.
      unknown, bos, eos: pieces that no text becomes.
      prefix: a space is put in front of every text.
    """

    pieces: list[str]
    scores: list[float]
    ordinary: list[int]
    unknown: str
    bos: str
    eos: str
    prefix: bool

    def build(self):
        """The `tokenizers.Tokenizer` that gives the same ids; no special tokens are added to a text."""
        vocab = {piece: index for index, piece in enumerate(self.pieces)}
        merges = merges_from_scores(self._joined, [self.scores[index] for index in self.ordinary])
        return sentencepiece_bpe(vocab, merges, self.unknown, prefix=self.prefix)

    @property
    def written_bytes(self) -> int:
        """Room that the files of a tokenizer of these pieces take, at most."""
        return vocab_bytes(self.pieces) + merges_bytes(self._joined)

    @property
    def _joined(self) -> list[str]:
        return [self.pieces[index] for index in self.ordinary]


def read_sentencepiece(file: Path) -> SentencePieceModel:
    """Read a tokenizer.model.

    Raises:
      ConversionError: it is no such file, or asks for what is not supported; everything that was found, at once.
    """
    from google.protobuf.message import DecodeError

    try:
        data = read_plain(file, _MOST_BYTES)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    try:
        model = _message("Model").FromString(data)
        problems = _problems(model)
    except DecodeError as error:
        problems = [f"it is damaged, or no SentencePiece model ({error})"]
    if problems:
        raise ConversionError([f"{file} ({len(data):,} bytes): {problem}" for problem in problems])
    pieces, trainer = [piece.piece for piece in model.pieces], model.trainer_spec
    return SentencePieceModel(
        pieces=pieces, scores=[piece.score for piece in model.pieces],
        ordinary=[index for index, piece in enumerate(model.pieces) if piece.type == _NORMAL],
        unknown=pieces[trainer.unk_id], bos=pieces[trainer.bos_id], eos=pieces[trainer.eos_id],
        prefix=model.normalizer_spec.add_dummy_prefix,
    )  # fmt: skip


def _problems(model: Any) -> list[str]:
    """Why the model cannot be rebuilt exactly; empty if it can."""
    pieces, trainer, normalizer = model.pieces, model.trainer_spec, model.normalizer_spec
    if not pieces:
        return ["it is damaged, or no SentencePiece model (it holds no pieces)"]
    if len(pieces) > _MOST_PIECES:
        return [f"it holds {len(pieces):,} pieces; at most {_MOST_PIECES:,} are read"]
    if not all(isinstance(piece.piece, str) for piece in pieces):  # what is no text comes as bytes
        return ["it is damaged (a piece is no UTF-8)"]
    problems = length_problems([piece.piece for piece in pieces])
    if trainer.model_type != _BPE:
        problems.append(f"its model_type is {trainer.model_type}; supported is {_BPE}, BPE")
    wanted = {"byte_fallback": True, "treat_whitespace_as_suffix": False}
    problems += [f"its {name} is not {value}" for name, value in wanted.items() if getattr(trainer, name) != value]
    wanted = {"remove_extra_whitespaces": False, "escape_whitespaces": True}
    problems += [f"its {name} is not {value}" for name, value in wanted.items() if getattr(normalizer, name) != value]
    if normalizer.precompiled_charsmap:
        problems.append("it normalises characters before encoding; supported is the identity")
    types = Counter(piece.type for piece in pieces)
    if unsupported := sorted(set(types) - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}):
        problems.append(f"it holds pieces of types {unsupported} (user-defined or unused), which are not supported")
    if types[_BYTE] != 256:
        problems.append(f"it holds {types[_BYTE]} of the 256 byte pieces")
    repeated = len(pieces) - len({piece.piece for piece in pieces})
    if repeated:
        problems.append(f"{repeated} of its {len(pieces)} pieces occur twice")
    if not all(math.isfinite(piece.score) for piece in pieces):
        problems.append("some of its scores are no finite numbers")
    elif len({piece.score for piece in pieces if piece.type == _NORMAL}) != types[_NORMAL]:
        problems.append("two of its pieces have the same score, which leaves open which is joined first")
    for name in ("unk_id", "bos_id", "eos_id"):
        if not 0 <= getattr(trainer, name) < len(pieces):
            problems.append(f"its {name} {getattr(trainer, name)} is outside its {len(pieces)} pieces")
        elif not fits_template(piece := pieces[getattr(trainer, name)].piece):
            problems.append(f"its {name} is the piece {piece!r:.80}, which no template can name")
    return problems or merge_problems([piece.piece for piece in pieces if piece.type == _NORMAL])


@functools.cache
def _message(name: str) -> Any:
    from google.protobuf import message_factory

    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(name))


@functools.cache
def _pool() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool

    file, pool = descriptor_pb2.FileDescriptorProto(name="tokenizer.proto"), descriptor_pool.DescriptorPool()
    for message, fields in _FIELDS.items():
        described = file.message_type.add(name=message)
        for name, number, kind, detail in fields:
            label = 3 if name == "pieces" else 1  # repeated, optional
            field = described.field.add(name=name, number=number, type=kind, label=label)
            if kind == _MESSAGE:
                field.type_name = detail
            else:
                field.default_value = detail
    pool.Add(file)
    return pool
