"""What needs no compiler: the table of cards, the readers of what a compiler writes, the errors."""

from __future__ import annotations

import dataclasses
import re

import pytest

from aot import programs
from jaxdecode.aot import MissingCompilerError, compile_program, compiler
from jaxdecode.aot.mosaic import read_host
from jaxdecode.aot.ptxas import parse_report
from jaxdecode.aot.riegeli import SIGNATURE, read_records
from jaxdecode.aot.thunks import read_graphs
from pallas_kernels.targets import TARGETS, find_target, this_device

HOST = """
define void @f_mosaic_gpu(ptr %0, ptr %1) {
  %3 = load ptr, ptr %1, align 8
  %4 = getelementptr ptr, ptr %1, i32 1
  %5 = load ptr, ptr %4, align 8
  %8 = alloca { ptr, [128 x i8] }, align 8
  %9 = alloca [2 x i64], align 8
  %10 = getelementptr { ptr, [128 x i8] }, ptr %8, i32 0, i32 0
  store ptr %5, ptr %10, align 8
  %11 = getelementptr i64, ptr %9, i32 0
  store ptr %10, ptr %11, align 8
  %12 = getelementptr i64, ptr %9, i32 1
  store ptr %7, ptr %12, align 8
  %16 = alloca [2 x i32], align 4
  %17 = getelementptr i32, ptr %16, i32 0
  store i32 0, ptr %17, align 4
  %18 = getelementptr i32, ptr %16, i32 1
  store i32 128, ptr %18, align 4
  call void @mosaic_gpu_build_kernel_spec(ptr %0, i32 4, i32 3, i32 1, i32 2, i32 1, i32 1, i32 128, i32 1, i32 1, \
i32 512, i32 0, i32 2, ptr %9, ptr %16)
  ret void
}
"""


def test_targets():
    for key, target in TARGETS.items():
        assert find_target(key.upper()) is target
        assert target.shared_per_block < target.shared_per_sm and target.memory_bytes > 20e9
    assert len({target.name for target in TARGETS.values()}) == len(TARGETS)
    a100 = find_target("a100-80gb")
    assert (a100.arch, a100.bandwidth, a100.shared_per_block) == ("sm_80", 2039, 166912)
    assert (find_target("rtx3090").arch, find_target("b200").arch) == ("sm_86", "sm_100")
    assert this_device() is None


def test_names_of_cards_are_forgiving():
    assert find_target("RTX 3090") is find_target("rtx-3090") is TARGETS["rtx3090"]
    with pytest.raises(ValueError, match=r"no card 'rtx390' \(did you mean rtx3090\?\); there are a100-80gb"):
        find_target("rtx390")
    with pytest.raises(ValueError, match="no card 'tpu'; there are"):
        find_target("tpu")


def test_a_card_from_a_file(tmp_path):
    file = tmp_path / "card.toml"
    file.write_text('like = "a100-80gb"\nname = "slow"\nbandwidth = 1200')
    card = find_target(str(file))
    assert card == dataclasses.replace(find_target("a100-80gb"), name="slow", bandwidth=1200)
    file.write_text('name = "x"\nbandwidth = "fast"\ncompute_capability = [8]\nfans = 2')
    with pytest.raises(ValueError) as error:
        find_target(str(file))
    for part in ("fans is unknown", "num_sms is missing", "bandwidth must be a positive integer", "from [8, 0] on"):
        assert part in str(error.value)
    for text, problem in (
        ('like = "l4"\nclock = inf', "clock must be a positive number"),
        ('like = "l4"\nname = ""', "name must be a name"),
        ('like = "l4"\ncompute_capability = [7, 5]', "from [8, 0] on"),
        ("like = 3", "like must be the name of a known card"),
        ('like = "l5"', "no card 'l5'"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=re.escape(problem)):
            find_target(str(file))
    for text in ("bandwidth =", None):
        file.write_text(text) if text else file.unlink()
        with pytest.raises(ValueError, match="cannot read a card from"):
            find_target(str(file))


def test_missing_compiler(monkeypatch):
    monkeypatch.setattr(compiler, "missing_packages", lambda: ["jax-cuda12-pjrt"])
    with pytest.raises(MissingCompilerError, match=r'needs jax-cuda12-pjrt: pip install "jaxdecode\[check\]"$'):
        compile_program(programs.softmax, target="l4")


def test_a_build_must_be_importable(monkeypatch):
    monkeypatch.setattr(compiler, "missing_packages", list)
    with pytest.raises(ValueError, match="at the top of a module"):
        compile_program(lambda: programs.softmax(), target="l4")


def test_host_function():
    launch, buffers, by_value = read_host(HOST)
    assert (launch.grid, launch.block, launch.cluster, launch.shared_bytes) == ((4, 3, 1), (128, 1, 1), (2, 1, 1), 512)
    assert (buffers, by_value) == ((1, None), (0, 128))
    with pytest.raises(RuntimeError, match="none of the call's buffers"):
        read_host(HOST.replace("store ptr %5", "store ptr %6"))
    with pytest.raises(RuntimeError, match="not launch it"):
        read_host("define void @f(ptr %0) {}")


def test_ptxas_report():
    text = """ptxas info    : Compiling entry function 'a' for 'sm_80'
ptxas info    : Function properties for a
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 1024 bytes smem, 376 bytes cmem[0]
ptxas info    : Compiling entry function 'b' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, 376 bytes cmem[0]
"""
    report = parse_report(text, "a")
    assert (report.registers, report.stack_bytes, report.spill_store_bytes, report.spill_load_bytes) == (255, 16, 8, 4)
    assert (report.shared_bytes, report.barriers) == (1024, 2)
    assert parse_report(text, "b").registers == 12
    with pytest.raises(RuntimeError, match="nothing of c"):
        parse_report(text, "c")


def test_graphs_nest_by_indentation():
    text = """001: kCopy  [source | next=002 (1)] kCopy
002: kWhile [prev=001 (1) | sink]
condition:
    003: kCustomKernel [source | sink] compare grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        004: kCustomKernel [source | sink] add grid: [1, 1, 1]
    005: kCustomCall [source | sink] kCustomCall
006: kCopy  [source | sink] kCopy
"""
    copy, loop, last = read_graphs(text, {3: "compare.1", 4: "add.1"})
    assert (copy.kind, last.id, list(loop.children)) == ("copy", 6, ["condition", "body"])
    graph, call = loop.children["body"]
    assert (graph.kind, call.kind, loop.children["condition"][0].name) == ("command_buffer", "custom_call", "compare.1")
    assert [node.name for node in graph.children["thunks"]] == ["add.1"]


def chunk(kind: bytes, count: int, body: bytes) -> bytes:
    return bytes(8) + len(body).to_bytes(8, "little") + bytes(8) + kind + count.to_bytes(7, "little") + bytes(8) + body


def test_records_plain_and_compressed():
    pytest.importorskip("cramjam", reason='Snappy needs pip install "jaxdecode[check]"')
    plain = chunk(b"r", 2, b"\0" + b"\2" + b"\1\3" + b"abcd")
    # Snappy: 13 bytes, the literal "ab", then 10 from 2 back (which repeat), then the literal "!"
    packed = bytes([13, 1 << 2]) + b"ab" + bytes([(10 - 4) << 2 | 1, 2, 0]) + b"!"
    sizes = bytes([1, 0]) + b"\x0d"
    compressed = chunk(b"r", 1, b"s" + bytes([len(sizes) + 1]) + b"\1" + sizes + b"\x0d" + packed)
    file = SIGNATURE + bytes(16) + chunk(b"s", 0, b"") + plain + compressed
    assert read_records(b"before" + file) == [b"a", b"bcd", b"abababababab!"]
    with pytest.raises(ValueError, match="no signature"):
        read_records(b"something else")
    with pytest.raises(ValueError, match="only simple chunks"):
        read_records(SIGNATURE + bytes(16) + chunk(b"t", 1, b""))
