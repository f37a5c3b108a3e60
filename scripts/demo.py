"""`make demo`: fetch SmolLM2-135M-Instruct, convert it, and stream an answer, with the times apart."""

from __future__ import annotations

import argparse
import shutil
import sys
import time

import smollm2
from rich.console import Console

import jaxdecode
from jaxdecode.checkpoint import load_manifest
from jaxdecode.cli.options import open_model, timing_line
from jaxdecode.cli.progress import transfer

notes = Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    try:
        smollm2.fetch()
        convert_once()
        answer(arguments.question, arguments.max_new_tokens, started)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def convert_once() -> None:
    """Converts the GGUF file with our converter unless a checkpoint of this very version is there."""
    if _is_current():
        return
    shutil.rmtree(smollm2.CHECKPOINT, ignore_errors=True)
    from convert import convert

    with transfer(notes, "converting") as advance:
        # float32: on a CPU without bfloat16 instructions it decodes fastest.
        convert(smollm2.GGUF, smollm2.CHECKPOINT, dtype="float32", progress=advance)
    notes.print(f"Converted {smollm2.GGUF.name} to {smollm2.CHECKPOINT}.")


def _is_current() -> bool:
    try:
        manifest = load_manifest(smollm2.CHECKPOINT)
    except (ValueError, OSError):
        return False
    found = (manifest["jaxdecode_version"], manifest["dtype"], manifest["source"]["name"])
    return found == (jaxdecode.__version__, "float32", str(smollm2.GGUF))


def answer(question: str, max_new_tokens: int, started: float) -> None:
    model = open_model(smollm2.CHECKPOINT)
    notes.print(f"\n[bold]{question}[/bold]\n", markup=True)
    pieces = model.stream(question, chat=True, max_new_tokens=max_new_tokens)
    first = None
    for piece in pieces:
        first = first or time.perf_counter() - started
        print(piece, end="", flush=True)
    print(flush=True)
    done = pieces.completion
    assert done is not None and first is not None
    notes.print(f"\n[dim]{timing_line(done.timing, done.prompt_tokens, len(done.tokens))}[/dim]")
    notes.print(f"[dim]the first word was on screen {first:.1f} s after the command started[/dim]")


if __name__ == "__main__":
    main()
