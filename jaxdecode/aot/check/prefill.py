"""What reading a prompt takes, as a range: most of it are XLA's own products, which are tuned on the card only."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from jaxdecode.aot.check.least import head_matrix, layer_matrices, seen
from jaxdecode.aot.cost import Assumptions, tensor_rate
from jaxdecode.config import ModelConfig
from jaxdecode.engine import prefill_chunks
from jaxdecode.generation import PREFILL_CHUNKS
from pallas_kernels.targets import Target


def chunk_sizes(prompt_len: int) -> list[int]:
    """Tokens a row of each prefill loop, in the order in which they run."""
    return sorted(prefill_chunks(prompt_len, PREFILL_CHUNKS), reverse=True)


def passes(prompt_len: int) -> dict[int, int]:
    """How often each loop runs for prompts of that length."""
    counts, left, sizes = {}, prompt_len, chunk_sizes(prompt_len)
    for size in sizes:
        counts[size] = -(-left // size) if size == min(sizes) else left // size
        left = max(0, left - size * counts[size])
    return counts


def prefill_seconds(
    config: ModelConfig,
    dtype: str,
    *,
    batch: int,
    prompt_len: int,
    kernels: Mapping[int, int],
    target: Target,
    assumed: Assumptions,
) -> tuple[float, float]:
    """Modelled seconds, fewest and most: an ideal pass over each chunk, at the shares assumed of XLA's products.

    A pass multiplies the layers' matrices with the chunk's tokens, reads them and the keys and values before it once,
    and attends to what is there; the output head follows once a row.
    """
    itemsize, matrices = jnp.dtype(dtype).itemsize, layer_matrices(config)
    rate, reached = tensor_rate(target, dtype), assumed.dram_share * target.bandwidth * 1e9
    work = [(0, batch * 2 * head_matrix(config), itemsize * head_matrix(config))]  # launches, operations, bytes
    start = 0
    for size, count in passes(prompt_len).items():
        for _ in range(count):
            tokens, slots = batch * size, seen(config, start + size)
            operations = 2 * matrices * tokens + 4 * tokens * slots * config.num_heads * config.head_dim
            moved = itemsize * (matrices + 2 * batch * slots * config.num_kv_heads * config.head_dim)
            work.append((kernels.get(size, 0), operations, moved))
            start += size
    fewest, most = (
        sum(
            max(operations / rate, moved / reached) / share
            + launches * assumed.kernel_gap
            + (assumed.round_trip if launches else 0.0)
            for launches, operations, moved in work
        )
        for share in reversed(assumed.product_share)
    )
    return fewest, most
