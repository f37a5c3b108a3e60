"""NVIDIA's assembler, run on PTX for what it reports: registers, spills, shared memory."""

from __future__ import annotations

import functools
import re
import subprocess

from jaxdecode.aot.program import PtxasReport
from jaxdecode.aot.toolchain import find_ptxas

_PROPERTIES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_TOO_NEW = re.compile(r"Unsupported \.version [\d.]+; current version is '([\d.]+)'")


@functools.cache  # most kernels of one program are also in the next
def run_ptxas(ptx: str, entry: str) -> PtxasReport:
    """Assembles `ptx` for the architecture it names and returns the report of one entry.

    The compiler may write a newer version of PTX than the assembler beside it reads, even for old cards whose
    instructions have not changed since; the assembler is then given the text as of its own version.

    Raises:
      RuntimeError: ptxas is missing or refuses the PTX.
    """
    run = _assemble(ptx, entry)
    if newer := _TOO_NEW.search(run.stderr):
        run = _assemble(re.sub(r"(?m)^\.version .*$", f".version {newer.group(1)}", ptx), entry)
    if run.returncode:
        raise RuntimeError(f"ptxas refuses {entry}:\n{run.stderr}")
    return parse_report(run.stderr, entry)


def _assemble(ptx: str, entry: str) -> subprocess.CompletedProcess[str]:
    binary, arch = find_ptxas(), re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    if binary is None or arch is None:
        raise RuntimeError("ptxas is not installed" if binary is None else f"the PTX of {entry} names no .target")
    command = [str(binary), "-v", f"-arch={arch.group(1)}", "-o", "/dev/null", "-"]
    return subprocess.run(command, input=ptx, capture_output=True, text=True, check=False)


def parse_report(text: str, entry: str) -> PtxasReport:
    """The numbers of one entry in the output of `ptxas -v`.

    Raises:
      RuntimeError: the output says nothing of the entry.
    """
    parts = re.split(r"Compiling entry function '([^']+)'", text)
    report = dict(zip(parts[1::2], parts[2::2], strict=True)).get(entry, "")
    frame, used = _PROPERTIES.search(report), re.search(r"Used (\d+) registers(.*)", report)
    if frame is None or used is None:
        raise RuntimeError(f"ptxas reports nothing of {entry}:\n{text}")
    shared = re.search(r"(\d+) bytes smem", used.group(2))
    barriers = re.search(r"used (\d+) barriers", used.group(2))
    stack, stores, loads = (int(number) for number in frame.groups())
    return PtxasReport(
        registers=int(used.group(1)),
        spill_store_bytes=stores,
        spill_load_bytes=loads,
        stack_bytes=stack,
        shared_bytes=int(shared.group(1)) if shared else 0,
        barriers=int(barriers.group(1)) if barriers else 0,
    )
