"""Whether a model's weights, caches and the compiler's temporary bytes fit a card."""

from __future__ import annotations

import dataclasses
import math

from jaxdecode.aot.check.least import slot_bytes, weight_bytes
from jaxdecode.aot.check.prefill import chunk_sizes
from jaxdecode.aot.check.program import prompt_len
from jaxdecode.aot.program import MemoryUse
from jaxdecode.cache import cache_slots
from jaxdecode.config import ModelConfig
from pallas_kernels.targets import Target

_JAX_SHARE = 0.75  # of a card's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """Memory on the card.

    Attributes:
      weight_bytes: of the parameters.
      cache_bytes: keys and values of all layers and rows.
      temporary_bytes: the rest that the compiled program needs; None if it was not compiled.
      memory_bytes: of the card.
      largest_batch: rows that fit with this context, 0 if none. An estimate on the safe side: temporaries are taken to
        grow with the rows, and with the largest chunk of a prompt. Where nothing was compiled, at most that.
      largest_context: tokens a row, a multiple of 32, that fit with this batch; likewise. The model may know fewer
        positions.
    """

    weight_bytes: int
    cache_bytes: int
    temporary_bytes: int | None
    memory_bytes: int
    largest_batch: int
    largest_context: int

    @property
    def total_bytes(self) -> int:
        """Bytes needed; without a compiled program the least that can be."""
        return self.weight_bytes + self.cache_bytes + (self.temporary_bytes or 0)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.memory_bytes

    @property
    def memory_fraction(self) -> float | None:
        """XLA_PYTHON_CLIENT_MEM_FRACTION that the program needs; None if JAX's own does or nothing would."""
        share = math.ceil(100 * self.total_bytes / self.memory_bytes) / 100
        return share if _JAX_SHARE < share <= 1 else None


def find_fit(
    config: ModelConfig, dtype: str, *, batch: int, context: int, target: Target, compiled: MemoryUse | None = None
) -> Fit:
    """Memory of a cell; `compiled` is what its program uses, its caches among the temporaries."""
    weights, slot = weight_bytes(config, dtype), slot_bytes(config, dtype)
    row, temporaries = cache_slots(context) * slot, None
    if compiled is not None:
        everything = compiled.arguments + compiled.outputs - compiled.aliased + compiled.temporaries
        temporaries = max(0, everything - weights - batch * row)
    left, spent = target.memory_bytes - weights, temporaries or 0
    return Fit(
        weight_bytes=weights,
        cache_bytes=batch * row,
        temporary_bytes=temporaries,
        memory_bytes=target.memory_bytes,
        largest_batch=max(0, int(left // (row + spent / batch))),
        largest_context=_largest_context(left, spent, batch * slot, context),
    )


def _largest_context(left: int, temporaries: int, slot: int, context: int) -> int:
    """Slots of `slot` bytes beside temporaries that grow with the largest chunk that a prompt is read in."""
    chunk, longest = chunk_sizes(prompt_len(context))[0], max(chunk_sizes(1 << 20))
    step = cache_slots(1)
    slots = max(0, (left - temporaries * longest // chunk) // slot // step * step)
    if chunk == longest or chunk_sizes(prompt_len(max(2, slots)))[0] == longest:
        return slots
    slots = max(0, (left - temporaries) // slot // step * step)  # too few for the longer chunks
    while slots > step and chunk_sizes(prompt_len(slots))[0] == longest:
        slots -= step
    return slots
