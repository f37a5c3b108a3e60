"""A certificate beside a checkpoint: what was compared with its source, by which programs, and how it came out."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from convert.errors import ConversionError
from convert.hf_config import parse_config
from convert.hf_reference import find_python
from convert.source_weights import compare_weights
from convert.sources import Source, open_source
from convert.verify import LONGEST, Report, verify_against_source
from jaxdecode.checkpoint import load_config, load_manifest, verify_hashes
from jaxdecode.checkpoint_journal import sync, sync_dir
from jaxdecode.checkpoint_writer import package_version
from jaxdecode.config import ModelConfig

FILE = "verification.json"
FORMAT_VERSION = 1
_SHAPE = ("vocab_size", "embed_dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")
_NOT_THE_MODEL = ("eos_token_ids", "max_position")  # what a conversion, or a file beside the weights, may set otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """The outcome of `certify`; `str()` is for people, `fields` is what the file holds.

    Attributes:
      report: the comparison; None if something was wrong before it.
      problems: why it failed; empty if it passed.
    """

    path: Path
    fields: dict[str, Any]
    report: Report | None
    problems: list[str]

    @property
    def passed(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        hashes, weights = self.fields["hashes"], self.fields["weights"]
        lines = [f"{hashes['tensors']} tensors re-read, {hashes['bytes']:,} bytes"]
        if weights:
            lines.append(f"{weights['equal']} of {weights['compared']} tensors equal the source's bit by bit")
        if self.report:
            lines.append(self.report.table())
        verdict = "PASS" if self.passed else "FAIL" if self.report else "FAIL (nothing was computed)"
        return "\n".join([*lines, *self.problems, f"verify: {verdict}", f"Wrote {self.path}"])


def certify(
    checkpoint: str | Path,
    source: str | Path,
    *,
    longest: int = LONGEST,
    python: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Compares every tensor and a model's answers with the source, and writes `verification.json` into the checkpoint.

    A certificate of a failure says so; it takes the place of an older one.

    Args:
      source: what it was converted from: a Hugging Face directory, a GGUF file or a hub name.
      longest: most positions of a sequence, prompt and greedy tokens together; the model's own limit may be lower.
      python: an interpreter with torch; None for `hf_reference.find_python`.
      progress: called with (bytes read, bytes in all), each tensor once to hash and once to compare it.

    Raises:
      ReferenceUnavailable: no Python with torch was found, or the reference process failed; nothing is written.
      ValueError: `checkpoint` is none, or the source cannot be read; nothing is written.
    """
    checkpoint, python = Path(checkpoint), python or find_python()  # before anything slow
    config, manifest = load_config(checkpoint), load_manifest(checkpoint)
    total = sum(row["bytes"] for row in manifest["tensors"].values())
    problems, report, opened, weights = _changed(checkpoint, _share(progress, 0, total)), None, None, None
    if not problems:
        opened = open_source(source)
        problems = _other_model(config, opened, from_gguf=manifest["source"].get("kind") == "GGUF")
    if opened and not problems:
        weights, differences = compare_weights(checkpoint, opened, _share(progress, total, total))
        report = verify_against_source(checkpoint, source, longest=longest, python=python)
        problems = differences + report.problems
    fields = {
        "format_version": FORMAT_VERSION,
        "passed": not problems,
        "problems": problems,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hashes": {"tensors": len(manifest["tensors"]), "bytes": total, "sha256": weights_sha256(manifest)},
        "source": _describe_source(source, opened, manifest),
        "positions": {"model": config.max_position, "cap": longest},
        "weights": weights,
        "comparison": report.to_dict() if report else None,
        "versions": _versions(),
    }
    _write(checkpoint / FILE, fields)
    return Certificate(path=checkpoint / FILE, fields=fields, report=report, problems=problems)


def weights_sha256(manifest: dict[str, Any]) -> str:
    """One hash of the hashes of all tensors: says which weights a certificate is about."""
    rows = {name: row["sha256"] for name, row in manifest["tensors"].items()}
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _share(
    progress: Callable[[int, int], None] | None, before: int, total: int
) -> Callable[[int], None] | None:
    """The progress of one of the two times that all bytes are read."""
    return progress and (lambda done: progress(before + done, 2 * total))


def _changed(checkpoint: Path, progress: Callable[[int], None] | None) -> list[str]:
    try:
        verify_hashes(checkpoint, progress)
    except ValueError as error:
        return [str(error)]
    return []


def _other_model(config: ModelConfig, source: Source, *, from_gguf: bool) -> list[str]:
    """What shows without any arithmetic that the source is of another model; GGUF says little more than shapes."""
    if source.problems:
        raise ConversionError(source.problems, f"cannot read {source.path}")
    theirs = parse_config(source.config, source.generation_config)
    every = [field.name for field in dataclasses.fields(config) if field.name not in _NOT_THE_MODEL]
    names = _SHAPE if from_gguf or source.kind == "GGUF" else every
    pairs = [(name, getattr(config, name), getattr(theirs, name)) for name in names]
    differences = [f"{name} is {ours} here and {other} there" for name, ours, other in pairs if ours != other]
    return [f"{source.path} is another model: {', '.join(differences)}"] if differences else []


def _describe_source(source: str | Path, opened: Source | None, manifest: dict[str, Any]) -> dict[str, Any]:
    """Which source it was, and whether its files are the very ones (by name, size and time) that were converted."""
    if opened is None:
        return {"name": str(source)}
    about = {"name": str(source), "kind": opened.kind, "fingerprint": opened.fingerprint}
    return about | {"same_files_as_converted": opened.fingerprint == manifest["source"].get("fingerprint")}


def _versions() -> dict[str, str]:
    ours = {"jaxdecode": package_version(), "python": platform.python_version(), "device": jax.default_backend()}
    return ours | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "transformers")}


def _write(path: Path, fields: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(_finite(fields), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        sync(file)
    os.replace(temporary, path)
    sync_dir(path.parent)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: their names instead."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
