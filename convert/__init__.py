"""Hugging Face checkpoints and GGUF files to jaxdecode's checkpoints, and back.

convert.convert("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2")
convert.export("smollm2", "smollm2-hf")
"""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.export import export
from convert.hf_config import find_family, parse_config
from convert.hf_directory import read_config
from convert.positions import extend_positions as extend
from convert.sources import Source, open_source
from convert.weights import DTYPES, Plan, Target, chunks, make_plan, specs
from jaxdecode.checkpoint_writer import CheckpointWriter, partial_dir, refuse_existing, refuse_foreign
from jaxdecode.config import ModelConfig

__all__ = ["Conversion", "ConversionError", "Progress", "convert", "export", "read_config"]

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, item


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was, or with `dry_run` would be, converted.

    Attributes:
      tensors, parameters: of the checkpoint (fused tensors count once).
      disk_bytes, peak_bytes: room it takes; predicted peak of anonymous memory of this process.
      trained_positions: those of the source, where the checkpoint has more of them; else None.
      continued_items: items an earlier, interrupted run had written.
      restarted: an interrupted run of another source, dtype or version was found and thrown away.
    """

    source: str
    kind: str
    destination: Path
    config: ModelConfig
    dtype: str
    tensors: int
    parameters: int
    disk_bytes: int
    peak_bytes: int
    largest_tensor_bytes: int
    trained_positions: int | None = None
    continued_items: int = 0
    restarted: bool = False


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    extend_positions: int | None = None,
    dry_run: bool = False,
    planned: Callable[[Conversion], None] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint; DST appears whole or not at all, and a killed run continues when called again.

    Args:
      src: a Hugging Face model directory, a GGUF file, or a hub name.
      dst: a path that does not exist yet.
      dtype: "float32", "bfloat16" or "float16"; None is the source's own (float32 for quantised GGUF).
      extend_positions: how many learned positions to write, for measuring speed beyond those that were trained; see
        `convert.positions`.
      dry_run: plan and check, write nothing.
      planned: called with the plan before anything is written.
      progress: called with (bytes done, bytes in all, item) as tensors are written.

    Raises:
      ConversionError: every problem found, at once; nothing is at DST.
    """
    dst = Path(dst)
    source, config, plan = _prepare(src, dst, dtype, extend_positions)
    result = _describe(src, dst, source, config, plan)
    if extend_positions is not None:
        result = dataclasses.replace(result, trained_positions=parse_config(source.config, {}).max_position)
    if planned:
        planned(result)
    if dry_run:
        return result
    identity = {"fingerprint": source.fingerprint, "dtype": plan.dtype, "kind": source.kind}
    about: dict[str, Any] = {"kind": source.kind, "name": str(src), "fingerprint": source.fingerprint}
    if result.trained_positions is not None:
        about["trained_positions"] = result.trained_positions
    try:
        with CheckpointWriter(dst, config=config, identity=identity, source=about) as writer:
            continued = sum(writer.finished(item) for item in plan.items)
            _write(writer, source, plan, progress)
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(str(error)) from error
    return dataclasses.replace(result, continued_items=continued, restarted=writer.restarted)


def _prepare(
    src: str | Path, dst: Path, dtype: str | None, extend_positions: int | None
) -> tuple[Source, ModelConfig, Plan]:
    """Open, translate and plan, collecting the problems of all three."""
    problems: list[str] = []
    if dtype is not None and dtype not in DTYPES:
        problems.append(f"unknown dtype {dtype!r}; supported are {', '.join(DTYPES)}")
    try:
        refuse_existing(dst)
        refuse_foreign(partial_dir(dst))
    except ValueError as error:
        problems.append(str(error))
    try:
        source = open_source(src)
        problems += source.problems
        config = parse_config(source.config, source.generation_config)
    except ConversionError as error:
        raise _refusal(src, problems + error.problems) from error
    plan, found = make_plan(source, config, find_family(source.config), dtype)
    problems += found
    if extend_positions is not None and not found:
        try:
            plan, config = extend(plan, config, extend_positions)
        except ConversionError as error:
            problems += error.problems
    if not problems:
        problems += _no_room(plan, dst)
    if problems:
        raise _refusal(src, problems)
    return source, config, plan


def _refusal(src: str | Path, problems: list[str]) -> ConversionError:
    named = len(problems) == 1 and str(src) in problems[0]
    return ConversionError(problems, "cannot convert" if named else f"cannot convert {src}")


def _write(writer: CheckpointWriter, source: Source, plan: Plan, progress: Progress | None) -> None:
    done = 0

    def counted(target: Target, item: str) -> Iterator[np.ndarray]:
        nonlocal done
        for chunk in chunks(target):
            yield chunk
            done += chunk.nbytes
            if progress:
                progress(done, plan.nbytes, item)

    try:
        source.write_tokenizer(writer.tokenizer_dir())
        for item, targets in plan.items.items():
            if writer.finished(item):
                done += sum(target.nbytes for target in targets)
                continue
            by_name = {target.name: target for target in targets}
            writer.write_item(
                item, specs(targets), lambda name, by_name=by_name, item=item: counted(by_name[name], item)
            )
    except ValueError:  # the same source would fail the same way again: nothing to continue
        writer.discard()
        raise
    writer.finish()


def _no_room(plan: Plan, dst: Path) -> list[str]:
    parent = dst.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        return [f"{parent} is no folder"]
    written = sum(file.stat().st_size for file in (partial_dir(dst) / "checkpoint" / "weights").glob("*"))
    free, needed = shutil.disk_usage(parent).free, plan.disk_bytes - written
    if not os.access(parent, os.W_OK):
        return [f"{parent} is not writable"]
    return [f"not enough disk: {dst} needs {needed:,} bytes, {parent} has {free:,} free"] if needed > free else []


def _describe(src: str | Path, dst: Path, source: Source, config: ModelConfig, plan: Plan) -> Conversion:
    return Conversion(
        source=str(src),
        kind=source.kind,
        destination=dst,
        config=config,
        dtype=plan.dtype,
        tensors=len(plan.targets),
        parameters=plan.parameters,
        disk_bytes=plan.disk_bytes,
        peak_bytes=_anonymous_bytes() + plan.peak_bytes,
        largest_tensor_bytes=max(target.nbytes for target in plan.targets),
    )


def _anonymous_bytes() -> int:
    """Memory of this process that no file backs; mapped weights belong to the page cache."""
    try:
        rows = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith(("RssAnon:", "RssShmem:")))
