"""Compiles programs for a card that is not here, in a process of their own."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxdecode.aot.job import Job, Program
from jaxdecode.aot.program import CompiledProgram
from jaxdecode.aot.toolchain import missing_packages
from jaxdecode.compilation import default_cache_dir
from pallas_kernels.targets import Target, find_target

_LOG_END = 3000  # characters of a log that an error quotes
_XLA_FLAGS = (
    "--xla_dump_to={dump}",
    "--xla_dump_hlo_snapshots",  # instead of the HLO as text, which holds every kernel once a launch
    "--xla_dump_hlo_pass_re=thunk",  # the thunks before and after conversion to CUDA graphs
    "--xla_dump_emitter_re=ptx",  # the PTX of XLA's own kernels
)


class CompileError(RuntimeError):
    """A program did not compile.

    Attributes:
      log: what the compiler printed.
    """

    def __init__(self, message: str, log: str):
        super().__init__(message)
        self.log = log

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.log)


class MissingCompilerError(NotImplementedError):
    """The compiler for NVIDIA cards is not installed."""


def compiler_installed() -> bool:
    """Whether the packages of the extra `check` are there."""
    return not missing_packages()


def compile_program(build: Callable[..., Program], *args: Any, target: Target | str, **kwargs: Any) -> CompiledProgram:
    """Compiles one program for a card that need not be here.

    Args:
      build: a function at the top of an importable module; called with `args` and `kwargs` in the compiling process,
        returns what to compile.
      target: the card or its short name.

    Returns:
      The program, or the one found in the cache for the same lowered program, card and compiler.

    Raises:
      CompileError: it does not compile; the end of the compiler's output is in the message.
      MissingCompilerError: the extra `check` is not installed.
      ValueError: there is no such target, or another process could not import `build`.
    """
    card = find_target(target) if isinstance(target, str) else target
    [outcome] = compile_programs([Job(build=build, target=card, args=args, kwargs=kwargs)])
    if isinstance(outcome, CompileError):
        raise outcome
    return outcome


def compile_programs(
    jobs: Sequence[Job], *, workers: int = 1, done: Callable[[int], None] | None = None
) -> list[CompiledProgram | CompileError]:
    """Compiles several programs in processes of their own, which are started again if a program ends one.

    One process cannot serve two cards: Mosaic keeps the first card's architecture for its assembler.

    Args:
      workers: processes at a time.
      done: called with the index of each job as it ends, in a thread of any worker.

    Returns:
      Per job the program or the error.

    Raises:
      MissingCompilerError: the extra `check` is not installed.
      ValueError: another process could not import the build of a job.
    """
    if missing := missing_packages():
        raise MissingCompilerError(
            f'compiling for an NVIDIA card needs {", ".join(missing)}: pip install "jaxdecode[check]"'
        )
    cache = default_cache_dir()
    with tempfile.TemporaryDirectory(prefix="jaxdecode-aot-") as name, ThreadPoolExecutor(workers) as pool:
        folder = Path(name)
        for index, job in enumerate(jobs):
            _check_importable(job.build)
            whole = dataclasses.replace(job, cache=job.cache or (cache / "aot" if cache else None))
            (folder / f"{index}.job").write_bytes(pickle.dumps(whole))
        shares = list(_shares([job.target for job in jobs], workers))
        outcomes: dict[int, CompiledProgram | CompileError] = {}
        running: set[subprocess.Popen] = set()
        try:
            for part in pool.map(lambda share: _compile_share(folder, share, done, running), shares):
                outcomes |= part
        except BaseException:  # an interrupt, or what `done` raised: nothing goes on behind the caller's back
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            raise
    return [outcomes[index] for index in range(len(jobs))]


def _shares(targets: list[Target], workers: int) -> Iterator[list[int]]:
    """Jobs for one process each: all of one card, cut so that every worker has some of each."""
    for target in dict.fromkeys(targets):
        mine = [index for index, other in enumerate(targets) if other == target]
        for first in range(min(workers, len(mine))):
            yield mine[first::workers]


def _compile_share(
    folder: Path, pending: list[int], done: Callable[[int], None] | None, running: set[subprocess.Popen]
) -> dict[int, CompiledProgram | CompileError]:
    outcomes: dict[int, CompiledProgram | CompileError] = {}
    while pending:
        ended = _run_worker(folder, pending, done, running)
        outcomes |= zip(pending, ended, strict=False)
        pending = pending[len(ended) :]
    return outcomes


def _run_worker(
    folder: Path, jobs: list[int], done: Callable[[int], None] | None, running: set[subprocess.Popen]
) -> list[CompiledProgram | CompileError]:
    """Runs the worker over `jobs` until it is done or has died; one outcome for each job it took up."""
    own = folder / f"worker-{jobs[0]}"
    for part in ("dump", "scratch"):
        (own / part).mkdir(parents=True)
    command = [sys.executable, "-m", "jaxdecode.aot.worker", str(folder), str(own / "dump"), *map(str, jobs)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    told, printed = set(), ""
    with subprocess.Popen(command, env=_environment(own), **pipe) as process:
        running.add(process)
        assert process.stdout is not None
        for line in process.stdout:  # the number of each job that has ended, or why the worker did not start
            if not line.strip().isdecimal():
                printed += line
                continue
            told.add(int(line))
            if done:
                done(int(line))
    running.discard(process)
    shutil.rmtree(own)
    if process.returncode in (-signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    outcomes = _read_outcomes(folder, jobs, process.returncode, printed)
    for job in jobs[: len(outcomes)]:
        if done and job not in told:
            done(job)
    return outcomes


def _read_outcomes(folder: Path, jobs: list[int], status: int, printed: str) -> list[CompiledProgram | CompileError]:
    outcomes: list[CompiledProgram | CompileError] = []
    for job in jobs:
        result, log = folder / f"{job}.result", folder / f"{job}.log"
        if not result.exists():
            # a worker that ended before its first job has said why itself
            text = log.read_text(errors="replace") if log.exists() else printed
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            message = f"the compiler ended the process ({how}):\n{text[-_LOG_END:]}"
            return [*outcomes, CompileError(message, text)]
        outcome = pickle.loads(result.read_bytes())
        result.unlink()
        if isinstance(outcome, str):
            text = log.read_text(errors="replace")
            outcome = CompileError(f"the program does not compile:\n{outcome[-_LOG_END:]}", f"{text}{outcome}")
        outcomes.append(outcome)
    return outcomes


def _environment(own: Path) -> dict[str, str]:
    """The worker's environment: set before it imports JAX, and free of the caller's own compiler flags."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("MOSAIC_GPU_")},
        "PYTHONPATH": path,
        "TMPDIR": str(own / "scratch"),  # Mosaic leaves a folder for each kernel
        "JAX_PLATFORMS": "cpu",  # the plugin is loaded for its compiler only
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_FLAGS": " ".join(_XLA_FLAGS).format(dump=own / "dump"),
        "MOSAIC_GPU_DUMP_TO": str(own / "dump"),
        "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
    }


def _check_importable(build: Callable[..., Program]) -> None:
    module, name = getattr(build, "__module__", None), getattr(build, "__qualname__", "")
    if module in (None, "__main__") or getattr(sys.modules.get(module), name, None) is not build:
        raise ValueError(
            f"build must be a function at the top of a module that another process can import, got {build!r}"
        )
