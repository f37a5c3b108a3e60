"""XLA's serialised executables, read with the message definitions that the compiler itself carries.

XLA publishes no Python bindings for `GpuExecutableProto`. Its plugin, however, contains the definition of every message
as a serialised FileDescriptorProto, so that what is read here always fits the compiler that wrote it.
"""

from __future__ import annotations

import functools
import mmap
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from jaxdecode.aot.riegeli import SIGNATURE, read_records, read_varint
from jaxdecode.aot.toolchain import find_plugin

_EXECUTABLE = "xla/service/gpu/gpu_executable.proto", "xla.gpu.GpuExecutableProto"
_MANIFEST = "xla/util/split_proto/split_proto.proto", "xla.SplitProtoManifest"


def read_executable(serialized: bytes) -> Any:
    """The GpuExecutableProto in what `Executable.serialize()` returns.

    XLA writes a large message as a list of records: a manifest, fields that would be too large, and partial messages.

    Raises:
      ValueError: the bytes are not such an executable.
    """
    for record in read_records(serialized):
        if record.startswith(SIGNATURE):
            manifest_record, *parts = read_records(record)
            break
    else:
        raise ValueError("the serialised program holds no executable")
    manifest = _message(*_MANIFEST).FromString(manifest_record)
    executable = _message(*_EXECUTABLE)()
    for entry, part in zip(manifest.records, parts, strict=True):
        if entry.HasField("proto_merge_record"):
            executable.MergeFromString(part)
        elif len(path := entry.field_override_record.field_path) != 1:
            raise ValueError(f"a field of the executable was split off that cannot be put back: {path}")
        # what remains are whole top-level fields: the assembled code, of which we have the PTX
    return executable


@functools.cache
def _message(file: str, name: str) -> Any:
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(name))


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    library, pool, added = find_plugin(), descriptor_pool.DescriptorPool(), set()
    if library is None:
        raise RuntimeError("the compiler's plugin is not installed")

    def add(name: str, image: mmap.mmap) -> None:
        if name in added:
            return
        added.add(name)
        definition = _definition(image, name)
        for dependency in definition.dependency:
            add(dependency, image)
        pool.Add(definition)

    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
        for name, _ in (_EXECUTABLE, _MANIFEST):
            add(name, image)
    return pool


def _definition(image: mmap.mmap, name: str) -> descriptor_pb2.FileDescriptorProto:
    # field 1 of the message, its name, followed by field 2, the package
    start = image.find(b"\n" + bytes([len(name)]) + name.encode() + b"\x12")
    if start < 0:
        raise ValueError(f"the compiler's plugin does not define {name}")
    return descriptor_pb2.FileDescriptorProto.FromString(image[start : _definition_end(image, start)])


def _definition_end(image: mmap.mmap, start: int) -> int:
    """Where a FileDescriptorProto ends: no length is stored, so its fields are followed as far as they are its own."""
    fields = {field.number: field for field in descriptor_pb2.FileDescriptorProto.DESCRIPTOR.fields}
    end = start
    while True:
        window = image[end : end + 20]
        if not window.strip(b"\0"):
            return end
        tag, length = read_varint(window, 0)
        number, wire = tag >> 3, tag & 7
        if number not in fields or wire not in (0, 2) or (number == 1 and end != start):
            return end
        size, after = read_varint(window, length)
        end += after + (size if wire == 2 else 0)
