"""Compiles programs for a card that is not here, in a process of their own."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
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


class MissingCompilerError(RuntimeError):
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


def compile_programs(jobs: Sequence[Job]) -> list[CompiledProgram | CompileError]:
    """Compiles several programs, one after the other: a process for each card, started again if a program ends it.

    One process cannot serve two cards: Mosaic keeps the first card's architecture for its assembler.

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
    with tempfile.TemporaryDirectory(prefix="jaxdecode-aot-") as name:
        folder = Path(name)
        for part in ("dump", "scratch"):
            (folder / part).mkdir()
        for index, job in enumerate(jobs):
            _check_importable(job.build)
            whole = dataclasses.replace(job, cache=job.cache or (cache / "aot" if cache else None))
            (folder / f"{index}.job").write_bytes(pickle.dumps(whole))
        outcomes: dict[int, CompiledProgram | CompileError] = {}
        for target in dict.fromkeys(job.target for job in jobs):
            pending = [index for index, job in enumerate(jobs) if job.target == target]
            while pending:
                done = _run_worker(folder, pending)
                outcomes |= zip(pending, done, strict=False)
                pending = pending[len(done) :]
    return [outcomes[index] for index in range(len(jobs))]


def _run_worker(folder: Path, jobs: list[int]) -> list[CompiledProgram | CompileError]:
    """Runs the worker over `jobs` until it is done or has died; one outcome for each job it took up."""
    command = [sys.executable, "-m", "jaxdecode.aot.worker", str(folder), *map(str, jobs)]
    run = subprocess.run(
        command, env=_environment(folder), capture_output=True, text=True, check=False, errors="replace"
    )
    outcomes: list[CompiledProgram | CompileError] = []
    for job in jobs:
        result, log = folder / f"{job}.result", folder / f"{job}.log"
        if not result.exists():
            # a worker that ended before its first job has said why on its own stderr
            text = log.read_text(errors="replace") if log.exists() else run.stderr
            how = signal.Signals(-run.returncode).name if run.returncode < 0 else f"exit status {run.returncode}"
            message = f"the compiler ended the process ({how}):\n{text[-_LOG_END:]}"
            return [*outcomes, CompileError(message, text)]
        outcome = pickle.loads(result.read_bytes())
        if isinstance(outcome, str):
            text = log.read_text(errors="replace")
            outcome = CompileError(f"the program does not compile:\n{outcome[-_LOG_END:]}", f"{text}{outcome}")
        outcomes.append(outcome)
    return outcomes


def _environment(folder: Path) -> dict[str, str]:
    """The worker's environment: set before it imports JAX, and free of the caller's own compiler flags."""
    dump = folder / "dump"
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("MOSAIC_GPU_")},
        "PYTHONPATH": path,
        "TMPDIR": str(folder / "scratch"),  # Mosaic leaves a folder for each kernel
        "JAX_PLATFORMS": "cpu",  # the plugin is loaded for its compiler only
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_FLAGS": " ".join(_XLA_FLAGS).format(dump=dump),
        "MOSAIC_GPU_DUMP_TO": str(dump),
        "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
    }


def _check_importable(build: Callable[..., Program]) -> None:
    module, name = getattr(build, "__module__", None), getattr(build, "__qualname__", "")
    if module in (None, "__main__") or getattr(sys.modules.get(module), name, None) is not build:
        raise ValueError(
            f"build must be a function at the top of a module that another process can import, got {build!r}"
        )
