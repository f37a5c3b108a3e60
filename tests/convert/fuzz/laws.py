"""The laws that hold for every input of the converter, and the means to see them broken.

`convert` makes a checkpoint that loads, or raises a ConversionError of sane length. Either way it ends soon, takes
little memory, writes nowhere but at its destination, leaves nothing there when it refuses, and runs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import resource
import signal
import stat
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inputs import Input

SECONDS = 10.0  # of processor time for planning and converting one input
PATIENCE = 12  # ticks of `TICK` seconds in which nothing ends
TICK = 5.0
GROWTH = 512 << 20  # bytes of memory that one input may add to the process
HARD_LIMIT = 4 << 30  # address space on top of what an idle process has mapped; beyond it allocations fail
MESSAGE = 20_000  # characters
LINE = 1_000
_VALUES = re.compile(r"cannot hold \d+ of its values")  # said of weights alone
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_RUNNING = {
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen",
    "pickle.find_class", "socket.connect",
}  # fmt: skip
_CHANGING = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


class LawBroken(AssertionError):
    """An input for which `convert` did what it must never do."""


class TooSlow(BaseException):
    """Raised by the alarm inside whatever takes too long."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    converted: bool
    seconds: float
    growth: int
    message: str


def observe(given: Input, world: Path, seconds: float = SECONDS, growth: int = GROWTH) -> Outcome:
    """Convert one input in an empty folder and look at everything that can be seen from outside.

    Raises:
      LawBroken: the message names the law.
    """
    source, destination = given.write(world), world / "out" / "ours"
    os.chdir(world / "here")  # where a command would leave its traces
    before, started, resident = snapshot(world), time.process_time(), reset_peak()
    options = {"dtype": given.dtype, "extend_positions": given.extend_positions}
    with watched(world / "out"), alarm(seconds):
        planned = _attempt(source, destination, dry_run=True, **options)
        if snapshot(world) != before:
            raise LawBroken(f"a dry run changed {difference(before, snapshot(world))}")
        done = _attempt(source, destination, dry_run=False, **options)
    elapsed, grown = time.process_time() - started, max(0, peak() - resident)
    if elapsed > seconds:
        raise LawBroken(f"time: {elapsed:.1f} s of processor time")
    if grown > growth:
        raise LawBroken(f"memory: {grown >> 20} MiB more")
    _check_agreement(planned, done)
    _check_surroundings(world, before, refused=isinstance(done, Exception))
    if isinstance(done, Exception):
        _check_message(str(done))
        return Outcome(False, elapsed, grown, str(done))
    with alarm(seconds):
        _check_loads(destination, done)
    return Outcome(True, elapsed, grown, "")


def _check_agreement(planned: Any, done: Any) -> None:
    """A dry run says what the conversion will. It reads no weights, so it cannot know of a value that is too large."""
    refused = isinstance(done, Exception)
    told = str(planned) == str(done) if refused else not isinstance(planned, Exception)
    if not told and (isinstance(planned, Exception) or not _VALUES.search(str(done))):
        raise LawBroken(f"the dry run said {planned!s:.300}, the conversion {done!s:.300}")


def _attempt(source: Path, destination: Path, **options: Any) -> Any:
    """What `convert` returns, or its ConversionError."""
    from convert import ConversionError, convert

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            return convert(source, destination, **options)
    except ConversionError as error:
        return error
    except (LawBroken, KeyboardInterrupt):
        raise
    except TooSlow as error:
        raise LawBroken(f"time: still running in {_place(error)}") from error
    except BaseException as error:  # a panic of a library is no Exception
        raise LawBroken(f"{type(error).__name__} at {_place(error)}: {error!s:.300}") from error


def _place(error: BaseException) -> str:
    """The innermost line of ours in a traceback."""
    rows = [row for row in traceback.extract_tb(error.__traceback__) if "/tests/" not in row.filename]
    ours = [row for row in rows if "/convert/" in row.filename or "/jaxdecode/" in row.filename] or rows
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


def _check_message(message: str) -> None:
    lines = message.split("\n")
    if not message or len(message) > MESSAGE or max(map(len, lines)) > LINE:
        raise LawBroken(f"message: {len(message)} characters, the longest line {max(map(len, lines))}")
    odd = [character for line in lines for character in line if not character.isprintable()]
    if odd:
        raise LawBroken(f"message: holds {odd[0]!r} in {message[:300]!r}")


def _check_loads(destination: Path, done: Any) -> None:
    import numpy as np

    from jaxdecode.checkpoint import flatten, load_params, verify_hashes

    try:
        params, config = load_params(destination)
        arrays = flatten(params)
        hashed = verify_hashes(destination)
    except (ValueError, TypeError, OSError, OverflowError, AttributeError) as error:
        raise LawBroken(f"what was converted does not load: {type(error).__name__}: {error!s:.300}") from error
    if config != done.config or len(arrays) != done.tensors or hashed != done.tensors:
        raise LawBroken("the checkpoint is not the one that was announced")
    if sum(int(np.prod(array.shape)) for array in arrays.values()) != done.parameters:
        raise LawBroken("the number of parameters is not the one that was announced")
    room = sum(file.stat().st_size for file in destination.rglob("*") if file.is_file())
    if room > done.disk_bytes:
        raise LawBroken(f"the checkpoint takes {room:,} bytes, {done.disk_bytes:,} were announced")
    modes = {path: path.lstat().st_mode for path in destination.rglob("*")}
    odd = [path for path, mode in modes.items() if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)]
    if odd:
        raise LawBroken(f"the checkpoint holds {odd[0].name}, which is no plain file")


# What lies around the converter


def snapshot(world: Path) -> dict[str, tuple]:
    """Every entry below a folder, links not followed, with small files' contents."""
    rows = {}
    for folder, folders, files in os.walk(world):
        for name in folders + files:
            path = Path(folder) / name
            row = path.lstat()
            link = os.readlink(path) if path.is_symlink() else ""
            plain = stat.S_ISREG(row.st_mode)
            content = hashlib.sha256(path.read_bytes()).hexdigest() if plain and row.st_size < 1 << 20 else ""
            when = 0 if path == world / "out" else row.st_mtime_ns
            size = row.st_size if plain else 0
            rows[str(path.relative_to(world))] = (row.st_mode, row.st_ino, size, when, link, content)
    return rows


def difference(before: dict[str, tuple], after: dict[str, tuple]) -> list[str]:
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))[:5]


def _check_surroundings(world: Path, before: dict[str, tuple], refused: bool) -> None:
    """Nothing but the destination changed; an unfinished checkpoint that was there may be gone."""
    after = snapshot(world)
    if refused:
        taken = {name for name in before if name.startswith("out/ours.partial") and name not in after}
    else:
        taken = {name for name in {*before, *after} if name.startswith(("out/ours/", "out/ours.partial/"))}
        taken |= {"out/ours"} | ({"out/ours.partial"} - set(after))
    changed = [name for name in difference(before, after) if name not in taken]
    if changed:
        raise LawBroken(f"{'a refused conversion' if refused else 'the conversion'} changed {changed}")


# What happens inside the process

_watching: Path | None = None
_seen: list[str] = []


def install_watch() -> None:
    """From now on `watched` sees programs being run and files being written; cannot be undone."""
    sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple) -> None:
    if _watching is None:
        return
    if event in _RUNNING:
        _seen.append(f"runs: {event}{arguments!r:.200}")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        _note_path(event, arguments[0])
    elif event in _CHANGING and arguments[-1] == -1:  # not relative to an open folder
        for argument in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
            _note_path(event, argument)


def _note_path(event: str, path: Any) -> None:
    assert _watching is not None
    if isinstance(path, str | bytes):
        path = os.path.realpath(os.path.dirname(os.fsdecode(path) or "."))
        if not Path(path).is_relative_to(_watching):
            _seen.append(f"writes: {event} in {path}")


@contextlib.contextmanager
def watched(allowed: Path) -> Iterator[None]:
    """Breaks the law if a program is run, or a file changed outside `allowed`; needs `install_watch`."""
    global _watching
    _seen.clear()
    _watching = Path(os.path.realpath(allowed))
    try:
        yield
    finally:
        _watching = None
    if _seen:
        raise LawBroken(_seen[0])


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises TooSlow after so much processor time, and then each second; or after `PATIENCE` ticks of the clock.

    Ticks are counted, since a process that is stopped for an hour has only one waiting for it.
    """
    ticks = 0

    def ring(*_: Any) -> None:
        raise TooSlow

    def tick(*_: Any) -> None:
        nonlocal ticks
        ticks += 1
        if ticks > PATIENCE:
            raise TooSlow

    signal.signal(signal.SIGPROF, ring)
    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)


def limit_memory() -> None:
    """Let allocations beyond `HARD_LIMIT` fail; mapped files count too."""
    limit = _status("VmSize") + HARD_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def reset_peak() -> int:
    """Starts the measurement of peak memory anew; returns the bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Most bytes resident since `reset_peak`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{field}:"))
