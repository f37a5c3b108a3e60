"""The text layer on a tiny random model with a tokenizer made here: generate, stream, score, stop strings."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from tiny import tiny_model
from tiny_tokenizer import byte_fallback_tokenizer, byte_level_tokenizer

import jaxdecode
from jaxdecode import sampler
from jaxdecode.decoding import Buckets
from jaxdecode.text import LanguageModel, load
from jaxdecode.tokenizer import TextBuilder


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    params, config = tiny_model(vocab_size=len(tokenizer), num_layers=1, max_position=256)
    return LanguageModel(params, config, tokenizer)


WILD = sampler(1.2, top_k=300)  # random text: any byte may follow any other


def plain(completion):
    """A completion without its timing, which no two runs share."""
    return {k: v for k, v in dataclasses.asdict(completion).items() if k not in ("timing", "logprobs")}


@pytest.fixture(scope="module")
def long_text(model):
    return model.generate("the fox", max_new_tokens=100, sampler=WILD, seed=3)[0]


def test_the_text_is_what_the_tokenizer_decodes(model, tokenizer, long_text):
    tokens = [token for token in long_text.tokens if token != tokenizer.eos_token_id]
    assert long_text.text == tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")
    assert len(long_text.text) > 40
    assert len(long_text.logprobs) == len(long_text.tokens)
    assert long_text.finish_reason in ("eos", "length")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stop_at", [None, 1, 3])
def test_stream_gives_the_text_of_generate(model, seed, stop_at):
    options = dict(max_new_tokens=60, sampler=WILD, seed=seed)
    if stop_at:
        text = model.generate("hello", **options)[0].text
        options["stop"] = ["nowhere to be found", text[20 : 20 + stop_at]]
    stream = model.stream("hello", **options)
    pieces = list(stream)
    completion = model.generate("hello", **options)[0]
    assert "".join(pieces) == completion.text
    assert stream.completion is not None
    assert plain(stream.completion) == plain(completion)
    if not stop_at:
        assert len(pieces) > 10  # as they come, not at the end


@pytest.mark.parametrize("start", [0, 5, 17, 40])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_stop_string_cuts_before_its_first_occurrence(model, long_text, start, length):
    stop = long_text.text[start : start + length]
    completion = model.generate("the fox", max_new_tokens=100, sampler=WILD, seed=3, stop=stop)[0]
    assert completion.text == long_text.text[: long_text.text.index(stop)]
    assert completion.finish_reason == "stop"
    assert completion.tokens == long_text.tokens[: len(completion.tokens)]
    assert len(completion.logprobs) == len(completion.tokens) < len(long_text.tokens)


def test_rows_stop_each_for_themselves(model):
    prompts, options = ["the fox", "hello", "dog"], dict(max_new_tokens=50, sampler=WILD, seed=3)
    free = model.generate(prompts, **options)
    stop = free[1].text[12:15]
    together = model.generate(prompts, stop=stop, **options)
    assert [plain(c) for c in together] == [plain(model.generate(p, stop=stop, **options)[0]) for p in prompts]
    assert together[1].finish_reason == "stop"


def test_a_batch_changes_nothing(model):
    prompts = ["the fox", "hello " * 20, "d", "naïve €", "over"]
    options = dict(max_new_tokens=20, sampler=WILD, seed=5)
    together = model.generate(prompts, **options)
    assert [plain(c) for c in together] == [plain(model.generate(p, **options)[0]) for p in prompts]
    assert len({c.text for c in together}) == len(prompts)


def test_samples_seeds_and_numbers_per_prompt(model):
    options = dict(max_new_tokens=12)
    samples = model.generate(["the fox", "hello"], num_samples=3, sampler=WILD, **options)
    assert len({tuple(c.tokens) for c in samples}) == 6
    assert plain(samples[3]) == plain(model.generate("hello", sampler=WILD, **options)[0])
    again = model.generate(["hello", "hello"], seeds=[8, 9], sampler=WILD, **options)
    assert plain(again[1]) == plain(model.generate("hello", seed=9, sampler=WILD, **options)[0])
    assert again[0].tokens != again[1].tokens
    mixed = model.generate(["hello"] * 3, sampler=sampler([0.0, 1.2, 2.0]), num_samples=2, **options)
    greedy = model.generate("hello", **options)[0]
    assert plain(mixed[0]) == plain(mixed[1]) == plain(greedy)
    assert plain(mixed[2]) == plain(model.generate("hello", sampler=sampler(1.2), **options)[0])


def test_more_prompts_than_a_batch_holds_take_turns(model):
    prompts = [f"hello {i}" for i in range(35)]
    progress = []
    completions = model.generate(prompts, max_new_tokens=2, progress=progress.append)
    assert plain(completions[34]) == plain(model.generate(prompts[34], max_new_tokens=2)[0])
    assert progress == sorted(progress)
    assert progress[-1] == sum(len(c.tokens) for c in completions)


def test_the_end_token_ends_the_text_and_is_not_shown(model):
    eos = model.tokenizer.eos_token_id
    bias = {eos: 1000.0}
    completion = model.generate("hello", sampler=sampler(0, logit_bias=bias, vocab_size=len(model.tokenizer)))[0]
    assert (completion.text, completion.tokens, completion.finish_reason) == ("", [eos], "eos")
    other = LanguageModel(model.params, dataclasses.replace(model.config, eos_token_ids=(7,)), model.tokenizer)
    assert other.eos_token_ids() == (7,)
    completion = other.generate("hello", sampler=sampler(0, logit_bias={7: 1000.0}, vocab_size=len(model.tokenizer)))[0]
    assert (completion.text, completion.finish_reason) == ("", "eos")


def test_chat_encodes_the_template_once(model):
    tokens = model.encode([{"role": "user", "content": "hello"}])
    assert model.tokenizer.decode(tokens) == "<s><|user|>hello</s><|assistant|>"
    assert tokens.count(model.tokenizer.bos_token_id) == 1
    assert model.encode("hello", chat=True) == tokens
    assert model.encode("hello")[0] == model.tokenizer.bos_token_id
    conversations = [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "dog"}]]
    both = model.generate(conversations, max_new_tokens=4)
    assert plain(both[0]) == plain(model.generate("hello", chat=True, max_new_tokens=4)[0])
    assert plain(both[1]) == plain(model.generate(conversations[1], max_new_tokens=4)[0])


def test_score_is_the_log_probability_of_generation(model):
    completion = model.generate("the fox", max_new_tokens=20)[0]
    tokens = model.encode("the fox") + completion.tokens
    texts = ["the fox", "hello world", model.tokenizer.decode(tokens[1:], skip_special_tokens=True)]
    scores = model.score(texts)
    for text, result in zip(texts, scores, strict=True):
        assert result.tokens == model.encode(text)
        assert len(result.logprobs) == len(result.tokens) - 1
        assert result.total == pytest.approx(sum(result.logprobs))
        assert result.perplexity == pytest.approx(math.exp(-np.mean(result.logprobs)))
    if scores[2].tokens == tokens:  # decoding and encoding again may split the text otherwise
        np.testing.assert_allclose(scores[2].logprobs[-20:], completion.logprobs, atol=1e-5)
    direct = jaxdecode.score(model.params, model.config, np.asarray([tokens]), np.asarray([len(tokens)]))
    np.testing.assert_allclose(np.asarray(direct)[0, -len(completion.tokens) :], completion.logprobs, atol=1e-5)
    assert model.score("hello world")[0].total == pytest.approx(scores[1].total, abs=1e-4)


compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
)


def test_nothing_is_compiled_for_another_prompt_number_seed_or_weights(model):
    def run(lm, prompt, temperature, p, seed, limit):
        options = dict(max_new_tokens=limit, sampler=sampler(temperature, top_p=p), seed=seed)
        list(lm.stream(prompt, **options))
        lm.generate(prompt, stop="qqq", **options)
        return lm.generate(prompt, **options)[0]

    first = run(model, "hello", 1.0, 0.5, 0, 10)
    run(model, "dog", 0.1, 0.5, 1, 10)
    before = len(compiled)
    other = LanguageModel(jax.tree.map(lambda x: x * 1.01, model.params), model.config, model.tokenizer)
    weights = len(compiled) - before  # the products above
    second = run(other, "hello " * 25, 0, 0.9, 12345, 17)
    assert len(compiled) - before == weights
    assert first.timing.first_token_seconds > 0
    assert second.timing.compile_seconds == 0.0
    assert second.timing.decoded_tokens == len(second.tokens) - 1


def test_compile_time_is_apart(model):
    config = dataclasses.replace(model.config, max_position=255)  # another program
    fresh = LanguageModel(model.params, config, model.tokenizer)
    timings = [fresh.generate("hello", max_new_tokens=5)[0].timing for _ in range(2)]
    assert timings[0].compile_seconds > 10 * timings[0].first_token_seconds
    assert timings[1].compile_seconds == 0.0
    assert timings[1].tokens_per_second is not None


@pytest.mark.parametrize(
    ("prompt", "limit", "max_position", "expected"),
    [
        (1, 1, 4096, (1, 960, 64)),
        (960, 64, 4096, (1, 960, 64)),
        (961, 64, 4096, (1, 1984, 64)),
        (5, 128, 4096, (1, 896, 128)),
        (5, 129, 4096, (1, 768, 256)),
        (1900, 48, 2048, (1, 1984, 64)),
        (2000, 48, 2048, (1, 2000, 48)),
        (1990, 48, 2048, (1, 2000, 48)),
        (100, 20, 128, (1, 108, 20)),
    ],
)
def test_buckets(prompt, limit, max_position, expected):
    buckets = Buckets.of_prompts([[1] * prompt], limit, max_position)
    assert dataclasses.astuple(buckets) == expected
    assert buckets.prompt >= prompt and buckets.prompt + buckets.new_tokens <= max_position


def test_the_longest_prompt_the_model_allows_runs(model):
    prompt = "a" * 400
    tokens = len(model.encode(prompt))
    prompt = prompt[: 400 - (tokens - 251)]
    assert len(model.encode(prompt)) == 251
    assert len(model.generate(prompt, max_new_tokens=5)[0].tokens) == 5
    assert len(model.score(prompt)[0].logprobs) == 250


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(""), "the prompt is empty"),
        (lambda m: m.generate([]), "no prompts were given"),
        (lambda m: m.generate(["hello", ""]), "the prompt is empty"),
        (lambda m: m.generate([{"role": "user", "content": ""}]), "the prompt is empty"),
        (lambda m: m.generate("hello", max_new_tokens=0), "must be at least 1; got 0 and 1"),
        (lambda m: m.generate("hello", num_samples=0), "must be at least 1; got 128 and 0"),
        (lambda m: m.generate("a", max_new_tokens=256), r"the model's 256 positions; got 2 \+ 256, which need 257"),
        (lambda m: m.stream("a", max_new_tokens=256), r"the model's 256 positions; got 2 \+ 256, which need 257"),
        (lambda m: m.generate("a", stop=""), "a stop string must not be empty"),
        (lambda m: m.generate("a", stop=["x", ""]), "a stop string must not be empty"),
        (lambda m: m.generate(["a", "b"], seeds=[1]), "seeds must be one per prompt; got 1 for 2 prompts"),
        (lambda m: m.score("z" * 300), "256 positions"),
        (lambda m: m.score(""), "the prompt is empty"),
    ],
)
def test_bad_requests_say_what_is_wrong(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.parametrize("kind", ["rotary", "learned"])
def test_text_and_tokens_reach_the_same_last_position(model, tokenizer, kind):
    params, config = (model.params, model.config) if kind == "rotary" else tiny_model(
        vocab_size=len(tokenizer), num_layers=1, max_position=73, rope=None, position_offset=2
    )  # fmt: skip
    own = LanguageModel(params, config, tokenizer)
    limit, prompt = config.max_position, "z" * (config.max_position - 4)
    assert len(own.encode(prompt)) == limit - 3
    completion = own.generate(prompt, max_new_tokens=4)[0]  # the last is never fed
    assert len(completion.tokens) == 4 or completion.finish_reason == "eos"
    tokens = np.asarray([own.encode(prompt)])
    arguments = params, config, tokens, np.asarray([limit - 3]), jax.random.key(0)
    made = jaxdecode.generate(*arguments, max_new_tokens=4)
    assert made.tokens[0, : len(completion.tokens)].tolist() == completion.tokens
    message = f"the model's {limit} positions; got {limit - 3} \\+ 5, which need {limit + 1}: take a shorter prompt"
    message += " or fewer new tokens" + (", or convert with --extend-positions" if kind == "learned" else "$")
    with pytest.raises(ValueError, match=message):
        own.generate(prompt, max_new_tokens=5)
    if kind == "learned":
        with pytest.raises(ValueError, match=r"73 learned positions; 74 were asked for, .*--extend-positions"):
            jaxdecode.generate(*arguments, max_new_tokens=5)


def test_a_model_without_tokenizer_or_template_says_so(model):
    with pytest.raises(ValueError, match="this checkpoint has no tokenizer"):
        LanguageModel(model.params, model.config).generate("hello")
    plain_tokenizer = byte_level_tokenizer()
    plain_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="this model has no chat template"):
        LanguageModel(model.params, model.config, plain_tokenizer).generate("hello", chat=True)


def test_load_says_how_to_convert(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"Hugging Face checkpoint; .*jaxdecode convert {tmp_path} "):
        load(tmp_path)
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    with pytest.raises(ValueError, match=rf"GGUF file; .*jaxdecode convert {gguf} {tmp_path}/model-jax"):
        load(gguf)
    with pytest.raises(ValueError, match="no jaxdecode checkpoint"):
        (tmp_path / "empty").mkdir()
        load(tmp_path / "empty")


def test_a_saved_model_loads_and_generates_the_same(model, tmp_path):
    model.tokenizer.save_pretrained(tmp_path / "tokenizer")
    jaxdecode.save(tmp_path / "saved", model.params, model.config, tokenizer_dir=tmp_path / "tokenizer")
    again = load(tmp_path / "saved")
    options = dict(max_new_tokens=10, sampler=WILD, chat=True)
    assert again.config == model.config
    assert plain(again.generate("hello", **options)[0]) == plain(model.generate("hello", **options)[0])
    assert json.dumps(again.generate("hello", **options)[0].tokens)  # plain Python numbers


TEXTS = ["😀😀 naïve café € 10", "ab a b 😀 b", "é", "  two  spaces ", "line\nbreak 👩‍👩‍👧"]


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["a b", "b 😀"])
def test_text_builder_gives_whole_characters_and_in_sum_the_text(make, text, prompt):
    tokenizer = make()
    start, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + text)["input_ids"]
    assume_same_prefix = whole[: len(start)] == start
    following = whole[len(start) :] if assume_same_prefix else tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = tokenizer.decode(start + following, skip_special_tokens=True)[
        len(tokenizer.decode(start, skip_special_tokens=True)) :
    ]
    builder = TextBuilder(tokenizer, start)
    pieces = [builder.feed(token) for token in following] + [builder.finish()]
    assert "".join(pieces) == builder.text == expected
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) >= min(len(following), 2) // 2


def test_text_builder_drops_a_character_that_never_ends_and_shows_hopeless_bytes():
    tokenizer = byte_level_tokenizer()
    tokens = tokenizer("a😀", add_special_tokens=False)["input_ids"]
    broken = next(t for t in range(len(tokenizer)) if tokenizer.decode([t]) == "\ufffd")
    builder = TextBuilder(tokenizer, [])
    assert [builder.feed(tokens[0]), builder.feed(broken), builder.finish()] == ["a", "", ""]
    hopeless = TextBuilder(tokenizer, [])
    shown = "".join(hopeless.feed(broken) for _ in range(40)) + hopeless.finish()
    assert 16 <= len(shown) <= 40


def test_text_builder_holds_what_may_begin_a_stop_string():
    tokenizer = byte_level_tokenizer()
    tokens = [tokenizer.convert_tokens_to_ids(letter) for letter in "xabcabd!"]
    builder = TextBuilder(tokenizer, [], stop=["abd", "zz"])
    assert [builder.feed(token) for token in tokens] == ["x", "", "", "abc", "", "", "", ""]
    assert (builder.text, builder.stopped, builder.finish()) == ("xabc", True, "")
    ends = TextBuilder(tokenizer, [], stop=["abd"])
    assert [ends.feed(token) for token in tokens[:3]] + [ends.finish()] == ["x", "", "", "ab"]
