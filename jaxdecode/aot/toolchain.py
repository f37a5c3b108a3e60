"""Where the compiler is: XLA's CUDA plugin and NVIDIA's assembler, found without loading either."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

PACKAGES = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12", "protobuf", "cramjam")


def find_plugin() -> Path | None:
    """The library that holds XLA's compiler for NVIDIA cards, None if it is not installed."""
    return _in_package("jax_plugins", "xla_cuda12/xla_cuda_plugin.so")


def find_ptxas() -> Path | None:
    """ptxas of the nvidia-cuda-nvcc-cu12 package, else of the PATH; None if there is none."""
    on_path = shutil.which("ptxas")
    return _in_package("nvidia", "cuda_nvcc/bin/ptxas") or (Path(on_path) if on_path else None)


def missing_packages() -> list[str]:
    """The packages of the extra `check` that are not installed."""
    found = (
        importlib.util.find_spec("jax_cuda12_plugin"),
        find_plugin(),
        find_ptxas(),
        _in_package("google", "protobuf"),
        importlib.util.find_spec("cramjam"),
    )
    return [name for name, where in zip(PACKAGES, found, strict=True) if where is None]


def _in_package(package: str, file: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((Path(folder) / file for folder in folders if (Path(folder) / file).exists()), None)
