"""Single instructions, written by hand: roundings, flushes, carries, labels; and what must not pass as known."""

import numpy as np
import pytest

from ptx.faults import UnknownInstruction
from ptx.launch import DeviceMemory, Launch
from ptx.parser import parse

FRAME = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry one(.param .u64 out)
{{
.reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<8>; .reg .f32 %f<8>; .reg .f64 %d<8>; .reg .b64 %x<8>;
ld.param.u64 %x0, [out];
{body}
ret;
}}
"""


def run(body: str, threads: int = 1, count: int = 1) -> list[int]:
    device = DeviceMemory([8 * count])
    Launch(parse(FRAME.format(body=body)), "one", (1, 1, 1), (threads, 1, 1), device.addresses, device.memory)
    size = int(device.memory.written[device.span(0)].sum()) // count
    return device.read(0, np.dtype(f"u{size}"), (count,)).tolist()


RESULTS = {
    "mov.f32 %f1,0f3f800000; mov.f32 %f2,0fa1800000; add.rz.f32 %f3,%f1,%f2; st.global.f32 [%x0],%f3;": 0x3F7FFFFF,
    "mov.f32 %f1,0f3f800000; mov.f32 %f2,0f21800000; add.rp.f32 %f3,%f1,%f2; st.global.f32 [%x0],%f3;": 0x3F800001,
    "mov.f32 %f1,0f3f800000; mov.f32 %f2,0fa1800000; fma.rz.f32 %f3,%f1,%f1,%f2; st.global.f32 [%x0],%f3;": 0x3F7FFFFF,
    "mov.f32 %f1,0f3f800000; mov.f32 %f2,0fa1800000; sub.rm.f32 %f3,%f1,%f2; st.global.f32 [%x0],%f3;": 0x3F800000,
    # 7 · 37/256 − 2⁻³⁰ lies just below the middle of two bfloat16 numbers
    "mov.b16 %h1,0x40e0; mov.b16 %h2,0x3e14; mov.b16 %h3,0xb080; fma.rn.bf16 %h4,%h1,%h2,%h3; "
    "st.global.b16 [%x0],%h4;": 0x3F81,
    "mov.f32 %f1,0f00000001; cvt.ftz.f64.f32 %d1,%f1; st.global.f64 [%x0],%d1;": 0,
    "mov.b16 %h1,0x0001; add.ftz.f16 %h2,%h1,%h1; st.global.b16 [%x0],%h2;": 0,
    "mov.b32 %r2,0x00010001; mov.b32 %r3,0x3c003c00; mul.ftz.f16x2 %r4,%r2,%r3; st.global.b32 [%x0],%r4;": 0,
    "mov.b16 %h1,1; mov.b16 %h2,0; setp.ne.ftz.f16 %p1,%h1,%h2; selp.u32 %r2,1,0,%p1; st.global.u32 [%x0],%r2;": 0,
    "mov.f32 %f1,0f80000001; slct.ftz.u32.f32 %r2,7,9,%f1; st.global.u32 [%x0],%r2;": 7,
    "mov.f32 %f1,0f80000000; add.sat.f32 %f3,%f1,%f1; st.global.f32 [%x0],%f3;": 0,
    "mov.s32 %r2,0x40000000; mov.s32 %r3,0x7fffffff; mad.hi.sat.s32 %r4,%r2,%r3,%r3; st.global.u32 [%x0],%r4;": 2**31
    - 1,
    "mov.s32 %r2,-1; mov.s32 %r3,1; mad.hi.cc.s32 %r4,%r2,%r3,0; st.global.u32 [%x0],%r4;": 2**32 - 1,
    "mov.u32 %r2,-1; add.cc.u32 %r3,%r2,1; addc.u32 %r4,5,0; st.global.u32 [%x0],%r4;": 6,
    "mov.b32 %r2,0x3c003c00; mov.b32 %r3,0x40000000; setp.eq.u32 %p3,1,1; setp.lt.and.f16x2 %p1|%p2,%r2,%r3,%p3; "
    "selp.u32 %r4,1,0,%p1; selp.u32 %r5,2,0,%p2; add.u32 %r4,%r4,%r5; st.global.u32 [%x0],%r4;": 2,
    'mov.u32 %r2,1;\n .pragma "nounroll"; add.u32 %r2,%r2,1; st.global.u32 [%x0],%r2;': 2,
    "mov.u32 %r2,0x8070ff01; mov.u32 %r3,0x11223344; prmt.b32 %r4,%r2,%r3,0x9b4f; st.global.u32 [%x0],%r4;": 0xFFFF4400,
    # a label belongs to its braces
    "mov.u32 %r2,0; { L: add.u32 %r2,%r2,1; setp.lt.u32 %p1,%r2,10; @%p1 bra L; } "
    "{ L: add.u32 %r2,%r2,1; setp.lt.u32 %p1,%r2,20; @%p1 bra L; } st.global.u32 [%x0],%r2;": 20,
}


@pytest.mark.parametrize("body", RESULTS)
def test_a_single_instruction(body):
    assert run(body) == [RESULTS[body]]


def test_lanes_that_name_each_other_vote_apart():
    body = (
        "mov.u32 %r1,%tid.x; and.b32 %r2,%r1,1; setp.eq.u32 %p1,%r2,1; selp.b32 %r3,0xaaaaaaaa,0x55555555,%p1; "
        "redux.sync.add.u32 %r4,%r1,%r3; mul.wide.u32 %x1,%r1,4; add.u64 %x2,%x0,%x1; st.global.u32 [%x2],%r4;"
    )
    assert run(body, 32, 32) == [240, 256] * 16


@pytest.mark.parametrize(
    "line",
    [
        "add.rz.f64 %d1,%d2,%d3;",
        "cvt.rz.f32.s64 %f1,%x1;",
        "div.rz.f32 %f1,%f2,%f3;",
        "add.wrong.u32 %r1,%r2,%r3;",
        "frobnicate.u32 %r1,%r2;",
        "ld.local.nowhere.u32 %r1,[%x0];",
        "mov.u32 %r1,%clock;",
        "call.uni (%r1), helper, (%r2);",
        "cp.async.bulk.shared.global [%r1],[%x0],16;",
    ],
)
def test_what_has_no_rule_is_an_error(line):
    with pytest.raises(UnknownInstruction):
        run(line + " st.global.u32 [%x0],0;")


def test_a_block_larger_than_the_kernel_allows_is_refused():
    text = FRAME.format(body="st.global.u32 [%x0],0;").replace(
        "(.param .u64 out)", "(.param .u64 out)\n.maxntid 32, 1, 1"
    )
    device = DeviceMemory([8])
    with pytest.raises(ValueError, match="64 threads a block; one allows 32"):
        Launch(parse(text), "one", (1, 1, 1), (64, 1, 1), device.addresses, device.memory)
