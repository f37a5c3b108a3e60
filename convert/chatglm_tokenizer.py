"""ChatGLM2's and ChatGLM3's tokenizer from tokenizer.model alone; their publisher's code is never run.

What that code does (tokenization_chatglm.py of THUDM/chatglm2-6b and THUDM/chatglm3-6b): five special tokens, in
ChatGLM3 nine, follow SentencePiece's own; every sequence begins with [gMASK] and sop; the names of special tokens that
somebody typed are text. ChatGLM2's chat numbers its rounds, ChatGLM3's names roles and encodes each message apart, so
with a space in front. Its chat keeps answers without the white space around them, and so do the templates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convert.chatglm_version import find_version
from convert.errors import ConversionError
from convert.sentencepiece_file import SentencePieceModel, read_sentencepiece

CLASS = "ChatGLMTokenizer"
_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_STOPS = ("<|user|>", "<|observation|>")  # ChatGLM3 ends its turn with one of these, or with eos

# A line's indentation and the line breaks between tags are dropped by {%- and -%}.
_TEMPLATE_2 = """\
{{- '[gMASK]sop' -}}
{%- set said = namespace(rounds=0, last='assistant') -%}
{%- for message in messages -%}
  {%- if message.role == 'user' and said.last == 'assistant' -%}
    {%- set said.rounds = said.rounds + 1 -%}
    {{- '[Round ' ~ said.rounds ~ ']\\n\\n问：' ~ message.content ~ '\\n\\n答：' -}}
  {%- elif message.role == 'assistant' and said.last == 'user' -%}
    {{- message.content | trim ~ '\\n\\n' -}}
  {%- else -%}
    {{- raise_exception('ChatGLM2 knows user and assistant in turn, user first; got ' ~ message.role
        ~ (' after ' ~ said.last if said.rounds else ' first')) -}}
  {%- endif -%}
  {%- set said.last = message.role -%}
{%- endfor -%}
{%- if add_generation_prompt and said.last != 'user' -%}
  {{- raise_exception('ChatGLM2 answers a message of the user; the last is of ' ~ said.last) -}}
{%- endif -%}
"""
_TEMPLATE_3 = """\
{{- '[gMASK]sop' -}}
{%- for message in messages -%}
  {%- if message.role not in ['system', 'user', 'assistant', 'observation'] -%}
    {{- raise_exception('ChatGLM3 knows system, user, assistant and observation; got ' ~ message.role) -}}
  {%- endif -%}
  {%- set content = message.content | trim if message.role == 'assistant' else message.content -%}
  {{- '<|' ~ message.role ~ '|>' ~ (message.metadata or '') ~ '\\n' ~ (' ' ~ content if content else '') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


class ChatGLMTokenizer:
    """A tokenizer.model and which ChatGLM it belongs to, 2 or 3."""

    def __init__(self, model: SentencePieceModel, version: int, max_length: int | None):
        self._model, self._version, self._max_length = model, version, max_length
        self._specials = _SPECIALS if version == 2 else _SPECIALS + _ROLES
        first = len(model.pieces)
        self._ids = {name: first + index for index, name in enumerate(self._specials)}

    def taken(self) -> list[str]:
        """Names of special tokens that are pieces too, of which `tokenizers` can give one name only one id."""
        return sorted(set(self._specials) & set(self._model.pieces))

    @property
    def size(self) -> int:
        """Number of tokens, special ones included."""
        return len(self._model.pieces) + len(self._specials)

    @property
    def written_bytes(self) -> int:
        """What `write` writes, at most."""
        return self._model.written_bytes

    def with_stops(self, generation_config: dict[str, Any]) -> dict[str, Any]:
        """A generation_config.json that also names the roles at which ChatGLM3 stops."""
        if self._version == 2:
            return generation_config
        said = generation_config.get("eos_token_id")
        known = said if isinstance(said, list) else [] if said is None else [said]
        return generation_config | {"eos_token_id": [*known, *(self._ids[name] for name in _STOPS)]}

    def write(self, target: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        from tokenizers import AddedToken, processors

        tokenizer, model = self._model.build(), self._model
        names = (model.unknown, model.bos, model.eos, *self._specials)
        tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
        given = {name: tokenizer.token_to_id(name) for name in self._ids}
        assert given == self._ids, f"special tokens have the ids {given}; expected {self._ids}"
        begin = [(name, self._ids[name]) for name in ("[gMASK]", "sop")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[gMASK] sop $A", pair=f"[gMASK] sop $A $B {model.eos}",
            special_tokens=[*begin, (model.eos, model.pieces.index(model.eos))],
        )  # fmt: skip
        tokenizer.save(str(target / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "eos_token": model.eos, "unk_token": model.unknown, "pad_token": model.unknown, "padding_side": "left",
            "split_special_tokens": True, "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": self._max_length, "chat_template": _TEMPLATE_2 if self._version == 2 else _TEMPLATE_3,
        }  # fmt: skip
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (target / "tokenizer_config.json").write_text(text, encoding="utf-8")


def open_chatglm_tokenizer(path: Path, config: dict[str, Any]) -> ChatGLMTokenizer | None:
    """The tokenizer of a ChatGLM directory; None if it brings no tokenizer, or one that needs no conversion.

    Raises:
      ConversionError: files are missing or damaged, or it is not to be told which ChatGLM it is.
    """
    model_file, config_file = path / "tokenizer.model", path / "tokenizer_config.json"
    said = _read_config(config_file) if config_file.exists() else {}
    name = said.get("tokenizer_class", CLASS)
    if name != CLASS and (path / "tokenizer.json").exists():
        return None
    if not model_file.exists():
        if not config_file.exists() or (path / "tokenizer.json").exists():
            return None
        raise ConversionError(
            f"{path} has {config_file.name}, which names {name!r:.80}, but no tokenizer.model: get that file from "
            f"where the model was published, or remove {config_file.name} to convert without tokenizer"
        )
    if name != CLASS:
        raise ConversionError(
            f"{config_file}: tokenizer_class {name!r:.80} is not supported; supported is {CLASS}, of ChatGLM2 and "
            "ChatGLM3; remove the tokenizer's files to convert without it"
        )
    length = config.get("seq_length")
    tokenizer = ChatGLMTokenizer(
        read_sentencepiece(model_file), _version(path, said, config), length if isinstance(length, int) else None
    )
    if taken := tokenizer.taken():
        raise ConversionError(
            f"{model_file} holds {', '.join(map(repr, taken))} as pieces of text, which are names of special tokens "
            "too, and a name can have but one id here; remove the tokenizer's files to convert without it"
        )
    room = config.get("padded_vocab_size")
    if isinstance(room, int) and tokenizer.size > room:
        raise ConversionError(
            f"{model_file} and the special tokens are {tokenizer.size:,} tokens, the model has room for {room:,} "
            "(padded_vocab_size of config.json): one of the two files belongs to another model"
        )
    return tokenizer


def _read_config(file: Path) -> dict[str, Any]:
    from convert.hf_directory import read_json

    problems: list[str] = []
    said = read_json(file, problems)
    if problems:
        raise ConversionError([f"{problem}; get it from where the model was published" for problem in problems])
    return said


def _version(path: Path, said: dict[str, Any], config: dict[str, Any]) -> int:
    """2 or 3, which share everything but the special tokens' number and the chat."""
    found = find_version(path, said, config)
    if found is not None:
        return found
    raise ConversionError(
        f"{path}: nothing says whether the tokenizer is ChatGLM2's or ChatGLM3's, whose chats differ; expected "
        "tokenizer_config.json to hold a name_or_path with chatglm2 or chatglm3 in its last part, found "
        f"{said.get('name_or_path')!r:.80}; write one there, for example THUDM/chatglm2-6b"
    )
