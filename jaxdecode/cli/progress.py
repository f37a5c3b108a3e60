"""How a command shows what is done: a bar with an ETA on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 5.0


@contextlib.contextmanager
def transfer(console: Console, verb: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yields a function that takes (bytes done, bytes in all, what is written now)."""
    if not console.is_terminal:
        yield _lines(console, verb)
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total, item: bar.update(task, completed=done, total=total, description=f"{verb} {item}")


@contextlib.contextmanager
def counter(console: Console, verb: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that takes (things done, things in all)."""
    if not console.is_terminal:
        yield lambda done, total: console.print(f"{verb}: {done} of {total}", soft_wrap=True)
        return
    from rich import progress

    columns = (*progress.Progress.get_default_columns(), progress.MofNCompleteColumn())
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(console: Console, verb: str) -> Callable[[int, int, str], None]:
    start = last = time.monotonic()

    def advance(done: int, total: int, item: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_SECONDS and done < total:
            return
        last, rate = now, done / max(now - start, 1e-6)
        left = (total - done) / max(rate, 1.0)
        amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB, {rate / 1e6:.0f} MB/s, {left:.0f} s left"
        console.print(f"{verb} {item}: {amount}", markup=False, soft_wrap=True)

    return advance
