"""Text to tokens and back; the only file that imports transformers, and only when a tokenizer is wanted."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Message = Mapping[str, str]  # {"role": "user", "content": "…"}

# How many tokens of the prompt are decoded together with the first new one: what a token looks like may
# depend on its neighbours (a leading space, a character spread over several tokens).
_CONTEXT = 6
_PATIENCE = 16  # tokens after which bytes that still form no character are shown as they are


def load_tokenizer(folder: Path) -> Any | None:
    """The transformers tokenizer saved in a folder, None if nothing is there."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # "PyTorch was not found": it is not needed
    from transformers import AutoTokenizer

    # A tokenizer that is a program of its publisher's is refused, not asked about.
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a plain prompt, with the special tokens the model expects in front.

    Raises:
      ValueError: nothing to continue from.
    """
    if not text:
        raise ValueError("the prompt is empty; give at least one character to continue from")
    tokens = tokenizer(text)["input_ids"]
    if not tokens:
        raise ValueError(f"the prompt {text!r} has no tokens in this model's vocabulary")
    return list(tokens)


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation up to where the assistant answers.

    Raises:
      ValueError: no messages, or the model has no chat template.
    """
    if not messages or not any(message.get("content") for message in messages):
        raise ValueError("the prompt is empty; a chat needs at least one message with text")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this model has no chat template; continue plain text instead (chat=False, --raw)")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote them already


class TextBuilder:
    """Turns one row's tokens into text as they come.

    Never gives out part of a character, nor text that may turn out to begin a stop string. A character that
    the last token leaves incomplete is dropped.

    Attributes:
      text: everything given out so far.
      stopped: True once a stop string was met; the text ends before it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()):
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window = list(prompt[-_CONTEXT:])  # tokens decoded together
        self._shown = len(self._decode(self._window))  # characters of the window already taken
        self._new = 0  # tokens of the window not yet taken
        self._held = ""  # text that may begin a stop string

    def feed(self, token: int) -> str:
        """Takes one token and returns the text that is now certain, often one word, at times none."""
        if self.stopped:
            return ""
        self._window.append(token)
        self._new += 1
        return self._give(self._held + self._take(final=False))

    def finish(self) -> str:
        """Returns what was held back; call it once, when no token follows."""
        if self.stopped:
            return ""
        piece, self._held = self._held + self._take(final=True), ""
        return self._give(piece, final=True)

    def _take(self, *, final: bool) -> str:
        decoded = self._decode(self._window)
        fresh = decoded[self._shown :]
        if fresh.endswith("\ufffd") and (final or self._new < _PATIENCE):
            return fresh.rstrip("\ufffd") if final else ""
        if fresh:
            self._window = self._window[-self._new :]  # begins where a character begins
            self._shown = len(self._decode(self._window))
            self._new = 0
        return fresh

    def _give(self, piece: str, *, final: bool = False) -> str:
        starts = [start for start in (piece.find(stop) for stop in self._stop) if start >= 0]
        if starts:
            self.stopped, self._held, piece = True, "", piece[: min(starts)]
        elif not final:
            certain = len(piece) - max((_overlap(piece, stop) for stop in self._stop), default=0)
            piece, self._held = piece[:certain], piece[certain:]
        self.text += piece
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
