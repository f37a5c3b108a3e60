"""What tests of compiled kernels share: compiling what is asked for, and what every kernel must be. Holds no test."""

from __future__ import annotations

import pytest

from jaxdecode.aot import CompiledProgram, CompileError, Job, Kernel, compile_programs
from jaxdecode.aot.inspection import inspect_kernel


def compile_wanted(request: pytest.FixtureRequest, jobs: dict[str, Job]) -> dict[str, CompiledProgram]:
    """Compiles, for a module's fixture, the jobs that bear the `name` of a test that will run."""
    items = [item for item in request.session.items if item.path == request.path]
    names = {item.callspec.params.get("name") for item in items if hasattr(item, "callspec")}  # pyright: ignore
    wanted = {name: job for name, job in jobs.items() if names & {name, name.removesuffix(" chain")}}
    outcomes = dict(zip(wanted, compile_programs(list(wanted.values())), strict=True))
    failed = {name: str(outcome) for name, outcome in outcomes.items() if isinstance(outcome, CompileError)}
    assert not failed, failed
    return {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, CompiledProgram)}


def our_kernel(program: CompiledProgram) -> Kernel:
    [kernel] = [kernel for kernel in program.kernels.values() if kernel.kind == "mosaic"]
    return kernel


def check_kernel(program: CompiledProgram, *, tensor_cores: bool = True, narrow_copies: bool = False) -> None:
    """One kernel of ours; nothing in local memory; it fits the card, and fetches 16 bytes a thread or by TMA.

    narrow_copies: whether it may copy activations in smaller pieces.
    """
    kernel = our_kernel(program)
    facts = inspect_kernel(kernel)
    assert kernel.report is not None
    assert not facts.spill_bytes and not facts.local_memory, kernel.report
    assert kernel.launch.shared_bytes + kernel.report.shared_bytes <= program.target.shared_per_block
    assert facts.tensor_cores == tensor_cores
    assert facts.async_copies > 0 and (narrow_copies or not facts.narrow_copies)
