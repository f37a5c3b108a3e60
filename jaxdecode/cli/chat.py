"""`jaxdecode chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from jaxdecode.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from jaxdecode.text import LanguageModel

_HELP = """/clear  forget the conversation
/help   this list
/exit   leave (or Ctrl-D); Ctrl-C stops an answer"""


def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = None,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = 0,
    implementation: options.Implementation = None,
    stop: options.Stop = None,
) -> None:
    """Talk to a model that has a chat template."""
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
    settings = dict(max_new_tokens=max_new_tokens, sampler=sampler, stop=stop or ())
    language_model.encode(
        [{"role": "user", "content": "?"}], chat=True
    )  # no template: say so before the first word
    _talk(language_model, [{"role": "system", "content": system}] if system else [], seed, settings)


def _talk(model: LanguageModel, beginning: list[dict[str, str]], seed: int, settings: dict) -> None:
    from rich.console import Console

    console, notes = Console(highlight=False), options.messages()
    notes.print("[dim]/help lists the commands, /exit leaves.[/dim]")
    history = list(beginning)
    while (said := _ask(console)) is not None:
        if said in ("/exit", "/quit"):
            return
        if said == "/clear":
            history = list(beginning)
            notes.print("[dim]The conversation is forgotten.[/dim]")
        elif said.startswith("/"):
            notes.print(_HELP if said == "/help" else f"There is no {said}.\n{_HELP}", markup=False)
        elif said:
            history.append({"role": "user", "content": said})
            seed += 1  # the same words again may get another answer
            _answer(model, history, len(beginning), seed, settings, console, notes)


def _ask(console: Console) -> str | None:
    try:
        return (console.input("[bold cyan]› [/bold cyan]") if sys.stdin.isatty() else input()).strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(
    model: LanguageModel,
    history: list[dict[str, str]],
    kept: int,
    seed: int,
    settings: dict,
    console: Console,
    notes: Console,
) -> None:
    """Answers the last message and appends the answer; a message that cannot be answered is taken back."""
    from rich.text import Text

    try:
        forgotten = trim_history(model, history, kept, settings["max_new_tokens"])
        if forgotten:
            notes.print(f"[dim]The context is full: the oldest {forgotten} messages are forgotten.[/dim]")
        pieces, text = model.stream(history, seed=seed, chat=True, **settings), ""
        try:
            for piece in pieces:
                text += piece
                console.print(piece, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            notes.print("[dim] (stopped)[/dim]", end="")
        console.print()
    except ValueError as error:
        history.pop()
        notes.print(Text.assemble(("error:", "bold red"), f" {error}"))
        return
    history.append({"role": "assistant", "content": text})
    if pieces.completion:
        done = pieces.completion
        line = options.timing_line(done.timing, done.prompt_tokens, len(done.tokens))
        notes.print(f"[dim]{line}[/dim]")


def trim_history(model: LanguageModel, history: list[dict[str, str]], kept: int, max_new_tokens: int) -> int:
    """Drops the oldest turns, but not the first `kept` messages, until an answer fits; returns how many."""
    from jaxdecode.config import positions_needed

    dropped = 0
    def needed() -> int:
        return positions_needed(len(model.encode(history, chat=True)), max_new_tokens)

    while len(history) - kept > 2 and needed() > model.config.max_position:
        del history[kept : kept + 2]
        dropped += 2
    return dropped
