"""The `jaxdecode` command: one typer app, one file per command.

A command's file imports what it needs inside the command, so `jaxdecode --help` starts at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from jaxdecode.cli.chat import chat
from jaxdecode.cli.check import check
from jaxdecode.cli.convert import convert
from jaxdecode.cli.env import env
from jaxdecode.cli.export import export
from jaxdecode.cli.generate import generate
from jaxdecode.cli.score import score
from jaxdecode.cli.verify import verify

app = typer.Typer(
    name="jaxdecode",
    help="Convert Hugging Face language models to JAX and generate text from them.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (convert, verify, export, generate, chat, score, check, env):
    app.command()(command)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Convert Hugging Face language models to JAX and generate text from them."""


def main() -> None:
    """Runs the command line; an error is one paragraph on stderr and exit code 1 (`--debug`: a traceback)."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # wherever it stands
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own chatter, below errors
    try:
        app(arguments, prog_name="jaxdecode")
    except (ValueError, NotImplementedError, OSError) as error:
        if debug:
            raise
        sys.exit(_complain(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(error: Exception) -> int:
    from rich.console import Console
    from rich.text import Text

    if isinstance(error, BrokenPipeError):  # `jaxdecode … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    message = str(error) or type(error).__name__
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    return 1
