"""The thunks of XLA's executable message and the kernels they launch, as plain data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jaxdecode.aot import mosaic
from jaxdecode.aot.program import Argument, GraphNode, Kernel, Launch, Slice, Thunk
from jaxdecode.aot.ptxas import run_ptxas

_SLICES = {"BufferAllocationSliceProto", "ShapedSliceProto", "NullableShapedSliceProto"}
_WRITTEN = {"destination", "dest", "output", "result", "d", "y_or_dx", "workspace", "scratch", "temp"}
# of kernels and custom calls, what becomes fields of ours or is of no use as text
_OPAQUE = {"attributes", "opaque", "execution_state", "custom_kernel", "tma_metadata", "launch_dimensions", "written"}
_OPAQUE |= {"target_name", "api_version", "kernel_name", "shmem_bytes", "args_shape", "cluster_dim"}
_NODE = re.compile(r"^( *)(\d+): k(\w+)\s+\[")
_LABEL = re.compile(r"^ *(\w+(?: \d+)?):$")


class ThunkReader:
    """Reads the thunks of one executable, collecting the kernels they launch.

    Attributes:
      kernels: by key, filled by `read`.
    """

    def __init__(self, executable: Any, dump: Path):
        """Takes the executable message and the folder in which the compiler left the PTX."""
        self.kernels: dict[str, Kernel] = {}
        self._dump = dump
        texts = [file.read_text() for file in sorted(dump.glob("module_*.ptx"))]
        self._ptx = {entry: text for text in texts for entry in _entries(text)}
        self._triton = _triton_fusions(executable.hlo_module_with_config.hlo_module)

    def read(self, messages: Any) -> tuple[Thunk, ...]:
        """A sequence of ThunkProto with all that is nested in it."""
        return tuple(self._thunk(message) for message in messages)

    def _thunk(self, message: Any) -> Thunk:
        info = message.thunk_info
        [field] = [field.name for field, _ in message.ListFields() if field.name != "thunk_info"]
        body, kind, kernel, target = getattr(message, field), field.removesuffix("_thunk"), None, ""
        buffers, children, attributes = self._fields(body)
        arguments = buffers
        if kind in ("kernel", "custom_kernel"):
            kernel, arguments = self._xla_kernel(body, info.profile_annotation)
            buffers = [argument for argument in arguments if argument.slice is not None]
        elif kind == "custom_call":
            target = body.target_name
            if target == mosaic.CALL_TARGET:
                kernel, arguments = self._mosaic_kernel(body, buffers)
        return Thunk(
            id=info.thunk_id,
            kind=kind,
            name=info.profile_annotation,
            kernel=kernel,
            target=target,
            arguments=tuple(arguments),
            buffers=tuple(buffers),
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
            values = value if field.is_repeated else [value]
            if kind in _SLICES:
                arguments += _named_slices(field.name, values, field.is_repeated)
            elif kind == "ThunkSequenceProto":
                name = re.sub(r"_?thunks?(_sequence)?$", "", field.name) or "thunks"
                for index, sequence in enumerate(values):
                    children[f"{name}_{index}" if field.is_repeated else name] = self.read(sequence.thunks)
            elif kind == "ThunkProto":
                children["thunks"] = self.read(values)
            elif kind == "CopyThunkProto":
                arguments, children, attributes = self._fields(value)
            elif field.name not in _OPAQUE:
                plain = [str(item) if kind else item for item in values]
                attributes[field.name] = plain if field.is_repeated else plain[0]
        return arguments, children, attributes

    def _xla_kernel(self, message: Any, instruction: str) -> tuple[str, list[Argument]]:
        custom = message.custom_kernel if hasattr(message, "custom_kernel") else None
        name = custom.kernel_spec.kernel_name if custom else message.kernel_name
        library = custom is not None and custom.kernel_spec.HasField("in_process_symbol")
        if name not in self._ptx and not library:
            raise RuntimeError(f"the compiler wrote no PTX for the kernel {name}")
        blocks, threads = (
            (custom.block_dims, custom.thread_dims)
            if custom
            else (message.launch_dimensions.block_counts, message.launch_dimensions.thread_counts_per_block)
        )
        cluster = _xyz((custom or message).cluster_dim)
        launch = Launch(
            grid=_xyz(blocks),
            block=_xyz(threads),
            cluster=cluster if max(cluster) > 1 else None,
            shared_bytes=custom.shared_memory_bytes if custom else message.shmem_bytes,
        )
        zeroed, descriptors = set(message.zeroed_output_buffer_indices), message.tma_metadata.arg_index_to_tma_info
        arguments = [
            Argument(name=f"arg_{index}", slice=_slice(buffer), written=written, zeroed=index in zeroed)
            for index, (buffer, written) in enumerate(zip(message.args, message.written, strict=True))
        ]
        if descriptors:
            raise RuntimeError(f"kernel {name} takes TMA descriptors, which cannot be read yet")
        if custom:
            arguments = _packed(arguments, custom.kernel_spec.kernel_args_packing_spec)
        kind = "library" if library else "triton" if instruction in self._triton else "xla"
        self._add(key=name, name=name, kind=kind, ptx="" if library else self._ptx[name], launch=launch)
        return name, self._fit(name, arguments)

    def _mosaic_kernel(self, message: Any, buffers: list[Argument]) -> tuple[str, list[Argument]]:
        compiled = mosaic.find_kernel(message.attributes.attrs["kernel_hash"].str, self._dump)
        [name] = _entries(compiled.ptx)
        results = {_place(buffer.slice) for buffer in buffers if buffer.written}
        arguments = []
        for index, size in zip(compiled.buffers, compiled.by_value, strict=True):
            if index is None:
                arguments.append(Argument(name="descriptors", slice=None, by_value=size))
            else:
                buffer = buffers[index]
                # a donated operand and its result are two buffers of the call in one place
                written = _place(buffer.slice) in results
                arguments.append(Argument(name=buffer.name, slice=buffer.slice, written=written))
        key = f"{name}@{compiled.module.rpartition('__')[2]}"
        self._add(key=key, name=name, kind="mosaic", ptx=compiled.ptx, launch=compiled.launch)
        return key, self._fit(key, arguments)

    def _add(self, *, key: str, name: str, kind: str, ptx: str, launch: Launch) -> None:
        known = self.kernels.get(key)
        if known is None:
            report = run_ptxas(ptx, name) if ptx else None
            self.kernels[key] = Kernel(key=key, name=name, kind=kind, ptx=ptx, launch=launch, report=report)
        elif known.launch != launch:
            raise RuntimeError(f"kernel {key} is launched in two ways: {known.launch} and {launch}")

    def _fit(self, key: str, arguments: list[Argument]) -> list[Argument]:
        kernel = self.kernels[key]
        expected = _parameters(kernel.ptx, kernel.name)
        if kernel.ptx and len(arguments) != expected:
            raise RuntimeError(f"kernel {key} has {expected} parameters, its launch {len(arguments)} arguments")
        return arguments


def _triton_fusions(module: Any) -> set[str]:
    """The fusions that XLA has written through Triton, by their configuration: in place, or shared by several."""
    found = set()
    for instruction in (instruction for part in module.computations for instruction in part.instructions):
        config = instruction.backend_config
        if instruction.HasField("backend_config_payload"):
            config = module.payloads[instruction.backend_config_payload.id]
        if instruction.opcode == "fusion" and b'"kind":"__triton' in config:
            found.add(instruction.name)
    return found


def read_graphs(text: str, names: dict[int, str]) -> tuple[GraphNode, ...]:
    """The tree in XLA's print of a thunk sequence: depth is indentation, a line such as "body:" names what follows.

    Args:
      names: the HLO instruction of each thunk.
    """
    root: dict[str, list] = {}
    stack: list[tuple[int, dict[str, list]]] = [(-1, root)]
    labels: dict[int, str] = {}
    label = "thunks"
    for line in text.splitlines():
        if named := _LABEL.match(line):
            label = named.group(1).replace(" ", "_")
        elif node := _NODE.match(line):
            depth, number = len(node.group(1)), int(node.group(2))
            while stack[-1][0] >= depth:
                stack.pop()
            parent = stack[-1][1]
            if label != "thunks":
                labels[id(parent)], label = label, "thunks"
            children: dict[str, list] = {}
            kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", node.group(3)).lower()
            parent.setdefault(labels.get(id(parent), "thunks"), []).append((number, kind, children))
            stack.append((depth, children))
    return _nodes(root.get("thunks", []), names)


def _nodes(rows: list, names: dict[int, str]) -> tuple[GraphNode, ...]:
    return tuple(
        GraphNode(
            id=number,
            kind=kind,
            name=names.get(number, ""),
            children={label: _nodes(nested, names) for label, nested in children.items()},
        )
        for number, kind, children in rows
    )


def _named_slices(field: str, messages: Any, repeated: bool) -> list[Argument]:
    name = re.sub(r"_buffer(_index)?$", "", field)
    name = name.removesuffix("s") if repeated else name
    return [
        Argument(name=f"{name}_{index}" if repeated else name, slice=_slice(message), written=name in _WRITTEN)
        for index, message in enumerate(messages)
    ]


def _slice(message: Any) -> Slice | None:
    """The plain form of any of XLA's three messages for a slice; None for a null one."""
    shape = None
    if message.DESCRIPTOR.name == "NullableShapedSliceProto":
        if not message.HasField("shaped_slice"):
            return None
        message = message.shaped_slice
    if message.DESCRIPTOR.name == "ShapedSliceProto":
        shape, message = tuple(message.shape.dimensions), message.slice
    kinds = message.DESCRIPTOR.fields_by_name["element_type"].enum_type.values_by_number
    dtype = kinds[message.element_type].name.lower() if message.element_type else ""
    return Slice(
        allocation=message.buffer_allocation_index, offset=message.offset, size=message.size, dtype=dtype, shape=shape
    )


def _packed(arguments: list[Argument], spec: Any) -> list[Argument]:
    """The kernel's parameters: addresses of the thunk's buffers, or constant bytes."""
    if not spec.kernel_arguments:
        return arguments
    packed = []
    for index, parameter in enumerate(spec.kernel_arguments):
        if parameter.relocations:
            [relocation] = parameter.relocations
            packed.append(arguments[relocation.argument_index])
        else:
            packed.append(Argument(name=f"constant_{index}", slice=None, value=bytes(parameter.data)))
    return packed


def _place(at: Slice | None) -> tuple[int, int, int] | None:
    return (at.allocation, at.offset, at.size) if at else None


def _xyz(message: Any) -> tuple[int, int, int]:
    # a dimension that is not written is 0 on the wire and 1 in meaning
    sides = message.coordinates
    return max(sides.x, 1), max(sides.y, 1), max(sides.z, 1)


def _entries(ptx: str) -> list[str]:
    return re.findall(r"^\.visible \.entry\s+([\w$.]+)", ptx, re.MULTILINE)


def _parameters(ptx: str, entry: str) -> int:
    signature = re.search(rf"\.entry\s+{re.escape(entry)}\s*\((.*?)\)", ptx, re.DOTALL)
    return signature.group(1).count(".param") if signature else 0
