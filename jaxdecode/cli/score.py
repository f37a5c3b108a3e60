"""`jaxdecode score`: how probable given texts are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxdecode.cli import options

if TYPE_CHECKING:
    from jaxdecode.text import LanguageModel, Score


def score(
    model: options.Model,
    text: Annotated[str | None, typer.Option(help="The text; - reads standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file of texts, one a line.")] = None,
    implementation: options.Implementation = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a text.")] = False,
) -> None:
    """Print log-probability and perplexity of texts (natural logarithms; the first token is given)."""
    if (text is None) == (file is None):
        raise ValueError("give one of --text TEXT, --text - (standard input) and --file FILE")
    if file is not None:
        texts = [line for line in file.read_text().splitlines() if line.strip()]
    else:
        texts = [sys.stdin.read() if text == "-" else str(text)]
    if not texts:
        raise ValueError(f"{file} holds no texts; it should have one a line")
    language_model = options.open_model(model, implementation)
    with options.messages().status(f"Scoring {len(texts)} texts …"):
        scores = language_model.score(texts)
    if as_json:
        for line, result in zip(texts, scores, strict=True):
            typer.echo(json.dumps(_as_dict(line, result), ensure_ascii=False))
    else:
        for result in scores:
            _print(language_model, result)


def _as_dict(text: str, result: Score) -> dict:
    return {
        "text": text,
        "tokens": result.tokens,
        "logprobs": result.logprobs,
        "total": result.total,
        "perplexity": result.perplexity,
    }


def _print(model: LanguageModel, result: Score) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("token", "id", "log-prob", box=None, pad_edge=False)
    for token, logprob in zip(result.tokens, [None, *result.logprobs], strict=True):
        shown = Text(repr(model.tokenizer.decode([token]))[1:-1])
        table.add_row(shown, str(token), "" if logprob is None else f"{logprob:.4f}")
    console = Console(highlight=False)
    console.print(table)
    per_token = result.total / len(result.logprobs)
    console.print(
        f"total {result.total:.4f} · per token {per_token:.4f} · perplexity {result.perplexity:.4f}\n"
    )
