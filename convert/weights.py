"""The engine: plan which rows of which source tensor go where, check that nothing is missing, stream them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from convert.errors import ConversionError
from convert.family import Family, Part
from convert.rows import reordered
from convert.sources import Source, SourceTensor
from jaxdecode.checkpoint import flatten, item_of
from jaxdecode.config import ModelConfig
from jaxdecode.safetensors_file import numpy_dtype, plan_header, tensor_bytes

CHUNK_BYTES = 16 << 20  # of float32 values held at once; a few temporaries of this size are the engine's memory
DTYPES = ("float32", "bfloat16", "float16")
FLOATS = (*DTYPES, "float64")


@dataclasses.dataclass(frozen=True)
class Target:
    """One tensor of the checkpoint: the source tensors whose rows stand in it one after another."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[SourceTensor, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion will write: item name -> its tensors, in the order of the model, and a tokenizer's files."""

    items: dict[str, list[Target]]
    dtype: str
    tokenizer_bytes: int

    @property
    def targets(self) -> list[Target]:
        return [target for targets in self.items.values() for target in targets]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)

    @property
    def parameters(self) -> int:
        return sum(math.prod(target.shape) for target in self.targets)

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk: tokenizer, tensors, headers, and about 300 bytes per tensor of manifest and journal."""
        headers = sum(len(plan_header(specs(targets))[0]) for targets in self.items.values())
        return self.tokenizer_bytes + self.nbytes + headers + 600 * len(self.targets) + (1 << 20)

    @property
    def peak_bytes(self) -> int:
        """Anonymous memory that streaming adds: a chunk as read and as cast, and dequantising's scratch."""
        rows = max((_row_bytes(target.shape) for target in self.targets), default=0)
        return 6 * max(CHUNK_BYTES, rows)


def make_plan(source: Source, config: ModelConfig, family: Family, dtype: str | None) -> tuple[Plan, list[str]]:
    """Match every tensor the model needs with the source's.

    Returns:
      (plan, problems): missing, misshaped, unexpected tensors and types that cannot be converted.
    """
    from jaxdecode.models import abstract_params

    problems: list[str] = []
    chosen = dtype or own_dtype(source)
    tensors = _by_table(source, family, problems)
    items: dict[str, list[Target]] = {}
    used: set[str] = set()
    for name, abstract in flatten(abstract_params(config)).items():
        wanted = family.parts(config, name, abstract.shape[0])
        used.update(part.name for part in wanted)
        parts = _match(tensors, name, abstract.shape, wanted, problems)
        items.setdefault(item_of(name), []).append(Target(name, tuple(abstract.shape), chosen, parts))
    if config.tied_embeddings:
        used.update(_check_tied(tensors, family, problems))
    problems += _unexpected(tensors, family, used)
    return Plan(items, chosen, source.tokenizer_bytes), problems


def _by_table(source: Source, family: Family, problems: list[str]) -> dict[str, SourceTensor]:
    """The source's tensors under the names of the family's table."""
    tensors: dict[str, SourceTensor] = {}
    for tensor in source.tensors.values():
        name = family.full_name(tensor.name)
        if name in tensors:
            problems.append(f"{tensors[name].name} and {tensor.name} are one tensor of a {family.model_type}")
        tensors[name] = tensor
    return tensors


def own_dtype(source: Source) -> str:
    """The narrowest of `DTYPES` that holds every matrix exactly; float32 for quantised or float64 ones."""
    found = {tensor.dtype for tensor in source.tensors.values() if len(tensor.shape) > 1 and tensor.dtype in FLOATS}
    return found.pop() if len(found) == 1 and found <= set(DTYPES) else "float32"


def specs(targets: list[Target]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the writer needs to know of an item's tensors."""
    return {target.name: (target.dtype, target.shape) for target in targets}


def chunks(target: Target) -> Iterator[np.ndarray]:
    """The rows of a target in order, a few at a time, in its dtype.

    Raises:
      ConversionError: a finite value becomes infinite in the target's dtype.
    """
    dtype, step = numpy_dtype(target.dtype), max(1, CHUNK_BYTES // _row_bytes(target.shape))
    for part in target.parts:
        for start in range(0, part.shape[0], step):
            yield _cast(part.read(start, min(start + step, part.shape[0])), dtype, target, part)


def _cast(values: np.ndarray, dtype: np.dtype, target: Target, part: SourceTensor) -> np.ndarray:
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype)
    if dtype.itemsize < 4 or values.dtype.itemsize > 4:  # bfloat16 to float16 can overflow too
        lost = np.isinf(cast) & np.isfinite(values)
        if lost.any():
            largest = float(np.abs(values[lost].astype(np.float64)).max())
            raise ConversionError(
                f"{part.name} -> {target.name}: {dtype} cannot hold {int(lost.sum())} of its values (the "
                f"largest is {largest:.6g}); choose --dtype bfloat16 or float32"
            )
    return cast


def _row_bytes(shape: tuple[int, ...]) -> int:
    return 4 * max(1, math.prod(shape[1:]))


def _match(
    tensors: dict[str, SourceTensor], name: str, shape: tuple[int, ...], wanted: list[Part], problems: list[str]
) -> tuple[SourceTensor, ...]:
    parts = []
    for part_name, rows, order in wanted:
        part, expected = tensors.get(part_name), (rows, *shape[1:])
        if part is None:
            problems.append(f"missing tensor {part_name}{list(expected)}, needed for {name}{list(shape)}")
        elif part.shape != expected:
            problems.append(
                f"misshaped tensor {part_name}: the source holds {list(part.shape)}, {name}{list(shape)} "
                f"needs {list(expected)}"
            )
        elif part.dtype not in FLOATS:
            problems.append(
                f"tensor {part_name} has dtype {part.stored}, which is not supported; supported are {', '.join(FLOATS)}"
            )
        else:
            parts.append(part if order is None else reordered(part, order))
    return tuple(parts)


def _check_tied(tensors: dict[str, SourceTensor], family: Family, problems: list[str]) -> list[str]:
    """A head beside tied embeddings must repeat them; returns the names this accounts for."""
    head_name, embed_name = f"{family.model['head']}.weight", f"{family.model['embed']}.weight"
    head, embed = tensors.get(head_name), tensors.get(embed_name)
    if head is None or embed is None or len(embed.shape) != 2 or 0 in embed.shape:
        return [head_name]  # a misshaped embedding is reported as such
    if head.shape != embed.shape or not _equal(head, embed):
        problems.append(
            f"config.json ties {head_name} to {embed_name}, but the source holds both and they differ; set "
            "tie_word_embeddings to false if the head is meant"
        )
    return [head_name]


def _equal(a: SourceTensor, b: SourceTensor) -> bool:
    step = max(1, CHUNK_BYTES // _row_bytes(a.shape))
    spans = ((start, min(start + step, a.shape[0])) for start in range(0, a.shape[0], step))
    return all(np.array_equal(a.read(*span), b.read(*span)) for span in spans)


def _unexpected(tensors: dict[str, SourceTensor], family: Family, used: set[str]) -> list[str]:
    ignored = [re.compile(pattern) for pattern in family.ignored]
    return [
        f"unexpected tensor {tensor.name}{list(tensor.shape)} in {tensor.where}: a {family.model_type} of "
        "this config.json has no place for it"
        for name, tensor in tensors.items()
        if name not in used and not any(pattern.fullmatch(name) for pattern in ignored)
    ]
