"""The one cost model: how long a kernel takes on a card, from its compiled form and what is assumed below.

Nothing here is measured. A kernel is a number of equal blocks. As many as fit reside on the card at a time; such a wave
moves its bytes at the rate that the bytes in flight allow (Little's law), up to the share of the bandwidth that is
assumed to be reached, and takes longer if the level-2 cache or the arithmetic do. Waves follow one another, and the
last may leave a part of the card idle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxdecode.aot.program import Kernel
from pallas_kernels.targets import Target

_BLOCKS_PER_SM = {(8, 6): 16, (8, 9): 24}  # CUDA C++ Programming Guide, technical specifications; else 32
_REGISTERS, _REGISTER_UNIT = 65536, 256  # of a multiprocessor; a warp gets a multiple
_SYSTEM_SHARED = 1024  # bytes that the system keeps for a block
_ISSUE = 128  # instructions, counted by lane, that a multiprocessor issues each clock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the model takes for granted; times in seconds.

    Attributes:
      dram_share: of the card's bandwidth that a kernel reaches with enough bytes in flight.
      dram_latency: from a request to its data while the memory is busy.
      l2_bytes_per_clock: that the level-2 cache gives a multiprocessor.
      kernel_gap: from the end of a kernel to the start of the next in one CUDA graph.
      launch_gap: the same between kernels launched one by one.
      combine: for the last block of a split to add the others' results up.
      round_trip: for the host to read a loop's condition and launch its next step.
      product_share: lowest and highest share that XLA's own products reach of the tensor cores and of dram_share.
      tensor_share: of the tensor cores' peak that a kernel reaches.
    """

    dram_share: float = 0.92
    dram_latency: float = 0.8e-6
    l2_bytes_per_clock: int = 64
    kernel_gap: float = 1.0e-6
    launch_gap: float = 3.0e-6
    combine: float = 1.5e-6
    round_trip: float = 15e-6
    product_share: tuple[float, float] = (0.4, 0.8)
    tensor_share: float = 1.0

    def at(self, share: float) -> Assumptions:
        """The same for a kernel that reaches `share` of what ours do."""
        return dataclasses.replace(
            self, dram_share=share * self.dram_share, tensor_share=share * self.tensor_share
        )

    def describe(self) -> str:
        """One line for a person."""
        low, high = self.product_share
        return (
            f"kernels reach {self.dram_share:.0%} of the nominal bandwidth if latency ({self.dram_latency * 1e6:g} µs) "
            f"times bandwidth is in flight; the level-2 cache gives {self.l2_bytes_per_clock} bytes a clock and "
            f"multiprocessor; {self.kernel_gap * 1e6:g} µs between kernels of a graph ({self.launch_gap * 1e6:g} µs "
            f"outside); {self.combine * 1e6:g} µs to add up a split; {self.round_trip * 1e6:g} µs for each wait of the "
            f"host; XLA's own products, which are tuned on the card only, {low:.0%} to {high:.0%} of an ideal one"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one launch does.

    Attributes:
      blocks: that have something to do.
      blocks_per_sm: that a multiprocessor holds at a time.
      in_flight: bytes that a block has asked for and not yet got.
      least: bytes of weights, keys and values that must come from device memory.
      requested: what is asked for of those.
      activations: bytes that the level-2 cache answers.
      tensor_operations: multiplications and additions on tensor cores, padding included.
      instructions: on CUDA cores, counted by lane.
      split: the last block adds the others' results up.
    """

    blocks: int
    blocks_per_sm: int
    in_flight: int
    least: int
    requested: int
    activations: int = 0
    tensor_operations: float = 0.0
    instructions: float = 0.0
    split: bool = False


def blocks_per_sm(kernel: Kernel, target: Target) -> int:
    """Blocks of a kernel that a multiprocessor holds: by threads, registers and shared memory."""
    if kernel.report is None:
        raise ValueError(f"{kernel.name} is a library kernel: there is no report of its registers")
    x, y, z = kernel.launch.block
    warps = -(-x * y * z // 32)
    per_warp = -(-kernel.report.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    shared = kernel.launch.shared_bytes + kernel.report.shared_bytes + _SYSTEM_SHARED
    return min(
        _BLOCKS_PER_SM.get(target.compute_capability, 32),
        target.threads_per_sm // (32 * warps),
        _REGISTERS // per_warp // warps,
        target.shared_per_sm // shared,
    )


def tensor_rate(target: Target, dtype: str) -> float:
    """Operations a second of a card's tensor cores: float32 goes through them as TF32, at half the rate."""
    return target.tensor_tflops * 1e12 / (2 if dtype == "float32" else 1)


def kernel_seconds(
    work: Work, target: Target, assumed: Assumptions, *, dtype: str = "float16", captured: bool = True
) -> dict[str, float]:
    """Modelled seconds of one launch, by what they are spent on; their sum is its time.

    Returns:
      "bytes": the least bytes at the nominal bandwidth, the time of an ideal kernel; "memory efficiency": that no
      kernel reaches it; "padding": bytes beyond the least; "bytes in flight", "level-2 cache", "arithmetic": what a
      whole wave waits for instead of memory; "last wave": that it leaves some of the card idle; "start" of a kernel's
      first bytes, and adding up of splits; "gap" to the next kernel.
    """
    reached = target.bandwidth * 1e9 * assumed.dram_share
    slots = max(1, work.blocks_per_sm * target.num_sms)
    whole, rest = divmod(work.blocks, slots)
    spent = {
        "bytes": work.least / (target.bandwidth * 1e9),
        "memory efficiency": work.least / reached - work.least / (target.bandwidth * 1e9),
        "padding": (work.requested - work.least) / reached,
    }
    for count, blocks, last in ((whole, slots, False), (1 if rest else 0, rest, True)):
        if count:
            cause, extra = _wait(work, blocks, target, assumed, dtype)
            cause = "last wave" if last and whole else cause
            spent[cause] = spent.get(cause, 0.0) + count * extra
    spent["start"] = assumed.dram_latency + (assumed.combine if work.split else 0.0)
    spent["gap"] = assumed.kernel_gap if captured else assumed.launch_gap
    return {name: seconds for name, seconds in spent.items() if seconds > 0}


def _wait(work: Work, resident: int, target: Target, assumed: Assumptions, dtype: str) -> tuple[str, float]:
    """How much longer a wave of `resident` blocks takes than its bytes at the reached bandwidth, and for what."""
    share, sms, clock = resident / work.blocks, min(resident, target.num_sms), target.clock * 1e9
    tensor_cores = assumed.tensor_share * tensor_rate(target, dtype) * sms / target.num_sms
    moved = work.requested * share
    ideal = moved / (target.bandwidth * 1e9 * assumed.dram_share)
    limits = {
        "bytes in flight": moved / (resident * work.in_flight / assumed.dram_latency) if moved else 0.0,
        "level-2 cache": (moved + work.activations * share) / (sms * assumed.l2_bytes_per_clock * clock),
        "arithmetic": work.tensor_operations * share / tensor_cores
        + work.instructions * share / (sms * _ISSUE * clock),
    }
    cause = max(limits, key=lambda name: limits[name])
    return cause, max(0.0, limits[cause] - ideal)


def add_up(parts: Mapping[str, float], into: dict[str, float], times: int = 1) -> None:
    """Adds the seconds of `times` launches to those of a whole step."""
    for name, seconds in parts.items():
        into[name] = into.get(name, 0.0) + times * seconds
