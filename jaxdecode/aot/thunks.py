"""XLA's executable message to our plain data: thunks, kernels, allocations, inputs, outputs, constants."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxdecode.aot import mosaic
from jaxdecode.aot.program import Allocation, Argument, Endpoint, GraphNode, Kernel, Launch, Slice, Thunk
from jaxdecode.aot.ptxas import run_ptxas

_SLICES = {"BufferAllocationSliceProto", "ShapedSliceProto", "NullableShapedSliceProto"}
_WRITTEN = {"destination", "dest", "output", "result", "results", "d", "aux", "filter_output", "workspace", "scratch"}
# of no use as text: what the kernels are made of
_OPAQUE = {"attributes", "opaque", "execution_state", "custom_kernel", "tma_metadata", "launch_dimensions"}
_TUPLE = "tuple"


class ThunkReader:
    """Reads the thunks of one executable, collecting the kernels they launch.

    Attributes:
      kernels: by key, filled by `read`.
    """

    def __init__(self, executable: Any, dump: Path):
        self.kernels: dict[str, Kernel] = {}
        self._dump = dump
        self._ptx = {
            entry: text
            for file in sorted(dump.glob("module_*.ptx"))
            for text in [file.read_text()]
            for entry in re.findall(r"\.entry\s+([\w$.]+)", text)
        }
        self._triton = {
            instruction.name
            for instruction in _instructions(executable)
            if instruction.opcode == "fusion" and b'"__triton' in instruction.backend_config
        }

    def read(self, messages: Any) -> tuple[Thunk, ...]:
        """A sequence of thunks and everything nested in it."""
        return tuple(self._thunk(message) for message in messages)

    def _thunk(self, message: Any) -> Thunk:
        info, field = message.thunk_info, _set_field(message)
        inner, kind = getattr(message, field), field.removesuffix("_thunk")
        kernel, target = None, ""
        arguments, children, attributes = self._fields(inner)
        if kind == "custom_call":
            target = inner.target_name
            if target == mosaic.CALL_TARGET:
                kernel, arguments = self._mosaic(inner, arguments)
        elif kind in ("custom_kernel", "kernel"):
            kernel, arguments = self._xla_kernel(inner, kind, info.profile_annotation)
        return Thunk(
            id=info.thunk_id,
            kind=kind,
            name=info.profile_annotation,
            kernel=kernel,
            target=target,
            arguments=tuple(arguments),
            children=children,
            attributes=attributes,
        )

    def _fields(self, message: Any) -> tuple[list[Argument], dict[str, tuple[Thunk, ...]], dict[str, Any]]:
        """Slices, nested sequences and plain values of a thunk, told apart by the types of its fields."""
        arguments: list[Argument] = []
        children: dict[str, tuple[Thunk, ...]] = {}
        attributes: dict[str, Any] = {}
        for field, value in message.ListFields():
            kind = field.message_type.name if field.message_type else ""
            name = re.sub(r"_(buffer|buffer_index|buffers|slice|slices)$", "", field.name)
            values = value if field.is_repeated else [value]
            if kind in _SLICES:
                arguments += _slices(name, values, field.is_repeated)
            elif kind == "ThunkSequenceProto":
                name = re.sub(r"_?thunks?(_sequence)?$", "", field.name) or "thunks"
                for index, sequence in enumerate(values):
                    children[f"{name}_{index}" if field.is_repeated else name] = self.read(sequence.thunks)
            elif kind == "ThunkProto":
                children["thunks"] = self.read(values)
            elif kind.endswith("CopyThunkProto"):
                more, _, attributes = self._fields(value)
                arguments += more
            elif kind and field.name not in _OPAQUE:
                attributes[name] = "".join(str(item) for item in values)
            elif field.name not in _OPAQUE:
                attributes[name] = list(value) if field.is_repeated else value
        return arguments, children, attributes

    def _mosaic(self, message: Any, buffers: list[Argument]) -> tuple[str, list[Argument]]:
        compiled = mosaic.find_kernel(message.attributes.attrs["kernel_hash"].str, self._dump)
        name = _entry(compiled.ptx)
        key = f"{name}@{compiled.module.rpartition('__')[2]}"
        self._add(Kernel, key, name, "mosaic", compiled.ptx, compiled.launch, len(compiled.buffers))
        results = {_range(buffer.slice) for buffer in buffers if buffer.name.startswith("result")}
        buffers = [_singular(buffer) for buffer in buffers]
        arguments = []
        for index, size in zip(compiled.buffers, compiled.by_value, strict=True):
            if index is None:
                arguments.append(Argument(name="descriptors", slice=None, by_value=size))
                continue
            buffer = buffers[index]
            written = _range(buffer.slice) in results
            arguments.append(Argument(name=buffer.name, slice=buffer.slice, written=written))
        return key, arguments
