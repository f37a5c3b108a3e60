"""The process that compiles: `python -m jaxdecode.aot.worker FOLDER DUMP JOB…`.

It is a process of its own because LLVM ends the process on some errors, and because a compiler for NVIDIA cards must
not meet the JAX of the caller. Its environment is set by `compile_programs`. For every JOB it reads `FOLDER/JOB.job`
and writes what the compiler prints to `JOB.log`, the result or the error to `JOB.result`, and prints JOB; DUMP is where
the compiler leaves its files.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pickle
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxdecode.aot import mosaic
from jaxdecode.aot.buffers import read_allocations, read_constants, read_outputs, read_parameters
from jaxdecode.aot.executable import read_executable
from jaxdecode.aot.job import Job, Program
from jaxdecode.aot.program import CompiledProgram, MemoryUse, walk
from jaxdecode.aot.thunks import ThunkReader, read_graphs
from jaxdecode.aot.toolchain import PACKAGES
from pallas_kernels.targets import Target

# the driver and toolkit that graphs are compiled for; without a version XLA leaves the newer features off
_DRIVER = "12.9.0"
_TARGET_PROTO = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads_per_sm}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_per_sm}
  shared_memory_per_block_optin: {shared_per_block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {num_sms} fpus_per_core: {fpus_per_sm} clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth}000000000 l2_cache_size: {l2_bytes} device_memory_size: {memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  driver_version: "{driver}" runtime_version: "{driver}" compile_time_toolkit_version: "{driver}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def main(folder: Path, dump: Path, jobs: list[str]) -> None:
    """Compiles the jobs in order; an error of one leaves the others alone."""
    mosaic.name_by_content()
    mosaic.dump_no_constraints()
    for job in jobs:
        with _output_to(folder / f"{job}.log"):
            try:
                result = _compile(pickle.loads((folder / f"{job}.job").read_bytes()), dump)
            except KeyboardInterrupt:
                raise
            except BaseException:  # whatever a user's build or the compiler raises is the result of this job
                result = traceback.format_exc()
        partial = folder / f"{job}.partial"
        partial.write_bytes(pickle.dumps(result))
        partial.rename(folder / f"{job}.result")
        print(job, flush=True)


def _compile(job: Job, dump: Path) -> CompiledProgram:
    program = job.build(*job.args, **job.kwargs)
    if not isinstance(program, Program):
        raise TypeError(f"{job.build.__qualname__} returned a {type(program).__name__}, not a Program")
    lowered = _lower(program, _device(job.target))
    kept = sorted(lowered._lowering.compile_args["kept_var_idx"])
    options = {name: program.compiler_options[name] for name in sorted(program.compiler_options)}
    file = job.cache / f"{_key(lowered.as_text(), job.target, options, kept)}.pickle" if job.cache else None
    if file and (found := _from_cache(file)):
        return found
    for left in dump.iterdir():
        # a Mosaic kernel is compiled once in this process: what was written of it serves later programs too
        if left.is_dir():  # of what the build itself ran on the CPU
            shutil.rmtree(left)
        elif left.name.startswith("module_") or left.suffix not in (".ptx", ".ll"):
            left.unlink()
    compiled = _read(lowered.compile(compiler_options=options or None), job.target, kept, dump)
    if file:
        _write_atomically(file, pickle.dumps(compiled))
    return compiled


def _lower(program: Program, device: Any) -> Any:
    """Traces and lowers with the card as the default device: that is where Mosaic takes the architecture from."""
    sharding = SingleDeviceSharding(device)  # with one of a mesh, which kernels' results lack, a layer is lowered twice

    def place(leaf: Any) -> Any:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    args, kwargs = jax.tree.map(place, (program.args, dict(program.kwargs)))
    with jax.default_device(device):
        traced = jax.jit(program.function, **program.jit_options).trace(*args, **kwargs)
        return traced.lower(lowering_platforms=("cuda",))


def _read(compiled: Any, target: Target, kept: list[int], dump: Path) -> CompiledProgram:
    executable, memory = read_executable(compiled.runtime_executable().serialize()), compiled.memory_analysis()
    reader = ThunkReader(executable, dump)
    thunks = reader.read(executable.thunks)
    names = {thunk.id: thunk.name for thunk in walk(thunks)}
    [before] = dump.glob("*.thunk_sequence.txt")
    after = next(dump.glob("*.thunk_sequence_after_thunk_passes.txt"), before)
    return CompiledProgram(
        target=target,
        thunks=thunks,
        thunk_text=before.read_text(),
        graphs=read_graphs(after.read_text(), names),
        graph_text=after.read_text(),
        kernels=reader.kernels,
        allocations=read_allocations(executable),
        parameters=read_parameters(executable, kept),
        outputs=read_outputs(executable),
        constants=read_constants(executable),
        memory=MemoryUse(
            arguments=memory.argument_size_in_bytes,
            outputs=memory.output_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
        ),
    )


@functools.cache
def _device(target: Target) -> Any:
    fields = {field.name: getattr(target, field.name) for field in dataclasses.fields(target)}
    major, minor = target.compute_capability
    proto = _TARGET_PROTO.format(**fields, major=major, minor=minor, driver=_DRIVER)
    name = hashlib.sha256(proto.encode()).hexdigest()  # topologies are kept by name
    topology = topologies.get_topology_desc(topology_name=name, platform="cuda", target_config=proto, topology="1x1x1")
    return topology.devices[0]


def _key(text: str, target: Target, options: dict[str, Any], kept: list[int]) -> str:
    """What decides the outcome: the program, the card, the compiler, and how its output is read here."""
    digest = hashlib.sha256(text.encode())
    versions = [
        f"{d.name} {d.version}" for d in importlib.metadata.distributions() if d.name in ("jax", "jaxlib", *PACKAGES)
    ]
    digest.update(repr((target, options, kept, sorted(versions))).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _from_cache(file: Path) -> CompiledProgram | None:
    """What was compiled before; a damaged file counts as none."""
    try:
        return dataclasses.replace(pickle.loads(file.read_bytes()), cached=True)
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        AttributeError,
        ImportError,
        IndexError,
        TypeError,
        ValueError,
    ):
        return None


def _write_atomically(file: Path, data: bytes) -> None:
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(file)
    except OSError as error:  # a program that cannot be kept is no reason to lose it
        print(f"{file} cannot be written: {error}", file=sys.stderr)


@contextlib.contextmanager
def _output_to(file: Path):
    """Sends what this process prints, also what its C++ parts print, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with file.open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(saved, start=1):
                os.dup2(copy, number)
                os.close(copy)


def _end_with_parent() -> None:
    """Asks Linux for a SIGTERM when the process that waits for the results has died."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    _end_with_parent()
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
