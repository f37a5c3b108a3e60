"""Where a compiled program keeps what: its allocations, inputs, outputs and constants."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from jaxdecode.aot.program import Allocation, Endpoint, Slice

# literals of these types hold numbers; of the others, which are all narrow, the bytes themselves
_NUMBERS = {
    "f32": "<f4",
    "f64": "<f8",
    "c64": "<f4",
    "c128": "<f8",
    "s32": "<i4",
    "s64": "<i8",
    "u32": "<u4",
    "u64": "<u8",
    "pred": "?",
}


def read_allocations(executable: Any) -> tuple[Allocation, ...]:
    """All allocations, in the order of their indices."""
    rows = sorted(executable.buffer_allocations.values, key=lambda row: row.index)
    return tuple(
        Allocation(
            index=row.index,
            size=row.size,
            role=_role(row),
            parameter=row.parameter_number if row.is_entry_computation_parameter else None,
            live_out=row.maybe_live_out,
            aliased=row.is_parameter_aliased_with_output,
        )
        for row in rows
    )


def read_parameters(executable: Any, kept: list[int]) -> tuple[Endpoint, ...]:
    """The program's inputs.

    Args:
      kept: per parameter of the compiled program its place among the caller's arguments.
    """
    where = {
        row.parameter_number: row.index
        for row in executable.buffer_allocations.values
        if row.is_entry_computation_parameter and not row.parameter_shape_index
    }
    shapes = executable.program_shape.parameters
    return tuple(
        Endpoint(index=kept[number], slice=_whole(where[number], shape)) for number, shape in enumerate(shapes)
    )


def read_outputs(executable: Any) -> tuple[Endpoint, ...]:
    """The program's results, in order.

    Raises:
      RuntimeError: a result is a tuple inside a tuple, which JAX never returns.
    """
    result = executable.program_shape.result
    is_tuple = _dtype(result) == "tuple"
    leaves = list(result.tuple_shapes) if is_tuple else [result]
    outputs = []
    for entry in executable.output_info_map:
        path = list(entry.shape_index.indexes)
        if len(path) > 1:
            raise RuntimeError(f"result {path} of the program is nested")
        if len(path) == is_tuple:  # the table of addresses of a tuple is no result of its own
            number = path[0] if path else 0
            where = _whole(entry.output_info.allocation_index, leaves[number])
            outputs.append(Endpoint(index=number, slice=where))
    return tuple(sorted(outputs, key=lambda output: output.index))


def read_constants(executable: Any) -> dict[int, bytes]:
    """The bytes of every constant by allocation.

    The executable names the allocation of each constant after the HLO instruction, which holds its value.

    Raises:
      RuntimeError: a constant's value is missing or does not fill its allocation.
    """
    sizes = {row.index: row.size for row in executable.buffer_allocations.values}
    literals = {
        "buffer_for_" + re.sub(r"[.-]", "_", instruction.name): instruction.literal
        for computation in executable.hlo_module_with_config.hlo_module.computations
        for instruction in computation.instructions
        if instruction.opcode == "constant"
    }
    constants = {}
    for constant in executable.constants:
        data = constant.content.data or _literal_bytes(literals.get(constant.symbol_name))
        if len(data) != sizes[constant.allocation_index]:
            raise RuntimeError(
                f"constant {constant.symbol_name} has {len(data)} bytes, its allocation "
                f"{sizes[constant.allocation_index]}"
            )
        constants[constant.allocation_index] = data
    return constants


def _role(row: Any) -> str:
    flags = {
        "parameter": row.is_entry_computation_parameter,
        "constant": row.is_constant,
        "local": row.is_thread_local,
        "output": row.maybe_live_out,
    }
    return next((role for role, flag in flags.items() if flag), "temporary")


def _whole(allocation: int, shape: Any) -> Slice:
    dtype, dims = _dtype(shape), tuple(shape.dimensions)
    written = re.search(r"\d+", dtype)
    bits = shape.layout.element_size_in_bits or (int(written.group()) if written else 8)
    return Slice(allocation=allocation, offset=0, size=-(-bits * math.prod(dims) // 8), dtype=dtype, shape=dims)


def _dtype(shape: Any) -> str:
    kinds = shape.DESCRIPTOR.fields_by_name["element_type"].enum_type.values_by_number
    return kinds[shape.element_type].name.lower()


def _literal_bytes(literal: Any) -> bytes:
    if literal is None:
        return b""
    dtype = _dtype(literal.shape)
    values = getattr(literal, f"{dtype}s")
    return np.array(values, _NUMBERS[dtype]).tobytes() if dtype in _NUMBERS else bytes(values)
