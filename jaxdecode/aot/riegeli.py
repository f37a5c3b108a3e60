"""Reader of the Riegeli record files in which XLA serialises executables.

A file is cut into blocks of 64 KiB, each led by a header of 24 bytes. What is left is a chain of chunks: a header of
40 bytes (hash, data size, data hash, type and number of records, decoded size) and the data. Chunks of type "r" hold
the records' sizes and the records, both plain or compressed with Snappy. The format is described in
github.com/google/riegeli, doc/riegeli_records_file_format.md.
"""

from __future__ import annotations

SIGNATURE = bytes.fromhex("83af70d10d884a3f")
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40


def read_records(data: bytes) -> list[bytes]:
    """All records of the file that begins at the first signature in `data`.

    Raises:
      ValueError: it is no such file, or it uses a chunk type or compression that XLA does not write.
    """
    start = data.find(SIGNATURE)
    if start < 0:
        raise ValueError("not a Riegeli file: no signature")
    stream = b"".join(data[at + _BLOCK_HEADER : at + _BLOCK] for at in range(start, len(data), _BLOCK))
    records, at = [], 0
    while at + _CHUNK_HEADER <= len(stream):
        size = int.from_bytes(stream[at + 8 : at + 16], "little")
        kind, count = stream[at + 24 : at + 25], int.from_bytes(stream[at + 25 : at + 32], "little")
        at += _CHUNK_HEADER
        if kind == b"r":
            records += _simple_chunk(stream[at : at + size], count)
        elif kind not in (b"s", b"m", b"p"):  # signature, metadata, padding
            raise ValueError(f"Riegeli chunk of type {kind!r}: only simple chunks can be read")
        at += size
    return records


def _simple_chunk(data: bytes, count: int) -> list[bytes]:
    from cramjam import snappy  # pyright: ignore[reportMissingImports]: of the extra `check`

    def unsnap(part: bytes) -> bytes:
        return bytes(snappy.decompress_raw(part))

    compression, length_at = data[:1], 1
    length, at = read_varint(data, length_at)
    sizes, values = data[at : at + length], data[at + length :]
    if compression == b"s":
        # each part is led by its decoded size, which Snappy then repeats
        sizes, values = (unsnap(part[read_varint(part, 0)[1] :]) for part in (sizes, values))
    elif compression != b"\0":
        raise ValueError(f"Riegeli compression {compression!r}: only none and Snappy can be read")
    records, size_at, value_at = [], 0, 0
    for _ in range(count):
        size, size_at = read_varint(sizes, size_at)
        records.append(values[value_at : value_at + size])
        value_at += size
    return records


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer and the place after it."""
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
