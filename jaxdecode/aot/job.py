"""What is handed to the compiling process: a program as the caller describes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pallas_kernels.targets import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A function to compile, as returned by a job's `build`.

    Attributes:
      function: what `jax.jit` takes, not jitted itself at the top.
      args: its arguments: pytrees of `jax.ShapeDtypeStruct` or arrays, of which only shape and type count; other
        leaves (static arguments) are passed as they are.
      kwargs: its keyword arguments, likewise.
      jit_options: of `jax.jit`: donate_argnums, static_argnums, …
      compiler_options: of XLA, by name: {"xla_gpu_enable_command_buffer": ""}.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    jit_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One program for one card.

    Attributes:
      build: a function at the top of an importable module that returns the Program; called in the other process.
      target: the card.
      args: the arguments of `build`, picklable.
      kwargs: its keyword arguments, picklable.
      cache: the folder of compiled programs; None for no cache. `compile_programs` fills it in.
    """

    build: Callable[..., Program]
    target: Target
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache: Path | None = None
