"""Pallas Mosaic GPU kernels in a compiled program: which PTX, which launch, which parameter is which buffer.

How one appears (JAX 0.12, XLA as shipped with it):

- In the HLO and among the thunks it is a custom call to `mosaic_gpu_v2`. Its attributes hold the kernel as MLIR
  bytecode (`module`) and the SHA-256 of that (`kernel_hash`); its buffers are the operands, then the results. Nothing
  else is said: no grid, no block, no PTX. XLA compiles the module when it makes the executable, once per hash.
- `MOSAIC_GPU_DUMP_TO` makes it write, per module, PTX and the LLVM IR of the host function that prepares a launch.
  Files are named by the module's symbol and a counter. The symbol is the Python function's name, so two kernels of one
  name cannot be told apart; `name_by_content` therefore adds a hash of the module's text before it is handed on.
- The host function ends in one call of `mosaic_gpu_build_kernel_spec`: token, grid, cluster (zeros if none), block,
  dynamic shared memory, a flag, the number of parameters, the table of their addresses, the table of their sizes.
- The kernel's parameters stand in the order in which its body first uses them, *not* in that of the buffers: a kernel
  that initialises its pipeline with the output has the output first. The table of addresses says which buffer each
  parameter is. A buffer the body never touches has no parameter.
- From sm_90 on buffers that are copied by TMA are not parameters; their descriptors are, together, one parameter
  passed by value (its size in the table is not 0), which the host fills with `mosaic_gpu_init_tma_desc`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

from jaxdecode.aot.program import Launch

CALL_TARGET = "mosaic_gpu_v2"
_names: dict[bytes, str] = {}  # kernel hash: the name of its module
_kernels: dict[str, MosaicKernel] = {}  # by name of the module; XLA compiles each only once in a process


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicKernel:
    """One compiled Mosaic kernel.

    Attributes:
      module: the name of its module, unique by content.
      buffers: per parameter the buffer it is (operands, then results), None if it is passed by value.
      by_value: per parameter its bytes if passed by value, else 0.
    """

    module: str
    ptx: str
    launch: Launch
    buffers: tuple[int | None, ...]
    by_value: tuple[int, ...]


def name_by_content() -> None:
    """From now on in this process every Mosaic module is named after its function and its content."""
    from jax.experimental.mosaic.gpu import core
    from jaxlib.mlir import ir

    lower = core._mosaic_gpu_lowering_rule

    def lower_named(ctx, *args, module, **options):
        attributes, known = module.operation.attributes, set(core.KNOWN_KERNELS)
        # the name under which JAX dumps its own stages counts the calls: it is not content
        text = re.sub(r'mosaic_gpu\.dump_basename = "[^"]*"', "", str(module))
        name = f"{attributes['sym_name'].value}__{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        attributes["sym_name"] = ir.StringAttr.get(name)
        results = lower(ctx, *args, module=module, **options)
        for kernel_hash in set(core.KNOWN_KERNELS) - known:
            _names[kernel_hash] = name
        return results

    core._mosaic_gpu_lowering_rule = lower_named


def dump_no_constraints() -> None:
    """Spares every kernel a third of its lowering: the printing of its layout constraints, which nobody reads."""
    from jax.experimental.mosaic.gpu import constraints

    constraints.ConstraintSystem.__str__ = lambda self: "not printed"


def find_kernel(kernel_hash: bytes, dump: Path) -> MosaicKernel:
    """The kernel of a custom call, from what was dumped when it was compiled, in this job or an earlier one.

    Raises:
      RuntimeError: nothing was dumped for it, or its host function is not of the form described above.
    """
    module = _names[kernel_hash]
    if module not in _kernels:
        found = sorted(dump.glob(f"{module}_*.ptx"))
        if not found:
            raise RuntimeError(f"the compiler wrote no PTX for the Mosaic kernel {module}")
        launch, buffers, by_value = read_host(found[0].with_suffix(".ll").read_text())
        _kernels[module] = MosaicKernel(
            module=module, ptx=found[0].read_text(), launch=launch, buffers=buffers, by_value=by_value
        )
    return _kernels[module]


def read_host(text: str) -> tuple[Launch, tuple[int | None, ...], tuple[int, ...]]:
    """Launch and parameters in the LLVM IR of a host function.

    Returns:
      The launch; per parameter its buffer, None if passed by value; per parameter its bytes if passed by value.

    Raises:
      RuntimeError: it is not of the form described above.
    """
    call = re.search(r"call void @mosaic_gpu_build_kernel_spec\(([^)]*)\)", text)
    table = re.search(r"^define void @\w+\(ptr %\w+, ptr (%\w+)\)", text, re.MULTILINE)
    if call is None or table is None:
        raise RuntimeError("the host function of a Mosaic kernel does not launch it the way it is known to")
    words = [word.split()[-1] for word in call.group(1).split(",")]
    numbers, addresses, sizes = [int(word) for word in words[1:13]], words[13], words[14]
    at = re.findall(r"(%\w+) = getelementptr [^%]*(%\w+), (?:i32 0, )?i32 (\d+)$", text, re.MULTILINE)
    element = {(base, int(index)): name for name, base, index in at}
    stored = {where: what for what, where in re.findall(r"store \w+ ([%\w]+), ptr (%\w+)", text)}
    loaded = dict(re.findall(r"(%\w+) = load ptr, ptr (%\w+)", text))
    entry = {name: index for (base, index), name in element.items() if base == table.group(1)} | {table.group(1): 0}
    buffers, by_value = [], []
    for parameter in range(numbers[11]):
        size = int(stored[element[sizes, parameter]])
        value = stored[element[addresses, parameter]]
        buffer = None if size else entry.get(loaded.get(stored.get(value, ""), ""))
        if not size and buffer is None:
            raise RuntimeError(f"parameter {parameter} of a Mosaic kernel is none of the call's buffers")
        buffers.append(buffer)
        by_value.append(size)
    return _launch(*numbers[:10]), tuple(buffers), tuple(by_value)


def _launch(gx: int, gy: int, gz: int, cx: int, cy: int, cz: int, bx: int, by: int, bz: int, shared: int) -> Launch:
    return Launch(grid=(gx, gy, gz), block=(bx, by, bz), cluster=(cx, cy, cz) if cx else None, shared_bytes=shared)
