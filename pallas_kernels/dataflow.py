"""Which implementation of an operation runs, decided by stated rules."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import jax


class Choice(NamedTuple):
    """An implementation's name and the rule that picked it."""

    implementation: str
    reason: str


def choose_implementation(op: str, platform: str | None = None) -> Choice:
    """Picks the implementation of `op` ("linear", "decode_attention", "prefill_attention") on a platform.

    Args:
      op: name of the operation.
      platform: "cpu", "gpu" or "tpu"; None asks JAX for its default one.
    """
    platform = platform or jax.default_backend()
    return Choice("xla", f"rule: {op} on {platform} runs as XLA's own code; no hand-written kernel for it yet")


def import_when_called(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that costs something to import, or cannot be imported everywhere."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*args, **kwargs)

    return run


def find_implementation(
    op: str, implementation: str | None, table: dict[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """The callable behind `implementation=`; None applies `choose_implementation`.

    Raises:
      NotImplementedError: no implementation of that name; the message lists those that exist.
    """
    name = implementation or choose_implementation(op).implementation
    if name not in table:
        raise NotImplementedError(f"{op} has no implementation {name!r}; available: {', '.join(sorted(table))}")
    return table[name]
