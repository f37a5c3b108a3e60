"""What reading a prompt takes, as a range: most of it are XLA's own products, which are tuned on the card only."""

from __future__ import annotations

from jaxdecode.aot.check.fit import slot_bytes, weight_bytes
from jaxdecode.aot.cost import Assumptions
from jaxdecode.config import ModelConfig
from jaxdecode.engine import prefill_chunks
from jaxdecode.generation import PREFILL_CHUNKS
from pallas_kernels.targets import Target


def chunk_sizes(prompt_len: int) -> list[int]:
    """Tokens a row of each prefill loop, in the order in which they run."""
    return sorted(prefill_chunks(prompt_len, PREFILL_CHUNKS), reverse=True)


def passes(prompt_len: int) -> dict[int, int]:
    """How often each loop runs for prompts of that length."""
    counts, left = {}, prompt_len
    for size in chunk_sizes(prompt_len):
        smallest = size == min(chunk_sizes(prompt_len))
        counts[size] = -(-left // size) if smallest else left // size
        left = max(0, left - size * counts[size])
    return counts


def prefill_seconds(
    config: ModelConfig,
    dtype: str,
    *,
    batch: int,
    prompt_len: int,
    kernels: dict[int, int],
    target: Target,
    assumed: Assumptions,
) -> tuple[float, float]:
    """Modelled seconds, (fewest, most): an ideal pass over each chunk, at the shares assumed of XLA's products.

    A pass multiplies all matrices but the embedding with the chunk's tokens, reads them and the cache before it once,
    and attends to what is there.
    """
    itemsize = 4 if dtype == "float32" else 2
    matrices = weight_bytes(config, dtype) - config.vocab_size * config.embed_dim * itemsize
    slot = slot_bytes(config, dtype)
    bounds = [0.0, 0.0]
    start = 0
    for size, count in passes(prompt_len).items():
        for _ in range(count):
            tokens, seen = batch * size, start + size
            products = 2 * matrices / itemsize * tokens
            attention = 4 * config.num_layers * config.num_heads * config.head_dim * tokens * seen
            moved = matrices + batch * seen * slot
            for index, share in enumerate(reversed(assumed.product_share)):
                busy = (products + attention) / (share * target.tensor_tflops * 1e12)
                read = moved / (share * assumed.dram_share * target.bandwidth * 1e9)
                bounds[index] += max(busy, read) + kernels.get(size, 0) * assumed.kernel_gap + assumed.round_trip
            start += size
    return bounds[0], bounds[1]
