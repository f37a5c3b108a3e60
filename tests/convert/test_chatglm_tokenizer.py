"""ChatGLM's tokenizer out of tokenizer.model: tokens, texts and prompts are those of the publisher's code."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import made
import pytest
from made import tiny_hf
from sentencepiece_models import PIECES, SPECIALS, Original, train

from convert import ConversionError, convert, export
from convert.chatglm_tokenizer import open_chatglm_tokenizer
from convert.sentencepiece_file import read_sentencepiece
from jaxdecode.checkpoint import load_config
from jaxdecode.text import load
from jaxdecode.tokenizer import TextBuilder, encode_chat, encode_text, load_tokenizer

ROOM = 920  # the model's vocabulary
CODE = "raise SystemExit('the code of the checkpoint was run')\n"


def settings(version: int, **changes) -> dict:
    """The publisher's tokenizer_config.json."""
    code = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    name = {"name_or_path": f"THUDM/chatglm{version}-6b", "remove_space": False, "do_lower_case": False}
    return name | {"tokenizer_class": "ChatGLMTokenizer", "auto_map": code} | changes


def write_files(folder: Path, version: int, model: bytes | None = None, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train() if model is None else model)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings(version, **changes)))
    return folder


def write_model(folder: Path, version: int) -> Path:
    """A tiny ChatGLM as its publisher's directories are, code included."""
    config = tiny_hf.CASES["chatglm"] | {"padded_vocab_size": ROOM, "seq_length": 512}
    made.write_directory(folder, config | {"auto_map": {"AutoModel": "modeling_chatglm.ChatGLMModel"}})
    for name in ("modeling_chatglm.py", "tokenization_chatglm.py"):
        (folder / name).write_text(CODE)
    return write_files(folder, version)


@pytest.fixture(scope="module", params=[2, 3])
def version(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def original(version) -> Original:
    return Original(version)


@pytest.fixture(scope="module")
def converted(version, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chatglm")
    convert(write_model(folder / "hf", version), folder / "ours")
    return folder / "ours"


@pytest.fixture(scope="module")
def tokenizer(converted):
    return load_tokenizer(converted / "tokenizer")


PLAIN = [
    "The quick brown fox", "fox", " fox", "fox ", "  two  spaces  ", "a", "人工智能", "你好，世界！", "晚上睡不着",
    "混合 mixed 文本", "北京 Beijing 上海 Shanghai", "龘靐齉", "def main():\n    return 1\n",
    "for i in range(10):\n\tprint(i)\n",
    "if (a<b && c>d) { x[0] = '\\n'; } // end", '{"key": [1, 2, 3]}', "😀", "😀😀 👩‍👩‍👧 🇫🇷", "a😀b", "naïve café €10",
    "Ångström e\u0301 ﬁ ½ ①", "Ｆｕｌｌ　ｗｉｄｔｈ，。！", "　", "１２３", "1234567890",
    "3.14159 -1e10", "\n", "\n\n\n", "\t", "\t\t x",
    "\r\n", "line\nbreak\n", " \n \t ", "▁", "▁▁fox", "a▁b", "\x00", "a\x00b", "\ufeffbom", "\u200bzero", "\x7f\x1b[0m",
    "https://example.org/a?b=c&d=%20#e", "user@example.org", "ALLCAPS lower MiXeD", "...!!!???", "'\"`´‘’“”«»",
    "русский текст", "עברית ועברית", "العربية", "हिन्दी", "ไทย", "한국어 텍스트", "日本語のテキスト",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\U0010ffff",
    "the " * 300, "人工智能" * 300, "a" * 5000, "\n" * 700, "😀" * 400,
]  # fmt: skip
TYPED = [
    *SPECIALS, "<unk>", "<s>", "</s>", "<pad>", "<0x0A>", "<|endoftext|>", "sophisticated sop eop sopeop", "[gMASK]sop",
    "say [gMASK] and <|user|>\n no </s> more", "<|user|>\n hi<|assistant|>", "[[gMASK]]", "<|user<|user|>|>",
    "问：[MASK]答：",
]  # fmt: skip


def made_up() -> list[str]:
    """Spaces in every number, and letters of all sorts thrown together."""
    source = random.Random(0)
    alphabets = ("ab fox", "人工智能的 技术", " \n\t", "ａ　１ b", "😀a 的\n", "<|user>[gMASK] sop")
    texts = ["x" + " " * count + "y" for count in range(40)] + [" " * count for count in range(1, 40)]
    return texts + ["".join(source.choices(letters, k=source.randint(1, 40))) for letters in alphabets * 40]


TEXTS = [*PLAIN, *TYPED, *made_up()]


def test_tokens_are_those_of_sentencepiece(tokenizer, original):
    assert len(set(TEXTS)) > 300
    for text in TEXTS:
        assert encode_text(tokenizer, text) == original.encode(text), text
    assert tokenizer("")["input_ids"] == original.encode("") == original.prefix


def test_texts_of_pieces_at_random(tokenizer, original):
    pieces = [original.pieces.id_to_piece(index).replace("▁", " ") for index in range(259, PIECES)]
    source = random.Random(1)
    for _ in range(3000):
        text = "".join(source.choices(pieces, k=source.randint(1, 9)))
        assert encode_text(tokenizer, text) == original.encode(text), text


def test_decoding_gives_the_text_back_as_the_original_does(tokenizer, original):
    for text in TEXTS:
        tokens = encode_text(tokenizer, text)
        decoded = tokenizer.decode(tokens, skip_special_tokens=True)
        assert decoded == original.decode(tokens) == text.replace("▁", " "), text


def test_special_tokens_are_where_the_original_has_them(tokenizer, original, version):
    assert len(tokenizer) == PIECES + (5 if version == 2 else 9)
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in original.specials} == original.specials
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 0, 2)
    assert tokenizer.bos_token is None and tokenizer.padding_side == "left" and tokenizer.model_max_length == 512
    everything = [0, 1, 2, *original.specials.values()]
    assert tokenizer.decode(everything, skip_special_tokens=True) == ""
    assert tokenizer.convert_ids_to_tokens(everything[3:]) == list(original.specials)


def test_where_a_model_stops(converted, version):
    assert load_config(converted).eos_token_ids == ((2,) if version == 2 else (PIECES + 6, PIECES + 8, 2))


@pytest.mark.parametrize("rounds", [1, 2, 3, 11])
@pytest.mark.parametrize(
    "typed", ["你好", "  fox ", "a\n\nb", "[gMASK]sop<|user|>\n </s>", "[Round 2]\n\n问：x\n\n答：", "\ue000sop"]
)
def test_prompts(tokenizer, original, version, rounds, typed):
    turns = [(f"{typed} {count}", f"回答 {typed} {count}") for count in range(rounds - 1)]
    said = [*(line for turn in turns for line in turn), typed]
    messages = [{"role": ("user", "assistant")[index % 2], "content": line} for index, line in enumerate(said)]
    if version == 2:
        assert encode_chat(tokenizer, messages) == original.encode(original.prompt_2(typed, turns))
    else:
        messages = [{"role": "system", "content": typed}, *messages]
        assert encode_chat(tokenizer, messages) == original.chat_3(messages)


def test_answers_are_kept_without_white_space_around_them(tokenizer):
    """As the publisher's chat does; what a model says begins with some."""

    def chat(answer: str) -> list[int]:
        turns = [("user", "a"), ("assistant", answer), ("user", "b")]
        return encode_chat(tokenizer, [{"role": role, "content": text} for role, text in turns])

    assert chat("\n fox\n") == chat("fox") != chat("fox fox")


def test_a_role_of_chatglm_3_may_say_more(tmp_path):
    messages = [
        {"role": "assistant", "metadata": "tool_name sop<|user|>", "content": "x"},
        {"role": "observation", "content": ""},
    ]
    assert encode_chat(alone(tmp_path, 3), messages) == Original(3).chat_3(messages)


def test_every_private_character_at_once(tokenizer):
    taken = "".join(map(chr, range(0xE000, 0xF900)))
    with pytest.raises(ValueError, match="every private character"):
        encode_chat(tokenizer, [{"role": "user", "content": taken}])
    assert encode_chat(tokenizer, [{"role": "user", "content": taken[:-1] + "sop"}])


def test_conversations_that_do_not_exist(tokenizer, version):
    def chat(*roles: str) -> list[int]:
        return encode_chat(tokenizer, [{"role": role, "content": "x"} for role in roles])

    with pytest.raises(ValueError, match=rf"refuses this conversation: ChatGLM{version} knows .*; got tool"):
        chat("tool")
    if version == 2:
        for roles, problem in {
            ("system", "user"): "got system first",
            ("user", "user"): "got user after user",
            ("user", "assistant"): "the last is of assistant",
        }.items():
            with pytest.raises(ValueError, match=problem):
                chat(*roles)


def alone(folder: Path, version: int):
    """The tokenizer of a directory that holds nothing else."""
    opened = open_chatglm_tokenizer(write_files(folder / "hf", version), {})
    assert opened is not None
    opened.write(folder)
    return load_tokenizer(folder)


def test_the_original_prompt_word_for_word(tmp_path):
    tokens = encode_chat(alone(tmp_path, 2), [{"role": "user", "content": "晚上睡不着应该怎么办"}])
    assert tokens == Original(2).encode("[Round 1]\n\n问：晚上睡不着应该怎么办\n\n答：")


def test_pieces_of_text_as_they_come(tokenizer, original):
    prompt = encode_text(tokenizer, "答：")
    for text in ("你好👋！ fox  jumps\n", "龘靐", "\n 问题"):
        builder = TextBuilder(tokenizer, prompt)
        pieces = [builder.feed(token) for token in original.pieces.encode(text)] + [builder.finish()]
        assert "".join(pieces) == builder.text == f" {text}"


def test_a_model_generates_and_chats_without_its_code(converted, run):
    model = load(converted)
    assert model.generate("你好", chat=True, max_new_tokens=5)[0].prompt_tokens == len(model.encode("你好", chat=True))
    code, out, _ = run("generate", converted, "--chat", "--prompt", "你好", "--max-new-tokens", 4, "--json")
    assert code == 0 and json.loads(out)["tokens"]
    code, out, err = run("chat", converted, "--max-new-tokens", 4, stdin="你好\nfox\n/exit\n")
    assert code == 0 and err.count("prompt tokens") == 2 and "error" not in err
    written = sorted(file.name for file in (converted / "tokenizer").iterdir())
    assert written == ["tokenizer.json", "tokenizer_config.json"]


def test_an_exported_model_keeps_its_tokenizer(converted, tokenizer, tmp_path):
    export(converted, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "again")
    assert load_config(tmp_path / "again") == load_config(converted)
    again = load_tokenizer(tmp_path / "again" / "tokenizer")
    assert again is not None and again.chat_template == tokenizer.chat_template
    for text in TEXTS[:80]:
        assert encode_text(again, text) == encode_text(tokenizer, text)


def test_what_tells_chatglm_2_from_3(tmp_path):
    def size(config: dict, code: str | None = None, **changes) -> int:
        folder = write_files(tmp_path, 2, **changes)
        (folder / "tokenization_chatglm.py").unlink(missing_ok=True)
        if code is not None:
            (folder / "tokenization_chatglm.py").write_text(code)
        opened = open_chatglm_tokenizer(folder, config)
        assert opened is not None
        return opened.size - PIECES

    assert size({}) == 5
    assert size({}, name_or_path="THUDM/ChatGLM3-6b-32k") == 9
    assert size({"_name_or_path": "THUDM/chatglm3-6b"}, name_or_path="/models/mine") == 9
    assert size({}, name_or_path="/models/chatglm2/chatglm3-6b-32k/") == 9
    assert size({}, name_or_path="/models/chatglm3/chatglm2-6b") == 5
    assert size({}, name_or_path="/models/mine", chat_template="<|user|> … <|observation|>") == 9
    assert size({}, CODE, name_or_path="/models/mine") == 5
    assert size({}, CODE + "# <|observation|>", name_or_path="/models/mine") == 9
    with pytest.raises(ConversionError, match=r"nothing says whether .* found '/models/mine'; write one there"):
        size({}, name_or_path="/models/mine")


def without(*names: str):
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def with_model(model):
    """model: the bytes, or what makes them."""
    return lambda folder: (folder / "tokenizer.model").write_bytes(model() if callable(model) else model)


def with_config(**changes):
    return lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps(settings(2, **changes)))


def edited(**changes) -> bytes:
    """The trained model with pieces (by id) or fields of its normaliser changed."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(train())
    for name, value in changes.items():
        if name == "types":
            for index, kind in value.items():
                model.pieces[index].type = kind
        elif name == "score":
            model.pieces[300].score = model.pieces[301].score
        else:
            setattr(model.normalizer_spec, name, value)
    return model.SerializeToString()


def renamed(index: int, name: str) -> bytes:
    """The trained model with another text for a piece."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(train())
    model.pieces[index].piece = name
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("tokenizer.model"), "names 'ChatGLMTokenizer', but no tokenizer.model: get that file"),
        (with_model(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "git lfs pull"),
        (with_model(b""), r"tokenizer.model \(0 bytes\): it is damaged, .*holds no pieces"),
        (with_model(lambda: train()[:-7]), "it is damaged, or no SentencePiece model"),
        (with_model(b"IQ== 0\nIg== 1\n"), "it is damaged, or no SentencePiece model"),
        (with_model(lambda: train(model_type="unigram", vocab_size=470)), "its model_type is 1; supported is 2, BPE"),
        (with_model(lambda: train(byte_fallback=False, vocab_size=500)), "holds 0 of the 256 byte pieces"),
        (with_model(lambda: train(normalization_rule_name="nfkc")), "it normalises characters"),
        (with_model(lambda: train(user_defined_symbols="<n>")), r"pieces of types \[4\]"),
        (with_model(lambda: edited(remove_extra_whitespaces=True)), "its remove_extra_whitespaces is not False"),
        (with_model(lambda: edited(score=True)), "the same score"),
        (with_model(lambda: edited(types={7: 1})), "holds 255 of the 256 byte pieces"),
        (with_model(lambda: train(vocab_size=916)), "are 921 tokens, the model has room for 920"),
        (with_config(tokenizer_class="ChatGLM4Tokenizer"), "tokenizer_class 'ChatGLM4Tokenizer' is not supported"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "is not readable JSON"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(change, message, tmp_path, run):
    source = write_model(tmp_path / "hf", 2)
    change(source)
    code, _, err = run("convert", source, tmp_path / "ours")
    assert code == 1 and not (tmp_path / "ours").exists() and "Traceback" not in err
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "ours")


@pytest.mark.parametrize("name", ["sop", "[gMASK]", "eop"])
def test_a_special_token_that_is_a_piece_too_is_refused(name, tmp_path):
    """One name has one id in a tokenizer.json: the tokens after it would all move down."""
    source = write_model(tmp_path / "hf", 2)
    with_model(renamed(300, name))(source)
    with pytest.raises(ConversionError, match=rf"holds {re.escape(repr(name))} as pieces of text, .* special tokens"):
        convert(source, tmp_path / "ours")
    with_model(renamed(2, name))(source)  # what ends a text may not be called so either
    with pytest.raises(ConversionError, match="names of special tokens"):
        convert(source, tmp_path / "ours")


def test_without_tokenizer_files_the_weights_are_converted(tmp_path):
    source = write_model(tmp_path / "hf", 2)
    without("tokenizer.model", "tokenizer_config.json")(source)
    convert(source, tmp_path / "ours")
    assert load(tmp_path / "ours").tokenizer is None


def test_a_model_without_the_space_in_front(tmp_path):
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes(train(add_dummy_prefix=False))
    tokenizer = read_sentencepiece(tmp_path / "tokenizer.model").build()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=train(add_dummy_prefix=False))
    for text in PLAIN:
        assert tokenizer.encode(text).ids == pieces.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == pieces.decode(pieces.encode(text))


def test_code_that_a_tokenizer_names_is_not_taken_along(tmp_path):
    """Of any family; and a checkpoint that still names some is refused, not trusted."""
    from tiny_tokenizer import byte_level_tokenizer

    source = made.write_directory(tmp_path / "hf", made.small_case(vocab_size=320))
    byte_level_tokenizer().save_pretrained(source)
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["code.Class", None]}}))
    (source / "code.py").write_text(CODE)
    convert(source, tmp_path / "ours")
    kept = tmp_path / "ours" / "tokenizer"
    assert load(tmp_path / "ours").encode("hello") == byte_level_tokenizer()("hello")["input_ids"]
    assert not (kept / "code.py").exists() and "auto_map" not in (kept / "tokenizer_config.json").read_text()
    (kept / "tokenizer_config.json").write_text(file.read_text())
    with pytest.raises(ValueError, match=r"names code of its own .*never runs; convert the model again"):
        load(tmp_path / "ours")
