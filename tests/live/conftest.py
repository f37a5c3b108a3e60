"""Live comparisons: need $JAXDECODE_HF_PYTHON, the Python of an environment with torch, transformers and gguf."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from convert.hf_reference import PYTHON_VARIABLE

# What is compared here is the code that users run, optimised.
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("--xla_backend_optimization_level=0", "")

GGUF_VARIABLE = "JAXDECODE_SMOLLM2_GGUF"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def hf_python() -> str:
    if not os.environ.get(PYTHON_VARIABLE):
        pytest.skip(f"{PYTHON_VARIABLE} is not set")
    return str(Path(os.environ[PYTHON_VARIABLE]).absolute())


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file: the one named in $JAXDECODE_SMOLLM2_GGUF, else the demo's."""
    default = Path(__file__).resolve().parents[2] / ".cache" / "smollm2" / GGUF_NAME
    path = Path(os.environ.get(GGUF_VARIABLE) or default)
    if not path.exists():
        pytest.fail(f"{path} is missing: run `make weights`, or set {GGUF_VARIABLE}")
    return path
