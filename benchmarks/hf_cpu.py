"""Decode speed on this CPU: our engine beside transformers + torch, same weights in float32, greedy, in one run.

    JAXDECODE_HF_PYTHON=… python benchmarks/hf_cpu.py [--checkpoint CHECKPOINT] [--batch 1 8]

Each engine is a process of its own and they take turns, so that drift of the machine hits both. The tokens are
compared before anything is timed. transformers runs in the fastest of its configurations (attention, cache,
torch.compile), found here. Ends with exit code 1 if tokens differ or, with --require, if a ratio is below its goal.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from convert import export
from convert.hf_reference import find_python
from jaxdecode.checkpoint import load_config, load_manifest
from jaxdecode.tokenizer import encode_text, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
ENGINES = Path(__file__).resolve().parent / "engines"
sys.path.insert(0, str(ENGINES))

from worker import Worker  # noqa: E402

CHECKPOINT = ROOT / ".cache" / "smollm2" / "float32"
GOALS = {1: 2.0, 8: 1.4}  # by batch: ours over theirs
BUSY = 0.5  # load average above which timings mean little
TEXT = (
    "The old harbour had two piers. From the longer one, boats left every morning for the islands, carrying letters, "
    "flour and schoolchildren; the shorter one belonged to the gulls. On market days the whole town smelled of tar "
    "and oranges, and the clock over the customs house, which had been wrong since the war, struck whenever it "
    "liked. Nobody minded. People met at the third stroke, whatever the hour, and walked up the hill together to "
    "see whether the lighthouse keeper had painted his door again. It had been green, then blue, then a yellow so "
    "bright that a captain mistook it for a signal. "
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: the demo's")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it needs a C++ compiler)")
    parser.add_argument("--require", action="store_true", help=f"fail below the goals, {GOALS}")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"warning: load average {load:.2f}; something else is running, the timings mean little", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="hf-cpu-"))
    try:
        sys.exit(not compare(arguments, export(arguments.checkpoint, folder / "hf"), load))
    finally:
        shutil.rmtree(folder)


def compare(arguments: argparse.Namespace, hf_folder: Path, load: float) -> bool:
    """Times every batch size, prints and writes the rows; returns whether tokens (and goals, if required) hold."""
    threads = len(os.sched_getaffinity(0))
    ours = Worker([sys.executable, str(ENGINES / "jaxdecode_engine.py"), str(arguments.checkpoint)], _environment(True))
    theirs = Worker(
        [find_python(), str(ENGINES / "transformers_engine.py"), str(hf_folder), str(threads)], _environment(False)
    )
    about = {"jaxdecode": ours.ask(do="describe"), "transformers": theirs.ask(do="describe")}
    configurations = [
        name for name in about["transformers"]["configurations"] if not (arguments.no_compile and "compile" in name)
    ]
    good = True
    for batch in arguments.batch:
        prompts = make_prompts(arguments.checkpoint, batch, arguments.prompt_tokens)
        request = {"do": "run", "prompts": prompts, "new_tokens": arguments.new_tokens}
        choice, trials = choose_configuration(theirs, request, configurations)
        runs = time_both(ours, theirs, request, choice, arguments.repeats)
        if runs is None:
            good = False
            continue
        rows = [_row(arguments, engine, about[engine]["versions"], runs[engine], batch, load) for engine in runs]
        rows[1] |= {"configuration": choice, "trials": trials}
        rows[1]["first_call_extra_seconds"] = trials[choice]["first_call_extra_seconds"]
        ratio = rows[0]["tokens_per_second"] / rows[1]["tokens_per_second"]
        for row in rows:
            row["ratio"] = round(ratio, 3)
        write(arguments.output, rows)
        show(rows, ratio, GOALS.get(batch))
        good &= not arguments.require or ratio >= GOALS.get(batch, 0)
    ours.close()
    theirs.close()
    return good


def make_prompts(checkpoint: Path, batch: int, length: int) -> list[list[int]]:
    """`batch` stretches of one text, each `length` tokens; made-up ids if the checkpoint has no tokenizer."""
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    if tokenizer is None:
        ids = np.random.RandomState(0).randint(load_config(checkpoint).vocab_size, size=(batch, length))
        return ids.tolist()
    ids = encode_text(tokenizer, TEXT * (2 + (length + 11 * batch) // 100))
    return [ids[11 * index : 11 * index + length] for index in range(batch)]


def choose_configuration(worker: Worker, request: dict, configurations: list[str]) -> tuple[str, dict[str, dict]]:
    """The fastest way to run transformers, and how fast all of them are: the better of two runs."""
    trials = {}
    for name in configurations:
        # The same shapes as the real run: a static cache of another size would compile again.
        cold, *warm = (worker.ask(**request, configuration=name) for _ in range(3))
        best = max(warm, key=_speed)
        trials[name] = {
            "tokens_per_second": round(_speed(best), 2),
            "first_call_extra_seconds": round(max(_seconds(cold) - _seconds(best), 0), 2),
        }
    return max(trials, key=lambda name: trials[name]["tokens_per_second"]), trials


def time_both(ours: Worker, theirs: Worker, request: dict, choice: str, repeats: int) -> dict[str, list[dict]] | None:
    """Every run of both engines, taking turns; the first of each includes compiling. None if their tokens differ."""
    asks = {
        "jaxdecode": lambda: ours.ask(**request),
        "transformers": lambda: theirs.ask(**request, configuration=choice),
    }
    runs = {engine: [ask()] for engine, ask in asks.items()}
    tokens = [np.asarray(runs[engine][0]["tokens"]) for engine in asks]
    if (tokens[0] != tokens[1]).any():
        rows = np.flatnonzero((tokens[0] != tokens[1]).any(axis=1))
        first = (tokens[0] != tokens[1])[rows[0]].argmax()
        print(f"the engines' tokens differ: rows {rows.tolist()}, first at token {first}; nothing was timed")
        return None
    for turn in range(repeats):
        for engine in sorted(asks, reverse=bool(turn % 2)):
            runs[engine].append(asks[engine]())
            if runs[engine][-1]["tokens"] != runs["jaxdecode"][0]["tokens"]:
                print(f"{engine} gave other tokens the second time")
                return None
    return runs


def _speed(run: dict) -> float:
    return len(run["tokens"]) * (len(run["tokens"][0]) - 1) / run["decode_seconds"]


def _seconds(run: dict) -> float:
    return run["first_token_seconds"] + run["decode_seconds"]


def _row(arguments, engine: str, versions: dict, runs: list[dict], batch: int, load: float) -> dict[str, Any]:
    warm_up, *timed = runs
    speeds, firsts = [_speed(run) for run in timed], [run["first_token_seconds"] for run in timed]
    low, middle, high = np.percentile(speeds, [20, 50, 80]).round(2).tolist()
    return {
        "engine": engine,
        "tokens_per_second": middle,
        "tokens_per_second_p20": low,
        "tokens_per_second_p80": high,
        "first_token_ms": round(1e3 * statistics.median(firsts), 2),
        "first_call_extra_seconds": round(max(_seconds(warm_up) - _seconds(timed[-1]), 0), 2),
        "batch": batch,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "dtype": "float32",
        "model": _model_name(arguments.checkpoint),
        "repeats": arguments.repeats,
        "device": device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": load,
        "versions": versions,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def show(rows: list[dict], ratio: float, goal: float | None) -> None:
    print(f"\nbatch {rows[0]['batch']}, prompt {rows[0]['prompt_tokens']}, new tokens {rows[0]['new_tokens']}, float32")
    print(f"{'engine':<14}{'decode tokens/s':>16}{'p20':>9}{'p80':>9}{'first token ms':>16}{'first call +s':>15}")
    for row in rows:
        print(
            f"{row['engine']:<14}{row['tokens_per_second']:>16.1f}{row['tokens_per_second_p20']:>9.1f}"
            f"{row['tokens_per_second_p80']:>9.1f}{row['first_token_ms']:>16.1f}{row['first_call_extra_seconds']:>15.1f}"
        )
    for name, trial in rows[1]["trials"].items():
        chosen = " (chosen)" if name == rows[1]["configuration"] else ""
        print(f"  transformers, {name}: {trial['tokens_per_second']} tokens/s in a trial{chosen}")
    print(f"ratio {ratio:.2f}×" + (f" (goal {goal}×)" if goal else ""), flush=True)


def write(folder: Path, rows: list[dict]) -> None:
    slug = re.sub(r"[^a-z0-9]+", "-", f"{rows[0]['device']} {rows[0]['cores']} cores".lower()).strip("-")
    path = folder / slug / "hf_cpu.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def device_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _model_name(checkpoint: Path) -> str:
    return Path(load_manifest(checkpoint)["source"].get("name", checkpoint)).name


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _environment(ours: bool) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    if ours:
        environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return environment


if __name__ == "__main__":
    main()
