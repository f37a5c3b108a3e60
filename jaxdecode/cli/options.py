"""What `generate` and `chat` share: the sampler's numbers as options, loading a model, showing timings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from jaxdecode.config import ModelConfig
    from jaxdecode.decoding import Timing
    from jaxdecode.sampling import Sampler
    from jaxdecode.text import LanguageModel

Model = Annotated[Path, typer.Argument(help="Checkpoint folder that `jaxdecode convert` wrote.")]
Implementation = Annotated[
    str | None, typer.Option(help="Force reference, xla or mosaic_gpu; see `jaxdecode env` for what runs.")
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Seed = Annotated[int, typer.Option(help="Seed of the random draws.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]
Temperature = Annotated[float, typer.Option(help="0 takes the best token every time.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k best tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the fewest tokens of this probability together.")]
MinP = Annotated[
    float | None, typer.Option(help="Draw from tokens at least this fraction of the best one's.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: prefer tokens not in prompt or answer.")
]
PresencePenalty = Annotated[float | None, typer.Option(help="Subtracted once from tokens already generated.")]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="Subtracted for each time a token was generated.")
]
LogitBias = Annotated[
    list[str] | None, typer.Option(metavar="TOKEN=BIAS", help="Added to a token's logit; may be repeated.")
]


def build_sampler(
    config: ModelConfig,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    presence_penalty: float | None,
    frequency_penalty: float | None,
    logit_bias: list[str] | None,
) -> Sampler:
    """The sampler the options ask for; `Greedy` if they ask for nothing."""
    from jaxdecode.sampling import Greedy, sampler

    numbers = (top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty)
    biases = dict(map(_parse_bias, logit_bias)) if logit_bias else None
    if temperature == 0 and biases is None and all(number is None for number in numbers):
        return Greedy()
    return sampler(temperature, *numbers, biases, vocab_size=config.vocab_size)


def _parse_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise ValueError(f"--logit-bias takes TOKEN=BIAS, for example 42=-5.5; got {text!r}") from error


def messages() -> Console:
    """Where everything but the answer goes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def open_model(path: Path, implementation: str | None = None) -> LanguageModel:
    """Loads a model, saying what is waited for, and once if it will run on the CPU."""
    from rich.text import Text

    from jaxdecode.devices import describe_backend
    from jaxdecode.text import load

    console = messages()
    with console.status(Text(f"Loading {path} …")):
        model = load(path, implementation=implementation)
        backend = describe_backend()
    if backend.platform == "cpu":
        console.print(Text(backend.reason, style="dim"))
    return model


def timing_line(timing: Timing, prompt_tokens: int, new_tokens: int) -> str:
    """Prompt tokens, time to first token, speed; compile time apart."""
    speed = timing.tokens_per_second
    parts = [
        f"{prompt_tokens} prompt tokens",
        f"first token after {timing.first_token_seconds:.2f} s",
        f"{new_tokens} tokens" + (f" at {speed:.1f} tokens/s" if speed else ""),
        f"compiling {timing.compile_seconds:.2f} s (not counted in the others)",
    ]
    return " · ".join(parts)
