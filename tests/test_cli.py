"""The command line, in process, on a tiny checkpoint."""

import json
import subprocess
import sys
from importlib import import_module

import jax
import numpy as np
import pytest
from tiny import tiny_model
from tiny_tokenizer import byte_level_tokenizer

import jaxdecode
from jaxdecode.cli.chat import trim_history
from jaxdecode.text import LanguageModel


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = byte_level_tokenizer()
    params, config = tiny_model(vocab_size=len(tokenizer), num_layers=1, max_position=256)
    tokenizer.save_pretrained(folder / "tokenizer")
    jaxdecode.save(folder / "model", params, config, tokenizer_dir=folder / "tokenizer")
    return folder / "model"


@pytest.fixture(scope="module")
def model(checkpoint):
    return jaxdecode.load(checkpoint)


def test_generate_prints_the_text_on_stdout_and_the_times_on_stderr(run, checkpoint, model):
    code, out, err = run("generate", checkpoint, "--prompt", "the fox", "--max-new-tokens", 12)
    completion = model.generate("the fox", max_new_tokens=12)[0]
    assert (code, out) == (0, completion.text + "\n")
    assert err.count("on the CPU") == 1
    assert f"{completion.prompt_tokens} prompt tokens · first token after" in err
    assert "12 tokens at" in err
    assert "compiling" in err


def test_generate_reads_standard_input(run, checkpoint, model):
    _, out, _ = run("generate", checkpoint, "--prompt", "-", "--max-new-tokens", 5, stdin="hello world")
    assert out == model.generate("hello world", max_new_tokens=5)[0].text + "\n"


OPTIONS = "--temperature 1.1 --top-k 200 --top-p 0.9 --min-p 0.001 --repetition-penalty 1.1 --presence-penalty 0.1"


def test_generate_passes_every_option_on(run, checkpoint, model):
    options = [*OPTIONS.split(), "--frequency-penalty", 0.2, "--logit-bias", "65=2.5", "--logit-bias", "70=-1"]
    rest = ["--seed", 4, "--stop", "zzz", "--chat", "--num-samples", 2, "--max-new-tokens", 10, "--json"]
    code, out, err = run("generate", checkpoint, "--prompt", "hello", *options, *rest)
    assert code == 0, err
    chain = jaxdecode.sampler(1.1, 200, 0.9, 0.001, 1.1, 0.1, 0.2, {65: 2.5, 70: -1.0}, len(model.tokenizer))
    expected = model.generate("hello", sampler=chain, seed=4, stop="zzz", chat=True, num_samples=2, max_new_tokens=10)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["tokens"] for line in lines] == [completion.tokens for completion in expected]
    assert set(lines[0]) == {
        "prompt", "text", "tokens", "logprobs", "finish_reason", "prompt_tokens", "timing"
    }  # fmt: skip


def test_generate_runs_a_file_of_prompts_as_a_batch(run, checkpoint, model, tmp_path):
    (tmp_path / "prompts").write_text("hello\n\nthe fox\n")
    code, out, err = run("generate", checkpoint, "--prompts-file", tmp_path / "prompts", "--max-new-tokens", 6)
    first, second = model.generate(["hello", "the fox"], max_new_tokens=6)
    assert code == 0, err
    assert out == f"── hello\n{first.text}\n── the fox\n{second.text}\n"
    assert f"{first.prompt_tokens + second.prompt_tokens} prompt tokens" in err


def test_score_prints_totals(run, checkpoint, model, tmp_path):
    (tmp_path / "texts").write_text("hello world\nthe dog\n")
    code, out, _ = run("score", checkpoint, "--file", tmp_path / "texts", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    for line, result in zip(lines, model.score(["hello world", "the dog"]), strict=True):
        assert line["tokens"] == result.tokens
        assert line["total"] == pytest.approx(result.total, abs=1e-4)
        assert line["perplexity"] == pytest.approx(np.exp(-np.mean(result.logprobs)), rel=1e-4)
    code, out, _ = run("score", checkpoint, "--text", "-", stdin="hello world")
    assert code == 0
    assert f"total {lines[0]['total']:.4f}" in out


def test_chat_answers_forgets_and_leaves(run, checkpoint, model):
    said = "hello\n/help\n/nonsense\n/clear\nthe dog\n/exit\nnever reached\n"
    code, out, err = run("chat", checkpoint, "--temperature", 0, "--max-new-tokens", 8, stdin=said)
    assert code == 0, err
    sampler = jaxdecode.sampler(0, top_p=0.95)
    answers = [
        "".join(model.stream(words, chat=True, sampler=sampler, max_new_tokens=8)) for words in ("hello", "the dog")
    ]
    assert out == "".join(answer + "\n" for answer in answers)
    assert "There is no /nonsense" in err
    assert "forgotten" in err


def test_chat_says_when_a_message_is_too_long_and_goes_on(run, checkpoint):
    code, _, err = run("chat", checkpoint, "--max-new-tokens", 8, stdin=f"{'z' * 400}\nhello\n")
    assert code == 0
    assert "error: prompt and new tokens must fit the model's 256 positions" in err
    assert "8 tokens" in err


def test_chat_drops_the_oldest_turns_when_the_context_is_full(model):
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": "dog " * 12} for i in range(9)]
    history = [{"role": "system", "content": "be brief"}, *turns]
    dropped = trim_history(model, history, 1, 64)
    assert 0 < dropped == 10 - len(history) and dropped % 2 == 0
    assert history[0]["role"] == "system"
    assert history[-1] is turns[-1] and history[1]["role"] == "user"
    assert len(model.encode(history)) + 64 - 1 <= 256
    restored = [history[0], *turns[dropped - 2 :]]
    assert len(model.encode(restored)) + 64 - 1 > 256


def test_env_tells_versions_devices_and_caches(run):
    code, out, _ = run("env", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["jax"], facts["jaxdecode"]) == (jax.__version__, jaxdecode.__version__)
    assert len(facts["devices"]) == 2
    assert facts["compiled programs"].startswith("not kept")
    assert "CPU" in facts["backend"]
    code, out, _ = run("env")
    assert "decode_attention" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{absent}", "--prompt", "x"], "no checkpoint at"),
        (["generate", "{model}"], "give one of --prompt TEXT"),
        (["generate", "{model}", "--prompt", "x", "--prompts-file", "y"], "give one of --prompt TEXT"),
        (["generate", "{model}", "--prompts-file", "{absent}"], "No such file"),
        (["generate", "{model}", "--prompts-file", "{empty}"], "holds no prompts"),
        (["generate", "{model}", "--prompt", ""], "the prompt is empty"),
        (["generate", "{model}", "--prompt", "x", "--top-p", "7"], "top_p must be in"),
        (["generate", "{model}", "--prompt", "x", "--temperature", "-1"], "temperature must be at least 0"),
        (["generate", "{model}", "--prompt", "x", "--logit-bias", "a=b"], "--logit-bias takes TOKEN=BIAS"),
        (["generate", "{model}", "--prompt", "x", "--max-new-tokens", "300"], "got 2 + 300, which need 301"),
        (["generate", "{model}", "--prompt", "x", "--max-new-tokens", "0"], "must be at least 1; got 0"),
        (["generate", "{model}", "--prompt", "x", "--stop", ""], "a stop string must not be empty"),
        (["score", "{model}"], "give one of --text TEXT"),
        (["score", "{model}", "--file", "{empty}"], "holds no texts"),
        (["chat", "{bare}"], "this checkpoint has no tokenizer"),
        (["convert", "{absent}", "{absent}-jax"], ""),
        (["export", "{absent}", "{absent}-hf"], ""),
    ],
)
def test_an_error_is_one_paragraph(run, checkpoint, model, tmp_path, arguments, message):
    (tmp_path / "empty").write_text("\n")
    places = {"model": checkpoint, "absent": tmp_path / "absent", "empty": tmp_path / "empty"}
    if "{bare}" in arguments:
        jaxdecode.save(tmp_path / "bare", model.params, model.config)
    code, out, err = run(*(text.format(bare=tmp_path / "bare", **places) for text in arguments))
    assert code == 1
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert err.count("error: ") == 1


def test_debug_shows_the_traceback(run, tmp_path):
    for arguments in (["--debug", "generate"], ["generate", "--debug"]):
        with pytest.raises(FileNotFoundError):
            run(*arguments, tmp_path / "absent", "--prompt", "x")


def test_wrong_usage_and_no_command(run):
    assert run("generate")[0] == 2
    assert run("nonsense")[0] == 2
    code, out, err = run()
    assert code in (0, 2)
    for command in ("convert", "verify", "export", "generate", "chat", "score", "env"):
        assert command in out + err


def test_help_starts_without_jax():
    code = "import sys, jaxdecode.cli; print([m for m in ('jax', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_checkpoint_that_needs_converting_names_the_command(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, _, err = run("generate", tmp_path, "--prompt", "x")
    assert code == 1
    assert f"jaxdecode convert {tmp_path} " in err.replace("\n", " ")


def test_the_api_lists_what_it_has():
    for name in jaxdecode.__all__:
        assert getattr(jaxdecode, name) is not None
        assert name in dir(jaxdecode)
    assert jaxdecode.generate is import_module("jaxdecode.generation").generate
    assert isinstance(LanguageModel, type)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jaxdecode.nothing  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
