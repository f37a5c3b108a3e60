"""Compiling for cards that are not here: what comes back fits together and is what was compiled."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from needs import needs_compiler

from aot import programs
from jaxdecode.aot import CompileError, Job, compile_program, compile_programs
from pallas_kernels.targets import find_target

pytestmark = needs_compiler

JOBS = {
    "softmax": (programs.softmax, "a100-80gb"),
    "computed": (programs.computed_in_the_build, "a100-80gb"),
    "loop-80": (programs.loop, "a100-80gb"),
    "abort": (programs.aborts_below_sm_90, "a100-80gb"),
    "loop-86": (programs.loop, "rtx3090"),
    "fails": (programs.fails, "rtx3090"),
    "loop-90": (programs.loop, "h100"),
    "same_name": (programs.same_name, "a100-80gb"),
    "in_place": (programs.in_place, "a100-80gb"),
    "nested": (programs.nested, "a100-80gb"),
}


@pytest.fixture(scope="module")
def compiled():
    arguments = {"same_name": (4.0,)}
    jobs = [
        Job(build=build, target=find_target(target), args=arguments.get(name, ()))
        for name, (build, target) in JOBS.items()
    ]
    return dict(zip(JOBS, compile_programs(jobs), strict=True))


@pytest.fixture(params=[name for name in JOBS if name not in ("abort", "fails")])
def program(compiled, request):
    outcome = compiled[request.param]
    assert not isinstance(outcome, CompileError), outcome
    return outcome


def test_slices_lie_in_their_allocations(program):
    slices = [argument.slice for thunk in program.walk() for argument in (*thunk.arguments, *thunk.buffers)]
    slices += [endpoint.slice for endpoint in (*program.parameters, *program.outputs)]
    for part in filter(None, slices):
        allocation = program.allocations[part.allocation]
        assert allocation.index == part.allocation and allocation.role != "local"
        assert part.offset + part.size <= allocation.size


def test_every_kernel_has_its_ptx_and_one_launch(program):
    launched = {thunk.kernel for thunk in program.walk()} - {None}
    assert launched == set(program.kernels)
    for kernel in program.kernels.values():
        assert kernel.ptx.count(f".entry {kernel.name}(") == 1
        assert f".target {program.target.arch}" in kernel.ptx
        assert kernel.report.registers > 0 and kernel.report.spill_store_bytes == 0


def test_thunks_read_only_what_was_written_before(program):
    """Walked in order, each body once, every byte that a thunk reads is an input, a constant or an earlier result."""
    written = {(endpoint.slice.allocation, byte) for endpoint in program.parameters for byte in _bytes(endpoint.slice)}
    written |= {(index, byte) for index, data in program.constants.items() for byte in range(len(data))}
    for thunk in program.walk():
        if thunk.kind in ("while", "conditional"):
            continue
        for buffer in thunk.buffers:
            unread = thunk.kind == "cublas_lt_matmul" and buffer.name == "c"  # is d, times beta = 0
            if not buffer.written and not unread:
                assert {(buffer.slice.allocation, byte) for byte in _bytes(buffer.slice)} <= written, thunk
        for buffer in thunk.buffers:
            if buffer.written:
                written |= {(buffer.slice.allocation, byte) for byte in _bytes(buffer.slice)}
    for output in program.outputs:
        assert {(output.slice.allocation, byte) for byte in _bytes(output.slice)} <= written


def _bytes(part):
    return range(part.offset, part.offset + part.size, 4) if part.size >= 4 else range(part.offset, part.offset + 1)


def test_xla_program(compiled):
    program = compiled["softmax"]
    # the argument that is not used has no place in the compiled program
    assert [(p.index, p.slice.dtype, p.slice.shape) for p in program.parameters] == [(0, "f32", (8, 256))]
    assert [(o.index, o.slice.dtype, o.slice.shape) for o in program.outputs] == [
        (0, "f32", (8, 256)),
        (1, "s32", (8,)),
    ]
    assert {kernel.kind for kernel in program.kernels.values()} <= {"xla", "triton"}
    assert program.memory.arguments == 8 * 256 * 4


@pytest.mark.parametrize("name", ["loop-80", "loop-86", "loop-90"])
def test_a_loop_is_one_graph_with_its_mosaic_kernels(compiled, name):
    program = compiled[name]
    [loop] = [thunk for thunk in program.thunks if thunk.kind == "while"]
    mosaic = [thunk for thunk in loop.children["body"] if thunk.target == "mosaic_gpu_v2"]
    assert len(mosaic) == 3 and len({thunk.kernel for thunk in mosaic}) == 1
    kernel = program.kernels[mosaic[0].kernel]
    assert kernel.kind == "mosaic" and kernel.launch.grid == (4, 1, 1) and kernel.launch.block == (128, 1, 1)
    assert kernel.launch.shared_bytes >= 2 * 2 * 8 * 256 * 4
    assert loop.argument("condition_result").size == 1
    [after] = [node for node in program.graphs if node.kind == "while"]
    [graph] = after.children["body"]
    assert graph.kind == "command_buffer"
    assert [node.id for node in graph.children["thunks"]] == [thunk.id for thunk in loop.children["body"]]


def test_parameters_of_a_mosaic_kernel_follow_the_ptx(compiled):
    """The pipeline's body touches the result first; on Hopper the operands are TMA descriptors."""
    names, buffers = {}, {}
    for name in ("loop-80", "loop-86", "loop-90"):
        thunk = next(thunk for thunk in compiled[name].walk() if thunk.target == "mosaic_gpu_v2")
        names[name] = [argument.name for argument in thunk.arguments]
        buffers[name] = [(buffer.name, buffer.written) for buffer in thunk.buffers]
    assert names["loop-80"] == names["loop-86"] == ["result_0", "operand_0", "operand_1"]
    assert names["loop-90"] == ["result_0", "descriptors"]
    assert set(map(tuple, buffers.values())) == {(("operand_0", False), ("operand_1", False), ("result_0", True))}


def test_donation_and_constants(compiled):
    program = compiled["loop-80"]
    assert program.memory.aliased == 8 * 1024 * 4
    assert [a.parameter for a in program.allocations if a.aliased] == [1]
    assert program.outputs[1].slice.allocation == program.parameters[1].slice.allocation
    assert programs.CONSTANT.tobytes() in program.constants.values()


def test_kernels_of_one_name_keep_their_own_ptx(compiled):
    program = compiled["same_name"]
    mosaic = [kernel for kernel in program.kernels.values() if kernel.kind == "mosaic"]
    assert len(mosaic) == 2 and len({kernel.name for kernel in mosaic}) == 1
    literal = {(2, 1, 1): "0f40000000", (4, 1, 1): "0f40800000"}  # 2.0 and 4.0
    for kernel in mosaic:
        own = literal[kernel.launch.grid]
        other = next(value for value in literal.values() if value != own)
        doubled = own == "0f40000000" and "add" in kernel.ptx  # x * 2 may become x + x
        assert (own in kernel.ptx or doubled) and other not in kernel.ptx


def test_a_buffer_updated_in_place_is_written(compiled):
    program = compiled["in_place"]
    [thunk] = [thunk for thunk in program.walk() if thunk.kernel]
    assert all(argument.written for argument in thunk.arguments)
    assert {argument.slice.allocation for argument in thunk.arguments} == {program.outputs[0].slice.allocation}


def test_library_calls_and_nested_loops_are_thunks(compiled):
    program = compiled["nested"]
    [product] = [thunk for thunk in program.walk() if thunk.kind == "cublas_lt_matmul"]
    assert product.kernel is None and product.argument("a").shape == product.argument("b").shape == (256, 256)
    assert [argument.name for argument in product.arguments if argument.written] == ["d", "workspace"]
    [outer] = [thunk for thunk in program.thunks if thunk.kind == "while"]
    [inner] = [thunk for thunk in outer.children["body"] if thunk.kind == "while"]
    assert (outer.attributes["trip_count"], inner.attributes["trip_count"]) == (2, 3)
    [after] = [node for node in program.graphs if node.kind == "while"]
    nested = next(node for node in after.children["body"] if node.kind == "while")
    assert nested.id == inner.id and set(nested.children) == {"condition", "body"}


def test_an_abort_is_the_error_of_its_own_job(compiled):
    error = compiled["abort"]
    assert isinstance(error, CompileError) and "ended the process" in str(error) and "Cannot select" in str(error)
    error = compiled["fails"]
    assert isinstance(error, CompileError) and "this build fails" in str(error)


def test_the_callers_jax_is_not_touched():
    code = (
        "from aot import programs; from jaxdecode.aot import compile_program\n"
        "import jax, sys\n"
        "compile_program(programs.in_place, target='l4')\n"
        "print(jax._src.xla_bridge.backends_are_initialized(), 'jax_plugins.xla_cuda12' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_TESTS, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


_TESTS = programs.__file__.rpartition("aot")[0]


def test_a_cached_program_is_not_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDECODE_CACHE_DIR", str(tmp_path))
    first = compile_program(programs.same_name, 3.0, target="rtx3090")
    [file] = (tmp_path / "aot").iterdir()
    stamp = file.stat().st_mtime_ns
    again = compile_program(programs.same_name, 3.0, target="rtx3090")
    assert not first.cached and again.cached
    assert dataclasses.replace(again, cached=False) == first
    assert file.stat().st_mtime_ns == stamp
    file.write_bytes(file.read_bytes()[:1000])  # damaged: compiled anew
    assert dataclasses.replace(compile_program(programs.same_name, 3.0, target="rtx3090"), cached=False) == first
    others = [
        compile_program(programs.same_name, 3.0, target="rtx4090"),
        compile_program(programs.same_name, 5.0, target="rtx3090"),
    ]
    assert not any(other.cached for other in others)
    assert len(list((tmp_path / "aot").iterdir())) == 3
