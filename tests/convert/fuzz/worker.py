"""Runs inputs of one kind in a process of its own: python worker.py KIND COUNT SEED [KEEP]; prints a JSON summary.

KIND "corpus" runs the cases of `corpus.py`, of which COUNT may name one, and prints what came of each.
SEED "fixed" makes the same inputs each time. With KEEP, the first input that broke a law in some way is left there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import binary_inputs
import file_inputs
import hypothesis
import json_inputs
import laws
import sentencepiece_inputs
import torch_inputs
from inputs import Input

KINDS = {
    "config": json_inputs.configs(),
    "generation": json_inputs.generation_configs(),
    "index": json_inputs.indexes(),
    "tokenizer": json_inputs.tokenizer_files(),
    "sentencepiece": sentencepiece_inputs.sentencepiece_files(),
    "safetensors": binary_inputs.safetensors_files(),
    "gguf": binary_inputs.gguf_files(),
    "torch": torch_inputs.torch_files(),
    "files": file_inputs.odd_files(),
}
_BATCH = 250
LARGE_GROWTH = 1 << 30  # bytes that a hostile input of great size may take


@dataclasses.dataclass
class Summary:
    kind: str
    inputs: int = 0
    converted: int = 0
    refused: int = 0
    slowest: float = 0.0
    growth: int = 0
    peak: int = 0
    broken: dict[str, list[Any]] = dataclasses.field(default_factory=dict)  # signature -> times, law, kept input


def main(kind: str, count: str, seed: str, keep: str = "") -> None:
    summary, number = Summary(kind), 0
    prepare()
    if kind == "corpus":
        print(json.dumps(run_corpus(count)))
        return
    while summary.inputs < int(count):
        batch = min(_BATCH, int(count) - summary.inputs)
        if seed == "fixed":
            batch = int(count)
        before = summary.inputs
        _run(summary, batch, None if seed == "fixed" else int(seed) * 1000 + number, keep)
        number += 1
        if seed == "fixed" or summary.inputs == before:
            break
    print(json.dumps(dataclasses.asdict(summary)))


def prepare() -> None:
    """Load what the converter loads late, so that an input's time and memory are its own; then limit and watch."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAXDECODE_CACHE_DIR": "off", "HF_HUB_OFFLINE": "1"}
    sys.dont_write_bytecode = True
    import jax
    import orbax.checkpoint  # noqa: F401
    import tokenizers  # noqa: F401

    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        pairs, rows, data = binary_inputs.sound_gguf("llama", "gpt2")
        sound = binary_inputs.gguf(list(pairs), list(rows), data)
        outcome = laws.observe(Input(files={"source/x.gguf": sound}, source="source/x.gguf"), Path(scratch), 120)
        assert outcome.converted, outcome.message
        os.chdir(Path(__file__).parent)
    laws.limit_memory()
    laws.install_watch()


def _run(summary: Summary, count: int, seed: int | None, keep: str) -> None:
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=seed is None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(KINDS[summary.kind])
    def one(given: Input) -> None:
        note(summary, given, keep)

    (one if seed is None else hypothesis.seed(seed)(one))()


def run_corpus(pattern: str) -> dict[str, Any]:
    """What came of every case of the corpus whose name holds the pattern ("0" for all)."""
    import corpus

    found: dict[str, Any] = {}
    for name, (make, _) in corpus.CASES.items():
        if pattern not in ("0", name):
            continue
        world = Path(tempfile.mkdtemp(prefix="fuzz-"))
        print(world, file=sys.stderr, flush=True)
        try:
            found[name] = dataclasses.asdict(laws.observe(make(), world, growth=LARGE_GROWTH)) | {"broken": ""}
        except laws.LawBroken as error:
            found[name] = {"broken": str(error)}
        finally:
            os.chdir(Path(__file__).parent)
            shutil.rmtree(world)
    return found


def note(summary: Summary, given: Input, keep: str) -> None:
    """Run one input and count what came of it."""
    world = Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(world, file=sys.stderr, flush=True)  # a sign of life, and what to look at after a crash
    summary.inputs += 1
    try:
        outcome = laws.observe(given, world)
    except laws.LawBroken as error:
        signature = re.sub(r"\d+", "N", str(error))[:90]
        row = summary.broken.setdefault(signature, [0, str(error)[:400], ""])
        row[0] += 1
        if keep and row[0] == 1:
            row[2] = f"{keep}/{summary.kind}-{len(summary.broken)}"
            shutil.rmtree(row[2], ignore_errors=True)
            given.write(_made(Path(row[2])))
    else:
        summary.converted += outcome.converted
        summary.refused += not outcome.converted
        summary.slowest = max(summary.slowest, outcome.seconds)
        summary.growth = max(summary.growth, outcome.growth)
    finally:
        summary.peak = max(summary.peak, laws.peak())
        os.chdir(Path(__file__).parent)
        shutil.rmtree(world)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:])
