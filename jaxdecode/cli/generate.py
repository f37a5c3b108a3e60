"""`jaxdecode generate`: continue one prompt as a stream, or many as a batch."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxdecode.cli import options

if TYPE_CHECKING:
    from jaxdecode.text import Completion, LanguageModel


def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option(help="The text to continue; - reads standard input.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A file of prompts, one a line, as a batch.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = 0,
    implementation: options.Implementation = None,
    stop: options.Stop = None,
    num_samples: Annotated[int, typer.Option(help="Completions for each prompt.")] = 1,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Wrap prompts in the chat template, or not.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a completion.")] = False,
) -> None:
    """Continue a prompt, or a file of prompts as one batch."""
    prompts = _read_prompts(prompt, prompts_file)
    language_model = options.open_model(model, implementation)
    sampler = options.build_sampler(
        language_model.config,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
    )
    settings = dict(max_new_tokens=max_new_tokens, sampler=sampler, seed=seed, stop=stop or (), chat=chat)
    if len(prompts) == num_samples == 1 and not as_json:
        completions = [_stream(language_model, prompts[0], settings)]
    else:
        completions = _batch(language_model, prompts, num_samples, settings)
        for index, completion in enumerate(completions):
            _show(completion, prompts[index // num_samples], as_json, header=len(completions) > 1)
    if not as_json:
        options.messages().print(f"[dim]{_summary(completions, num_samples)}[/dim]")


def _read_prompts(prompt: str | None, prompts_file: Path | None) -> list[str]:
    if (prompt is None) == (prompts_file is None):
        raise ValueError("give one of --prompt TEXT, --prompt - (standard input) and --prompts-file FILE")
    if prompts_file is None:
        return [sys.stdin.read() if prompt == "-" else str(prompt)]
    lines = [line for line in prompts_file.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{prompts_file} holds no prompts; it should have one a line")
    return lines


def _stream(model: LanguageModel, prompt: str, settings: dict) -> Completion:
    pieces = model.stream(prompt, **settings)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    assert pieces.completion is not None
    return pieces.completion


def _batch(model: LanguageModel, prompts: list[str], num_samples: int, settings: dict) -> list[Completion]:
    with options.messages().status("Compiling and reading the prompts …") as status:
        return model.generate(
            prompts,
            num_samples=num_samples,
            progress=lambda tokens: status.update(f"Generating … {tokens} tokens"),
            **settings,
        )


def _show(completion: Completion, prompt: str, as_json: bool, *, header: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"prompt": prompt, **dataclasses.asdict(completion)}, ensure_ascii=False))
        return
    if header:
        typer.echo(f"── {prompt}")
    typer.echo(completion.text)


def _summary(completions: list[Completion], num_samples: int) -> str:
    timings = list({id(completion.timing): completion.timing for completion in completions}.values())
    total = dataclasses.replace(
        timings[0],
        compile_seconds=sum(timing.compile_seconds for timing in timings),
        decode_seconds=sum(timing.decode_seconds for timing in timings),
        decoded_tokens=sum(timing.decoded_tokens for timing in timings),
    )
    prompt_tokens = sum(completion.prompt_tokens for completion in completions[::num_samples])
    return options.timing_line(total, prompt_tokens, sum(len(c.tokens) for c in completions))
