"""Text to tokens and back; the only file that imports transformers, and only when a tokenizer is wanted."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Message = Mapping[str, str]  # {"role": "user", "content": "…"}

# How many tokens of the prompt are decoded together with the first new one: what a token looks like may
# depend on its neighbours (a leading space, a character spread over several tokens).
_CONTEXT = 6
_PRIVATE_USE = range(0xE000, 0xF900)  # characters that mean nothing
_PATIENCE = 16  # tokens after which bytes that still form no character are shown as they are


def load_tokenizer(folder: Path) -> Any | None:
    """The transformers tokenizer saved in a folder, None if nothing is there.

    Raises:
      ValueError: it needs code of its own, which is never run, or is none that transformers can read.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    config = folder / "tokenizer_config.json"
    if code := _settings(config).get("auto_map"):
        raise ValueError(
            f"{config} names code of its own ({code}), which jaxdecode never runs; convert the model again, which "
            "writes a tokenizer that needs none"
        )
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # "PyTorch was not found": it is not needed
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower
        raise _unreadable(folder, error) from error


def _settings(config: Path) -> dict[str, Any]:
    try:
        said = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    except (OSError, ValueError) as error:
        raise _unreadable(config.parent, error) from error
    if not isinstance(said, dict):
        raise _unreadable(config.parent, TypeError(f"{config.name} holds no object"))
    return said


def _unreadable(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {reason}); convert the model again "
        "from a source whose tokenizer transformers loads, or empty that folder to go without (jaxdecode.generate "
        "takes token ids)"
    )


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

    Special tokens in a message are special tokens, unless the tokenizer says `split_special_tokens`: then they are
    text, and only the template's own count.

    Raises:
      ValueError: no messages, the model has no chat template, or the template refuses the conversation.
    """
    if not messages or not any(message.get("content") for message in messages):
        raise ValueError("the prompt is empty; a chat needs at least one message with text")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this model has no chat template; continue plain text instead (chat=False, --raw)")
    if getattr(tokenizer, "split_special_tokens", False):
        return _encode_chat_apart(tokenizer, messages)
    text = _render(tokenizer, messages)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote them already


def _render(tokenizer: Any, messages: Sequence[Message]) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses this conversation: {error}") from error


def _encode_chat_apart(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation in which the names of special tokens that somebody typed are text."""
    specials = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    said = set("".join(text for message in messages for text in message.values() if isinstance(text, str)))
    mark = next((mark for mark in map(chr, _PRIVATE_USE) if mark not in said), None)  # breaks every name that was typed
    if mark is None:
        raise ValueError("the conversation uses every private character of Unicode; one must be free to encode it")
    name = re.compile(f"(?={names})(.)", re.DOTALL)

    def typed(key: str, text: Any) -> Any:
        return text if key == "role" or not isinstance(text, str) else name.sub(rf"\1{mark}", text)

    marked = [{key: typed(key, text) for key, text in message.items()} for message in messages]
    tokens: list[int] = []
    for part in re.split(f"({names})", _render(tokenizer, marked)):
        own = [specials[part]] if part in specials else None
        tokens += own or tokenizer(part.replace(mark, ""), add_special_tokens=False)["input_ids"]
    return tokens


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
