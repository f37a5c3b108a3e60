"""Writing a checkpoint so that it is whole or absent, and so that a killed run continues where it stopped.

Everything happens in `PATH.partial`, one item (weight file) after another; a journal there names the finished
items and their hashes. One rename of a directory makes the checkpoint appear at PATH.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxdecode import safetensors_file
from jaxdecode.checkpoint import FORMAT_VERSION
from jaxdecode.checkpoint_journal import append_line, begin_journal, read_journal, sync, sync_dir
from jaxdecode.config import ModelConfig

Specs = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name -> (dtype name, shape)


class CheckpointWriter:
    """Context manager that writes one checkpoint.

    Attributes:
      partial: the directory it works in; it outlives a failed or killed run, for the next one to continue.
      restarted: a partial of something else was found there and thrown away.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        config: ModelConfig,
        identity: dict[str, Any] | None,
        source: dict[str, Any],
    ):
        """Prepare to write `path`; nothing is touched before entering the context.

        Args:
          identity: JSON that fixes the bytes to be written (source fingerprint, dtype); a partial with the
            same identity and config is continued. None never continues.
          source: JSON for the manifest: where the weights come from.
        """
        self.path = Path(path)
        self.partial = partial_dir(self.path)
        self.restarted = False
        self._config, self._source = config, source
        header = {
            "format_version": FORMAT_VERSION,
            "version": package_version(),
            "config": config.to_dict(),
            "identity": identity,
        }
        self._header = json.loads(json.dumps(header))  # as it reads back: tuples become lists
        self._rows: dict[str, dict[str, Any]] = {}  # tensor name -> manifest row
        self._items: dict[str, list[str]] = {}  # finished items -> their tensors
        self._lock: IO[str] | None = None
        self._journal: IO[str] | None = None

    def __enter__(self) -> CheckpointWriter:
        """Take the partial directory, continuing or clearing what is there.

        Raises:
          ValueError: the destination exists, another writer is at work, or PATH.partial is not ours.
        """
        refuse_existing(self.path)
        refuse_foreign(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = (self.partial / "lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ValueError(f"another process is writing {self.path} (it holds {self.partial / 'lock'})") from error
        try:
            refuse_existing(self.path)  # a writer that held the lock until now may just have finished
            if not _is_still(self._lock, self.partial / "lock"):
                raise ValueError(f"another process has just given up writing {self.path}; run again")
            self._take_over()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for file in (self._journal, self._lock):
            if file is not None:
                file.close()

    def finished(self, item: str) -> bool:
        """Whether an earlier run wrote this item."""
        return item in self._items

    def write_item(self, item: str, specs: Specs, chunks: Callable[[str], Iterator[np.ndarray]]) -> None:
        """Write one weight file: `chunks(name)` yields a tensor's elements in order, in its spec's dtype.

        Raises:
          ValueError: the chunks of a tensor do not add up to its size.
        """
        header, entries = safetensors_file.plan_header(specs)
        file = self._weights / f"{item}.safetensors"
        temporary = file.with_suffix(".tmp")
        rows = {}
        with temporary.open("wb") as output:
            output.write(header)
            for name, entry in entries.items():
                rows[name] = {
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "bytes": entry.stop - entry.start,
                    "file": f"weights/{file.name}",
                    "sha256": _write_tensor(output, name, entry, chunks(name)),
                }
            sync(output)
        os.replace(temporary, file)
        sync_dir(self._weights)
        self._note({"item": item, "tensors": rows})

    def tokenizer_dir(self) -> Path:
        """An empty directory for the tokenizer's files."""
        path = self.partial / "checkpoint" / "tokenizer"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def copy_tokenizer(self, source: Path) -> None:
        """Take over the files of a tokenizer directory."""
        target = self.tokenizer_dir()
        for file in sorted(source.iterdir()):
            if file.is_file():
                shutil.copyfile(file, target / file.name)

    def finish(self) -> None:
        """Write config and manifest, then make the checkpoint appear.

        Raises:
          ValueError: something else appeared at the destination in the meantime.
        """
        checkpoint = self.partial / "checkpoint"
        _write_orbax_items(
            self.partial / "items",
            checkpoint,
            {"config": self._config.to_dict(), "manifest": self._manifest()},
        )
        for folder, _, files in os.walk(checkpoint):
            for name in files:
                if not name.endswith(".safetensors"):  # those are on the disk already
                    with (Path(folder) / name).open("rb") as file:
                        os.fsync(file.fileno())
            sync_dir(Path(folder))
        refuse_existing(self.path)
        os.rename(checkpoint, self.path)
        sync_dir(self.path.parent)
        self.discard()

    def discard(self) -> None:
        """Throw the partial away, for an error that another run would meet again."""
        self.__exit__()
        shutil.rmtree(self.partial)

    @property
    def _weights(self) -> Path:
        return self.partial / "checkpoint" / "weights"

    def _take_over(self) -> None:
        """Continue a journal with our header; clear anything else."""
        journal = self.partial / "journal.jsonl"
        lines = read_journal(journal)
        if not lines or self._header["identity"] is None or lines[0] != self._header:
            self.restarted = bool(lines)
            for child in self.partial.iterdir():
                if child.name != "lock":
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
            lines = []
        self._weights.mkdir(parents=True, exist_ok=True)
        kept = [line for line in lines[1:] if self._intact(line)]
        # written anew: a killed run may have left half a line
        self._journal = begin_journal(journal, [self._header, *kept])
        for line in kept:
            self._remember(line)

    def _intact(self, line: dict[str, Any]) -> bool:
        try:
            entries = safetensors_file.read_header(self._weights / f"{line['item']}.safetensors")
            written = {name: (row["dtype"], row["shape"]) for name, row in line["tensors"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a line of the journal may hold anything
            return False
        return written == {name: (entry.dtype, list(entry.shape)) for name, entry in entries.items()}

    def _note(self, line: dict[str, Any]) -> None:
        assert self._journal is not None, "write_item is called inside the context"
        append_line(self._journal, line)
        self._remember(line)

    def _remember(self, line: dict[str, Any]) -> None:
        self._items[line["item"]] = list(line["tensors"])
        self._rows |= line["tensors"]

    def _manifest(self) -> dict[str, Any]:
        rows = dict(sorted(self._rows.items()))
        sizes: dict[str, int] = {}
        for row in rows.values():
            sizes[row["dtype"]] = sizes.get(row["dtype"], 0) + row["bytes"]
        return {
            "format_version": FORMAT_VERSION,
            "jaxdecode_version": package_version(),
            "dtype": max(sizes, key=lambda name: sizes[name]),
            "source": self._source,
            "total_bytes": sum(sizes.values()),
            "tensors": rows,
        }


def partial_dir(path: Path) -> Path:
    """Where an unfinished checkpoint of `path` lives: beside it, so that a rename finishes it."""
    return path.parent / f"{path.name}.partial"


def _is_unfinished(partial: Path) -> bool:
    """Whether there is nothing, nothing yet, or what a writer left: a lock among plain files, no link."""
    if not os.path.lexists(partial):
        return True
    if partial.is_symlink() or not partial.is_dir():
        return False
    inside = [Path(folder) / name for folder, folders, files in os.walk(partial) for name in folders + files]
    plain = all(stat.S_ISREG(mode) or stat.S_ISDIR(mode) for mode in (path.lstat().st_mode for path in inside))
    return not inside or (plain and (partial / "lock").is_file())


def refuse_foreign(partial: Path) -> None:
    """Refuse to work in anything but an unfinished checkpoint.

    Raises:
      ValueError: something else is there.
    """
    if not _is_unfinished(partial):
        raise ValueError(f"{partial} is in the way: it is not an unfinished checkpoint; move it")


def refuse_existing(path: Path) -> None:
    """Refuse to write over anything.

    Raises:
      ValueError: `path` exists.
    """
    if os.path.lexists(path):
        raise ValueError(f"the destination {path} exists already; remove it or choose another")


def _write_tensor(output: IO[bytes], name: str, entry: safetensors_file.Entry, chunks: Iterator[np.ndarray]) -> str:
    """Append one tensor; returns the SHA-256 of its little-endian bytes."""
    digest, written = hashlib.sha256(), 0
    for chunk in chunks:
        if chunk.dtype != safetensors_file.numpy_dtype(entry.dtype):
            raise ValueError(f"{name}: a chunk is {chunk.dtype}, the tensor {entry.dtype}")
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        digest.update(data)
        output.write(data.data)
        written += len(data)
    if written != entry.stop - entry.start:
        raise ValueError(
            f"{name}: {written} bytes were produced, its shape {list(entry.shape)} needs {entry.stop - entry.start}"
        )
    return digest.hexdigest()


def _write_orbax_items(scratch: Path, target: Path, items: dict[str, Any]) -> None:
    """Let Orbax write JSON items into a directory of its own, then move them into `target`."""
    import orbax.checkpoint as ocp

    shutil.rmtree(scratch, ignore_errors=True)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        arguments = {name: ocp.args.JsonSave(item) for name, item in items.items()}
        checkpointer.save(scratch.absolute(), args=ocp.args.Composite(**arguments))
    for child in scratch.iterdir():
        old = target / child.name
        if old.is_dir():
            shutil.rmtree(old)
        os.replace(child, old)
    scratch.rmdir()


def _is_still(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def package_version() -> str:
    try:
        return importlib.metadata.version("jaxdecode")
    except importlib.metadata.PackageNotFoundError:  # a source tree on PYTHONPATH
        return "0+source"
