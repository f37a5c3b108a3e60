"""A checkpoint's numbers against its source's: streamed chunk by chunk through the converter's own plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.hf_config import find_family, parse_config
from convert.positions import extend_positions
from convert.sources import Source
from convert.weights import Target, chunks, make_plan
from jaxdecode.checkpoint import load_config, load_manifest, tensor_views

_NAMED = 5  # tensors that differ, in a message


def compare_weights(
    checkpoint: str | Path, source: Source, progress: Callable[[int], None] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Converts the source's tensors again, as the checkpoint was converted, and compares them bit by bit.

    Args:
      progress: called with the bytes compared so far.

    Returns:
      (record, problems): how many tensors were compared and are equal, and where the first others differ.

    Raises:
      ConversionError: tensors are missing from the source, or have shapes that its config.json does not give them.
    """
    targets, problems = _plan(checkpoint, source)
    views = tensor_views(checkpoint)
    if names := sorted(set(views) ^ set(targets)):
        problems.append(f"tensors that only one of the checkpoint and {source.path} has: {', '.join(names[:_NAMED])}")
    shared, differ, done = [name for name in views if name in targets], [], 0
    for name in shared:
        if where := _difference(targets[name], views[name]):
            differ.append(f"{name} ({where})")
        done += views[name].nbytes
        if progress:
            progress(done)
    if differ:
        first = ", ".join(differ[:_NAMED]) + (", …" if len(differ) > _NAMED else "")
        problems.append(f"{len(differ)} tensors differ from {source.path}: {first}")
    record = {"compared": len(shared), "equal": len(shared) - len(differ), "first_different": differ[:_NAMED]}
    return record, problems


def _plan(checkpoint: str | Path, source: Source) -> tuple[dict[str, Target], list[str]]:
    """What a conversion with the checkpoint's own options would write, and why that cannot be known."""
    manifest, config = load_manifest(checkpoint), parse_config(source.config, source.generation_config)
    plan, problems = make_plan(source, config, find_family(source.config), manifest["dtype"])
    if problems:
        raise ConversionError(problems, f"cannot read {source.path}")
    refused: list[str] = []
    if "trained_positions" in manifest["source"]:
        try:
            plan, _ = extend_positions(plan, config, load_config(checkpoint).max_position)
        except ConversionError as error:
            refused = [f"{source.path}: {problem}" for problem in error.problems]
    rows = manifest["tensors"]
    return {
        target.name: dataclasses.replace(target, dtype=rows[target.name]["dtype"]) if target.name in rows else target
        for target in plan.targets
    }, refused


def _difference(target: Target, ours: np.ndarray) -> str:
    """Where a tensor differs from the source's first; empty if it does not."""
    if target.shape != ours.shape:
        return f"{list(ours.shape)} here and {list(target.shape)} there"
    start = 0
    try:
        for chunk in chunks(target):
            mine = ours[start : start + len(chunk)]
            if mine.tobytes() != chunk.tobytes():
                same = (_bytes(mine) == _bytes(chunk)).all(axis=1)
                return f"first in row {start + int(np.argmin(same))}"
            start += len(chunk)
    except ConversionError as error:
        return str(error)
    return ""


def _bytes(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
