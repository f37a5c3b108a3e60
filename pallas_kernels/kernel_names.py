"""Names of our kernels in profiles and compiled programs: the operation and its blocks, "gemv_n64_k128_stages4"."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"_([a-z]+)(\d+)")
_END = "_mosaic_gpu_kernel"  # what Mosaic adds


def kernel_name(op: str, **blocks: int) -> str:
    """The name of a kernel function; `blocks` by short names without digits."""
    return op + "".join(f"_{name}{size}" for name, size in blocks.items())


def read_kernel_name(name: str) -> tuple[str, dict[str, int]]:
    """The operation and the blocks in a name, as Mosaic passes it on or as `kernel_name` made it."""
    plain = name.removesuffix(_END)
    blocks = _BLOCK.findall(plain)
    return _BLOCK.sub("", plain), {block: int(size) for block, size in blocks}
