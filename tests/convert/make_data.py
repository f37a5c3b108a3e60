"""Makes the files in data/: python tests/convert/make_data.py SMOLLM2.gguf; needs torch, transformers, gguf, regex.

data/torch.bin is written by torch. data/smollm2_tokens.json holds texts and their tokens by a byte-pair encoder written
here after llama.cpp's rules, and whether transformers' own reading of the GGUF file gives the same: it does not know
the pre-tokenizer "smollm", which cuts out every digit before GPT-2's rule is applied.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

DATA = Path(__file__).parent / "data"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = [
    "Hello world", "The year is 2024, pi = 3.14159", "  leading", "trailing   ", "a\n\n\nb\t\tc", "", " ", "\n",
    "it's we'll I'M DON'T they've I'd", "naïve café Ünïcödé", "日本語のテキスト", "😀👨‍👩‍👧‍👦 emoji", "½ ² ³ ① Ⅷ ٣٤",
    "x=1234567890;y=-0.5e10", "def f(x):\n    return x**2\n", "\u200b\u00a0 nbsp", "Ġ raw", "http://a.b/c?d=e&f=1",
    "A" * 50, "\r\nwindows\r\n", "mixed 12ab34 5-6 7/8", " 1 22  333", "देवनागरी १२३", "\x00\x7f control",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>", "<repo_name>foo<file_sep>", "a<|im_end|>b <|im_end|> c",
]  # fmt: skip
CHAT = [
    {"role": "user", "content": "Hi there 12"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "?"},
]


def main() -> None:
    write_torch_file()
    write_tokens(Path(sys.argv[1]))


def write_torch_file() -> None:
    import torch

    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "base": base, "transposed": base.T, "rows": base[2:], "column": base[:, 3],
        "half": torch.arange(5, dtype=torch.float16), "brain": torch.arange(3, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)), "integers": torch.arange(3),
    }  # fmt: skip
    torch.save(tensors, DATA / "torch.bin")


def write_tokens(path: Path) -> None:
    from transformers import AutoTokenizer

    encode = smollm_encoder(path)
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    chat = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    letters = "abc XYZ 019.,!?'\n\té漢😀<|>_-²"
    made = ["".join(random.Random(seed).choices(letters, k=seed % 30 + 1)) for seed in range(200)]
    rows = [{"text": t, "ids": encode(t), "transformers": theirs.encode(t) == encode(t)} for t in [*TEXTS, *made]]
    assert theirs.encode(chat) == encode(chat)
    golden = {"chat": CHAT, "chat_text": chat, "chat_ids": encode(chat), "rows": rows}
    (DATA / "smollm2_tokens.json").write_text(json.dumps(golden, ensure_ascii=False, indent=0) + "\n")
    differ = [row["text"] for row in rows if not row["transformers"]]
    print(f"{len(rows)} texts, {len(differ)} of them otherwise in transformers, for example {differ[:4]}")


def smollm_encoder(path: Path):
    """Text -> token ids: special tokens first, then every digit, then GPT-2's words, then merges by rank."""
    import gguf
    import regex

    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = {tuple(m.split(" ")): rank for rank, m in enumerate(fields["tokenizer.ggml.merges"].contents())}
    ids = {token: index for index, token in enumerate(tokens)}
    special = [token for token, kind in zip(tokens, types) if kind == 3]  # noqa: B905
    special_pattern = regex.compile("(" + "|".join(map(regex.escape, sorted(special, key=len, reverse=True))) + ")")
    letters = byte_letters()

    def encode(text: str) -> list[int]:
        found = []
        for part in special_pattern.split(text):
            if part in special:
                found.append(ids[part])
                continue
            for piece in regex.split(r"(\p{N})", part):
                for word in regex.findall(GPT2, piece):
                    found += [ids[token] for token in merge("".join(letters[byte] for byte in word.encode()))]
        return found

    def merge(word: str) -> list[str]:
        pieces = list(word)
        while True:
            ranks = [merges.get(pair, len(merges)) for pair in itertools.pairwise(pieces)]
            if not ranks or min(ranks) == len(merges):
                return pieces
            best = ranks.index(min(ranks))
            pieces[best : best + 2] = ["".join(pieces[best : best + 2])]

    return encode


def byte_letters() -> list[str]:
    """GPT-2's alphabet: a printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


if __name__ == "__main__":
    main()
