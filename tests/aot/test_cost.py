"""The cost model: occupancy by hand, and laws that no assumption may break."""

from __future__ import annotations

import dataclasses

import pytest

from jaxdecode.aot import Kernel, Launch, PtxasReport
from jaxdecode.aot.cost import Assumptions, Work, add_up, blocks_per_sm, kernel_seconds
from pallas_kernels.targets import find_target

A100, ASSUMED = find_target("a100-80gb"), Assumptions()
# 16 MiB in 512 blocks, two an SM, each with 48 KiB on its way
WORK = Work(blocks=512, blocks_per_sm=2, in_flight=48 << 10, least=16 << 20, requested=16 << 20)


def kernel(threads: int = 128, registers: int = 32, shared: int = 0) -> Kernel:
    report = PtxasReport(
        registers=registers, spill_store_bytes=0, spill_load_bytes=0, stack_bytes=0, shared_bytes=0, barriers=0
    )
    launch = Launch(grid=(1, 1, 1), block=(threads, 1, 1), cluster=None, shared_bytes=shared)
    return Kernel(key="k", name="k", kind="mosaic", ptx="", launch=launch, report=report)


@pytest.mark.parametrize(
    ("card", "threads", "registers", "shared", "expected"),
    [
        ("a100-80gb", 1024, 32, 0, 2),  # threads
        ("a100-80gb", 32, 16, 0, 32),  # the most blocks there can be
        ("rtx3090", 32, 16, 0, 16),
        ("a100-80gb", 128, 122, 0, 4),  # 128 registers a thread in units of 256 a warp: 16384 of 65536 a block
        ("a100-80gb", 128, 255, 0, 2),
        ("a100-80gb", 128, 64, 71681, 2),  # (71681 + 1024) twice into 167936
        ("rtx3090", 128, 64, 70657, 1),  # into 102400
    ],
)
def test_blocks_an_sm(card, threads, registers, shared, expected):
    assert blocks_per_sm(kernel(threads, registers, shared), find_target(card)) == expected


def test_a_library_kernel_has_no_report():
    with pytest.raises(ValueError, match="library kernel"):
        blocks_per_sm(dataclasses.replace(kernel(), report=None), A100)


def test_a_whole_wave_moves_its_bytes_at_the_reached_bandwidth():
    work = dataclasses.replace(WORK, blocks=216)  # 108 SMs, two each
    spent = kernel_seconds(work, A100, ASSUMED)
    assert spent.pop("start") == ASSUMED.dram_latency and spent.pop("gap") == ASSUMED.kernel_gap
    assert spent["bytes"] == (16 << 20) / 2039e9
    assert sum(spent.values()) == pytest.approx((16 << 20) / (0.92 * 2039e9))


def test_few_bytes_in_flight_bind():
    """Little's law: 216 blocks with 1 KiB each and 0.8 µs latency move 276 GB/s, whatever the card can."""
    work = dataclasses.replace(WORK, blocks=216, in_flight=1024)
    spent = kernel_seconds(work, A100, ASSUMED)
    assert sum(spent.values()) - spent["start"] - spent["gap"] == pytest.approx((16 << 20) * 0.8e-6 / (216 * 1024))
    assert spent["bytes in flight"] > spent["bytes"]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"requested": 20 << 20}, "padding"),
        ({"blocks": 217, "in_flight": 1 << 10}, "last wave"),
        ({"activations": 1 << 30}, "level-2 cache"),
        ({"tensor_operations": 1e12}, "arithmetic"),
        ({"instructions": 1e12}, "arithmetic"),
        ({"split": True}, "start"),
    ],
)
def test_more_of_anything_takes_longer_and_is_named(change, cause):
    before = kernel_seconds(WORK, A100, ASSUMED)
    after = kernel_seconds(dataclasses.replace(WORK, **change), A100, ASSUMED)
    assert sum(after.values()) > sum(before.values())
    assert after[cause] > before.get(cause, 0.0)


@pytest.mark.parametrize("field", ["dram_latency", "kernel_gap"])
def test_a_worse_assumption_never_helps(field):
    worse = dataclasses.replace(ASSUMED, **{field: 10 * getattr(ASSUMED, field)})
    for work in (WORK, dataclasses.replace(WORK, in_flight=512), dataclasses.replace(WORK, least=0, requested=0)):
        assert sum(kernel_seconds(work, A100, worse).values()) > sum(kernel_seconds(work, A100, ASSUMED).values())


def test_outside_a_graph_the_gap_is_longer():
    assert kernel_seconds(WORK, A100, ASSUMED, captured=False)["gap"] == ASSUMED.launch_gap > ASSUMED.kernel_gap


def test_no_time_is_below_the_roofline():
    for blocks in (1, 100, 216, 217, 5000):
        work = dataclasses.replace(WORK, blocks=blocks)
        assert sum(kernel_seconds(work, A100, ASSUMED).values()) > work.least / (A100.bandwidth * 1e9)


def test_add_up():
    total = {"a": 1.0}
    add_up({"a": 2.0, "b": 3.0}, total, 2)
    assert total == {"a": 5.0, "b": 6.0}
