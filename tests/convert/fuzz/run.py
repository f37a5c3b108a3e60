"""Fuzz the converter: python tests/convert/fuzz/run.py --count 5000 [--seed 0] [--keep FOLDER] [KIND …].

Each kind of input runs in a process of its own, whose memory is limited. Prints how many inputs there were and what
came of them; exit code 1 if one broke a law of `laws.py`. With --keep those inputs are left in a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KINDS = ("config", "generation", "index", "tokenizer", "sentencepiece", "safetensors", "gguf", "torch", "files")
SILENCE = 180  # looks, half a second apart, without a new input: a worker is stuck; an alarm cannot end all that hangs


def run_kind(kind: str, count: int, seed: str, keep: str = "") -> dict[str, Any]:
    """The summary of one worker; `broken` holds what it died of, should it die."""
    command = [sys.executable, str(HERE / "worker.py"), kind, str(count), seed, keep]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[2])}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "out").open("w+") as out:
        signs = Path(scratch) / "signs"
        with signs.open("w") as written:
            process = subprocess.Popen(command, stdout=out, stderr=written, cwd=HERE, env=environment)
        _wait(process, signs)
        out.seek(0)
        lines, said = out.read().splitlines(), signs.read_text(errors="replace").splitlines()
    worlds = [Path(line) for line in said if re.fullmatch(r"\S+/fuzz-\w+", line)]
    for world in worlds:
        shutil.rmtree(world, ignore_errors=True)  # of one that a dead worker left
    if process.returncode or not lines:
        how = f"the process ended with {process.returncode}: {said[-15:]}"
        summary = {"kind": kind, "inputs": len(worlds), "converted": 0, "refused": 0, "slowest": 0.0, "growth": 0,
                   "peak": 0, "broken": {"died": [1, how, ""]}}  # fmt: skip
    else:
        summary = json.loads(lines[-1])
    return summary | {"wall": time.monotonic() - started}


def _wait(process: subprocess.Popen, signs: Path) -> None:
    """Wait for a worker that gives signs of life; kill it when they cease."""
    size, looks = -1, 0
    while True:
        try:
            process.wait(0.5)
            return
        except subprocess.TimeoutExpired:
            now, looks = signs.stat().st_size, looks + 1
        if now != size:
            size, looks = now, 0
        elif looks > SILENCE:
            process.kill()


def show(summaries: list[dict[str, Any]]) -> str:
    """A table of summaries, their sum, and every law that was broken."""
    heads = {"kind": "<12", "inputs": ">8", "converted": ">11", "refused": ">9", "broken": ">8", "slowest": ">10",
             "one input": ">11", "peak": ">8"}  # fmt: skip
    rows = ["".join(f"{head:{form}}" for head, form in heads.items())]
    total = {"kind": "all"}
    for name in ("inputs", "converted", "refused"):
        total[name] = sum(summary[name] for summary in summaries)
    for name in ("slowest", "growth", "peak"):
        total[name] = max(summary[name] for summary in summaries)
    total["broken"] = {f"{s['kind']}{key}": row for s in summaries for key, row in s["broken"].items()}
    for row in [*summaries, total]:
        failures = sum(times for times, *_ in row["broken"].values())
        rows.append(
            f"{row['kind']:<12}{row['inputs']:>8,}{row['converted']:>11,}{row['refused']:>9,}{failures:>8,}"
            f"{row['slowest']:>8.2f} s{row['growth'] >> 20:>7} MiB{row['peak'] >> 20:>4} MiB"
        )
    for summary in summaries:
        rows += [f"{summary['kind']}: {law} ({times} times) {kept}" for times, law, kept in summary["broken"].values()]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="kinds of input; all of them by default")
    parser.add_argument("--count", type=int, default=5_000, help="inputs in all")
    parser.add_argument("--seed", default="0", help="a number; others give other inputs")
    parser.add_argument("--keep", default="", help="where inputs that break a law are left")
    options = parser.parse_args()
    kinds = options.kinds or list(KINDS)
    keep, started, summaries = str(Path(options.keep).absolute()) if options.keep else "", time.monotonic(), []
    for kind in kinds:
        summaries.append(run_kind(kind, -(-options.count // len(kinds)), options.seed, keep))
        print(f"{kind}: {summaries[-1]['inputs']} inputs in {summaries[-1]['wall']:.0f} s", file=sys.stderr, flush=True)
    print(show(summaries))
    print(f"{time.monotonic() - started:.0f} s in all; seed {options.seed}")
    sys.exit(any(summary["broken"] for summary in summaries))


if __name__ == "__main__":
    main()
