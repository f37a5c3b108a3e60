"""A small SentencePiece model of ChatGLM's kind, trained here, and what its publisher's code makes of text with it.

The real one (1,018,370 bytes) is BPE with byte fallback, normalises nothing, keeps every space and puts one in front.
"""

from __future__ import annotations

import functools
import io

import sentencepiece

PIECES = 900
SPECIALS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on in the afternoon sun.",
    "人工智能是研究、开发用于模拟、延伸和扩展人的智能的理论、方法、技术及应用系统的一门新的技术科学。",
    "晚上睡不着应该怎么办？可以喝一杯热牛奶，听一些轻松的音乐，不要看手机。",
    "你好，我是一个人工智能助手，很高兴见到你，欢迎问我任何问题。问：答：[Round 1] [Round 2]",
    "def main():",
    "    for index in range(10):",
    "        print(index, 'hello world')\t# greeting",
    "        return {'key': [1, 2, 3], \"value\": index * 2 + 1}",
    "北京是中华人民共和国的首都，是全国的政治中心、文化中心。上海是中国最大的城市之一。",
    "SOP means standard operating procedure; a sophisticated sop is not a special token. [MASK] <|user|> </s>",
    "Ｆｕｌｌ－ｗｉｄｔｈ　ｌｅｔｔｅｒｓ　１２３，。！？",
]


@functools.cache
def train(**changes) -> bytes:
    """The bytes of a tokenizer.model; `changes` are options of SentencePiece's trainer."""
    model = io.BytesIO()
    options = {
        "model_type": "bpe", "vocab_size": PIECES, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "character_coverage": 0.98,
        "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=model, **(options | changes)
    )
    return model.getvalue()


class Original:
    """What tokenization_chatglm.py does, in terms of SentencePiece alone."""

    def __init__(self, version: int):
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=train())
        first = self.pieces.get_piece_size()
        self.specials = {name: first + index for index, name in enumerate(SPECIALS[: 5 if version == 2 else 9])}
        self.prefix = [self.specials["[gMASK]"], self.specials["sop"]]

    def encode(self, text: str) -> list[int]:
        return self.prefix + self.pieces.encode(text)

    def decode(self, tokens: list[int]) -> str:
        return self.pieces.decode([token for token in tokens if token < self.pieces.get_piece_size()])

    def prompt_2(self, query: str, history: list[tuple[str, str]]) -> str:
        prompt = ""
        for count, (question, answer) in enumerate(history, 1):
            prompt += f"[Round {count}]\n\n问：{question}\n\n答：{answer}\n\n"
        return f"{prompt}[Round {len(history) + 1}]\n\n问：{query}\n\n答："

    def chat_3(self, messages: list[dict[str, str]]) -> list[int]:
        tokens = list(self.prefix)
        for message in messages:
            tokens.append(self.specials[f"<|{message['role']}|>"])
            tokens += self.pieces.encode(message.get("metadata", "") + "\n") + self.pieces.encode(message["content"])
        return [*tokens, self.specials["<|assistant|>"]]
