"""A GGUF file's tokenizer metadata as the files `transformers.AutoTokenizer` reads."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

from convert.errors import ConversionError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name of the pre-tokenizer -> how text is split before byte pairs are merged; None is GPT-2's own rule.
SPLITS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_WHOLE_WORDS_FIRST = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "tekken",
)  # a piece that is a token is not merged; they add bos
_UNKNOWN, _CONTROL, _USER_DEFINED = _ADDED = 2, 3, 4  # token types
_PREFIX = "tokenizer.ggml."
_SPACE = "▁"  # sentencepiece's mark for a space
_LONGEST = 1_000  # characters of a token; the longest published have some 200
_CHARACTERS = 8_000_000  # of all tokens together; every one may be a place to cut a token in two
# Ways to join two tokens into a third, and characters of what they make. Llama's 32,000 tokens have 60,000, Gemma's
# quarter of a million half a million of some 10 characters.
_MERGES, _MERGED_CHARACTERS = 1_000_000, 16_000_000
_ENTRY_BYTES = 80  # of tokenizer.json around a token or a merge, at most
_SPECIAL_BYTES = 300  # of it, again, around a special token
_OTHER_BYTES = 1 << 18  # of all files, whatever the tokens are


def tokenizer_problems(metadata: dict[str, Any]) -> list[str]:
    """Why the tokenizer in a GGUF file's metadata cannot be rebuilt; empty if it can."""
    model, pre = metadata.get(f"{_PREFIX}model"), metadata.get(f"{_PREFIX}pre")
    tokens, types = metadata.get(f"{_PREFIX}tokens"), metadata.get(f"{_PREFIX}token_type")
    if model not in ("gpt2", "llama"):
        return [f"tokenizer model {model!r:.80} is not supported; supported are gpt2 and llama"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens) or not tokens:
        return ["the tokenizer has no list of tokens"]
    problems = length_problems(tokens)
    if len(set(tokens)) < len(tokens):
        problems.append(f"the tokenizer's {len(tokens)} tokens hold {len(tokens) - len(set(tokens))} duplicates")
    if types is not None and (not isinstance(types, list) or len(types) != len(tokens)):
        problems.append(f"the tokenizer has {len(tokens)} tokens, but its list of token types has another length")
    if model == "gpt2" and (not isinstance(pre, str) or pre not in SPLITS):
        problems.append(f"tokenizer pre-tokenizer {pre!r:.80} is not supported; supported are {', '.join(SPLITS)}")
    key = "merges" if model == "gpt2" else "scores"
    values = metadata.get(f"{_PREFIX}{key}")
    if not isinstance(values, list) or (model == "llama" and not _are_scores(values, len(tokens))):
        problems.append(f"the tokenizer has no usable list of {key}")
    elif model == "gpt2":
        problems += _bad_merges(values, set(tokens))
    elif not problems:
        problems += merge_problems(tokens)
    for name in ("bos", "eos", "unknown", "padding"):
        index = metadata.get(f"{_PREFIX}{name}_token_id", 0)
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(tokens):
            problems.append(f"the tokenizer's {name}_token_id {index!r:.80} is outside its {len(tokens)} tokens")
    return problems or _bad_bos(metadata)


def length_problems(tokens: list[str]) -> list[str]:
    """Why tokens are too long to be looked at one cut at a time; empty if they are not."""
    longest, together = max(map(len, tokens)), sum(map(len, tokens))
    if longest <= _LONGEST and together <= _CHARACTERS:
        return []
    return [
        f"the tokenizer's longest token has {longest} characters, all have {together}; "
        f"{_LONGEST:,} and {_CHARACTERS:,} are the limits"
    ]


def merge_problems(tokens: list[str]) -> list[str]:
    """Why the merges of tokens are too many to be written; empty if they are not."""
    try:
        _joins(tuple(tokens))
    except ValueError as error:
        return [str(error)]
    return []


def gguf_tokenizer_bytes(metadata: dict[str, Any]) -> int:
    """Room that the files of a sound tokenizer take, at most."""
    tokens, types = metadata[f"{_PREFIX}tokens"], metadata.get(f"{_PREFIX}token_type") or []
    if metadata[f"{_PREFIX}model"] == "gpt2":
        merges = metadata[f"{_PREFIX}merges"]
        joined = len(json.dumps(merges)) + _ENTRY_BYTES * len(merges)
    else:
        joined = merges_bytes(tokens)
    special = [token for token, kind in zip(tokens, types, strict=False) if kind in _ADDED]
    template = metadata.get("tokenizer.chat_template")
    written = len(template.encode()) if isinstance(template, str) else 0
    return vocab_bytes(tokens) + joined + _SPECIAL_BYTES * len(special) + len(json.dumps(special)) + written


def vocab_bytes(tokens: list[str]) -> int:
    """Room of a vocabulary and of what does not depend on it, at most; JSON in ASCII is never shorter."""
    return len(json.dumps(tokens)) + _ENTRY_BYTES * len(tokens) + _OTHER_BYTES


def merges_bytes(tokens: list[str]) -> int:
    """Room of the merges of tokens, at most."""
    sizes = [len(json.dumps(token)) for token in tokens]
    return sum(sizes[whole] + _ENTRY_BYTES for whole, _, _ in _joins(tuple(tokens)))


def write_gguf_tokenizer(metadata: dict[str, Any], target: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Raises:
      ConversionError: a kind of tokenizer this cannot rebuild.
    """
    problems = tokenizer_problems(metadata)
    if problems:
        raise ConversionError(problems)
    tokenizer = _byte_level(metadata) if metadata[f"{_PREFIX}model"] == "gpt2" else _sentencepiece(metadata)
    _add_tokens(tokenizer, metadata)
    bos = _special(metadata, "bos")
    if bos is not None and _adds_bos(metadata):
        _prepend_bos(tokenizer, bos, metadata[f"{_PREFIX}bos_token_id"])
    tokenizer.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "bos_token": bos, "eos_token": _special(metadata, "eos"), "unk_token": _special(metadata, "unknown"),
        "pad_token": _special(metadata, "padding"), "add_bos_token": _adds_bos(metadata),
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
    }  # fmt: skip
    (target / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def _byte_level(metadata: dict[str, Any]):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata[f"{_PREFIX}pre"]
    vocab = {token: index for index, token in enumerate(metadata[f"{_PREFIX}tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata[f"{_PREFIX}merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    pattern = SPLITS[pre]
    if pattern is not None:
        steps = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pattern == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any]):
    tokens = metadata[f"{_PREFIX}tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = merges_from_scores(tokens, metadata[f"{_PREFIX}scores"])
    prefix = metadata.get(f"{_PREFIX}add_space_prefix", True)
    return sentencepiece_bpe(vocab, merges, _special(metadata, "unknown"), prefix=prefix)


def sentencepiece_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str | None, *, prefix: bool):
    """Sentencepiece's BPE with byte tokens as a `tokenizers.Tokenizer`; `prefix` puts a space in front of a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def merges_from_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, one score a token; the highest comes first."""
    ranked = [(-scores[whole], left, right) for whole, left, right in _joins(tuple(tokens))]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(ranked)]


@functools.lru_cache(maxsize=1)  # asked for by the check, the announcement and the tokenizer
def _joins(tokens: tuple[str, ...]) -> list[tuple[int, int, int]]:
    """Places of every token that is two others, one after another, and of those.

    Raises:
      ValueError: they are too many.
    """
    places, found, characters = {token: place for place, token in enumerate(tokens)}, [], 0
    for whole, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left = places.get(token[:cut])
            right = None if left is None else places.get(token[cut:])
            if right is not None:
                found.append((whole, left, right))
                characters += len(token)
        if len(found) > _MERGES or characters > _MERGED_CHARACTERS:
            raise ValueError(
                f"the tokenizer's tokens can be joined into one another in more than {_MERGES:,} ways, or into "
                f"{_MERGED_CHARACTERS:,} characters, which are the limits; {whole + 1:,} of its {len(tokens):,} tokens "
                f"can be in {len(found):,} ways, into {characters:,} characters"
            )
    return found


def _add_tokens(tokenizer, metadata: dict[str, Any]) -> None:
    from tokenizers import AddedToken

    special, plain = [], []
    for token, kind in zip(metadata[f"{_PREFIX}tokens"], metadata.get(f"{_PREFIX}token_type") or [], strict=False):
        if kind in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _prepend_bos(tokenizer, bos: str, index: int) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, index)]
    )


def _adds_bos(metadata: dict[str, Any]) -> bool:
    default = metadata[f"{_PREFIX}model"] == "llama" or metadata.get(f"{_PREFIX}pre") in _WHOLE_WORDS_FIRST
    return bool(metadata.get(f"{_PREFIX}add_bos_token", default))


def _special(metadata: dict[str, Any], name: str) -> str | None:
    index = metadata.get(f"{_PREFIX}{name}_token_id")
    return None if index is None else metadata[f"{_PREFIX}tokens"][index]


def _bad_bos(metadata: dict[str, Any]) -> list[str]:
    bos = _special(metadata, "bos")
    if bos is None or not _adds_bos(metadata) or fits_template(bos):
        return []
    return [f"the tokenizer's bos token {bos!r:.80} cannot be put in front of a text"]


def fits_template(token: str) -> bool:
    """Whether a template can name a token: they are written with spaces, $ and :."""
    return bool(token) and not re.search(r"[\s$:]", token)


def _are_scores(values: list[Any], count: int) -> bool:
    return len(values) == count and all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _bad_merges(merges: list[Any], tokens: set[str]) -> list[str]:
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else []
        if len(parts) != 2 or not {*parts, "".join(parts)} <= tokens:
            return [f"the tokenizer's merge {merge!r:.80} does not join two of its tokens into a third"]
    return []
